// The gradient of a matrix over all steps without AVX-512, whose left operand is copied in the order in which it is multiplied.
//
// Rows of the gradients of gates may lie pages apart. Read in turns, three numbers of each for every few columns, they are
// more pages than the processor keeps at hand and more lines than a set of the first-level cache holds.

#pragma once

#include <cstdint>
#include <cstring>

#include "products.h"
#include "team.h"
#include "vectors.h"

namespace {

// Whether n columns read the copy often enough to pay for it.
inline bool copies_left(int64_t n) { return n >= 16 * LANES; }

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

// As `transposed_product`; `room` holds COLUMNS numbers and a left_copy.
template <typename L, typename F>
void copied_product(L left, F right, float* out, int64_t rows, int64_t m, int64_t n, float* room, int thread, int threads) {
    const Share mine = share((m + ROWS - 1) / ROWS, true, thread, threads);
    float* const copy = room + COLUMNS;  // [group][k][row of the group]
    const float* rights[CHUNK];
    for (int64_t start = 0; start < rows; start += CHUNK) {
        const int64_t depth = rows - start < CHUNK ? rows - start : CHUNK;
        const auto count_of = [=](int64_t group) { return m - group * ROWS < ROWS ? m - group * ROWS : ROWS; };
        for (int64_t k = 0; k < depth; ++k) {
            const float* const from = left(start + k);
            rights[k] = right(start + k);
            for (int64_t group = mine.first; group < mine.end; ++group) {
                float* const to = copy + ((group - mine.first) * depth + k) * ROWS;
                for (int r = 0; r < ROWS; ++r) to[r] = r < count_of(group) ? from[group * ROWS + r] : 0.0f;
            }
        }
        for (int64_t column = 0; column < n; column += 4 * LANES) {
            const int64_t width = n - column < 4 * LANES ? n - column : 4 * LANES;
            pack_columns(rights, depth, column, width, room);
            for (int64_t group = mine.first; group < mine.end; ++group) {
                float* const first = out + group * ROWS * n + column;
                const int count = static_cast<int>(count_of(group));
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
}

// The one or the other; without rows, zeros.
template <typename L, typename F>
inline void product_over_steps(L left, F right, float* out, int64_t rows, int64_t m, int64_t n, float* room, int thread,
                               int threads) {
    if (rows && copies_left(n)) return copied_product(left, right, out, rows, m, n, room, thread, threads);
    transposed_product(left, right, out, rows, m, n, room, thread, threads);
}

}  // namespace
