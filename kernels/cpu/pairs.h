// Products of bf16 numbers two at a time with sums in float32 (vdpbf16ps), and the orders of what they multiply: rows times
// packed weights, and the products over all steps that are the gradients of weights. The instruction, and the conversion to
// bf16, take what is smaller than the least normal number for zero.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

// -DWIDEN builds without integer and bf16 products, as for a processor without them.
#if !defined(WIDEN) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_PAIRS 1

constexpr int64_t PAIR_VECTOR = 2 * LANES;  // bf16 numbers of a vector: [lane][2]

ALWAYS_INLINE __m512bh pair_of(const uint16_t* p) {
    int32_t x;
    std::memcpy(&x, p, 4);
    return (__m512bh)_mm512_set1_epi32(x);
}

// Numbers of two rows side by side in each lane.
ALWAYS_INLINE __m512i side_by_side(__m512 first, __m512 second) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, halves);
}

template <int R, int VECTORS>
ALWAYS_INLINE void add_pairs(__m512 (&own)[R][VECTORS], const uint16_t* const (&from)[R], const uint16_t* w, int64_t next, int64_t k) {
    __m512bh pair[R];
    UNROLLED for (int r = 0; r < R; ++r) pair[r] = pair_of(from[r] + 2 * k);
    UNROLLED for (int v = 0; v < VECTORS; ++v) {
        const __m512bh weights = (__m512bh)_mm512_loadu_si512(w + v * next);
        UNROLLED for (int r = 0; r < R; ++r) own[r][v] = _mm512_dpbf16_ps(own[r][v], weights, pair[r]);
    }
}

// sums[r][v] += row r times VECTORS columns over `count` pairs of k, whose weights stand at w + pair * step + v * next.
template <int R, int VECTORS>
inline void pair_product(vec (&sums)[ROWS][4], const uint16_t* const (&a)[ROWS], int64_t count, const uint16_t* w, int64_t step,
                         int64_t next) {
    // Few sums do not hide the latency of an instruction, so their pairs are summed in turns.
    constexpr int APART = R * VECTORS <= 4 ? 4 : R * VECTORS <= 8 ? 2 : 1;
    const uint16_t* from[R];
    UNROLLED for (int r = 0; r < R; ++r) from[r] = a[r];
    __m512 own[APART][R][VECTORS];
    UNROLLED for (int apart = 0; apart < APART; ++apart)
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < VECTORS; ++v) own[apart][r][v] = apart ? __m512{} : (__m512)sums[r][v];
    int64_t k = 0;
    for (; k + APART <= count; k += APART)
        UNROLLED for (int apart = 0; apart < APART; ++apart) add_pairs(own[apart], from, w + (k + apart) * step, next, k + apart);
    for (; APART > 1 && k < count; ++k) add_pairs(own[0], from, w + k * step, next, k);
    UNROLLED for (int r = 0; r < R; ++r)
        UNROLLED for (int v = 0; v < VECTORS; ++v) {
            vec sum = (vec)own[0][r][v];
            UNROLLED for (int apart = 1; apart < APART; ++apart) sum += (vec)own[apart][r][v];
            sums[r][v] = sum;
        }
}

// The same for a number of rows that is known only now.
template <int VECTORS, int R = ROWS>
inline void pair_product(int rows, vec (&sums)[ROWS][4], const uint16_t* const (&a)[ROWS], int64_t count, const uint16_t* w,
                         int64_t step, int64_t next) {
    if (rows == R) return pair_product<R, VECTORS>(sums, a, count, w, step, next);
    if constexpr (R > 1) pair_product<VECTORS, R - 1>(rows, sums, a, count, w, step, next);
}

// weight (4H, depth) to [block][2 k at a time][gate][lane][2 k], zeros past the ends.
inline void pack_pairs(const float* weight, uint16_t* packed, int64_t hidden, int64_t depth) {
    for (int64_t block = 0; block < (hidden + LANES - 1) / LANES; ++block)
        for (int64_t gate = 0; gate < 4; ++gate) {
            const float* const rows = weight + (gate * hidden + block * LANES) * depth;
            const int64_t units = hidden - block * LANES;
            for (int64_t k = 0; k < depth; k += PAIR_VECTOR) {
                __m512i r[16];
                UNROLLED for (int unit = 0; unit < 16; ++unit) {
                    const float* const from = rows + unit * depth + k;
                    const int64_t left = unit < units ? depth - k : 0;
                    r[unit] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first_lanes(left - 16), from + 16),
                                                           _mm512_maskz_loadu_ps(first_lanes(left), from));
                }
                transpose(r);
                uint16_t* const to = packed + ((block * ((depth + 1) / 2) + k / 2) * 4 + gate) * PAIR_VECTOR;
                const int64_t pairs = (depth - k + 1) / 2;
                UNROLLED for (int pair = 0; pair < 16; ++pair)
                    if (pair < pairs) _mm512_storeu_si512(to + pair * 4 * PAIR_VECTOR, r[pair]);
            }
        }
}

// weight (4H, depth) to [block][2 n at a time][lane][2 n] with n over 4H, zeros past the depth.
inline void pack_pairs_back(const float* weight, uint16_t* packed, int64_t hidden, int64_t depth) {
    for (int64_t unit = 0; unit < depth; unit += LANES)
        for (int64_t n = 0; n < 4 * hidden; n += 2, packed += PAIR_VECTOR) {
            const __mmask16 lanes = first_lanes(depth - unit);
            const float* const from = weight + n * depth + unit;
            _mm512_storeu_si512(packed, side_by_side(_mm512_maskz_loadu_ps(lanes, from), _mm512_maskz_loadu_ps(lanes, from + depth)));
        }
}

// Products over many rows: out (m, n) += left.T right, with `left` (rows, m) in bf16 and `right` (rows, n) in float32, m a
// multiple of 4. So many rows and columns of both are taken together.
#if !defined(PAIR_ROWS)
#define PAIR_ROWS 512
#endif
constexpr int64_t LEFT_TILE = 32, RIGHT_TILE = 4 * LANES;

// bf16 numbers of a tile of `left` and of `right`: [pair of rows][column][2].
inline int64_t left_numbers(int64_t pairs) { return pairs * 2 * LEFT_TILE; }
inline int64_t right_numbers(int64_t pairs) { return pairs * 2 * RIGHT_TILE; }

// A tile of `left` from rows at these places; adds the sums of its columns to those of 32 columns.
template <typename P>
inline void pack_left(P row, int64_t rows, int64_t columns, uint16_t* to, __m512 (&sums)[2]) {
    const __mmask32 lanes = columns >= LEFT_TILE ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
    const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u));
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t k = 0; k < rows; k += 2, to += 2 * LEFT_TILE) {
        const __m512i first = _mm512_maskz_loadu_epi16(lanes, row(k));
        const __m512i second = k + 1 < rows ? _mm512_maskz_loadu_epi16(lanes, row(k + 1)) : _mm512_setzero_si512();
        const __m512i pairs[2] = {_mm512_permutex2var_epi16(first, low, second), _mm512_permutex2var_epi16(first, high, second)};
        UNROLLED for (int half = 0; half < 2; ++half) {
            _mm512_storeu_si512(to + half * PAIR_VECTOR, pairs[half]);
            const __m512 both = _mm512_add_ps((__m512)_mm512_slli_epi32(pairs[half], 16), (__m512)_mm512_and_si512(pairs[half], upper));
            sums[half] = _mm512_add_ps(sums[half], both);
        }
    }
}

// Numbers of two rows side by side in each lane, rounded to bf16 or already so, zeros where a row is null.
ALWAYS_INLINE __m512i two_rows(const float* first, const float* second, __mmask16 lanes) {
    const auto loaded = [=](const float* row) { return row ? _mm512_maskz_loadu_ps(lanes, row) : _mm512_setzero_ps(); };
    return side_by_side(loaded(first), loaded(second));
}
ALWAYS_INLINE __m512i two_rows(const uint16_t* first, const uint16_t* second, __mmask16 lanes) {
    const auto loaded = [=](const uint16_t* row) {
        return _mm512_cvtepu16_epi32(row ? _mm256_maskz_loadu_epi16(lanes, row) : _mm256_setzero_si256());
    };
    return _mm512_or_si512(loaded(first), _mm512_slli_epi32(loaded(second), 16));
}

// A tile of `right` from rows at these places, zeros where there is none: [pair][vector][lane][2].
template <typename N>
inline void pack_right(const N* const* row, int64_t rows, int64_t column, int64_t columns, uint16_t* to) {
    for (int64_t k = 0; k < rows; k += 2)
        for (int64_t v = 0; v < columns; v += LANES, to += PAIR_VECTOR) {
            const auto at = [=](int64_t k) { return k < rows && row[k] ? row[k] + column + v : nullptr; };
            _mm512_storeu_si512(to, two_rows(at(k), at(k + 1), first_lanes(columns - v)));
        }
}

// out[r][v] for R columns of a tile of `left`, on top of what is there if `more`.
template <int R, int VECTORS>
inline void outer_pairs(const uint16_t* left, const uint16_t* right, int64_t pairs, float* out, int64_t width, int64_t columns, bool more) {
    __m512 own[R][VECTORS] = {};
    UNROLLED for (int r = 0; r < R; ++r)
        UNROLLED for (int v = 0; v < VECTORS; ++v) __builtin_prefetch(out + r * width + v * LANES, 1);
    for (int64_t k = 0; k < pairs; ++k, left += 2 * LEFT_TILE, right += VECTORS * PAIR_VECTOR) {
        __m512bh weights[VECTORS];
        UNROLLED for (int v = 0; v < VECTORS; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(right + v * PAIR_VECTOR);
        UNROLLED for (int r = 0; r < R; ++r) {
            const __m512bh pair = pair_of(left + 2 * r);
            UNROLLED for (int v = 0; v < VECTORS; ++v) own[r][v] = _mm512_dpbf16_ps(own[r][v], weights[v], pair);
        }
    }
    UNROLLED for (int r = 0; r < R; ++r)
        UNROLLED for (int v = 0; v < VECTORS; ++v) {
            float* const to = out + r * width + v * LANES;
            const __mmask16 lanes = first_lanes(columns - v * LANES);
            const __m512 before = more ? _mm512_maskz_loadu_ps(lanes, to) : _mm512_setzero_ps();
            _mm512_mask_storeu_ps(to, lanes, _mm512_add_ps(before, own[r][v]));
        }
}

template <int VECTORS>
inline void outer_pairs(int count, const uint16_t* left, const uint16_t* right, int64_t pairs, float* out, int64_t width,
                        int64_t columns, bool more) {
    switch (count) {
        case 4: return outer_pairs<4, VECTORS>(left, right, pairs, out, width, columns, more);
        case 5: return outer_pairs<5, VECTORS>(left, right, pairs, out, width, columns, more);
        default: return outer_pairs<6, VECTORS>(left, right, pairs, out, width, columns, more);
    }
}

// The same for a whole tile of `left`, whose columns are a multiple of 4 up to 32, and one of `right`.
inline void outer_tile(const uint16_t* left, int64_t rows, const uint16_t* right, int64_t columns, int64_t pairs, float* out,
                       int64_t width, bool more) {
    for (int64_t row = 0; row < rows;) {
        const int64_t pieces = (rows - row + 5) / 6;
        const int count = static_cast<int>((rows - row + pieces - 1) / pieces);  // 32 as 6 + 6 + 5 + 5 + 5 + 5
        const uint16_t* const from = left + 2 * row;
        float* const to = out + row * width;
        switch ((columns + LANES - 1) / LANES) {
            case 1: outer_pairs<1>(count, from, right, pairs, to, width, columns, more); break;
            case 2: outer_pairs<2>(count, from, right, pairs, to, width, columns, more); break;
            case 3: outer_pairs<3>(count, from, right, pairs, to, width, columns, more); break;
            default: outer_pairs<4>(count, from, right, pairs, to, width, columns, more);
        }
        row += count;
    }
}
#endif

}  // namespace
