// The inner loops with AVX2. The target is set function by function: a header's inline functions compiled for AVX2 here could become the
// program's only copy of them, and stop a CPU without it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "stretches.hpp"

#define AVX2 __attribute__((target("avx2,fma")))

namespace idefics2 {
namespace {

constexpr char z = static_cast<char>(0x80);  // a shuffle's zero

// Two neighbouring weights as _mm256_madd_epi16 takes them: 16 bits each, the first one low. 22 bits do not fit, so there are two of these,
// the weights' upper 14 bits and their lower 8.
void push_pair(std::vector<int32_t>& pairs, int32_t first, int32_t second) {
    pairs.push_back(first >> 8 | (second >> 8) << 16);
    pairs.push_back((first & 0xff) | (second & 0xff) << 16);
}

// Running sums of eight outputs.
struct Sums {
    __m256i upper, lower;
};

AVX2 inline void add(Sums& sums, __m256i word_pairs, __m256i upper, __m256i lower) {
    sums.upper = _mm256_add_epi32(sums.upper, _mm256_madd_epi16(word_pairs, upper));
    sums.lower = _mm256_add_epi32(sums.lower, _mm256_madd_epi16(word_pairs, lower));
}

AVX2 inline Sums no_sums() { return {_mm256_setzero_si256(), _mm256_set1_epi32(1 << (kWeightBits - 1))}; }

// The values, not yet cut to a byte: the packing instructions do that.
AVX2 inline __m256i values(const Sums& sums) {
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_slli_epi32(sums.upper, 8), sums.lower), kWeightBits);
}

class Horizontal final : public HorizontalPass {
public:
    Horizontal(const Stretches& planned, int channels)
        : step_(kPixelsPerLoad * channels), parts_{Part(planned.start, channels), Part(planned.end, channels)} {}

    AVX2 void run(const uint8_t* const* in, uint8_t* const* out) const override {
        uint8_t* to[kBlock] = {out[0], out[1], out[2], out[3]};
        for (const Part& part : parts_) run_part(part, in, to);
    }

private:
    struct Part {
        int64_t pairs;
        std::vector<int64_t> offsets;
        std::vector<int32_t> weights;  // of each output and each pair: upper, lower
        __m128i near, far;             // the first two and the last two pixels of a load, as pairs of 16-bit words for R, G, B

        Part(const Stretch& stretch, int channels) : pairs(stretch.taps / 2), offsets(stretch.offsets) {
            for (size_t tap = 0; tap < stretch.weights.size(); tap += 2) push_pair(weights, stretch.weights[tap], stretch.weights[tap + 1]);
            near = mask(stretch.skipped, channels);
            far = mask(stretch.skipped + 2 * channels, channels);
        }

        static __m128i mask(int64_t first, int64_t channels) {
            const auto at = [&](int64_t x, int64_t c) { return static_cast<char>(first + x * channels + c); };
            return _mm_setr_epi8(at(0, 0), z, at(1, 0), z, at(0, 1), z, at(1, 1), z, at(0, 2), z, at(1, 2), z, z, z, z, z);
        }
    };

    AVX2 static __m256i load(const uint8_t* first, const uint8_t* second) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), _mm_loadu_si128(reinterpret_cast<const __m128i*>(second)), 1);
    }

    AVX2 void run_part(const Part& part, const uint8_t* const* in, uint8_t** out) const {
        const __m256i near = _mm256_broadcastsi128_si256(part.near), far = _mm256_broadcastsi128_si256(part.far);
        const __m256i close_up = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, z, z, z, z));
        const int32_t* weights = part.weights.data();
        for (size_t output = 0; output < part.offsets.size(); output += kOutputsPerStore) {
            __m256i top[kOutputsPerStore], bottom[kOutputsPerStore];  // rows 0 and 1, rows 2 and 3
            for (int i = 0; i < kOutputsPerStore; ++i) {
                int64_t at = part.offsets[output + i];
                Sums upper_rows = no_sums(), lower_rows = no_sums();
                for (int64_t pair = 0; pair < part.pairs; pair += 2, at += step_) {
                    const __m256i a = load(in[0] + at, in[1] + at), b = load(in[2] + at, in[3] + at);
                    const __m256i near_upper = _mm256_set1_epi32(weights[0]), near_lower = _mm256_set1_epi32(weights[1]);
                    add(upper_rows, _mm256_shuffle_epi8(a, near), near_upper, near_lower);
                    add(lower_rows, _mm256_shuffle_epi8(b, near), near_upper, near_lower);
                    weights += 2;
                    if (pair + 1 == part.pairs) break;
                    const __m256i far_upper = _mm256_set1_epi32(weights[0]), far_lower = _mm256_set1_epi32(weights[1]);
                    add(upper_rows, _mm256_shuffle_epi8(a, far), far_upper, far_lower);
                    add(lower_rows, _mm256_shuffle_epi8(b, far), far_upper, far_lower);
                    weights += 2;
                }
                top[i] = values(upper_rows);
                bottom[i] = values(lower_rows);
            }
            store(top, close_up, out[0], out[1]);
            store(bottom, close_up, out[2], out[3]);
            for (int row = 0; row < kBlock; ++row) out[row] += 3 * kOutputsPerStore;
        }
    }

    // Four outputs of two rows, a row to a half: 12 bytes and 4 more that the next store goes over.
    AVX2 static void store(const __m256i* outputs, __m256i close_up, uint8_t* first, uint8_t* second) {
        const __m256i left = _mm256_packus_epi32(outputs[0], outputs[1]), right = _mm256_packus_epi32(outputs[2], outputs[3]);
        const __m256i bytes = _mm256_shuffle_epi8(_mm256_packus_epi16(left, right), close_up);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(first), _mm256_castsi256_si128(bytes));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(second), _mm256_extracti128_si256(bytes, 1));
    }

    const int64_t step_;  // from a load to the next, in bytes
    const Part parts_[2];
};

class Vertical final : public VerticalPass {
public:
    static constexpr int64_t kBytes = 32;

    explicit Vertical(const Taps& taps) : taps_(taps), plain_(scalar_kernels.vertical(taps)) {
        for (int64_t output = 0; output < taps.outputs(); ++output) {
            begins_.push_back(static_cast<int64_t>(weights_.size()));
            const int32_t* weights = taps.of(output);
            const int64_t count = taps.count(output);
            for (int64_t tap = 0; tap < count; tap += 2) push_pair(weights_, weights[tap], tap + 1 < count ? weights[tap + 1] : 0);
        }
    }

    AVX2 void run(int64_t output, const uint8_t* const* in, int64_t bytes, uint8_t* out) const override {
        if (bytes < kBytes) return plain_->run(output, in, bytes, out);
        const int32_t* weights = weights_.data() + begins_[output];
        const int64_t taps = taps_.count(output);
        for (int64_t at = 0; at + kBytes <= bytes; at += kBytes) run_bytes(weights, taps, in, at, out + at);
        if (bytes % kBytes) run_bytes(weights, taps, in, bytes - kBytes, out + bytes - kBytes);
    }

private:
    AVX2 static void run_bytes(const int32_t* weights, int64_t taps, const uint8_t* const* in, int64_t at, uint8_t* out) {
        const __m256i zero = _mm256_setzero_si256();
        Sums sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int64_t tap = 0; tap < taps; tap += 2) {
            const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in[tap] + at));
            const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in[tap + 1] + at));
            const __m256i upper = _mm256_set1_epi32(weights[tap]), lower = _mm256_set1_epi32(weights[tap + 1]);
            const __m256i left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
            add(sums[0], _mm256_unpacklo_epi8(left, zero), upper, lower);
            add(sums[1], _mm256_unpackhi_epi8(left, zero), upper, lower);
            add(sums[2], _mm256_unpacklo_epi8(right, zero), upper, lower);
            add(sums[3], _mm256_unpackhi_epi8(right, zero), upper, lower);
        }
        const __m256i left = _mm256_packus_epi32(values(sums[0]), values(sums[1]));
        const __m256i right = _mm256_packus_epi32(values(sums[2]), values(sums[3]));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_packus_epi16(left, right));
    }

    const Taps& taps_;
    const std::unique_ptr<VerticalPass> plain_;  // for rows shorter than a vector
    std::vector<int64_t> begins_;
    std::vector<int32_t> weights_;
};

// The writers take 16 bytes, of which 14 are a channel's, and write exactly 14 values, for the neighbours belong to others: two
// overlapping halves, bytes 0 .. 7 and 6 .. 13.
struct WriteBytes {
    AVX2 static void write(__m128i plane, uint8_t* out, const Values&) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out), plane);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out + 6), _mm_srli_si128(plane, 6));
    }
};

// x * 2 / 255 - 1 with 2 / 255 in two floats: for each of the 256 bytes this rounds to Hugging Face's value.
AVX2 inline __m256 normalised(__m128i eight_bytes) {
    constexpr float kUpper = static_cast<float>(2 / 255.0), kLower = static_cast<float>(2 / 255.0 - kUpper);
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight_bytes));
    const __m256 scaled = _mm256_fmadd_ps(x, _mm256_set1_ps(kUpper), _mm256_mul_ps(x, _mm256_set1_ps(kLower)));
    return _mm256_sub_ps(scaled, _mm256_set1_ps(1.0f));
}

struct WriteFloats {
    AVX2 static void write(__m128i plane, uint8_t* out, const Values&) {
        _mm256_storeu_ps(reinterpret_cast<float*>(out), normalised(plane));
        _mm256_storeu_ps(reinterpret_cast<float*>(out + 6 * sizeof(float)), normalised(_mm_srli_si128(plane, 6)));
    }
};

struct WriteBfloats {
    AVX2 static __m256i rounded(__m256 values) {
        const __m256i bits = _mm256_castps_si256(values);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
    }

    AVX2 static void write(__m128i plane, uint8_t* out, const Values&) {
        const __m256i mixed = _mm256_packus_epi32(rounded(normalised(plane)), rounded(normalised(_mm_srli_si128(plane, 6))));
        const __m256i halves = _mm256_permute4x64_epi64(mixed, 0b11011000);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(halves));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 6 * 2), _mm256_extracti128_si256(halves, 1));
    }
};

template <class Value>
struct WriteFromTable {
    AVX2 static void write(__m128i plane, uint8_t* out, const Values& values) {
        uint8_t bytes[16];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), plane);
        for (int x = 0; x < 14; ++x) std::memcpy(out + x * sizeof(Value), values.table + bytes[x] * sizeof(Value), sizeof(Value));
    }
};

// Takes the channels' 14 bytes each out of 14 pixels, which fill `channels` loads: the last one overlaps, so that none passes the end.
template <int channels, class Writer>
AVX2 void cut_as(const uint8_t* row, int64_t columns, uint8_t* out, int64_t patch_stride, int64_t plane_stride, const Values& values) {
    int64_t starts[channels];
    __m128i masks[3][channels];
    for (int i = 0; i < channels; ++i) {
        starts[i] = std::min(16 * i, 14 * channels - 16);
        for (int c = 0; c < 3; ++c) {
            char mask[16];
            for (int x = 0; x < 16; ++x) {
                const int byte = x * channels + c;
                mask[x] = x < 14 && byte / 16 == i ? static_cast<char>(byte - starts[i]) : z;
            }
            masks[c][i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
        }
    }
    for (int64_t column = 0; column < columns; ++column, row += 14 * channels, out += patch_stride) {
        __m128i loads[channels];
        for (int i = 0; i < channels; ++i) loads[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + starts[i]));
        for (int c = 0; c < 3; ++c) {
            __m128i plane = _mm_shuffle_epi8(loads[0], masks[c][0]);
            for (int i = 1; i < channels; ++i) plane = _mm_or_si128(plane, _mm_shuffle_epi8(loads[i], masks[c][i]));
            Writer::write(plane, out + c * plane_stride, values);
        }
    }
}

using Cut = void (*)(const uint8_t* row, int64_t columns, uint8_t* out, int64_t patch_stride, int64_t plane_stride, const Values& values);

template <int channels>
Cut cut_for(const Values& values) {
    if (!values.table) return cut_as<channels, WriteBytes>;
    if (values.normalised) return values.bytes == 4 ? cut_as<channels, WriteFloats> : cut_as<channels, WriteBfloats>;
    if (values.bytes == 4) return cut_as<channels, WriteFromTable<uint32_t>>;
    return values.bytes == 2 ? cut_as<channels, WriteFromTable<uint16_t>> : cut_as<channels, WriteFromTable<uint8_t>>;
}

void cut(const uint8_t* row, int channels, int64_t columns, uint8_t* out, int64_t patch_stride, int64_t plane_stride, const Values& values) {
    const Cut cut = channels == 3 ? cut_for<3>(values) : cut_for<4>(values);
    cut(row, columns, out, patch_stride, plane_stride, values);
}

}  // namespace

const Kernels avx2_kernels{
    "avx2",
    [] { return (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) != 0; },
    [](const Taps& taps, int channels) -> std::unique_ptr<HorizontalPass> {
        Stretches planned;
        if (!plan_stretches(taps, channels, 2, planned)) return scalar_kernels.horizontal(taps, channels);
        return std::make_unique<Horizontal>(planned, channels);
    },
    [](const Taps& taps) -> std::unique_ptr<VerticalPass> { return std::make_unique<Vertical>(taps); },
    cut,
};

}  // namespace idefics2
#endif
