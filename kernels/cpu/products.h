// Matrix products in registers: a few rows times the packed weights of a block of hidden units, and its transposed twin.

#pragma once

#include <cstdint>

#include "vectors.h"

namespace {

// sums[r][v] += rows of `a` (stride `stride`) times VECTORS columns; the weights of k stand at w + k * step + v * next.
template <int R, int VECTORS, typename W>
inline void product(vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const W* w, int64_t step,
                    int64_t next) {
    if constexpr (R == 1) {
        // One row has too few sums to hide the latency of an addition, so even and odd k are summed apart.
        vec odd[VECTORS] = {};
        int64_t k = 0;
        for (; k + 1 < depth; k += 2) {
            for (int v = 0; v < VECTORS; ++v) {
                sums[0][v] += all(a[k]) * load_weights(w + k * step + v * next);
                odd[v] += all(a[k + 1]) * load_weights(w + (k + 1) * step + v * next);
            }
        }
        for (; k < depth; ++k)
            for (int v = 0; v < VECTORS; ++v) sums[0][v] += all(a[k]) * load_weights(w + k * step + v * next);
        for (int v = 0; v < VECTORS; ++v) sums[0][v] += odd[v];
    } else {
        for (int64_t k = 0; k < depth; ++k) {
            vec weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = load_weights(w + k * step + v * next);
            for (int r = 0; r < R; ++r) {
                vec x = all(a[r * stride + k]);
                for (int v = 0; v < VECTORS; ++v) sums[r][v] += x * weights[v];
            }
        }
    }
}

// The same for a number of rows that is known only now.
template <int VECTORS, typename W, int R = ROWS>
inline void product(int rows, vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const W* w,
                    int64_t step, int64_t next) {
    if (rows == R) return product<R, VECTORS, W>(sums, a, stride, depth, w, step, next);
    if constexpr (R > 1) product<VECTORS, W, R - 1>(rows, sums, a, stride, depth, w, step, next);
}

// Rows of the operands of transposed_product that are taken together: 32 KB of columns with vectors of 16.
constexpr int64_t CHUNK = 128;

// sums[r][v] += column r of `a` (rows of `stride`) times the rows of `columns`, which are VECTORS vectors wide.
template <int R, int VECTORS>
inline void outer(vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const float* columns) {
    for (int64_t k = 0; k < depth; ++k, a += stride, columns += VECTORS * LANES) {
        vec right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(columns + v * LANES);
        for (int r = 0; r < R; ++r) {
            const vec x = all(a[r]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += x * right[v];
        }
    }
}

template <int VECTORS, int R = ROWS>
inline void outer(int count, vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const float* columns) {
    if (count == R) return outer<R, VECTORS>(sums, a, stride, depth, columns);
    if constexpr (R > 1) outer<VECTORS, R - 1>(count, sums, a, stride, depth, columns);
}

}  // namespace
