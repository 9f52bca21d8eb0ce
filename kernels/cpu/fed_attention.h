// Attention of one row of a batch in one step: scores of the memory's steps, their softmax, the weighted mean, and the same
// back. Steps that are padding are left out by the list of those that are not.

#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "vectors.h"

namespace {

ALWAYS_INLINE float sum_of_lanes(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
#endif
}

// Of what is at most zero; below -87 it is exp(-87), 2e-38.
ALWAYS_INLINE vec exp_of(vec x) {
    const Exponential e = exponential<1>(x);
    return e.scale * e.p + e.scale;
}

// Lanes of vector v of a row of `size` numbers from `column` on: from none to all.
ALWAYS_INLINE int lanes_at(int64_t size, int64_t column, int v) {
    return static_cast<int>(std::clamp<int64_t>(size - column - v * LANES, 0, LANES));
}

// Some steps of the memory of one row, each a row of `size` numbers.
struct MemoryRows {
    const float* numbers;
    int64_t size;
    const int32_t* unmasked;  // the steps that count
    int64_t count;            // of those

    const float* operator[](int64_t i) const { return numbers + unmasked[i] * size; }
};

// Scores of P steps for a query.
template <bool ADDITIVE, int P>
void scores_of(const float* query, const float* const (&keys)[P], int64_t size, const float* vector, float* to) {
    vec sums[P] = {};
    for (int64_t k = 0; k < size; k += LANES) {
        const int n = lanes_at(size, k, 0);
        const vec asked = load(query + k, n), by = ADDITIVE ? load(vector + k, n) : vec{};
        for (int p = 0; p < P; ++p) {
            const vec key = load(keys[p] + k, n);
            sums[p] += ADDITIVE ? by * tanh_of(asked + key) : asked * key;
        }
    }
    for (int p = 0; p < P; ++p) to[p] = sum_of_lanes(sums[p]);
}

template <bool ADDITIVE>
void all_scores(const float* query, const MemoryRows& keys, const float* vector, float* scores) {
    constexpr int AT_ONCE = 4;
    int64_t i = 0;
    for (; i + AT_ONCE <= keys.count; i += AT_ONCE) {
        const float* at[AT_ONCE];
        for (int p = 0; p < AT_ONCE; ++p) at[p] = keys[i + p];
        scores_of<ADDITIVE>(query, at, keys.size, vector, scores + i);
    }
    for (; i < keys.count; ++i) {
        const float* const at[1] = {keys[i]};
        scores_of<ADDITIVE>(query, at, keys.size, vector, scores + i);
    }
}

// Scores become weights that sum up to one.
inline void softmax(float* scores, int64_t count, float scale) {
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) {
        scores[i] *= scale;
        most = scores[i] > most ? scores[i] : most;
    }
    vec sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const int n = lanes_at(count, i, 0);
        const vec weight = exp_of(load(scores + i, n) - most);
        store(scores + i, weight, n);
        sums += load(scores + i, n);
    }
    const float part = 1.0f / sum_of_lanes(sums);
    for (int64_t i = 0; i < count; ++i) scores[i] *= part;
}

// Gradients of weights become those of the scores that the weights were made of, without their scale.
inline void softmax_back(const float* weights, float* grads, int64_t count, float scale) {
    vec sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const int n = lanes_at(count, i, 0);
        sums += load(weights + i, n) * load(grads + i, n);
    }
    const float mean = sum_of_lanes(sums);
    for (int64_t i = 0; i < count; i += LANES) {
        const int n = lanes_at(count, i, 0);
        store(grads + i, load(weights + i, n) * (load(grads + i, n) - mean) * scale, n);
    }
}

// Sum of the steps, each times its weight; `nothing` everywhere where there is no step.
inline void weighted_sum(const MemoryRows& from, const float* weights, float nothing, float* to) {
    const float start = from.count ? 0.0f : nothing;
    for (int64_t column = 0; column < from.size; column += 4 * LANES) {
        vec sums[4] = {all(start), all(start), all(start), all(start)};
        int lanes[4];
        for (int v = 0; v < 4; ++v) lanes[v] = lanes_at(from.size, column, v);
        for (int64_t i = 0; i < from.count; ++i) {
            const float* const at = from[i] + column;
            for (int v = 0; v < 4 && lanes[v]; ++v) sums[v] += weights[i] * load(at + v * LANES, lanes[v]);
        }
        for (int v = 0; v < 4 && lanes[v]; ++v) store(to + column + v * LANES, sums[v], lanes[v]);
    }
}

// Gradients of scores vector . tanh(query + key), of V vectors of columns: that of the query is written, those of keys and
// vector are added to what is there. tanh is computed anew: kept, it would be as much memory as all keys at every step.
template <int V>
ALWAYS_INLINE void additive_columns(const float* query, const MemoryRows& keys, int64_t column, int lanes, const float* vector,
                                    const float* grads, float* grad_query, float* grad_keys, float* grad_vector) {
    vec asked[V], by[V], of_query[V] = {}, of_vector[V] = {};
    UNROLLED for (int v = 0; v < V; ++v) {
        asked[v] = load(query + column + v * LANES, lanes);
        by[v] = load(vector + column + v * LANES, lanes);
    }
    for (int64_t i = 0; i < keys.count; ++i) {
        const float* const key = keys[i] + column;
        float* const of_key = grad_keys + keys.unmasked[i] * keys.size + column;
        UNROLLED for (int v = 0; v < V; ++v) {
            const vec found = tanh_of(asked[v] + load(key + v * LANES, lanes));
            const vec inner = grads[i] * by[v] * (1.0f - found * found);
            of_vector[v] += grads[i] * found;
            of_query[v] += inner;
            store(of_key + v * LANES, load(of_key + v * LANES, lanes) + inner, lanes);
        }
    }
    UNROLLED for (int v = 0; v < V; ++v) {
        store(grad_query + column + v * LANES, of_query[v], lanes);
        float* const to = grad_vector + column + v * LANES;
        store(to, load(to, lanes) + of_vector[v], lanes);
    }
}

inline void additive_back(const float* query, const MemoryRows& keys, const float* vector, const float* grads, float* grad_query,
                          float* grad_keys, float* grad_vector) {
    constexpr int AT_ONCE = LANES == 16 ? 4 : 2;
    int64_t k = 0;
    for (; k + AT_ONCE * LANES <= keys.size; k += AT_ONCE * LANES)
        additive_columns<AT_ONCE>(query, keys, k, LANES, vector, grads, grad_query, grad_keys, grad_vector);
    for (; k < keys.size; k += LANES)
        additive_columns<1>(query, keys, k, lanes_at(keys.size, k, 0), vector, grads, grad_query, grad_keys, grad_vector);
}

}  // namespace
