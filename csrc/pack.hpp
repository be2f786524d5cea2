// Resized pixels into a caller's buffer: as packed patches, or as planes.
#pragma once

#include <cstdint>
#include <vector>

#include "resample.hpp"

namespace idefics2 {

struct Crop {
    Box box;    // in the source
    Size size;  // after the resize
};

// Patches of 588 values in Conv2d's order (channel, row, column), one after another. A value is the byte itself where there is no table,
// else the table's entry for it: 256 entries of 1, 2 or 4 bytes.
struct PatchBuffer {
    uint8_t* data;
    int64_t patches;
    int64_t value_bytes;
    const uint8_t* table;
};

// Planes of floats, [3][height][width], their strides in floats. Byte v of channel c becomes table[256 * c + v].
struct PlaneBuffer {
    float* data;
    int64_t channel_stride;
    int64_t row_stride;
    const float* table;
};

// All full patches of each crop, crop after crop. Throws where the crops' patches are not just as many as the buffer's, where a box lies
// outside the source, or where a crop has no full patch; nothing is written then.
void pack_patches(const Source& source, const std::vector<Crop>& crops, const PatchBuffer& out, PassOrder order, int threads);

// One whole resized crop, partial patches and all.
void resize_planes(const Source& source, const Crop& crop, const PlaneBuffer& out, PassOrder order, int threads);

}  // namespace idefics2
