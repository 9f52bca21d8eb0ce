// Vectors of the compiler's own (GCC and Clang), as wide as the target has them, so that one source serves AVX2, AVX-512
// and NEON: loads of weights as they are kept, and the two nonlinearities of an LSTM.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int ROWS = 6;  // 6 rows x 4 vectors of sums, 4 of weights and 1 of h fill 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int ROWS = 3;
#if defined(__AVX2__) && defined(__FMA__)
#define HAS_STRIPS 1  // strips.h
#endif
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

// For what takes or gives vectors. One that is handed over by reference stays in a register only where the call is inlined, and
// GCC decides that by how large the whole file is: code that another processor needs made others here 1.8 times as slow.
#define ALWAYS_INLINE inline __attribute__((always_inline))

// Before a loop over a few registers: GCC keeps an array in registers only where it unrolls all loops over it early.
#define UNROLLED _Pragma("GCC unroll 16")

ALWAYS_INLINE vec all(float x) { return x - vec{}; }  // x - 0 is x, which x + 0 is not for -0
ALWAYS_INLINE vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
ALWAYS_INLINE void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

// Weights as they are kept: float32, the upper half of a float32 (bfloat16), or int8 without its scale.
ALWAYS_INLINE vec load_weights(const float* p) { return load(p); }
ALWAYS_INLINE vec load_weights(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
    return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), uvec) << 16);
#endif
}
ALWAYS_INLINE vec load_weights(const int8_t* p) {
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
ALWAYS_INLINE void in_register(vec& x) {
#if defined(__AVX512F__)
    asm("" : "+v"(x));
#elif defined(__SSE2__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
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

#if defined(__AVX512F__)
// The first of 16 lanes, from none to all.
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : n > 0 ? (1 << n) - 1 : 0); }

// Sixteen rows of sixteen numbers become columns.
ALWAYS_INLINE void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    UNROLLED for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    UNROLLED for (int i = 0; i < 16; i += 4)
        UNROLLED for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    // Part L (128 bits) of r[4 i + j] is now column 4 L + j of rows 4 i to 4 i + 3; 0x88 takes parts 0 and 2, 0xdd 1 and 3.
    UNROLLED for (int j = 0; j < 4; ++j) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    UNROLLED for (int j = 0; j < 4; ++j) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    }
}
#elif defined(__AVX2__)
// Eight rows of eight numbers become columns.
ALWAYS_INLINE void transpose(__m256 (&r)[8]) {
    __m256 t[8];
    UNROLLED for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    UNROLLED for (int i = 0; i < 8; i += 4)
        UNROLLED for (int j = 0; j < 2; ++j) {
            r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    // Half L of r[4 i + j] is now column 4 L + j of rows 4 i to 4 i + 3.
    UNROLLED for (int j = 0; j < 4; ++j) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    UNROLLED for (int i = 0; i < 8; ++i) r[i] = t[i];
}
#endif

// The first `n` lanes, zeros after them. By a mask, which AddressSanitizer does not see.
#if defined(__AVX512F__) && !defined(__SANITIZE_ADDRESS__)
ALWAYS_INLINE vec load(const float* p, int n) { return n >= LANES ? load(p) : (vec)_mm512_maskz_loadu_ps(first_lanes(n), p); }
ALWAYS_INLINE void store(float* p, vec x, int n) {
    if (n >= LANES) return store(p, x);
    _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x);
}
#else
ALWAYS_INLINE vec load(const float* p, int n) {
    if (n >= LANES) return load(p);
    vec x = {};
    std::memcpy(&x, p, 4 * n);
    return x;
}
ALWAYS_INLINE void store(float* p, vec x, int n) {
    if (n >= LANES) return store(p, x);
    std::memcpy(p, &x, 4 * n);
}
#endif

// Where the last block has at most half a vector of units, two gates share one in products, and two rows in the cell.
#if defined(__AVX512F__) && defined(__AVX512DQ__)
constexpr bool HALVES = true;
ALWAYS_INLINE vec joined(vec a, vec b) { return (vec)_mm512_insertf32x8((__m512)a, _mm512_castps512_ps256((__m512)b), 1); }
ALWAYS_INLINE vec upper_half(vec a) { return (vec)_mm512_zextps256_ps512(_mm512_extractf32x8_ps((__m512)a, 1)); }
#else
constexpr bool HALVES = false;
ALWAYS_INLINE vec joined(vec a, vec) { return a; }
ALWAYS_INLINE vec upper_half(vec a) { return a; }
#endif
inline bool half_a_vector(int64_t hidden, int64_t block) { return HALVES && hidden - block * LANES <= LANES / 2; }

// No less than -most and no more than most; a NaN stays one.
ALWAYS_INLINE vec within(vec x, float most) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(-most), (__m512)x));
#elif defined(__AVX__)
    return (vec)_mm256_min_ps(_mm256_set1_ps(most), _mm256_max_ps(_mm256_set1_ps(-most), (__m256)x));
#else
    x = x < -most ? all(-most) : x;
    return x > most ? all(most) : x;
#endif
}

// exp(TIMES x) - 1 = scale * p + (scale - 1), with scale = 2^n and p = 2^r - 1, n + r = TIMES x log2(e): precise also where x
// is near zero, since nothing cancels. The exponent is cut at 87, where sigmoid and tanh are at their ends; a NaN stays one.
struct Exponential {
    vec scale, p;
    ALWAYS_INLINE vec less() const { return scale * p + (scale - 1.0f); }  // itself, less one
    ALWAYS_INLINE vec more() const { return scale * p + (scale + 1.0f); }
};
// Without the REST, which log2(e) has past a float, it errs by 1.3e-8 x more, a fifth of what x itself is uncertain by.
template <int TIMES, int MOST = 87, bool REST = true>
ALWAYS_INLINE Exponential exponential(vec x) {
    x = within(x, static_cast<float>(MOST) / (TIMES < 0 ? -TIMES : TIMES));
    const vec magic = all(12582912.0f);  // 1.5 * 2^23: added to it, a number is rounded to an integer in the last bits
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    const float log2e = TIMES * 1.44269502162933349609375f, rest = TIMES * 1.92596299e-8f;
    const vec shifted = x * log2e + magic;
    const vec n = shifted - magic;
    vec r = x * log2e - n;  // in one instruction, so the product is not rounded
    if (REST) r = x * rest + r;
    vec p = all(1.5403508e-4f);  // minimax of the relative error of 2^r - 1 on [-0.5, 0.5], 1.1e-8
    p = p * r + 1.3390736e-3f;
    p = p * r + 9.6182376e-3f;
    p = p * r + 5.5503573e-2f;
    p = p * r + 2.4022649e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r;
#else
    x = x * static_cast<float>(TIMES);
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
#endif
    return {(vec)(((ivec)shifted << 23) + 0x3f800000), p};
}

ALWAYS_INLINE vec sigmoid(vec x) {
    return 1.0f / exponential<-1>(x).more();
}

// (1 - exp(-2x)) / (1 + exp(-2x))
ALWAYS_INLINE vec tanh_of(vec x) {
    const vec less = exponential<-2>(x).less();
    return -less / (less + 2.0f);
}

// h of N vectors of units from their gates before the nonlinearities, and c, by three divisions in place of five: with I =
// exp(-i) and G = exp(-2 g), i * g becomes -(G - 1) / ((G - 1 + 2) (I + 1)), and o * tanh(c) likewise. Nothing cancels near zero.
// exp(20), from which on tanh is one, times I + 1 is infinite where i is below 1e-29, which is then taken for zero.
template <int N, typename Between>
ALWAYS_INLINE void cells_by_three(const vec (&gates)[N][4], vec (&c)[N], vec (&h)[N], Between between) {
    vec added[N], under[N];
    const auto more = [](vec x) { return exponential<-1, 87, false>(x).more(); };
    const auto less = [](vec x) { return exponential<-2, 20, false>(x).less(); };
    UNROLLED for (int j = 0; j < N; ++j) {
        const vec low = less(gates[j][2]);
        between(), between();
        added[j] = low / ((low + 2.0f) * more(gates[j][0]));
        between(), between();
    }
    UNROLLED for (int j = 0; j < N; ++j) {
        c[j] = c[j] / more(gates[j][1]) - added[j];
        between(), between(), between();
        under[j] = more(gates[j][3]);
        between(), between();
    }
    UNROLLED for (int j = 0; j < N; ++j) {
        const vec low = less(c[j]);
        between(), between(), between();
        h[j] = low / ((-2.0f - low) * under[j]);
    }
}

#if defined(__AVX512F__) && defined(__AVX512DQ__)
// 2^x, off by 7.5e-8 of itself: vreduceps leaves the part past the floor, vscalefps takes the floor itself and saturates.
// The polynomial is the minimax of the relative error on [0, 1].
ALWAYS_INLINE __m512 power_of_two(__m512 x) {
    const __m512 r = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.8775767e-3f), r, _mm512_set1_ps(8.9893397e-3f));
    for (float next : {5.5826318e-2f, 2.4015361e-1f, 6.9315308e-1f, 9.9999994e-1f}) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(next));
    return _mm512_scalef_ps(p, x);
}

// 1 / x: 14 bits and a step of Newton's, which is left out of infinity, where it would be NaN.
ALWAYS_INLINE __m512 inverse(__m512 x) {
    const __m512 y = _mm512_rcp14_ps(x), z = _mm512_fmadd_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(1.0f)), y);
    return _mm512_mask_mov_ps(z, _mm512_cmp_ps_mask(x, _mm512_set1_ps(INFINITY), _CMP_EQ_OQ), y);
}

// sigmoid(x), and tanh(x) that errs by 1e-7 absolutely, for what is rounded to bf16 afterwards.
ALWAYS_INLINE __m512 sigmoid_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return inverse(_mm512_add_ps(one, power_of_two(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f)))));
}
ALWAYS_INLINE __m512 tangent_of(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f), twice = _mm512_set1_ps(-2 * 1.44269504088896341f);
    // Cut, since infinity over infinity is no number; of a NaN, min returns its second operand.
    const __m512 e = power_of_two(_mm512_min_ps(_mm512_set1_ps(60.0f), _mm512_mul_ps(x, twice)));
    return _mm512_mul_ps(_mm512_sub_ps(one, e), inverse(_mm512_add_ps(one, e)));
}

// h of 16 units from their gates before the nonlinearities, and c. Three divisions in place of five:
// i * g = (1 - G) / ((1 + I) (1 + G)) with I = exp(-i), G = exp(-2 g), and o * tanh(c) likewise. What is cut at 2^60 would
// otherwise become infinity over infinity; where a factor is NaN, min returns its second operand.
// `between` is called twelve times on the way: what it does fills the time in which one instruction waits for another.
template <typename Between>
ALWAYS_INLINE __m512 cell_of(__m512 i, __m512 f, __m512 g, __m512 o, __m512& c, Between between) {
    const __m512 one = _mm512_set1_ps(1.0f), most = _mm512_set1_ps(60.0f);
    const __m512 once = _mm512_set1_ps(-1.44269504088896341f), twice = _mm512_set1_ps(-2 * 1.44269504088896341f);
    const __m512 I = power_of_two(_mm512_mul_ps(i, once));
    between();
    const __m512 G = power_of_two(_mm512_min_ps(most, _mm512_mul_ps(g, twice)));
    between();
    const __m512 F = power_of_two(_mm512_mul_ps(f, once));
    between();
    const __m512 O = power_of_two(_mm512_mul_ps(o, once));
    between();
    const __m512 below = inverse(_mm512_mul_ps(_mm512_add_ps(one, I), _mm512_add_ps(one, G)));
    between();
    const __m512 kept = inverse(_mm512_add_ps(one, F));
    between();
    c = _mm512_fmadd_ps(c, kept, _mm512_mul_ps(_mm512_sub_ps(one, G), below));
    between();
    between();
    const __m512 C = power_of_two(_mm512_min_ps(most, _mm512_mul_ps(c, twice)));
    between();
    between();
    const __m512 under = inverse(_mm512_mul_ps(_mm512_add_ps(one, O), _mm512_add_ps(one, C)));
    between();
    between();
    return _mm512_mul_ps(_mm512_sub_ps(one, C), under);
}
ALWAYS_INLINE __m512 cell_of(__m512 i, __m512 f, __m512 g, __m512 o, __m512& c) { return cell_of(i, f, g, o, c, [] {}); }
#endif

// h of a block of units from their gates before the nonlinearities, and c; by three divisions where a processor has what that
// takes. What `between` does on the way, BETWEEN times, fills the time in which one instruction waits for another.
constexpr int BETWEEN = 12;
template <bool THREE_DIVISIONS, typename F>
ALWAYS_INLINE vec cell_between(const float* gates, vec& c, F between) {
    const auto gate = [=](int number) { return load(gates + number * LANES); };
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    if (THREE_DIVISIONS) {
        __m512 state = (__m512)c;
        const __m512 h = cell_of((__m512)gate(0), (__m512)gate(1), (__m512)gate(2), (__m512)gate(3), state, between);
        c = (vec)state;
        return (vec)h;
    }
#endif
#if defined(HAS_STRIPS)
    const vec gates_of[1][4] = {{gate(0), gate(1), gate(2), gate(3)}};
    vec state[1] = {c}, h[1];
    cells_by_three(gates_of, state, h, between);
    c = state[0];
    return h[0];
#else
    const auto some = [&] { between(), between(), between(); };
    const vec i = sigmoid(gate(0)), g = tanh_of(gate(2));
    some();
    const vec f = sigmoid(gate(1)), o = sigmoid(gate(3));
    some();
    c = f * c + i * g;
    some();
    const vec narrowed = tanh_of(c);
    some();
    return o * narrowed;
#endif
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
