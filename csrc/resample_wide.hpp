// The passes with vectors of 64 bytes and the instruction that adds four products of bytes at once. Included by resample_vnni.cpp, where
// the vectors are AVX-512's, and by resample_portable.cpp, where they are arrays, so that every line of this file runs on any CPU.
//
// Before it is included stand WIDE, the attribute of functions that use vectors, and the type Vector with its operations.
#include <algorithm>
#include <cstring>

#include "stretches.hpp"

namespace idefics2 {
namespace {

constexpr int64_t kVectorBytes = 64;
constexpr char z = static_cast<char>(0x80);  // a shuffle's zero

// Four neighbouring weights as signed bytes, the first one low. 22 bits do not fit into one: a weight is a + 256 * b + 65536 * c with each
// of the three in -128 .. 127.
void push_quad(std::vector<int32_t>& quads, const int32_t* weights, int64_t count) {
    uint32_t quad[3] = {0, 0, 0};
    for (int64_t tap = 0; tap < count; ++tap) {
        int32_t rest = weights[tap];
        for (uint32_t& digits : quad) {
            const auto digit = static_cast<int8_t>(rest);
            digits |= static_cast<uint32_t>(static_cast<uint8_t>(digit)) << 8 * tap;
            rest = (rest - digit) / 256;
        }
    }
    for (const uint32_t digits : quad) quads.push_back(static_cast<int32_t>(digits));
}

// Sums of 16 outputs begin with a half in the highest digit's place: each digit is multiplied by 256 as the next lower one is added.
WIDE inline Vector no_sum() { return broadcast(1 << (kWeightBits - 1 - 16)); }

// The values, not yet cut to a byte: the packing instructions do that.
WIDE inline Vector values(Vector sum) { return shift_right<kWeightBits>(sum); }

// Running sums of 16 outputs, a digit each: for windows of any number of taps.
struct Sums {
    Vector low, middle, high;
};

WIDE inline Sums no_sums() { return {broadcast(0), broadcast(0), no_sum()}; }

WIDE inline void add(Sums& sums, Vector byte_quads, Vector low, Vector middle, Vector high) {
    sums.low = add_dot(sums.low, byte_quads, low);
    sums.middle = add_dot(sums.middle, byte_quads, middle);
    sums.high = add_dot(sums.high, byte_quads, high);
}

WIDE inline void add(Sums& sums, Vector byte_quads, const int32_t* weights) {
    add(sums, byte_quads, broadcast(weights[0]), broadcast(weights[1]), broadcast(weights[2]));
}

WIDE inline Vector values(const Sums& sums) {
    return values(add(shift_left<8>(add(shift_left<8>(sums.high), sums.middle)), sums.low));
}

// Where windows are far apart or rows short: a quarter of a vector is four pixels of a row, for one output of four rows.
class QuarterHorizontal final : public HorizontalPass {
public:
    QuarterHorizontal(const Stretches& planned, int channels)
        : HorizontalPass(kBlock), step_(kPixelsPerLoad * channels), parts_{Part(planned.start, channels), Part(planned.end, channels)} {}

    WIDE void run(const uint8_t* const* in, uint8_t* const* out) const override {
        uint8_t* to[kBlock] = {out[0], out[1], out[2], out[3]};
        for (const Part& part : parts_) run_part(part, in, to);
    }

private:
    static constexpr int kBlock = 4;

    struct Part {
        int64_t quads;
        std::vector<int64_t> offsets;
        std::vector<int32_t> weights;  // of each output and each four taps: three digits
        char by_channel[16];           // a load's four pixels as R R R R, G G G G, B B B B

        Part(const Stretch& stretch, int channels) : quads(stretch.loads()), offsets(stretch.offsets) {
            for (size_t tap = 0; tap < stretch.weights.size(); tap += 4) push_quad(weights, stretch.weights.data() + tap, 4);
            std::memset(by_channel, z, sizeof by_channel);
            for (int c = 0; c < 3; ++c)
                for (int x = 0; x < 4; ++x) by_channel[4 * c + x] = static_cast<char>(stretch.skipped + x * channels + c);
        }
    };

    WIDE void run_part(const Part& part, const uint8_t* const* in, uint8_t** out) const {
        constexpr char kCloseUp[16] = {0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, z, z, z, z};
        const Vector by_channel = repeat(part.by_channel), close_up = repeat(kCloseUp);
        const int32_t* weights = part.weights.data();
        for (size_t output = 0; output < part.offsets.size(); output += kOutputsPerStore) {
            Vector pixels[kOutputsPerStore];  // of four rows, a quarter of the vector each
            for (int i = 0; i < kOutputsPerStore; ++i) {
                int64_t at = part.offsets[output + i];
                Sums sums = no_sums();
                for (int64_t quad = 0; quad < part.quads; ++quad, at += step_, weights += 3)
                    add(sums, shuffle(load_quarters(in[0] + at, in[1] + at, in[2] + at, in[3] + at), by_channel), weights);
                pixels[i] = values(sums);
            }
            const Vector bytes = pack_bytes(pack_words(pixels[0], pixels[1]), pack_words(pixels[2], pixels[3]));
            store_quarters(shuffle(bytes, close_up), out[0], out[1], out[2], out[3]);
            for (int row = 0; row < kBlock; ++row) out[row] += 3 * kOutputsPerStore;
        }
    }

    const int64_t step_;  // from a load to the next, in bytes
    const Part parts_[2];
};

// Where five outputs' windows are close together: a vector has a lane of four taps for each of their 15 bytes, picked out of 64 bytes of a
// row, or out of twice 64: the first three outputs' and the last two's.
template <int kLoads>
class LaneHorizontal final : public HorizontalPass {
public:
    LaneHorizontal(const Taps& taps, int channels) : HorizontalPass(kBlock) {
        const int64_t row_bytes = taps.input * channels, quads = (taps.most() + 3) / 4;
        for (int64_t first = 0; first < taps.outputs(); first += kOutputs) {
            for (int64_t quad = 0; quad < quads; ++quad) {
                Step step{};
                uint32_t digits[3][kVectorBytes / 4] = {};
                for (int load = 0; load < kLoads; ++load)
                    step.at[load] = std::min(byte_of(taps, first + load * kFirst, 4 * quad) * channels, row_bytes - kVectorBytes);
                for (int64_t i = 0; i < kOutputs; ++i) {
                    const int64_t output = std::min(first + i, taps.outputs() - 1), at = step.at[i >= kFirst ? kLoads - 1 : 0];
                    int32_t weights[4] = {};
                    for (int64_t tap = 0; tap < 4 && 4 * quad + tap < taps.count(output); ++tap) weights[tap] = taps.of(output)[4 * quad + tap];
                    std::vector<int32_t> of_quad;
                    push_quad(of_quad, weights, 4);
                    for (int c = 0; c < 3; ++c) {
                        for (int digit = 0; digit < 3; ++digit) digits[digit][3 * i + c] = static_cast<uint32_t>(of_quad[digit]);
                        for (int64_t tap = 0; tap < 4; ++tap) {  // those without a weight may be any byte
                            const int64_t byte = byte_of(taps, output, 4 * quad + tap) * channels + c - at;
                            step.order[4 * (3 * i + c) + tap] = static_cast<uint8_t>(std::min(byte, kVectorBytes - 1));
                        }
                    }
                }
                std::memcpy(step.weights, digits, sizeof digits);
                steps_.push_back(step);
            }
        }
        quads_ = quads;
    }

    // Whether all taps of each five outputs lie within the loads, and the row has as many bytes as one.
    static bool fits(const Taps& taps, int channels) {
        if (taps.input * channels < kVectorBytes) return false;
        for (int64_t first = 0; first < taps.outputs(); first += kOutputs) {
            for (int load = 0; load < kLoads; ++load) {
                const int64_t from = std::min(first + load * kFirst, taps.outputs() - 1);
                const int64_t last = std::min(first + (load + 1 < kLoads ? kFirst : kOutputs), taps.outputs()) - 1;
                if (last > from && (taps.first[last] + 4 - taps.first[from]) * channels > kVectorBytes) return false;
            }
        }
        return true;
    }

    WIDE void run(const uint8_t* const* in, uint8_t* const* out) const override {
        switch (quads_) {
            case 1: return run_quads<1>(in, out);
            case 2: return run_quads<2>(in, out);
            case 3: return run_quads<3>(in, out);
            default: return run_any(in, out);
        }
    }

private:
    static constexpr int kBlock = 4;
    static constexpr int64_t kOutputs = 5, kFirst = 3;

    // Four taps of five outputs.
    struct Step {
        int64_t at[kLoads];
        uint8_t order[kVectorBytes];
        uint8_t weights[3][kVectorBytes];
    };

    WIDE static Vector bytes_of(const Step& step, const uint8_t* row, Vector order) {
        const Vector bytes = permute(load(row + step.at[0]), order);
        if constexpr (kLoads == 1) return bytes;
        return permute_upper<12 * kFirst>(bytes, load(row + step.at[kLoads - 1]), order);
    }

    template <int kQuads>
    WIDE void run_quads(const uint8_t* const* in, uint8_t* const* out) const {
        int64_t to = 0;
        for (const Step *step = steps_.data(), *end = step + steps_.size(); step != end; step += kQuads, to += 3 * kOutputs) {
            Vector bytes[kQuads][kBlock], sums[kBlock] = {no_sum(), no_sum(), no_sum(), no_sum()};
#pragma GCC unroll 3
            for (int quad = 0; quad < kQuads; ++quad) {
                const Vector order = load(step[quad].order);
#pragma GCC unroll 4
                for (int row = 0; row < kBlock; ++row) bytes[quad][row] = bytes_of(step[quad], in[row], order);
            }
#pragma GCC unroll 3
            for (int digit = 2; digit >= 0; --digit) {
#pragma GCC unroll 3
                for (int quad = 0; quad < kQuads; ++quad) {
                    const Vector weights = load(step[quad].weights[digit]);
#pragma GCC unroll 4
                    for (int row = 0; row < kBlock; ++row) {
                        const bool next_digit = quad == 0 && digit < 2;
                        sums[row] = add_dot(next_digit ? shift_left<8>(sums[row]) : sums[row], bytes[quad][row], weights);
                    }
                }
            }
            store(values(sums[0]), values(sums[1]), values(sums[2]), values(sums[3]), out, to);
        }
    }

    WIDE void run_any(const uint8_t* const* in, uint8_t* const* out) const {
        int64_t to = 0;
        for (const Step *step = steps_.data(), *end = step + steps_.size(); step != end; to += 3 * kOutputs) {
            Sums sums[kBlock] = {no_sums(), no_sums(), no_sums(), no_sums()};
            for (int64_t quad = 0; quad < quads_; ++quad, ++step) {
                const Vector order = load(step->order);
                const Vector low = load(step->weights[0]), middle = load(step->weights[1]), high = load(step->weights[2]);
                for (int row = 0; row < kBlock; ++row) add(sums[row], bytes_of(*step, in[row], order), low, middle, high);
            }
            store(values(sums[0]), values(sums[1]), values(sums[2]), values(sums[3]), out, to);
        }
    }

    // Packing leaves four bytes of each row in each quarter; put together, a quarter is a row.
    WIDE static void store(Vector a, Vector b, Vector c, Vector d, uint8_t* const* out, int64_t to) {
        alignas(kVectorBytes) static constexpr uint8_t kByRow[kVectorBytes] = {
            0, 1, 2,  3,  16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 4,  5,  6,  7,  20, 21, 22, 23, 36, 37, 38, 39, 52, 53, 54, 55,
            8, 9, 10, 11, 24, 25, 26, 27, 40, 41, 42, 43, 56, 57, 58, 59, 12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47, 60, 61, 62, 63,
        };
        const Vector mixed = pack_bytes(pack_words(a, b), pack_words(c, d));
        store_quarters(permute(mixed, load(kByRow)), out[0] + to, out[1] + to, out[2] + to, out[3] + to);
    }

    // The input pixel of an output's tap; the last one's for taps and outputs past the end.
    static int64_t byte_of(const Taps& taps, int64_t output, int64_t tap) {
        return std::min(taps.first[std::min(output, taps.outputs() - 1)] + tap, taps.input - 1);
    }

    std::vector<Step> steps_;
    int64_t quads_;
};

class WideVertical final : public VerticalPass {
public:
    explicit WideVertical(const Taps& taps) : taps_(taps), narrow_(scalar_kernels.vertical(taps)) {
        for (int64_t output = 0; output < taps.outputs(); ++output) {
            begins_.push_back(static_cast<int64_t>(weights_.size()));
            for (int64_t tap = 0; tap < taps.count(output); tap += 4)
                push_quad(weights_, taps.of(output) + tap, std::min<int64_t>(4, taps.count(output) - tap));
        }
    }

    WIDE void run(int64_t output, const uint8_t* const* in, int64_t bytes, uint8_t* out) const override {
        if (bytes < kVectorBytes) return narrow_->run(output, in, bytes, out);
        const int32_t* weights = weights_.data() + begins_[output];
        const int64_t taps = taps_.count(output);
        const auto run_bytes = taps <= 4 ? run_quads<1> : taps <= 8 ? run_quads<2> : taps <= 12 ? run_quads<3> : run_any;
        for (int64_t at = 0; at < bytes; at += kVectorBytes) {
            const int64_t start = std::min(at, bytes - kVectorBytes);
            run_bytes(weights, taps, in, start, out + start);
        }
    }

private:
    // Of four rows, the bytes of each output together.
    struct Quads {
        Vector of[4];
    };

    WIDE static Quads quads_of(const uint8_t* const* in, int64_t at) {
        const Vector a = load(in[0] + at), b = load(in[1] + at), c = load(in[2] + at), d = load(in[3] + at);
        const Vector low_ab = low_bytes(a, b), high_ab = high_bytes(a, b), low_cd = low_bytes(c, d), high_cd = high_bytes(c, d);
        return {{low_words(low_ab, low_cd), high_words(low_ab, low_cd), low_words(high_ab, high_cd), high_words(high_ab, high_cd)}};
    }

    template <int kQuads>
    WIDE static void run_quads(const int32_t* weights, int64_t, const uint8_t* const* in, int64_t at, uint8_t* out) {
        Quads quads[kQuads];
        Vector sums[4] = {no_sum(), no_sum(), no_sum(), no_sum()};
#pragma GCC unroll 3
        for (int quad = 0; quad < kQuads; ++quad) quads[quad] = quads_of(in + 4 * quad, at);
#pragma GCC unroll 3
        for (int digit = 2; digit >= 0; --digit) {
#pragma GCC unroll 3
            for (int quad = 0; quad < kQuads; ++quad) {
                const Vector weight = broadcast(weights[3 * quad + digit]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    const bool next_digit = quad == 0 && digit < 2;
                    sums[i] = add_dot(next_digit ? shift_left<8>(sums[i]) : sums[i], quads[quad].of[i], weight);
                }
            }
        }
        store(pack_bytes(pack_words(values(sums[0]), values(sums[1])), pack_words(values(sums[2]), values(sums[3]))), out);
    }

    WIDE static void run_any(const int32_t* weights, int64_t taps, const uint8_t* const* in, int64_t at, uint8_t* out) {
        Sums sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int64_t tap = 0; tap < taps; tap += 4, weights += 3) {
            const Quads quads = quads_of(in + tap, at);
            for (int i = 0; i < 4; ++i) add(sums[i], quads.of[i], weights);
        }
        store(pack_bytes(pack_words(values(sums[0]), values(sums[1])), pack_words(values(sums[2]), values(sums[3]))), out);
    }

    const Taps& taps_;
    const std::unique_ptr<VerticalPass> narrow_;  // for rows shorter than a vector
    std::vector<int64_t> begins_;
    std::vector<int32_t> weights_;
};

std::unique_ptr<HorizontalPass> wide_horizontal(const Taps& taps, int channels) {
    if (LaneHorizontal<1>::fits(taps, channels)) return std::make_unique<LaneHorizontal<1>>(taps, channels);
    if (LaneHorizontal<2>::fits(taps, channels)) return std::make_unique<LaneHorizontal<2>>(taps, channels);
    Stretches planned;
    if (!plan_stretches(taps, channels, 4, planned)) return scalar_kernels.horizontal(taps, channels);
    return std::make_unique<QuarterHorizontal>(planned, channels);
}

std::unique_ptr<VerticalPass> wide_vertical(const Taps& taps) { return std::make_unique<WideVertical>(taps); }

}  // namespace
}  // namespace idefics2
