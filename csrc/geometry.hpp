// What becomes of an image's size: crops, output sizes, patch grids and position ids. Integers only, no pixels.
#pragma once

#include <cstdint>
#include <vector>

namespace idefics2 {

struct Size {
    int64_t height;
    int64_t width;
};

struct Box {
    int64_t top;
    int64_t left;
    Size size;
};

// Where patch i of `length` stands on its side, as a fraction that is then sorted into `positions_per_side` equal buckets. Both formulas
// run in float32 and their rounding moves patches across borders: the exact i * positions_per_side / length is neither. Up to 70 patches
// on 70 positions they differ at (length, i) = (49, 28), (49, 42), (58, 29).
enum class PositionRule {
    transformers_5,     // i * (1 / length), at most 1 - 1e-6
    transformers_4_40,  // torch.arange(0, 1 - 1e-6, 1 / length), the formula when the released model was trained; here with the rounding
                        // that torch.arange has on vectors of eight floats (AVX2), since it depends on their width
};

// Hugging Face's `get_resize_output_image_size`, to the bit: the longer side is cut to `longest_edge`, the other follows by
// double division and truncation, then each side is raised to `shortest_edge` (a clamp: it may change the aspect ratio).
Size output_size(Size image, int64_t shortest_edge, int64_t longest_edge);

// The whole image, or for a split its quarters cut at floor(height / 2) and floor(width / 2) (top left, top right, bottom left,
// bottom right) and then the whole. Throws where a side is too short to be cut.
std::vector<Box> crop_boxes(Size image, bool split);

// Full patches only: rows and columns of pixels that do not fill a patch are dropped. Throws where none is full.
Size patch_grid(Size image, int64_t patch_size);

// The bucket, in 0 .. positions_per_side - 1, of each of `length` patches along a side. `length` may exceed `positions_per_side`.
std::vector<int64_t> side_positions(int64_t length, int64_t positions_per_side, PositionRule rule);

// The rows of the position table, row bucket * positions_per_side + column bucket, of a grid's patches in row-major order.
std::vector<int64_t> grid_positions(Size grid, int64_t positions_per_side, PositionRule rule);

}  // namespace idefics2
