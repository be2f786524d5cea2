// The Python module idefics2_fast._C. std::invalid_argument arrives in Python as ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "geometry.hpp"

namespace py = pybind11;
using namespace idefics2;

namespace {

PositionRule rule_of(const std::string& name) {
    if (name == "transformers-5") return PositionRule::transformers_5;
    if (name == "transformers-4.40") return PositionRule::transformers_4_40;
    throw std::invalid_argument("position_ids is '" + name + "', expected 'transformers-5' or 'transformers-4.40'");
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

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "Integer geometry of images: no pixels. Sizes are (height, width). Bad values raise ValueError.";
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
}
