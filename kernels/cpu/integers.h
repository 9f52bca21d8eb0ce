// Vectors of integers as wide as those of vectors.h, by AVX2 and by AVX-512 alike: products of bytes and of words added to sums
// of 32 bits, and rows of float32 rounded to what they multiply.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
#define HAS_INTEGERS 1
// vpdpbusd, which has one name and two encodings: AVX512-VNNI, and AVX-VNNI where there is no AVX-512.
#if defined(__AVX512F__) ? defined(__AVX512VNNI__) : defined(__AVXVNNI__)
#define HAS_FOUR_BYTES 1
#endif

namespace {

ALWAYS_INLINE ivec load_integers(const void* p) { return (ivec)load(static_cast<const float*>(p)); }

// In words of our own here and below, since GCC 12 copies the sums of its intrinsics to and fro.
ALWAYS_INLINE void add_to(ivec& sum, ivec x) { asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(x)); }

#if defined(HAS_FOUR_BYTES)
#if defined(__AVX512F__)
#define FOUR_BYTES_ADDED "vpdpbusd"
#else
#define FOUR_BYTES_ADDED "%{vex%} vpdpbusd"  // else the assembler takes the encoding of AVX-512
#endif
// To each lane the sum of four unsigned bytes times four signed ones.
ALWAYS_INLINE void add_four_bytes(ivec& sum, ivec unsigned_bytes, ivec bytes) {
    asm(FOUR_BYTES_ADDED " %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(bytes));
}
ALWAYS_INLINE void add_four_bytes(ivec& sum, ivec unsigned_bytes, const void* bytes) {
    asm(FOUR_BYTES_ADDED " %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "m"(*static_cast<const loose*>(bytes)));
}
#endif

// Four bytes at p in each lane, and eight in each two.
ALWAYS_INLINE ivec in_each_lane(const void* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
#if defined(__AVX512F__)
    return (ivec)_mm512_set1_epi32(x);
#else
    return (ivec)_mm256_set1_epi32(x);
#endif
}
ALWAYS_INLINE ivec in_each_two_lanes(const void* p) {
    int64_t x;
    std::memcpy(&x, p, 8);
#if defined(__AVX512F__)
    return (ivec)_mm512_set1_epi64(x);
#else
    return (ivec)_mm256_set1_epi64x(x);
#endif
}

#if defined(__AVX512F__)
// Sums of two products a lane: of words, and, in 16 bits, of unsigned bytes by signed ones.
ALWAYS_INLINE ivec two_words(ivec a, ivec b) { return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
ALWAYS_INLINE ivec two_bytes(ivec a, ivec b) { return (ivec)_mm512_maddubs_epi16((__m512i)a, (__m512i)b); }
ALWAYS_INLINE ivec words_of_ones() { return (ivec)_mm512_set1_epi16(1); }
// Two bytes a lane, widened to words.
ALWAYS_INLINE ivec widened_bytes(const void* p) {
    return (ivec)_mm512_cvtepi8_epi16(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
// Lanes 0 + 1, 2 + 3 and so on of a, then those of b.
ALWAYS_INLINE ivec sums_of_pairs(ivec a, ivec b) {
    const __m512 even = _mm512_shuffle_ps((__m512)a, (__m512)b, 0x88), odd = _mm512_shuffle_ps((__m512)a, (__m512)b, 0xdd);
    const __m512i sums = _mm512_add_epi32((__m512i)even, (__m512i)odd);  // two of a, two of b, by turns
    return (ivec)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), sums);
}
ALWAYS_INLINE ivec nearest(vec x) { return (ivec)_mm512_cvtps_epi32((__m512)x); }
ALWAYS_INLINE int32_t largest_of(ivec x) { return _mm512_reduce_max_epi32((__m512i)x); }
ALWAYS_INLINE ivec larger(ivec a, ivec b) { return (ivec)_mm512_max_epi32((__m512i)a, (__m512i)b); }
// The lowest word or byte of each lane.
ALWAYS_INLINE void store_words(void* p, ivec x) { _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x)); }
ALWAYS_INLINE void store_bytes(void* p, ivec x) { _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x)); }
#else
ALWAYS_INLINE ivec two_words(ivec a, ivec b) { return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b); }
ALWAYS_INLINE ivec two_bytes(ivec a, ivec b) { return (ivec)_mm256_maddubs_epi16((__m256i)a, (__m256i)b); }
ALWAYS_INLINE ivec words_of_ones() { return (ivec)_mm256_set1_epi16(1); }
ALWAYS_INLINE ivec widened_bytes(const void* p) { return (ivec)_mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
ALWAYS_INLINE ivec sums_of_pairs(ivec a, ivec b) {
    return (ivec)_mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)a, (__m256i)b), 0xd8);
}
ALWAYS_INLINE ivec nearest(vec x) { return (ivec)_mm256_cvtps_epi32((__m256)x); }
ALWAYS_INLINE int32_t largest_of(ivec x) {
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
ALWAYS_INLINE ivec larger(ivec a, ivec b) { return (ivec)_mm256_max_epi32((__m256i)a, (__m256i)b); }
// The bytes with these eight numbers, of each half of a register.
ALWAYS_INLINE __m256i of_halves(ivec x, int64_t numbers) { return _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi64x(numbers)); }
ALWAYS_INLINE void store_words(void* p, ivec x) {
    const __m256i of = of_halves(x, 0x0d0c090805040100);
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm_unpacklo_epi64(_mm256_castsi256_si128(of), _mm256_extracti128_si256(of, 1)));
}
ALWAYS_INLINE void store_bytes(void* p, ivec x) {
    const __m256i of = of_halves(x, 0x0c080400);
    _mm_storel_epi64(static_cast<__m128i*>(p), _mm_unpacklo_epi32(_mm256_castsi256_si128(of), _mm256_extracti128_si256(of, 1)));
}
#endif

// What a row of float32 is multiplied by to become integers whose largest is `levels`, and what one of them stands for: NaN
// where the row has a NaN or an infinity, since integers have none. A row whose numbers are too small to have an inverse
// counts as zeros.
struct RowScale {
    float by, unit;
    RowScale(const float* from, int64_t depth, float levels) {
        // Without their signs, numbers are in the order of their bits; infinity and NaN come last.
        ivec sizes = {};
        for (int64_t k = 0; k < depth; k += LANES) {
            const vec x = load(from + k, static_cast<int>(depth - k < LANES ? depth - k : LANES));
            sizes = larger(sizes, (ivec)x & 0x7fffffff);
        }
        const int32_t bits = largest_of(sizes);
        float most;
        std::memcpy(&most, &bits, 4);
        by = most > 1e-30f ? levels / most : 0.0f;
        unit = most / levels + 0.0f * most;
    }
};

}  // namespace
#endif
