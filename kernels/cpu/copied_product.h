// The gradients of wide matrices over all steps, whose left operand is copied in the order in which it is multiplied.
//
// Rows of the gradients of gates may lie pages apart. Read in turns, a few numbers of each for every few columns, they are
// more pages than the processor keeps at hand and more lines than a set of the first-level cache holds. One copy serves both
// matrices, and the gradient of the biases.

#pragma once

#include <cstdint>
#include <cstring>

#include "products.h"
#include "team.h"
#include "vectors.h"

namespace {

// Whether n columns read the copy often enough to pay for it.
inline bool copies_left(int64_t n) { return n >= 128; }

// Numbers of a copy, where there are so many rows of m columns.
inline int64_t left_copy(int64_t rows, int64_t m) {
    return (rows < CHUNK ? rows : CHUNK) * ((m + ROWS - 1) / ROWS * ROWS);
}

// `outer` of ROWS numbers a k that lie side by side.
template <int VECTORS>
inline void outer_of_copy(vec (&sums)[ROWS][4], const float* left, int64_t depth, const float* columns) {
    empty_registers();
    vec own[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k, left += ROWS, columns += VECTORS * LANES) {
        vec x[ROWS];
        for (int r = 0; r < ROWS; ++r) x[r] = all(left[r]);
        for (int v = 0; v < VECTORS; ++v) {
            vec right = load(columns + v * LANES);
            in_register(right);
            for (int r = 0; r < ROWS; ++r) own[r][v] += x[r] * right;
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = own[r][v];
}

// Groups that are copied together, and the vectors that they fill.
constexpr int64_t TOGETHER = 8, WIDE = TOGETHER * ROWS / LANES;
static_assert(WIDE * LANES == TOGETHER * ROWS);

// A thread's share of `depth` rows of `left` from `start` on: to [group][k][row of the group]. Adds them to `sums` (m,), if any.
template <typename L>
void copy_left(L left, int64_t start, int64_t depth, int64_t m, Share mine, float* copy, float* sums) {
    for (int64_t first = mine.first; first < mine.end; first += TOGETHER) {
        const int64_t end = first + TOGETHER < mine.end ? first + TOGETHER : mine.end;
        const int64_t column = first * ROWS, columns = (end * ROWS < m ? end * ROWS : m) - column, whole = columns / ROWS;
        const auto lanes = [=](int64_t v) { return static_cast<int>(columns - v * LANES < LANES ? columns - v * LANES : LANES); };
        vec sum[WIDE] = {};
        for (int64_t k = 0; k < depth; ++k) {
            const float* const from = left(start + k) + column;
            float* const to = copy + ((first - mine.first) * depth + k) * ROWS;
            for (int64_t group = 0; group < whole; ++group) std::memcpy(to + group * depth * ROWS, from + group * ROWS, 4 * ROWS);
            for (int64_t i = whole * ROWS; i < (end - first) * ROWS; ++i)
                to[whole * depth * ROWS + i - whole * ROWS] = i < columns ? from[i] : 0.0f;
            for (int64_t v = 0; sums && v * LANES < columns; ++v) sum[v] += load(from + v * LANES, lanes(v));
        }
        for (int64_t v = 0; sums && v * LANES < columns; ++v) {
            float* const to = sums + column + v * LANES;
            store(to, start ? load(to, lanes(v)) + sum[v] : sum[v], lanes(v));
        }
    }
}

// The same share of out (m, n), to which the copied rows times those of `right` are added.
template <typename F>
void multiply_copy(const float* copy, F right, float* out, int64_t start, int64_t depth, int64_t m, int64_t n, float* room,
                   Share mine) {
    const float* rights[CHUNK];
    for (int64_t k = 0; k < depth; ++k) rights[k] = right(start + k);
    for (int64_t column = 0; column < n; column += 4 * LANES) {
        const int64_t width = n - column < 4 * LANES ? n - column : 4 * LANES;
        pack_columns(rights, depth, column, width, room);
        for (int64_t group = mine.first; group < mine.end; ++group) {
            float* const first = out + group * ROWS * n + column;
            const int count = static_cast<int>(m - group * ROWS < ROWS ? m - group * ROWS : ROWS);
            // What is written after the product has by then arrived in the nearest cache.
            for (int r = 0; r < count; ++r)
                for (int64_t line = 0; line < width; line += 16) __builtin_prefetch(first + r * n + line, 1);
            const float* const own = copy + (group - mine.first) * depth * ROWS;
            vec sums[ROWS][4];
            switch (vectors_of(width)) {
                case 1: outer_of_copy<1>(sums, own, depth, room); break;
                case 2: outer_of_copy<2>(sums, own, depth, room); break;
                case 3: outer_of_copy<3>(sums, own, depth, room); break;
                default: outer_of_copy<4>(sums, own, depth, room);
            }
            store_sums(sums, count, width, start, first, n);
        }
    }
}

}  // namespace
