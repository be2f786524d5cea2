#include "pack.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "pool.hpp"

namespace idefics2 {
namespace {

// Rows of patches that one thread takes at once: the rows of pixels that two bands share are resized twice.
constexpr int64_t kLeastBand = 4;
constexpr int64_t kBandsPerThread = 4;

struct Band {
    size_t crop;
    int64_t first, last;
};

std::string text(const Box& box) {
    return std::to_string(box.size.height) + "x" + std::to_string(box.size.width) + " at (" + std::to_string(box.top) + ", " +
           std::to_string(box.left) + ")";
}

void require_inside(const Source& source, const Crop& crop) {
    const Box& box = crop.box;
    const auto fits = [](int64_t start, int64_t length, int64_t whole) { return start >= 0 && length >= 1 && start <= whole - length; };
    if (!fits(box.top, box.size.height, source.size.height) || !fits(box.left, box.size.width, source.size.width))
        throw std::invalid_argument("the crop of " + text(box) + " does not lie within the image of " + std::to_string(source.size.height) +
                                    "x" + std::to_string(source.size.width) + " pixels (height x width)");
    if (crop.size.height < 1 || crop.size.width < 1)
        throw std::invalid_argument("the size to resize to is " + std::to_string(crop.size.height) + "x" +
                                    std::to_string(crop.size.width) + ", expected 1x1 at least");
}

std::vector<Band> bands(const std::vector<int64_t>& rows, int threads) {
    int64_t total = 0;
    for (const int64_t of_crop : rows) total += of_crop;
    const int64_t wanted = threads > 1 ? kBandsPerThread * threads : 1;
    const int64_t length = std::max(kLeastBand, (total + wanted - 1) / wanted);
    std::vector<Band> all;
    for (size_t crop = 0; crop < rows.size(); ++crop)
        for (int64_t first = 0; first < rows[crop]; first += length) all.push_back({crop, first, std::min(first + length, rows[crop])});
    return all;
}

// Hugging Face's steps: x / 255 in double, rounded to float, minus 0.5, over 0.5.
float normalised(int byte) { return (static_cast<float>(byte * (1 / 255.0)) - 0.5f) / 0.5f; }

uint32_t bits(float value) {
    uint32_t as_integer;
    std::memcpy(&as_integer, &value, sizeof value);
    return as_integer;
}

// Rounded to the nearest, ties to even.
uint16_t bfloat16(float value) { return static_cast<uint16_t>((bits(value) + 0x7fff + (bits(value) >> 16 & 1)) >> 16); }

bool is_normalised(const uint8_t* table, int64_t value_bytes) {
    if (!table || value_bytes == 1) return false;
    for (int byte = 0; byte < 256; ++byte) {
        const uint32_t wide = bits(normalised(byte));
        const uint16_t narrow = bfloat16(normalised(byte));
        const void* expected = value_bytes == 4 ? static_cast<const void*>(&wide) : &narrow;
        if (std::memcmp(table + byte * value_bytes, expected, value_bytes) != 0) return false;
    }
    return true;
}

// Bytes of a whole buffer from which on they are better written past the caches.
constexpr int64_t kLarge = 1 << 20;

// A strip of patches: a few bytes straight into place, or values and many bytes by way of a few patches' bytes.
void write_patches(const Kernels& with, const std::vector<const uint8_t*>& strip, int channels, int64_t columns, const Values& values, bool large, uint8_t* out) {
    if (!values.table && !(large && with.copy)) return with.cut(strip.data(), channels, columns, out);
    constexpr int64_t kAtOnce = 8;
    alignas(64) uint8_t bytes[kAtOnce * kPatchValues];
    for (int64_t column = 0; column < columns; column += kAtOnce) {
        const int64_t count = std::min(kAtOnce, columns - column);
        const uint8_t* rows[kPatchSide];
        for (int64_t y = 0; y < kPatchSide; ++y) rows[y] = strip[y] + column * kPatchSide * channels;
        with.cut(rows, channels, count, bytes);
        uint8_t* to = out + column * kPatchValues * values.bytes;
        if (values.table) {
            with.convert(bytes, count * kPatchValues, to, values);
        } else {
            with.copy(bytes, count * kPatchValues, to);
        }
    }
}

}  // namespace

void pack_patches(const Source& source, const std::vector<Crop>& crops, const PatchBuffer& out, PassOrder order, int threads) {
    std::vector<Size> grids;
    std::vector<int64_t> firsts, rows;
    int64_t patches = 0;
    for (const Crop& crop : crops) {
        require_inside(source, crop);
        grids.push_back(patch_grid(crop.size, kPatchSide));
        firsts.push_back(patches);
        rows.push_back(grids.back().height);
        patches += grids.back().height * grids.back().width;
    }
    if (patches != out.patches)
        throw std::invalid_argument("out has " + std::to_string(out.patches) + " patches, expected " + std::to_string(patches));

    const Kernels& with = kernels();
    std::vector<std::unique_ptr<Resampler>> resamplers(crops.size());
    parallel_for(static_cast<int64_t>(crops.size()), threads, [&](int64_t i) {
        const Size needed{grids[i].height * kPatchSide, grids[i].width * kPatchSide};
        resamplers[i] = std::make_unique<Resampler>(crops[i].box.size, crops[i].size, needed, source.channels, order, with);
    });
    const Values values{out.value_bytes, out.table, is_normalised(out.table, out.value_bytes)};
    const std::vector<Band> all = bands(rows, threads);
    parallel_for(static_cast<int64_t>(all.size()), threads, [&](int64_t i) {
        const Band& band = all[i];
        const int64_t columns = grids[band.crop].width;
        const auto write = [&](int64_t y, const std::vector<const uint8_t*>& strip, int channels) {
            const int64_t patch = firsts[band.crop] + y / kPatchSide * columns;
            write_patches(with, strip, channels, columns, values, out.patches * kPatchValues >= kLarge, out.data + patch * kPatchValues * values.bytes);
        };
        resamplers[band.crop]->run(source.crop(crops[band.crop].box), band.first * kPatchSide, band.last * kPatchSide, write);
    });
}

void resize_planes(const Source& source, const Crop& crop, const PlaneBuffer& out, PassOrder order, int threads) {
    require_inside(source, crop);
    const Resampler resampler(crop.box.size, crop.size, crop.size, source.channels, order);
    const std::vector<Band> all = bands({(crop.size.height + kPatchSide - 1) / kPatchSide}, threads);
    parallel_for(static_cast<int64_t>(all.size()), threads, [&](int64_t i) {
        const int64_t last = std::min(all[i].last * kPatchSide, crop.size.height);
        resampler.run(source.crop(crop.box), all[i].first * kPatchSide, last, [&](int64_t y, const std::vector<const uint8_t*>& rows, int channels) {
            for (const uint8_t* row : rows) {
                for (int c = 0; c < 3; ++c) {
                    float* to = out.data + c * out.channel_stride + y * out.row_stride;
                    const float* table = out.table + 256 * c;
                    for (int64_t x = 0; x < crop.size.width; ++x) to[x] = table[row[x * channels + c]];
                }
                ++y;
            }
        });
    });
}

}  // namespace idefics2
