// The inner loops with AVX-512 VNNI and VBMI; see resample_wide.hpp. Targets are set function by function, as in resample_avx2.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "resample.hpp"

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vnni")))

namespace idefics2 {
namespace {

using Vector = __m512i;

WIDE inline Vector broadcast(int32_t value) { return _mm512_set1_epi32(value); }
WIDE inline Vector repeat(const char* quarter) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(quarter)));
}
WIDE inline Vector load(const uint8_t* from) { return _mm512_loadu_si512(from); }
WIDE inline void store(Vector vector, uint8_t* to) { _mm512_storeu_si512(to, vector); }

WIDE inline Vector load_quarters(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d) {
    const auto quarter = [](const uint8_t* from) WIDE { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
    const Vector first = _mm512_inserti32x4(_mm512_castsi128_si512(quarter(a)), quarter(b), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(first, quarter(c), 2), quarter(d), 3);
}

WIDE inline void store_quarters(Vector vector, uint8_t* a, uint8_t* b, uint8_t* c, uint8_t* d) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(a), _mm512_castsi512_si128(vector));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(b), _mm512_extracti32x4_epi32(vector, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(c), _mm512_extracti32x4_epi32(vector, 2));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(d), _mm512_extracti32x4_epi32(vector, 3));
}

WIDE inline Vector shuffle(Vector bytes, Vector order) { return _mm512_shuffle_epi8(bytes, order); }
WIDE inline Vector permute(Vector bytes, Vector order) { return _mm512_permutexvar_epi8(order, bytes); }
template <int kFrom>
WIDE inline Vector permute_upper(Vector lower, Vector bytes, Vector order) {
    return _mm512_mask_permutexvar_epi8(lower, ~uint64_t{0} << kFrom, order, bytes);
}
WIDE inline Vector add(Vector a, Vector b) { return _mm512_add_epi32(a, b); }
WIDE inline Vector add_dot(Vector sum, Vector bytes, Vector weights) { return _mm512_dpbusd_epi32(sum, bytes, weights); }
template <int bits>
WIDE inline Vector shift_left(Vector a) {
    return _mm512_slli_epi32(a, bits);
}
template <int bits>
WIDE inline Vector shift_right(Vector a) {
    return _mm512_srli_epi32(a, bits);
}
WIDE inline Vector low_bytes(Vector a, Vector b) { return _mm512_unpacklo_epi8(a, b); }
WIDE inline Vector high_bytes(Vector a, Vector b) { return _mm512_unpackhi_epi8(a, b); }
WIDE inline Vector low_words(Vector a, Vector b) { return _mm512_unpacklo_epi16(a, b); }
WIDE inline Vector high_words(Vector a, Vector b) { return _mm512_unpackhi_epi16(a, b); }
WIDE inline Vector pack_words(Vector a, Vector b) { return _mm512_packus_epi32(a, b); }
WIDE inline Vector pack_bytes(Vector a, Vector b) { return _mm512_packus_epi16(a, b); }

// Three channels of 14 pixels are picked into a quarter of a vector each. A store of 16 bytes runs into the patch's next row, which is
// written after it; the last rows are cut, for the next channel's first row stands there already.
template <int channels>
WIDE void cut_channels(const uint8_t* const* rows, int64_t columns, uint8_t* out) {
    constexpr int64_t kPixels = kPatchSide * channels, kPlane = kPatchSide * kPatchSide;
    constexpr __mmask16 kRow = (1 << kPatchSide) - 1;
    alignas(64) uint8_t order[64] = {};
    for (int c = 0; c < 3; ++c)
        for (int x = 0; x < kPatchSide; ++x) order[16 * c + x] = static_cast<uint8_t>(x * channels + c);
    const Vector by_channel = load(order);
    for (int64_t column = 0; column < columns; ++column, out += kPatchValues) {
        const auto planes = [&](int64_t y) WIDE {
            return permute(_mm512_maskz_loadu_epi8((uint64_t{1} << kPixels) - 1, rows[y] + column * kPixels), by_channel);
        };
        for (int64_t y = 0; y + 1 < kPatchSide; ++y) {
            const Vector of_row = planes(y);
            uint8_t* to = out + y * kPatchSide;
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(of_row));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + kPlane), _mm512_extracti32x4_epi32(of_row, 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * kPlane), _mm512_extracti32x4_epi32(of_row, 2));
        }
        const Vector last = planes(kPatchSide - 1);
        uint8_t* to = out + kPlane - kPatchSide;
        _mm_mask_storeu_epi8(to, kRow, _mm512_castsi512_si128(last));
        _mm_mask_storeu_epi8(to + kPlane, kRow, _mm512_extracti32x4_epi32(last, 1));
        _mm_mask_storeu_epi8(to + 2 * kPlane, kRow, _mm512_extracti32x4_epi32(last, 2));
    }
}

void cut(const uint8_t* const* rows, int channels, int64_t columns, uint8_t* out) {
    (channels == 3 ? cut_channels<3> : cut_channels<4>)(rows, columns, out);
}

// Normalised floats by whole lines of the cache, past it; all else as with AVX2. x * 2 / 255 - 1 with 2 / 255 in two floats.
WIDE void convert(const uint8_t* bytes, int64_t count, uint8_t* out, const Values& values) {
    const auto to_line = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) % 64) / sizeof(float));
    if (!values.normalised || values.bytes != 4 || reinterpret_cast<uintptr_t>(out) % sizeof(float) || count < to_line)
        return avx2_kernels.convert(bytes, count, out, values);
    constexpr float kUpper = static_cast<float>(2 / 255.0), kLower = static_cast<float>(2 / 255.0 - kUpper);
    const __m512 upper = _mm512_set1_ps(kUpper), lower = _mm512_set1_ps(kLower), one = _mm512_set1_ps(1.0f);
    scalar_kernels.convert(bytes, to_line, out, values);
    auto* to = reinterpret_cast<float*>(out);
    int64_t done = to_line;
    for (; done + 16 <= count; done += 16) {
        const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + done));
        const __m512 x = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen));
        _mm512_stream_ps(to + done, _mm512_sub_ps(_mm512_fmadd_ps(x, upper, _mm512_mul_ps(x, lower)), one));
    }
    _mm_sfence();
    scalar_kernels.convert(bytes + done, count - done, out + sizeof(float) * done, values);
}

WIDE void copy(const uint8_t* bytes, int64_t count, uint8_t* out) {
    const int64_t to_line = std::min<int64_t>(-reinterpret_cast<uintptr_t>(out) % 64, count);
    std::memcpy(out, bytes, to_line);
    int64_t done = to_line;
    for (; done + 64 <= count; done += 64) _mm512_stream_si512(reinterpret_cast<Vector*>(out + done), load(bytes + done));
    _mm_sfence();
    std::memcpy(out + done, bytes + done, count - done);
}

}  // namespace
}  // namespace idefics2

#include "resample_wide.hpp"

namespace idefics2 {

const Kernels vnni_kernels{
    "vnni",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && avx2_kernels.runs_here();
    },
    wide_horizontal,
    wide_vertical,
    cut,
    convert,
    copy,
};

}  // namespace idefics2
#endif
