// Matrix products in registers: a few rows times the packed weights of a block of hidden units, and its transposed twin.

#pragma once

#include <cstdint>
#include <cstring>

#include "team.h"
#include "vectors.h"

namespace {

// Bytes that stay in a near cache beside other things.
#if !defined(NEAR_BYTES)
#define NEAR_BYTES (1 << 20)
#endif
constexpr int64_t NEAR = NEAR_BYTES;

// Weights that do not stay in the second-level cache come from the third one slower than six rows multiply them, so those of
// the block after this one are asked for while all rows of this one are multiplied: LINES a k, in the first pieces of rows.
// With AVX2 it gained nothing in the walk back, and what GCC inlined then cost 3 % of calls that ask for nothing.
constexpr bool ASKS_AHEAD = LANES == 16;
constexpr int LINES = 2, PIECES_AHEAD = 4 / LINES;

// The share of a piece of rows of what comes next, which has four lines a k, or null.
inline const char* ahead_of(const void* next, int64_t piece, int64_t depth) {
    return next && piece < PIECES_AHEAD ? static_cast<const char*>(next) + piece * depth * LINES * 64 : nullptr;
}

// sums[r][v] += row r of `a` times VECTORS columns; the weights of k stand at w + k * step + v * next. ASKS for the lines from
// `ahead` on.
template <int R, int VECTORS, bool ASKS = false, typename W>
inline void product(vec (&sums)[ROWS][4], const float* const (&a)[ROWS], int64_t depth, const W* w, int64_t step,
                    int64_t next, const char* ahead = nullptr) {
    if constexpr (R == 1) {
        // One row has too few sums to hide the latency of an addition, so even and odd k are summed apart. In variables of its
        // own: GCC would store the caller's at each k.
        const float* x = a[0];
        vec even[VECTORS], odd[VECTORS] = {};
        for (int v = 0; v < VECTORS; ++v) even[v] = sums[0][v];
        int64_t k = 0;
        for (; k + 1 < depth; k += 2) {
            for (int v = 0; v < VECTORS; ++v) {
                even[v] += all(x[k]) * load_weights(w + k * step + v * next);
                odd[v] += all(x[k + 1]) * load_weights(w + (k + 1) * step + v * next);
            }
        }
        for (; k < depth; ++k)
            for (int v = 0; v < VECTORS; ++v) even[v] += all(x[k]) * load_weights(w + k * step + v * next);
        for (int v = 0; v < VECTORS; ++v) sums[0][v] = even[v] + odd[v];
    } else {
        empty_registers();
        vec own[R][VECTORS];
        const float* from[R];
        for (int r = 0; r < R; ++r) {
            from[r] = a[r];
            for (int v = 0; v < VECTORS; ++v) own[r][v] = sums[r][v];
        }
        for (int64_t k = 0; k < depth; ++k) {
            vec x[R];
            for (int r = 0; r < R; ++r) x[r] = all(from[r][k]);
            for (int line = 0; ASKS && line < LINES; ++line) __builtin_prefetch(ahead + (k * LINES + line) * 64, 0, 2);
            for (int v = 0; v < VECTORS; ++v) {
                vec weights = load_weights(w + k * step + v * next);
                in_register(weights);
                for (int r = 0; r < R; ++r) own[r][v] += x[r] * weights;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = own[r][v];
    }
}

// The same for a number of rows that is known only now.
template <int VECTORS, bool ASKS = false, typename W, int R = ROWS>
inline void product(int rows, vec (&sums)[ROWS][4], const float* const (&a)[ROWS], int64_t depth, const W* w,
                    int64_t step, int64_t next, const char* ahead = nullptr) {
    if (rows == R) return product<R, VECTORS, ASKS, W>(sums, a, depth, w, step, next, ahead);
    if constexpr (R > 1) product<VECTORS, ASKS, W, R - 1>(rows, sums, a, depth, w, step, next, ahead);
}

#if defined(__AVX512F__)
// weight (4H, depth) in float32 to [block][k][gate][lane], zeros past H, sixteen rows at a time; where two gates share a
// vector, [k][gates i and f, g and o][lane].
inline void pack_rows(const float* weight, float* packed, int64_t hidden, int64_t depth) {
    for (int64_t block = 0; block < (hidden + LANES - 1) / LANES; ++block) {
        const bool half = half_a_vector(hidden, block);
        const int64_t vectors = half ? 2 : 4, units = half ? LANES / 2 : LANES;
        for (int64_t v = 0; v < vectors; ++v)
            for (int64_t k = 0; k < depth; k += 16) {
                __m512i r[16];
                UNROLLED for (int lane = 0; lane < 16; ++lane) {
                    const int64_t gate = half ? 2 * v + lane / 8 : v, unit = block * LANES + lane % units;
                    const __mmask16 lanes = first_lanes(unit < hidden ? depth - k : 0);
                    r[lane] = (__m512i)_mm512_maskz_loadu_ps(lanes, weight + (gate * hidden + unit) * depth + k);
                }
                transpose(r);
                float* const to = packed + (block * depth * 4 + k * vectors + v) * LANES;
                UNROLLED for (int i = 0; i < 16; ++i)
                    if (k + i < depth) _mm512_storeu_si512(to + i * vectors * LANES, r[i]);
            }
    }
}
#endif

// weight (outputs, depth) of a linear layer to [four vectors of outputs][k][vector][lane], zeros past the last output: what
// `product<4>` reads.
inline int64_t linear_size(int64_t outputs, int64_t depth) { return (outputs + 4 * LANES - 1) / (4 * LANES) * 4 * LANES * depth; }
inline void pack_linear_rows(const float* weight, float* packed, int64_t outputs, int64_t depth) {
    for (int64_t first = 0; first < outputs; first += 4 * LANES, packed += 4 * LANES * depth)
        for (int64_t k = 0; k < depth; ++k)
            for (int64_t i = 0; i < 4 * LANES; ++i)
                packed[k * 4 * LANES + i] = first + i < outputs ? weight[(first + i) * depth + k] : 0.0f;
}

// weight (rows, depth) by which gradients of its rows are multiplied, to [block][row][lane], zeros past the depth.
inline int64_t back_size(int64_t rows, int64_t depth) { return (depth + LANES - 1) / LANES * LANES * rows; }
inline void pack_back_rows(const float* weight, float* packed, int64_t rows, int64_t depth) {
    for (int64_t column = 0; column < depth; column += LANES) {
        const int n = static_cast<int>(depth - column < LANES ? depth - column : LANES);
        for (int64_t row = 0; row < rows; ++row, packed += LANES) store(packed, load(weight + row * depth + column, n));
    }
}

// Rows of the operands of a transposed product that are taken together: 32 KB of columns with vectors of 16.
constexpr int64_t CHUNK = 128, COLUMNS = CHUNK * 4 * LANES;

// sums[r][v] = column r of the rows of `a` times the rows of `columns`, which are VECTORS vectors wide.
template <int R, int VECTORS>
inline void outer(vec (&sums)[ROWS][4], const float* const* a, int64_t column, int64_t depth, const float* columns) {
    empty_registers();
    vec own[R][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k, columns += VECTORS * LANES) {
        vec x[R];
        for (int r = 0; r < R; ++r) x[r] = all(a[k][column + r]);
        for (int v = 0; v < VECTORS; ++v) {
            vec right = load(columns + v * LANES);
            in_register(right);
            for (int r = 0; r < R; ++r) own[r][v] += x[r] * right;
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = own[r][v];
}

template <int VECTORS, int R = ROWS>
inline void outer(int count, vec (&sums)[ROWS][4], const float* const* a, int64_t column, int64_t depth,
                  const float* columns) {
    if (count == R) return outer<R, VECTORS>(sums, a, column, depth, columns);
    if constexpr (R > 1) outer<VECTORS, R - 1>(count, sums, a, column, depth, columns);
}

// Vectors that hold a width of at most COLUMNS / CHUNK numbers.
inline int vectors_of(int64_t width) { return static_cast<int>((width + LANES - 1) / LANES); }

// A width of columns of so many rows side by side, in whole vectors: zeros past the width, and where a row is null.
inline void pack_columns(const float* const* rows, int64_t depth, int64_t column, int64_t width, float* to) {
    const int64_t padded = vectors_of(width) * LANES;
    for (int64_t k = 0; k < depth; ++k, to += padded) {
        if (rows[k]) std::memcpy(to, rows[k] + column, 4 * width); else std::memset(to, 0, 4 * width);
        std::memset(to + width, 0, 4 * (padded - width));
    }
}

// Sums of `count` rows and a width of columns to memory whose rows are n apart, or on top of what it has.
inline void store_sums(const vec (&sums)[ROWS][4], int count, int64_t width, bool on_top, float* to, int64_t n) {
    for (int r = 0; r < count; ++r, to += n)
        for (int v = 0; v < vectors_of(width); ++v) {
            const int lanes = static_cast<int>(width - v * LANES < LANES ? width - v * LANES : LANES);
            store(to + v * LANES, on_top ? load(to + v * LANES, lanes) + sums[r][v] : sums[r][v], lanes);
        }
}

// A thread's share of out (m, n) = left.T right, of so many rows, whose addresses `left` and `right` give; zeros where
// `right` gives null. Rows go by the chunk, so that a chunk of `right` stays in the nearest cache for all of m; `chunk`
// holds COLUMNS numbers.
template <typename L, typename F>
void transposed_product(L left, F right, float* out, int64_t rows, int64_t m, int64_t n, float* chunk, int thread,
                        int threads) {
    const int64_t groups = (m + ROWS - 1) / ROWS;
    const Share mine = share(groups, true, thread, threads);
    const float* lefts[CHUNK];
    const float* rights[CHUNK];
    if (!rows)
        for (int64_t i = mine.first * ROWS * n; i < mine.end * ROWS * n && i < m * n; ++i) out[i] = 0.0f;
    for (int64_t start = 0; start < rows; start += CHUNK) {
        const int64_t depth = rows - start < CHUNK ? rows - start : CHUNK;
        for (int64_t k = 0; k < depth; ++k) {
            lefts[k] = left(start + k);
            rights[k] = right(start + k);
        }
        for (int64_t column = 0; column < n; column += 4 * LANES) {
            const int64_t width = n - column < 4 * LANES ? n - column : 4 * LANES;
            pack_columns(rights, depth, column, width, chunk);
            for (int64_t group = mine.first; group < mine.end; ++group) {
                const int64_t row = group * ROWS;
                const int count = static_cast<int>(m - row < ROWS ? m - row : ROWS);
                vec sums[ROWS][4] = {};
                switch (vectors_of(width)) {
                    case 1: outer<1>(count, sums, lefts, row, depth, chunk); break;
                    case 2: outer<2>(count, sums, lefts, row, depth, chunk); break;
                    case 3: outer<3>(count, sums, lefts, row, depth, chunk); break;
                    default: outer<4>(count, sums, lefts, row, depth, chunk);
                }
                store_sums(sums, count, width, start, out + row * n + column, n);
            }
        }
    }
}

// A thread's share of out (m,), the sums of the columns of so many rows; by the chunk, for fewer roundoffs.
template <typename L>
void column_sums(L left, float* out, int64_t rows, int64_t m, int thread, int threads) {
    const Share mine = share((m + LANES - 1) / LANES, true, thread, threads);
    constexpr int64_t AT_ONCE = 8;  // vectors: rows may lie pages apart
    for (int64_t first = mine.first; first < mine.end; first += AT_ONCE) {
        const int64_t count = mine.end - first < AT_ONCE ? mine.end - first : AT_ONCE, column = first * LANES;
        const auto lanes = [=](int64_t v) {
            return static_cast<int>(m - column - v * LANES < LANES ? m - column - v * LANES : LANES);
        };
        vec total[AT_ONCE] = {};
        for (int64_t start = 0; start < rows; start += CHUNK) {
            vec sum[AT_ONCE] = {};
            for (int64_t k = start; k < rows && k < start + CHUNK; ++k)
                for (int64_t v = 0; v < count; ++v) sum[v] += load(left(k) + column + v * LANES, lanes(v));
            for (int64_t v = 0; v < count; ++v) total[v] += sum[v];
        }
        for (int64_t v = 0; v < count; ++v) store(out + column + v * LANES, total[v], lanes(v));
    }
}

}  // namespace
