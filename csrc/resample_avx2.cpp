// The inner loops with AVX2. The target is set function by function: a header's inline functions compiled for AVX2 here could become the
// program's only copy of them, and stop a CPU without it.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "resample.hpp"

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

AVX2 inline Sums no_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

// The values, not yet cut to a byte: the packing instructions do that.
AVX2 inline __m256i values(const Sums& sums) {
    const __m256i half = _mm256_set1_epi32(1 << (kWeightBits - 1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(_mm256_slli_epi32(sums.upper, 8), half), sums.lower), kWeightBits);
}

// Which taps are multiplied together, and their weights.
struct Pairs {
    std::vector<int64_t> begin;    // of each output: where its weights begin
    std::vector<int32_t> weights;  // of each pair: upper, lower

    explicit Pairs(const Taps& taps) {
        for (int64_t output = 0; output < taps.outputs(); ++output) {
            begin.push_back(static_cast<int64_t>(weights.size()));
            const int32_t* of = taps.of(output);
            const int64_t count = taps.count(output);
            for (int64_t tap = 0; tap < count; tap += 2) push_pair(weights, of[tap], tap + 1 < count ? of[tap + 1] : 0);
        }
        begin.push_back(static_cast<int64_t>(weights.size()));
    }

    int64_t count(int64_t output) const { return (begin[output + 1] - begin[output]) / 2; }
    const int32_t* of(int64_t output) const { return weights.data() + begin[output]; }
};

template <int kPairs>
struct Unrolled {
    static constexpr int64_t count = kPairs;
};
struct Counted {
    int64_t count;
};

// work(how many pairs), which compiled code knows where they are few, as in most images.
template <class Work>
AVX2 inline void with_pairs(int64_t pairs, const Work& work) {
    switch (pairs) {
        case 1: return work(Unrolled<1>{});
        case 2: return work(Unrolled<2>{});
        case 3: return work(Unrolled<3>{});
        case 4: return work(Unrolled<4>{});
        case 5: return work(Unrolled<5>{});
        default: return work(Counted{pairs});
    }
}

// Of 16-bit words a0 b0 a1 b1 .. the sums of a * weight + b * weight, for upper and lower weights.
AVX2 inline void add(Sums& sums, __m256i word_pairs, __m256i upper, __m256i lower) {
    sums.upper = _mm256_add_epi32(sums.upper, _mm256_madd_epi16(word_pairs, upper));
    sums.lower = _mm256_add_epi32(sums.lower, _mm256_madd_epi16(word_pairs, lower));
    __asm__("" : "+x"(sums.upper), "+x"(sums.lower));  // add now: GCC would keep all products and add them in pairs, in memory
}

// 32 bytes, each the weighted sum of those in its place in two vectors for each pair, which row_at finds.
template <class Count, class RowAt>
AVX2 inline __m256i weighted_sum(const int32_t* weights, Count pairs, const RowAt& row_at) {
    const __m256i zero = _mm256_setzero_si256();
    Sums sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
#pragma GCC unroll 5
    for (int64_t pair = 0; pair < pairs.count; ++pair) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_at(2 * pair)));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_at(2 * pair + 1)));
        const __m256i upper = _mm256_set1_epi32(weights[2 * pair]), lower = _mm256_set1_epi32(weights[2 * pair + 1]);
        const __m256i left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
        add(sums[0], _mm256_unpacklo_epi8(left, zero), upper, lower);
        add(sums[1], _mm256_unpackhi_epi8(left, zero), upper, lower);
        add(sums[2], _mm256_unpacklo_epi8(right, zero), upper, lower);
        add(sums[3], _mm256_unpackhi_epi8(right, zero), upper, lower);
    }
    const __m256i left = _mm256_packus_epi32(values(sums[0]), values(sums[1]));
    const __m256i right = _mm256_packus_epi32(values(sums[2]), values(sums[3]));
    return _mm256_packus_epi16(left, right);
}

// Element i of a and of b in turn, half by half: for bytes, words, double words and quadruple words.
template <int kBytes, bool kUpper>
AVX2 inline __m256i in_turn(__m256i a, __m256i b) {
    if constexpr (kBytes == 1) return kUpper ? _mm256_unpackhi_epi8(a, b) : _mm256_unpacklo_epi8(a, b);
    if constexpr (kBytes == 2) return kUpper ? _mm256_unpackhi_epi16(a, b) : _mm256_unpacklo_epi16(a, b);
    if constexpr (kBytes == 4) return kUpper ? _mm256_unpackhi_epi32(a, b) : _mm256_unpacklo_epi32(a, b);
    if constexpr (kBytes == 8) return kUpper ? _mm256_unpackhi_epi64(a, b) : _mm256_unpacklo_epi64(a, b);
}

constexpr int kSide = 16;

// Transposes the 16 x 16 bytes of all lower halves, and those of all upper halves. Interleaving rows i and i + 8, four times over.
AVX2 inline void transpose(__m256i (&rows)[kSide]) {
    for (int step = 0; step < 4; ++step) {
        __m256i mixed[kSide];
        for (int i = 0; i < kSide / 2; ++i) {
            mixed[2 * i] = in_turn<1, false>(rows[i], rows[i + kSide / 2]);
            mixed[2 * i + 1] = in_turn<1, true>(rows[i], rows[i + kSide / 2]);
        }
        std::copy(mixed, mixed + kSide, rows);
    }
}

// A pass along 32 rows is a pass across them, of their transpose: a vector holds a column of bytes.
class Horizontal final : public HorizontalPass {
public:
    Horizontal(const Taps& taps, int channels)
        : HorizontalPass(kRows), taps_(taps), pairs_(taps), channels_(channels), row_bytes_(taps.input * channels) {
        for (int64_t x = 0; x < taps.outputs(); x = parts_.back().last) parts_.push_back(part_from(x));
        for (const Part& part : parts_) most_bytes_ = std::max(most_bytes_, part.end - part.start);
    }

    AVX2 void run(const uint8_t* const* in, uint8_t* const* out) const override {
        static thread_local std::vector<Column> columns, resized;
        columns.resize(std::max<size_t>(columns.size(), most_bytes_ + kSide + channels_));
        resized.resize(3 * kMostOutputs);
        for (size_t i = 0; i < parts_.size(); ++i) {
            const Part& part = parts_[i];
            Ahead ahead(in, part.end, i + 1 < parts_.size() ? parts_[i + 1].end : part.end, part.last - part.first);
            for (int64_t at = part.start; at < part.end; at += kSide) read_columns(in, std::min(at, row_bytes_ - kSide), part.start, columns.data());
            for (int64_t x = part.first; x < std::min(part.last, taps_.outputs()); ++x) {
                const uint8_t* first = columns[taps_.first[x] * channels_ - part.start].rows;
                ahead.fetch_share();
                Column* to = resized.data() + 3 * (x - part.first);
                with_pairs(pairs_.count(x), [&](auto pairs) AVX2 {
                    for (int c = 0; c < 3; ++c) {
                        const auto column = [&](int64_t tap) { return first + (tap * channels_ + c) * sizeof(Column); };
                        _mm256_store_si256(reinterpret_cast<__m256i*>(to[c].rows), weighted_sum(pairs_.of(x), pairs, column));
                    }
                });
            }
            for (int64_t at = 3 * part.first; at < 3 * part.last; at += kSide) write_columns(resized.data() + at - 3 * part.first, at, out);
        }
    }

private:
    static constexpr int kRows = 32;
    static constexpr int64_t kGranule = 16, kMostOutputs = 64;  // outputs in whole stores
    static constexpr int64_t kMostBytes = 512;  // of a row at once: their columns stay in the first cache

    struct Column {
        alignas(32) uint8_t rows[kRows];
    };

    // Outputs first .. last - 1, made of a row's bytes start .. end - 1. The last part's last outputs may not exist.
    struct Part {
        int64_t first, last, start, end;
    };

    // Asks for bytes of all rows before they are needed, some at a time: so many rows are too many for the CPU to foresee.
    class Ahead {
    public:
        Ahead(const uint8_t* const* in, int64_t start, int64_t end, int64_t times)
            : in_(in), at_(start), end_(end), share_(((end - start + kLine - 1) / kLine * kRows + times - 1) / times) {}

        void fetch_share() {
            for (int64_t i = 0; i < share_ && at_ < end_; ++i) {
                __builtin_prefetch(in_[row_] + at_);
                if (++row_ < kRows) continue;
                row_ = 0;
                at_ += kLine;
            }
        }

    private:
        static constexpr int64_t kLine = 64;
        const uint8_t* const* in_;
        int64_t at_, end_, share_, row_ = 0;
    };

    Part part_from(int64_t first) const {
        Part part{first, first, std::min(taps_.first[first] * channels_, row_bytes_ - kSide), 0};
        do {
            part.last += kGranule;
            part.end = taps_.end(std::min(part.last, taps_.outputs()) - 1) * channels_;
        } while (part.last < taps_.outputs() && part.last - first < kMostOutputs &&
                 taps_.end(std::min(part.last + kGranule, taps_.outputs()) - 1) * channels_ - part.start <= kMostBytes);
        return part;
    }

    AVX2 static void read_columns(const uint8_t* const* in, int64_t at, int64_t start, Column* columns) {
        __m256i rows[kSide];
        for (int i = 0; i < kSide; ++i) {
            const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[i] + at));
            const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in[i + kSide] + at));
            rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
        }
        transpose(rows);
        for (int i = 0; i < kSide; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(columns[at - start + i].rows), rows[i]);
    }

    AVX2 static void write_columns(const Column* columns, int64_t at, uint8_t* const* out) {
        __m256i rows[kSide];
        for (int i = 0; i < kSide; ++i) rows[i] = _mm256_load_si256(reinterpret_cast<const __m256i*>(columns[i].rows));
        transpose(rows);
        for (int i = 0; i < kSide; ++i) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i] + at), _mm256_castsi256_si128(rows[i]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out[i + kSide] + at), _mm256_extracti128_si256(rows[i], 1));
        }
    }

    const Taps& taps_;
    const Pairs pairs_;
    const int64_t channels_, row_bytes_;
    std::vector<Part> parts_;
    int64_t most_bytes_ = 0;
};

class Vertical final : public VerticalPass {
public:
    static constexpr int64_t kBytes = 32;

    explicit Vertical(const Taps& taps) : pairs_(taps), plain_(scalar_kernels.vertical(taps)) {}

    AVX2 void run(int64_t output, const uint8_t* const* in, int64_t bytes, uint8_t* out) const override {
        if (bytes < kBytes) return plain_->run(output, in, bytes, out);
        const int32_t* weights = pairs_.of(output);
        with_pairs(pairs_.count(output), [&](auto pairs) AVX2 {
            for (int64_t at = 0; at < bytes; at += kBytes) {
                const int64_t start = std::min(at, bytes - kBytes);
                const auto row = [&](int64_t tap) { return in[tap] + start; };
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + start), weighted_sum(weights, pairs, row));
            }
        });
    }

private:
    const Pairs pairs_;
    const std::unique_ptr<VerticalPass> plain_;  // for rows shorter than a vector
};

// Takes the channels' 14 bytes each out of 14 pixels, which fill `channels` loads: the last one overlaps, so that none passes the end.
// A store of 16 bytes runs into the next row of the patch, which is written after it; the patch's last row is stored in two halves.
template <int channels>
AVX2 void cut_channels(const uint8_t* const* rows, int64_t columns, uint8_t* out) {
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
    for (int64_t x = 0; x < columns * kPatchSide * channels; x += kPatchSide * channels) {
        const auto plane = [&](int64_t y, int c) AVX2 {
            __m128i bytes = _mm_setzero_si128();
            for (int i = 0; i < channels; ++i) {
                const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[y] + x + starts[i]));
                bytes = _mm_or_si128(bytes, _mm_shuffle_epi8(pixels, masks[c][i]));
            }
            return bytes;
        };
        for (int c = 0; c < 3; ++c)
            for (int64_t y = 0; y < kPatchSide; ++y, out += kPatchSide)
                if (c < 2 || y + 1 < kPatchSide) _mm_storeu_si128(reinterpret_cast<__m128i*>(out), plane(y, c));
        const __m128i last = plane(kPatchSide - 1, 2);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out - 14), last);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(out - 8), _mm_srli_si128(last, 6));
    }
}

void cut(const uint8_t* const* rows, int channels, int64_t columns, uint8_t* out) {
    (channels == 3 ? cut_channels<3> : cut_channels<4>)(rows, columns, out);
}

// x * 2 / 255 - 1 with 2 / 255 in two floats: for each of the 256 bytes this rounds to Hugging Face's value.
AVX2 inline __m256 normalised(const uint8_t* eight_bytes) {
    constexpr float kUpper = static_cast<float>(2 / 255.0), kLower = static_cast<float>(2 / 255.0 - kUpper);
    const __m256 x = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight_bytes))));
    const __m256 scaled = _mm256_fmadd_ps(x, _mm256_set1_ps(kUpper), _mm256_mul_ps(x, _mm256_set1_ps(kLower)));
    return _mm256_sub_ps(scaled, _mm256_set1_ps(1.0f));
}

AVX2 inline __m256i bfloat16_bits(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
}

AVX2 void convert(const uint8_t* bytes, int64_t count, uint8_t* out, const Values& values) {
    constexpr int64_t kAtOnce = 16;
    int64_t done = 0;
    if (values.normalised && values.bytes == 4) {
        // Past the caches where it can be: whoever reads so many floats does it later.
        const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0;
        float* to = reinterpret_cast<float*>(out);
        for (; done + 8 <= count; done += 8) {
            const __m256 eight = normalised(bytes + done);
            if (aligned) {
                _mm_stream_ps(to + done, _mm256_castps256_ps128(eight));
                _mm_stream_ps(to + done + 4, _mm256_extractf128_ps(eight, 1));
            } else {
                _mm256_storeu_ps(to + done, eight);
            }
        }
        _mm_sfence();
    } else if (values.normalised) {
        for (; done + kAtOnce <= count; done += kAtOnce) {
            const __m256i mixed = _mm256_packus_epi32(bfloat16_bits(normalised(bytes + done)), bfloat16_bits(normalised(bytes + done + 8)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 2 * done), _mm256_permute4x64_epi64(mixed, 0b11011000));
        }
    }
    scalar_kernels.convert(bytes + done, count - done, out + values.bytes * done, values);
}

}  // namespace

const Kernels avx2_kernels{
    "avx2",
    [] { return (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) != 0; },
    [](const Taps& taps, int channels) -> std::unique_ptr<HorizontalPass> {
        if (taps.input * channels < kSide) return scalar_kernels.horizontal(taps, channels);
        return std::make_unique<Horizontal>(taps, channels);
    },
    [](const Taps& taps) -> std::unique_ptr<VerticalPass> { return std::make_unique<Vertical>(taps); },
    cut,
    convert,
    nullptr,
};

}  // namespace idefics2
#endif
