// The Python module idefics2_fast._C. std::invalid_argument arrives in Python as ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "geometry.hpp"
#include "pack.hpp"
#include "pool.hpp"

namespace py = pybind11;
using namespace idefics2;

namespace {

PositionRule rule_of(const std::string& name) {
    if (name == "transformers-5") return PositionRule::transformers_5;
    if (name == "transformers-4.40") return PositionRule::transformers_4_40;
    throw std::invalid_argument("position_ids is '" + name + "', expected 'transformers-5' or 'transformers-4.40'");
}

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

std::tuple<int64_t, int64_t> pair(Size size) { return {size.height, size.width}; }

std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> boxes(int64_t height, int64_t width, bool split) {
    std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> out;
    for (const Box& box : crop_boxes({height, width}, split)) out.emplace_back(box.top, box.left, box.size.height, box.size.width);
    return out;
}

py::array_t<int64_t> positions(int64_t rows, int64_t columns, int64_t positions_per_side, const std::string& position_ids) {
    const auto values = grid_positions({rows, columns}, positions_per_side, rule_of(position_ids));
    return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

PassOrder order_of(const std::string& name) {
    if (name == "horizontal-first") return PassOrder::horizontal_first;
    if (name == "shrinking-first") return PassOrder::shrinking_first;
    throw std::invalid_argument("pass_order is '" + name + "', expected 'horizontal-first' or 'shrinking-first'");
}

using Pixels = py::array_t<uint8_t, 0>;
using PlannedCrop = std::tuple<std::tuple<int64_t, int64_t, int64_t, int64_t>, std::tuple<int64_t, int64_t>>;

Source source_of(const Pixels& pixels) {
    require(pixels.ndim() == 3 && (pixels.shape(2) == 3 || pixels.shape(2) == 4), "pixels must have the shape [H, W, 3] or [H, W, 4]");
    require(pixels.shape(0) >= 1 && pixels.shape(1) >= 1, "pixels must have one pixel at least");
    const bool close_up = pixels.strides(2) == 1 && (pixels.strides(1) == pixels.shape(2) || pixels.shape(1) == 1);
    require(close_up, "each row's pixels must lie one after another");
    return {pixels.data(), pixels.strides(0), static_cast<int>(pixels.shape(2)), {pixels.shape(0), pixels.shape(1)}};
}

Crop crop_of(const PlannedCrop& planned) {
    const auto& [box, size] = planned;
    const auto& [top, left, height, width] = box;
    return {{top, left, {height, width}}, {std::get<0>(size), std::get<1>(size)}};
}

int threads_of(std::optional<int> threads) {
    require(!threads || *threads >= 1, "threads must be 1 or more");
    return threads ? *threads : num_threads();
}

void pack(const Pixels& pixels, const std::vector<PlannedCrop>& planned, Pixels out, const std::optional<Pixels>& table,
          const std::string& pass_order, std::optional<int> threads) {
    const Source source = source_of(pixels);
    std::vector<Crop> crops;
    for (const PlannedCrop& crop : planned) crops.push_back(crop_of(crop));
    const int64_t value_bytes = out.ndim() == 2 ? out.shape(1) / kPatchValues : 0;
    require(value_bytes == 1 || value_bytes == 2 || value_bytes == 4, "out must have 588 values of 1, 2 or 4 bytes in each row");
    require(out.shape(1) == value_bytes * kPatchValues && (out.flags() & py::array::c_style), "out must be contiguous, 588 values in each row");
    const bool fits = !table ? value_bytes == 1 : table->size() == 256 * value_bytes && (table->flags() & py::array::c_style);
    require(fits, "table must be 256 values as wide as out's; bytes alone need none");
    const PatchBuffer buffer{out.mutable_data(), out.shape(0), value_bytes, table ? table->data() : nullptr};
    const PassOrder order = order_of(pass_order);
    const int most = threads_of(threads);
    py::gil_scoped_release release;
    pack_patches(source, crops, buffer, order, most);
}

void planes(const Pixels& pixels, const PlannedCrop& planned, py::array_t<float, 0> out, const py::array_t<float, 0>& table,
            const std::string& pass_order, std::optional<int> threads) {
    const Source source = source_of(pixels);
    const Crop crop = crop_of(planned);
    constexpr py::ssize_t item = sizeof(float);
    require(out.ndim() == 3 && out.shape(0) == 3 && out.shape(1) == crop.size.height && out.shape(2) == crop.size.width,
            "out must have the shape [3, height, width] of the crop after the resize");
    require(out.strides(2) == item || out.shape(2) == 1, "each row of out must be contiguous");
    require(out.strides(0) % item == 0 && out.strides(1) % item == 0, "out's strides must be whole floats");
    require(table.ndim() == 2 && table.shape(0) == 3 && table.shape(1) == 256 && (table.flags() & py::array::c_style),
            "table must be contiguous and have the shape [3, 256]");
    const PlaneBuffer buffer{out.mutable_data(), out.strides(0) / item, out.strides(1) / item, table.data()};
    const PassOrder order = order_of(pass_order);
    const int most = threads_of(threads);
    py::gil_scoped_release release;
    resize_planes(source, crop, buffer, order, most);
}

// https://arrow.apache.org/docs/format/CDataInterface.html
struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void** buffers;
    ArrowArray** children;
    ArrowArray* dictionary;
    void (*release)(ArrowArray*);
    void* private_data;
};

// A view of the pixels that an Arrow array of 4-byte lists holds; it keeps the array alive.
Pixels arrow_pixels(const py::capsule& capsule, int64_t height, int64_t width) {
    const auto* array = static_cast<const ArrowArray*>(PyCapsule_GetPointer(capsule.ptr(), "arrow_array"));
    if (!array) throw py::error_already_set();
    require(array->release && array->n_children == 1 && array->length == height * width && array->offset == 0,
            "the Arrow array does not hold one list of bytes for each pixel");
    const ArrowArray* bytes = array->children[0];
    require(bytes->n_buffers == 2 && bytes->length == 4 * height * width && bytes->offset == 0, "the Arrow array's pixels are not 4 bytes each");
    Pixels view({height, width, int64_t{4}}, {4 * width, int64_t{4}, int64_t{1}}, static_cast<const uint8_t*>(bytes->buffers[1]), capsule);
    view.attr("flags").attr("writeable") = false;
    return view;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Images to patches. Sizes are (height, width). Bad values raise ValueError.";
    module.def(
        "output_size",
        [](int64_t height, int64_t width, int64_t shortest_edge, int64_t longest_edge) {
            return pair(output_size({height, width}, shortest_edge, longest_edge));
        },
        py::arg("height"), py::arg("width"), py::arg("shortest_edge"), py::arg("longest_edge"),
        "(height, width) after Hugging Face's resize rule.");
    module.def("crop_boxes", &boxes, py::arg("height"), py::arg("width"), py::arg("split"),
               "[(top, left, height, width)]: the whole image, or its four quarters and then the whole.");
    module.def(
        "patch_grid", [](int64_t height, int64_t width, int64_t patch_size) { return pair(patch_grid({height, width}, patch_size)); },
        py::arg("height"), py::arg("width"), py::arg("patch_size"), "(rows, columns) of full patches.");
    module.def(
        "grid_positions", &positions, py::arg("rows"), py::arg("columns"), py::arg("positions_per_side"), py::arg("position_ids"),
        "int64 [rows * columns]: each patch's row in the position table, by the formula 'transformers-5' or 'transformers-4.40'.");

    module.def("pack_patches", &pack, py::arg("pixels").noconvert(), py::arg("crops"), py::arg("out").noconvert(), py::arg("table").noconvert(), py::arg("pass_order"),
               py::arg("threads") = py::none(),
               "uint8 [H, W, 3 or 4] (rows any distance apart) to the full patches of each crop ((top, left, height, width), (height, width)\n"
               "after the resize), into out, uint8 [P, 588 * bytes of a value]. table: uint8 [256 * bytes], the value of each byte, or None.");
    module.def("resize_planes", &planes, py::arg("pixels").noconvert(), py::arg("crop"), py::arg("out").noconvert(), py::arg("table").noconvert(), py::arg("pass_order"),
               py::arg("threads") = py::none(),
               "uint8 [H, W, 3 or 4] to one whole resized crop, into out, float32 [3, height, width] with contiguous rows.\n"
               "table: float32 [3, 256], the value of each byte of each channel.");
    module.def("arrow_pixels", &arrow_pixels, py::arg("array"), py::arg("height"), py::arg("width"),
               "uint8 [height, width, 4], a read-only view of the capsule 'arrow_array' of a Pillow image.");
    module.def("num_threads", &num_threads, "Threads used where a call does not say: the CPUs this process may run on, until set.");
    module.def("set_num_threads", &set_num_threads, py::arg("threads"));
    module.def("simd", [] { return std::string(kernels().name); }, "The inner loops in use; the environment variable IDEFICS2_FAST_SIMD sets them.");
    module.def("simd_paths", &kernels_here, "The inner loops that this CPU runs, the fastest first.");
    module.def("use_simd", &use_kernels, py::arg("name"));
}
