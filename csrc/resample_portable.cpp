// The passes of resample_wide.hpp with arrays in place of AVX-512's vectors: what the instructions mean, in loops. For tests, on any CPU.
#include <algorithm>
#include <cstdint>
#include <cstring>

#define WIDE

namespace idefics2 {
namespace {

struct Vector {
    uint8_t bytes[64];
};

constexpr int kQuarter = 16;

// The elements of a vector in order, and a vector of what `element` says of each index.
template <class Element>
Element get(const Vector& vector, int index) {
    Element element;
    std::memcpy(&element, vector.bytes + index * sizeof(Element), sizeof(Element));
    return element;
}

template <class Element, class Of>
Vector make(const Of& element) {
    Vector vector;
    for (int i = 0; i < static_cast<int>(64 / sizeof(Element)); ++i) {
        const auto value = static_cast<Element>(element(i));
        std::memcpy(vector.bytes + i * sizeof(Element), &value, sizeof(Element));
    }
    return vector;
}

// Quarter by quarter, elements of a and b in turn, from the quarter's lower or its upper half.
template <class Element>
Vector in_turn(const Vector& a, const Vector& b, bool upper) {
    constexpr int kEach = kQuarter / sizeof(Element);
    return make<Element>([&](int i) {
        const int from = i / kEach * kEach + upper * kEach / 2 + i % kEach / 2;
        return get<Element>(i % 2 ? b : a, from);
    });
}

// Quarter by quarter, a's elements and then b's, signed and cut to the range of the unsigned type of half the width.
template <class Narrow, class Wide>
Vector narrow(const Vector& a, const Vector& b) {
    constexpr int kEach = kQuarter / sizeof(Wide);
    constexpr int64_t kMost = static_cast<Narrow>(-1);
    return make<Narrow>([&](int i) {
        const int quarter = i / (2 * kEach), within = i % (2 * kEach);
        const Wide value = get<Wide>(within < kEach ? a : b, quarter * kEach + within % kEach);
        return std::clamp<int64_t>(value, 0, kMost);
    });
}

Vector broadcast(int32_t value) {
    return make<int32_t>([&](int) { return value; });
}
Vector repeat(const char* quarter) {
    return make<uint8_t>([&](int i) { return quarter[i % kQuarter]; });
}
Vector load(const uint8_t* from) {
    Vector vector;
    std::memcpy(vector.bytes, from, sizeof vector.bytes);
    return vector;
}
void store(const Vector& vector, uint8_t* to) { std::memcpy(to, vector.bytes, sizeof vector.bytes); }

Vector load_quarters(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    Vector vector;
    const uint8_t* from[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) std::memcpy(vector.bytes + i * kQuarter, from[i], kQuarter);
    return vector;
}

void store_quarters(const Vector& vector, uint8_t* a, uint8_t* b, uint8_t* c, uint8_t* d) {
    uint8_t* to[] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) std::memcpy(to[i], vector.bytes + i * kQuarter, kQuarter);
}

Vector shuffle(const Vector& bytes, const Vector& order) {
    return make<uint8_t>([&](int i) {
        const uint8_t from = order.bytes[i];
        return from & 0x80 ? 0 : bytes.bytes[i / kQuarter * kQuarter + from % kQuarter];
    });
}

// Byte i of the result is the byte that `order` says.
Vector permute(const Vector& bytes, const Vector& order) {
    return make<uint8_t>([&](int i) { return bytes.bytes[order.bytes[i] % 64]; });
}
// The same from byte `kFrom` on; before it, `lower`.
template <int kFrom>
Vector permute_upper(const Vector& lower, const Vector& bytes, const Vector& order) {
    return make<uint8_t>([&](int i) { return i < kFrom ? lower.bytes[i] : bytes.bytes[order.bytes[i] % 64]; });
}

Vector add(const Vector& a, const Vector& b) {
    return make<uint32_t>([&](int i) { return get<uint32_t>(a, i) + get<uint32_t>(b, i); });
}

Vector add_dot(const Vector& sum, const Vector& bytes, const Vector& weights) {
    return make<uint32_t>([&](int i) {
        int32_t dot = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j) dot += bytes.bytes[j] * static_cast<int8_t>(weights.bytes[j]);
        return get<uint32_t>(sum, i) + static_cast<uint32_t>(dot);
    });
}

template <int bits>
Vector shift_left(const Vector& a) {
    return make<uint32_t>([&](int i) { return get<uint32_t>(a, i) << bits; });
}
template <int bits>
Vector shift_right(const Vector& a) {
    return make<uint32_t>([&](int i) { return get<uint32_t>(a, i) >> bits; });
}

Vector low_bytes(const Vector& a, const Vector& b) { return in_turn<uint8_t>(a, b, false); }
Vector high_bytes(const Vector& a, const Vector& b) { return in_turn<uint8_t>(a, b, true); }
Vector low_words(const Vector& a, const Vector& b) { return in_turn<uint16_t>(a, b, false); }
Vector high_words(const Vector& a, const Vector& b) { return in_turn<uint16_t>(a, b, true); }
Vector pack_words(const Vector& a, const Vector& b) { return narrow<uint16_t, int32_t>(a, b); }
Vector pack_bytes(const Vector& a, const Vector& b) { return narrow<uint8_t, int16_t>(a, b); }

}  // namespace
}  // namespace idefics2

#include "resample_wide.hpp"

namespace idefics2 {

const Kernels portable_kernels{
    "vnni-portable",
    [] { return true; },
    wide_horizontal,
    wide_vertical,
    [](const uint8_t* const* rows, int channels, int64_t columns, uint8_t* out) { scalar_kernels.cut(rows, channels, columns, out); },
    [](const uint8_t* bytes, int64_t count, uint8_t* out, const Values& values) { scalar_kernels.convert(bytes, count, out, values); },
    [](const uint8_t* bytes, int64_t count, uint8_t* out) { std::memcpy(out, bytes, count); },
};

}  // namespace idefics2
