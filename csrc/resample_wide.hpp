// The passes with vectors of 64 bytes and the instruction that adds four products of bytes at once. Included by resample_vnni.cpp, where
// the vectors are AVX-512's, and by resample_portable.cpp, where they are arrays, so that every line of this file runs on any CPU.
//
// Before it is included stand WIDE, the attribute of functions that use vectors, and the type Vector with its operations.
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

// Running sums of 16 outputs, a digit each.
struct Sums {
    Vector low, middle, high;
};

WIDE inline Sums no_sums() { return {broadcast(1 << (kWeightBits - 1)), broadcast(0), broadcast(0)}; }

WIDE inline void add(Sums& sums, Vector byte_quads, const int32_t* weights) {
    sums.low = add_dot(sums.low, byte_quads, broadcast(weights[0]));
    sums.middle = add_dot(sums.middle, byte_quads, broadcast(weights[1]));
    sums.high = add_dot(sums.high, byte_quads, broadcast(weights[2]));
}

// The values, not yet cut to a byte: the packing instructions do that.
WIDE inline Vector values(const Sums& sums) {
    return shift_right<kWeightBits>(add(shift_left<8>(add(shift_left<8>(sums.high), sums.middle)), sums.low));
}

class WideHorizontal final : public HorizontalPass {
public:
    WideHorizontal(const Stretches& planned, int channels)
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
        for (int64_t at = 0; at + kVectorBytes <= bytes; at += kVectorBytes) run_bytes(weights, taps, in, at, out + at);
        if (bytes % kVectorBytes) run_bytes(weights, taps, in, bytes - kVectorBytes, out + bytes - kVectorBytes);
    }

private:
    WIDE static void run_bytes(const int32_t* weights, int64_t taps, const uint8_t* const* in, int64_t at, uint8_t* out) {
        Sums sums[4] = {no_sums(), no_sums(), no_sums(), no_sums()};
        for (int64_t tap = 0; tap < taps; tap += 4, weights += 3) {
            const Vector a = load(in[tap] + at), b = load(in[tap + 1] + at), c = load(in[tap + 2] + at), d = load(in[tap + 3] + at);
            const Vector low_ab = low_bytes(a, b), high_ab = high_bytes(a, b), low_cd = low_bytes(c, d), high_cd = high_bytes(c, d);
            add(sums[0], low_words(low_ab, low_cd), weights);
            add(sums[1], high_words(low_ab, low_cd), weights);
            add(sums[2], low_words(high_ab, high_cd), weights);
            add(sums[3], high_words(high_ab, high_cd), weights);
        }
        store(pack_bytes(pack_words(values(sums[0]), values(sums[1])), pack_words(values(sums[2]), values(sums[3]))), out);
    }

    const Taps& taps_;
    const std::unique_ptr<VerticalPass> narrow_;  // for rows shorter than a vector
    std::vector<int64_t> begins_;
    std::vector<int32_t> weights_;
};

std::unique_ptr<HorizontalPass> wide_horizontal(const Taps& taps, int channels) {
    Stretches planned;
    if (!plan_stretches(taps, channels, 4, planned)) return scalar_kernels.horizontal(taps, channels);
    return std::make_unique<WideHorizontal>(planned, channels);
}

std::unique_ptr<VerticalPass> wide_vertical(const Taps& taps) { return std::make_unique<WideVertical>(taps); }

}  // namespace
}  // namespace idefics2
