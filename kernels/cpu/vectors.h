// Vectors of the compiler's own (GCC and Clang), as wide as the target has them, so that one source serves AVX2, AVX-512
// and NEON: loads of weights as they are kept, and the two nonlinearities of an LSTM.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int ROWS = 6;  // 6 rows x 4 vectors of sums, 4 of weights and 1 of h fill 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int ROWS = 3;
#else
constexpr int LANES = 4;
constexpr int ROWS = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline vec all(float x) { return x - vec{}; }  // x - 0 is x, which x + 0 is not for -0
inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

// Weights as they are kept: float32, the upper half of a float32 (bfloat16), or int8 without its scale.
inline vec load_weights(const float* p) { return load(p); }
inline vec load_weights(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
    return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), uvec) << 16);
#endif
}
inline vec load_weights(const int8_t* p) {
    // GCC 12 converts vectors of bytes lane by lane, hence the processor's own instruction where there is one.
#if defined(__AVX512F__)
    const ivec wide = (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    const ivec wide = (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    const ivec wide = __builtin_convertvector(*reinterpret_cast<const bytes*>(p), ivec);
#endif
    return __builtin_convertvector(wide, vec);
}

// Keeps a value in a register that several products take: GCC would load it again for each, and run out of loads.
inline void in_register(vec& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__SSE2__)
    asm("" : "+x"(x));
#else
    (void)x;
#endif
}

// Before a loop that takes all 16 registers: GCC would keep constants of what comes after it in one, and a sum of the loop
// on the stack, with a trip to it in every turn.
inline void empty_registers() {
#if defined(__SSE2__) && defined(__x86_64__) && !defined(__AVX512F__)
    asm volatile("" ::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                 "xmm12", "xmm13", "xmm14", "xmm15");
#endif
}

// The first `n` lanes, zeros after them.
inline vec load(const float* p, int n) {
    if (n >= LANES) return load(p);
    vec x = {};
    std::memcpy(&x, p, 4 * n);
    return x;
}
inline void store(float* p, vec x, int n) {
    if (n >= LANES) return store(p, x);
    std::memcpy(p, &x, 4 * n);
}

// exp(x) - 1 = scale * p + (scale - 1), with x = k ln 2 + r, scale = 2^k, p = exp(r) - 1: precise also where x is near
// zero, since nothing cancels. |x| is cut at 87, where sigmoid and tanh are at their ends; a NaN stays one.
struct Exponential {
    vec scale, p;
};
inline Exponential exponential(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    x = x > 87.0f ? all(87.0f) : x;
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: added to it, a number is rounded to an integer in the last bits
    const vec shifted = x * 1.44269504088896341f + magic;
    const vec n = shifted - magic;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);  // Cephes' expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r;
    return {(vec)(((ivec)shifted << 23) + 0x3f800000), p};
}

inline vec sigmoid(vec x) {
    const Exponential e = exponential(-x);
    return 1.0f / (e.scale * e.p + (e.scale + 1.0f));
}

// (1 - exp(-2x)) / (1 + exp(-2x))
inline vec tanh_of(vec x) {
    const Exponential e = exponential(-2.0f * x);
    const vec less = e.scale * e.p + (e.scale - 1.0f);
    return -less / (less + 2.0f);
}

inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
