// The passes with AVX-512 VNNI; see resample_wide.hpp. Targets are set function by function, as in resample_avx2.cpp.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

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

}  // namespace
}  // namespace idefics2

#include "resample_wide.hpp"

namespace idefics2 {

const Kernels vnni_kernels{
    "vnni",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni") && avx2_kernels.runs_here();
    },
    wide_horizontal,
    wide_vertical,
    [](const uint8_t* const* rows, int channels, int64_t columns, uint8_t* out) { avx2_kernels.cut(rows, channels, columns, out); },
    [](const uint8_t* bytes, int64_t count, uint8_t* out, const Values& values) { avx2_kernels.convert(bytes, count, out, values); },
};

}  // namespace idefics2
#endif
