#include "geometry.hpp"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <stdexcept>
#include <string>

namespace idefics2 {
namespace {

std::string text(Size size) { return std::to_string(size.height) + "x" + std::to_string(size.width); }

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// float32 still tells neighbouring patches apart far beyond this, and torch.arange still gives one value per patch.
void require_count(const std::string& name, int64_t count) {
    constexpr int64_t most = 100'000;
    require(count >= 1 && count <= most, name + " is " + std::to_string(count) + ", expected 1 to " + std::to_string(most));
}

void require_pixels(Size image) {
    require(image.height >= 1 && image.width >= 1, "the image has " + text(image) + " pixels (height x width), expected 1x1 at least");
}

// torch.arange(start, end, step) in float32, as PyTorch computes it on a CPU with vectors of eight: the values of a whole pair of vectors
// are steps from their vector's rounded first value, those of the rest are rounded once.
std::vector<float> float_arange(double start, double end, double step) {
    constexpr int64_t lanes = 8;
    const auto count = static_cast<int64_t>(std::ceil((end - start) / step));
    const int64_t in_vectors = count / (2 * lanes) * (2 * lanes);
    std::vector<float> values;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t first = i < in_vectors ? i / lanes * lanes : i;
        const double base = static_cast<float>(start + step * static_cast<double>(first));
        values.push_back(static_cast<float>(base + static_cast<double>(i - first) * step));
    }
    return values;
}

std::vector<float> side_fractions(int64_t length, PositionRule rule) {
    const float step = 1.0f / static_cast<float>(length);  // a float32 tensor in both formulas
    if (rule == PositionRule::transformers_4_40) return float_arange(0.0, 1.0 - 1e-6, step);
    std::vector<float> fractions;
    for (int64_t i = 0; i < length; ++i) fractions.push_back(std::min(static_cast<float>(i) * step, static_cast<float>(1.0 - 1e-6)));
    return fractions;
}

}  // namespace

Size output_size(Size image, int64_t shortest_edge, int64_t longest_edge) {
    require_pixels(image);
    require(shortest_edge >= 1 && longest_edge >= shortest_edge,
            "shortest_edge " + std::to_string(shortest_edge) + " and longest_edge " + std::to_string(longest_edge) +
                " do not go together: expected 1 <= shortest_edge <= longest_edge");
    const double aspect = static_cast<double>(image.width) / static_cast<double>(image.height);
    const double longest = static_cast<double>(longest_edge);
    Size size = image;
    if (image.width >= image.height && image.width > longest_edge) {
        size = {static_cast<int64_t>(longest / aspect), longest_edge};
    } else if (image.height > image.width && image.height > longest_edge) {
        size = {longest_edge, static_cast<int64_t>(longest * aspect)};
    }
    return {std::max(size.height, shortest_edge), std::max(size.width, shortest_edge)};
}

std::vector<Box> crop_boxes(Size image, bool split) {
    require_pixels(image);
    const Box whole{0, 0, image};
    if (!split) return {whole};
    require(image.height >= 2 && image.width >= 2,
            "the image has " + text(image) + " pixels (height x width) and cannot be split in four: expected 2x2 at least");
    const Size near{image.height / 2, image.width / 2};
    const Size far{image.height - near.height, image.width - near.width};
    return {
        {0, 0, near},
        {0, near.width, {near.height, far.width}},
        {near.height, 0, {far.height, near.width}},
        {near.height, near.width, far},
        whole,
    };
}

Size patch_grid(Size image, int64_t patch_size) {
    require(patch_size >= 1, "patch_size is " + std::to_string(patch_size) + ", expected 1 or more");
    const Size grid{image.height / patch_size, image.width / patch_size};
    require(grid.height >= 1 && grid.width >= 1,
            "an image of " + text(image) + " pixels (height x width) has no full patch of " + text({patch_size, patch_size}));
    return grid;
}

std::vector<int64_t> side_positions(int64_t length, int64_t positions_per_side, PositionRule rule) {
    require_count("a side's number of patches", length);
    require_count("positions_per_side", positions_per_side);
    const double step = 1.0 / static_cast<double>(positions_per_side);
    const auto boundaries = float_arange(step, 1.0, step);
    std::vector<int64_t> buckets;
    for (const float fraction : side_fractions(length, rule)) {
        // torch.bucketize(right=True): how many boundaries are not above the fraction
        buckets.push_back(std::upper_bound(boundaries.begin(), boundaries.end(), fraction) - boundaries.begin());
    }
    assert(static_cast<int64_t>(buckets.size()) == length);
    return buckets;
}

std::vector<int64_t> grid_positions(Size grid, int64_t positions_per_side, PositionRule rule) {
    const auto rows = side_positions(grid.height, positions_per_side, rule);
    const auto columns = side_positions(grid.width, positions_per_side, rule);
    std::vector<int64_t> positions;
    positions.reserve(rows.size() * columns.size());
    for (const int64_t row : rows)
        for (const int64_t column : columns) positions.push_back(row * positions_per_side + column);
    return positions;
}

}  // namespace idefics2
