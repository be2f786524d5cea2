// Fuzz target of csrc/: any sizes through the geometry, any bytes as a small image through the resampler and both writers.
//
// With clang it is a libFuzzer target, steered by coverage. Elsewhere its own main, below, feeds it random bytes.
// Buffers have the exact size that the contracts ask for, so that AddressSanitizer sees every byte too many.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "geometry.hpp"
#include "pack.hpp"
#include "resample.hpp"

using namespace idefics2;

namespace {

#define REQUIRE(condition)                                                              \
    do {                                                                                \
        if (!(condition)) {                                                             \
            std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                               \
        }                                                                               \
    } while (false)

// Numbers drawn from the fuzzer's bytes; zeros when they are used up.
class Input {
public:
    Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

    uint8_t byte() {
        if (left_ == 0) return 0;
        --left_;
        return *data_++;
    }

    int64_t up_to(int64_t least, int64_t most) { return least + static_cast<int64_t>(word() % static_cast<uint64_t>(most - least + 1)); }

    // Any number, those of images more often than others.
    int64_t number() {
        switch (byte() % 4) {
            case 0: return up_to(-2, 40);
            case 1: return up_to(1, 5000);
            case 2: return up_to(1, 1 << 20);
            default: return static_cast<int64_t>(word() << 32 | word());
        }
    }

    void fill(std::vector<uint8_t>& bytes) {
        uint8_t last = byte();
        for (uint8_t& value : bytes) value = left_ > 0 ? last = byte() : last = static_cast<uint8_t>(last * 37 + 11);
    }

private:
    uint64_t word() {
        uint64_t value = 0;
        for (int i = 0; i < 4; ++i) value = value << 8 | byte();
        return value;
    }

    const uint8_t* data_;
    size_t left_;
};

template <class Work>
bool refused(const Work& work) {
    try {
        work();
        return false;
    } catch (const std::invalid_argument&) {
        return true;
    }
}

void check_boxes(Size image, bool split) {
    std::vector<Box> boxes;
    if (refused([&] { boxes = crop_boxes(image, split); })) {
        REQUIRE(std::min(image.height, image.width) < (split ? 2 : 1));
        return;
    }
    REQUIRE(boxes.size() == (split ? 5u : 1u));
    const Box& whole = boxes.back();
    REQUIRE(whole.top == 0 && whole.left == 0 && whole.size.height == image.height && whole.size.width == image.width);
    for (const Box& box : boxes) {
        REQUIRE(box.size.height >= 1 && box.size.width >= 1 && box.top >= 0 && box.left >= 0);
        REQUIRE(box.top <= image.height - box.size.height && box.left <= image.width - box.size.width);
    }
    if (split) {
        REQUIRE(boxes[0].size.height + boxes[2].size.height == image.height && boxes[2].top == boxes[0].size.height);
        REQUIRE(boxes[0].size.width + boxes[1].size.width == image.width && boxes[1].left == boxes[0].size.width);
    }
}

void check_positions(Size grid, int64_t side, PositionRule rule) {
    std::vector<int64_t> positions;
    if (grid.height > 300 || grid.width > 300) {  // for time's sake one side alone
        refused([&] { positions = side_positions(grid.height, side, rule); });
        REQUIRE(std::is_sorted(positions.begin(), positions.end()));
        for (const int64_t position : positions) REQUIRE(position >= 0 && position < side);
        return;
    }
    if (refused([&] { positions = grid_positions(grid, side, rule); })) return;
    REQUIRE(static_cast<int64_t>(positions.size()) == grid.height * grid.width);
    for (const int64_t position : positions) REQUIRE(position >= 0 && position < side * side);
}

void fuzz_geometry(Input& input) {
    const Size image{input.number(), input.number()};
    const int64_t shortest = input.number(), longest = input.number(), patch = input.number();
    const int64_t side = input.byte() % 16 ? input.up_to(-1, 100) : input.number();
    check_boxes(image, input.byte() % 2);
    Size size{};
    if (refused([&] { size = output_size(image, shortest, longest); })) return;
    REQUIRE(size.height >= shortest && size.width >= shortest && std::max(size.height, size.width) <= std::max(longest, shortest));
    Size grid{};
    if (refused([&] { grid = patch_grid(size, patch); })) return;
    REQUIRE(grid.height >= 1 && grid.height <= size.height / patch && grid.width >= 1 && grid.width <= size.width / patch);
    check_positions(grid, side, input.byte() % 2 ? PositionRule::transformers_5 : PositionRule::transformers_4_40);
}

// Pixels that end with the allocation. Rows lie some bytes apart, or backwards.
struct Image {
    std::vector<uint8_t> bytes;
    Source source;

    explicit Image(Input& input) {
        const int64_t most = input.byte() % 8 ? 40 : 600;
        const Size size{input.up_to(1, most), input.up_to(1, most)};
        const int channels = static_cast<int>(input.up_to(3, 4));
        const int64_t row = size.width * channels, stride = row + input.up_to(0, 70) * (input.byte() % 2);
        bytes.resize(static_cast<size_t>((size.height - 1) * stride + row));
        input.fill(bytes);
        const bool backwards = input.byte() % 4 == 0;
        source = {bytes.data() + (backwards ? (size.height - 1) * stride : 0), backwards ? -stride : stride, channels, size};
    }
};

Crop some_crop(Input& input, Size image) {
    Crop crop{{0, 0, image}, image};
    if (input.byte() % 2) crop.box = {input.up_to(-1, image.height), input.up_to(-1, image.width), {input.number(), input.number()}};
    if (input.byte() % 2) crop.box = {input.up_to(0, image.height - 1), input.up_to(0, image.width - 1), {1, 1}};
    if (input.byte() % 2) crop.box.size = {image.height - crop.box.top, image.width - crop.box.left};
    if (input.byte() % 4) crop.size = {input.up_to(0, 90), input.up_to(0, 90)};
    return crop;
}

struct Run {
    Source source;
    std::vector<Crop> crops;
    PassOrder order;
    int threads;
};

std::vector<uint8_t> patches_of(const Run& run, int64_t patches, const std::vector<uint8_t>& table, bool& threw) {
    const int64_t value_bytes = table.empty() ? 1 : static_cast<int64_t>(table.size()) / 256;
    std::vector<uint8_t> out(static_cast<size_t>(patches * kPatchValues * value_bytes), 0xA5);
    const PatchBuffer buffer{out.data(), patches, value_bytes, table.empty() ? nullptr : table.data()};
    threw = refused([&] { pack_patches(run.source, run.crops, buffer, run.order, run.threads); });
    if (threw) REQUIRE(std::all_of(out.begin(), out.end(), [](uint8_t value) { return value == 0xA5; }));
    return out;
}

void fuzz_patches(const Run& run, int64_t extra_patches, const std::vector<uint8_t>& table) {
    int64_t patches = extra_patches;
    for (const Crop& crop : run.crops)
        refused([&] {
            const Size grid = patch_grid(crop.size, kPatchSide);
            patches += grid.height * grid.width;
        });
    std::vector<uint8_t> expected;
    bool expected_throw = false;
    const auto names = kernels_here();
    for (auto name = names.rbegin(); name != names.rend(); ++name) {  // the scalar loops come first
        bool threw = false;
        use_kernels(*name);
        const auto out = patches_of(run, patches, table, threw);
        if (name == names.rbegin()) {
            expected = out;
            expected_throw = threw;
        }
        REQUIRE(threw == expected_throw && out == expected);
    }
    REQUIRE(extra_patches == 0 || expected_throw);
}

void fuzz_planes(const Run& run, int64_t row_gap) {
    static const std::vector<float> table = [] {
        std::vector<float> values(3 * 256);
        for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
        return values;
    }();
    const Crop& crop = run.crops.front();
    const int64_t row = crop.size.width + row_gap;
    std::vector<float> expected;
    for (const std::string& name : kernels_here()) {
        use_kernels(name);
        std::vector<float> out(static_cast<size_t>(std::max<int64_t>(3 * crop.size.height * row - row_gap, 0)), -1.0f);
        if (refused([&] { resize_planes(run.source, crop, {out.data(), crop.size.height * row, row, table.data()}, run.order, run.threads); }))
            REQUIRE(std::all_of(out.begin(), out.end(), [](float value) { return value == -1.0f; }));
        for (size_t i = 0; i < out.size(); ++i) REQUIRE(static_cast<int64_t>(i) % row < crop.size.width || out[i] == -1.0f);
        REQUIRE(expected.empty() || out == expected);
        expected = out;
    }
}

// None, any values, or the normalised ones, which some loops compute: as float, or its upper half.
std::vector<uint8_t> some_table(Input& input) {
    constexpr size_t bytes[] = {0, 1, 2, 4, 2, 4};
    const size_t kind = input.byte() % 6;
    std::vector<uint8_t> table(256 * bytes[kind]);
    input.fill(table);
    for (int byte = 0; byte < 256 && kind >= 4; ++byte) {
        const float value = (static_cast<float>(byte * (1 / 255.0)) - 0.5f) / 0.5f;
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        if (kind == 4) bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        std::memcpy(table.data() + byte * bytes[kind], &bits, bytes[kind]);
    }
    return table;
}

void fuzz_run(Input& input) {
    const Image image(input);
    Run run{image.source, {}, input.byte() % 2 ? PassOrder::horizontal_first : PassOrder::shrinking_first, static_cast<int>(input.up_to(1, 3))};
    for (int64_t crops = input.up_to(1, 3); crops > 0; --crops) run.crops.push_back(some_crop(input, image.source.size));
    fuzz_patches(run, input.byte() % 8 ? 0 : 1, some_table(input));
    fuzz_planes(run, input.up_to(0, 9));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input input(data, size);
    input.byte() % 2 ? fuzz_geometry(input) : fuzz_run(input);
    return 0;
}

#ifdef WITH_MAIN
#include <chrono>
#include <random>

// Of libFuzzer's options it knows -max_total_time=SECONDS.
int main(int count, char** arguments) {
    using Clock = std::chrono::steady_clock;
    int seconds = 10;
    for (int i = 1; i < count; ++i) std::sscanf(arguments[i], "-max_total_time=%d", &seconds);
    const auto end = Clock::now() + std::chrono::seconds(seconds);
    std::mt19937_64 draw(0);
    int64_t runs = 0;
    for (; Clock::now() < end; ++runs) {
        std::vector<uint8_t> data(draw() % 600);
        for (uint8_t& value : data) value = static_cast<uint8_t>(draw());
        LLVMFuzzerTestOneInput(data.data(), data.size());
    }
    std::printf("%lld random inputs, nothing found\n", static_cast<long long>(runs));
}
#endif
