// How the horizontal passes with vectors read a row: in loads of 16 bytes, each with four pixels of a window.
#pragma once

#include <vector>

#include "resample.hpp"

namespace idefics2 {

constexpr int64_t kPixelsPerLoad = 4;    // of RGB they are 12 of the 16 bytes
constexpr int64_t kOutputsPerStore = 4;  // and so it is with the 16 bytes of a store

// Neighbouring outputs, whole stores of them: past the last output of the row it is made again.
struct Stretch {
    int64_t taps = 0;              // of every window: its own, and zeros
    int64_t skipped = 0;           // bytes of a load before its pixels
    std::vector<int64_t> offsets;  // of each window's first load in the row, in bytes
    std::vector<int32_t> weights;  // of each window, `taps` of them

    int64_t loads() const { return (taps + kPixelsPerLoad - 1) / kPixelsPerLoad; }
};

// All outputs of a row in two stretches. Near its end a load must not begin at a window's first pixel, for it would pass the end: in the
// second stretch windows begin earlier, and RGB fills the last 12 bytes of a load and not the first.
struct Stretches {
    Stretch start, end;
};

// `granule`, 2 or 4: the first stretch's taps are a multiple of it. Returns false where the row is too short for such loads.
bool plan_stretches(const Taps& taps, int channels, int64_t granule, Stretches& planned);

}  // namespace idefics2
