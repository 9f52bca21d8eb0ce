// The head of a decoder over a large vocabulary: all outputs by weights of 8 bits (head_products.h), and those that may be
// among a row's largest once more in float32. Reading the weights is what such a head costs, and so it reads a quarter of them.
//
// A bound on the error of each output says which may be among the largest: with w = s q + r and h = t p + d, q and p the
// integers, |w.h - s t q.p| <= |r| |h| + |s q| |d|. The k-th largest lower bound is exceeded by k outputs; what cannot
// reach it stays as it is, and is below them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "head_products.h"
#include "status.h"
#include "team.h"

// Weights (outputs, depth) as they lie in the parameter, and as they were packed.
struct HeadCall {
    const float *weight, *bias;        // bias may be null
    const uint8_t* packed;
    const float *scale, *rest, *kept;  // of each row of weights: s, |r| and |s q|
    const float* h;                    // (rows, depth)
    float* output;                     // (rows, outputs)
    int64_t rows, outputs, depth, exact, threads;
};

#if defined(HAS_PRODUCTS)
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

// The outputs of two vectors of rows of weights for R rows of h.
template <int R>
void tile(const HeadCall& a, int64_t first, const Products::Integer* h, const Row* rows, float* output) {
    const int64_t width = rounded_up(a.depth, GROUP);
    ivec sums[2][R];
    multiply<R>(sums, a.packed + first * width, h, width);
    for (int n = 0; n < 2; ++n) {
        const int64_t at = first + n * LANES;
        const int inside = lanes_left(at, a.outputs);
        if (inside <= 0) return;
        const vec scale = load(a.scale + at, inside), bias = a.bias ? load(a.bias + at, inside) : vec{};
        for (int r = 0; r < R; ++r) {
            const ivec sum = (ivec)((uvec)sums[n][r] - static_cast<uint32_t>(rows[r].offset));
            const vec scaled = __builtin_convertvector(sum, vec) * rows[r].scale;
            store(output + r * a.outputs + at, scaled * scale + bias, inside);
        }
    }
}

template <int R = ROWS_AT_ONCE>
void tile(int64_t count, const HeadCall& a, int64_t first, const Products::Integer* h, const Row* rows, float* output) {
    if (count >= R) return tile<R>(a, first, h, rows, output);
    if constexpr (R > 1) tile<R - 1>(count, a, first, h, rows, output);
}

void tiles(const HeadCall& a, int64_t first, const Products::Integer* h, const Row* rows) {
    const int64_t width = rounded_up(a.depth, GROUP);
    for (int64_t row = 0; row < a.rows; row += ROWS_AT_ONCE)
        tile(a.rows - row, a, first, h + row * width, rows + row, a.output + row * a.outputs);
}

float exactly(const float* w, const float* h, int64_t depth) {
    vec sum = {};
    for (int64_t k = 0; k < depth; k += LANES) {
        const int inside = lanes_left(k, depth);
        sum += load(w + k, inside) * load(h + k, inside);
    }
    return total(sum);
}

// Bounds of the error of a vector of outputs. The roundings of float32, of both ways, are in it. They are a
// share of |w| |h| as rounded, so the bound is infinite wherever an output by integers could overflow.
struct Bound {
    const HeadCall& a;
    float norm, rest, rounding;
    Bound(const HeadCall& a, const Row& row)
        : a(a), norm(row.norm), rest(row.rest), rounding(2.0f * static_cast<float>(a.depth / LANES + 16) * ROUNDOFF) {}
    vec operator()(int64_t at, int inside) const {
        const vec r = load(a.rest + at, inside), kept = load(a.kept + at, inside);
        const vec bias = a.bias ? size_of(load(a.bias + at, inside)) : vec{};
        return size_of(r * norm + (kept * rest + ((r + kept) * (norm + rest) + bias) * rounding));
    }
};

// Computes in float32 what may be among the largest of a row; `best` has room for as many as are wanted.
int64_t refine(const HeadCall& a, const float* h, const Row& row, float* output, std::vector<float>& best) {
    const Bound bound(a, row);
    std::fill(best.begin(), best.end(), -INFINITE);
    ivec widest = {};
    each_vector(a.outputs, [&](int64_t at, int inside) {
        const vec own = bound(at, inside), low = load(output + at, inside) - own;
        widest = wider(widest, own);
        for (unsigned above = below(all(best.back()), low) & first_bits(inside); above; above &= above - 1) {
            const float value = low[__builtin_ctz(above)];
            if (!(value > best.back())) continue;
            size_t place = best.size() - 1;
            for (; place > 0 && best[place - 1] < value; --place) best[place] = best[place - 1];
            best[place] = value;
        }
    });
    // What is below this is so whatever its bound. It is NaN, and nothing below it, where a bound is.
    const float most = largest_of((vec)widest);
    const float floor = best.back() - most - 4.0f * ROUNDOFF * (std::fabs(best.back()) + most);
    int64_t count = 0;
    each_vector(a.outputs, [&](int64_t at, int inside) {
        const vec value = load(output + at, inside);
        if (!(~below(value, all(floor)) & first_bits(inside))) return;
        // Not below: where there is no bound, and so none of the two is larger, too.
        unsigned reaches = ~below(value + bound(at, inside), all(best.back())) & first_bits(inside);
        for (; reaches; reaches &= reaches - 1, ++count) {
            const int64_t found = at + __builtin_ctz(reaches);
            output[found] = exactly(a.weight + found * a.depth, h, a.depth) + (a.bias ? a.bias[found] : 0.0f);
        }
    });
    return count;
}

}  // namespace
#endif

extern "C" {

const char* head_failure() { return said; }

// Why this processor cannot, or an empty text.
const char* head_hindrance() {
#if defined(HAS_PRODUCTS)
    return "";
#else
    return "the head in int8 needs a processor with AVX2, and a compiler that knows them";
#endif
}

#if defined(HAS_PRODUCTS)

// The instructions that multiply.
const char* head_instructions() { return Products::NAME; }

int64_t head_bytes(int64_t outputs, int64_t depth) { return rounded_up(outputs, PAIR) * rounded_up(depth, GROUP); }

// Packs weight (outputs, depth) as q + OFFSET, with zeros past the end.
int64_t head_pack(const float* weight, uint8_t* packed, float* scale, float* rest, float* kept, int64_t outputs, int64_t depth) {
    const int64_t width = rounded_up(depth, GROUP);
    for (int64_t row = 0; row < rounded_up(outputs, PAIR); ++row) {
        const float* const from = weight + row * depth;
        const int64_t own = row < outputs ? depth : 0;
        float largest = 0.0f, spoilt = 0.0f;
        for (int64_t k = 0; k < own; ++k) {
            largest = std::max(largest, std::fabs(from[k]));
            spoilt += 0.0f * from[k];
        }
        const bool usable = spoilt == 0.0f && largest > LEAST;
        const float step = usable ? largest / 127.0f : 0.0f;
        double left = 0.0, size = 0.0;
        for (int64_t k = 0; k < width; ++k) {
            const long q = k < own && usable ? std::lrintf(from[k] / largest * 127.0f) : 0;
            packed[place(row, k, width)] = static_cast<uint8_t>(q + Products::OFFSET);
            const double value = static_cast<double>(step) * q, off = (k < own ? from[k] : 0.0f) - value;
            left += off * off;
            size += value * value;
        }
        if (row >= outputs) continue;
        scale[row] = step;
        // What is spoilt by a NaN or an infinity has no bound, and is always computed in float32.
        rest[row] = spoilt == 0.0f ? static_cast<float>(std::sqrt(left) * 1.0001) : INFINITE;
        kept[row] = static_cast<float>(std::sqrt(size) * 1.0001);
    }
    return DONE;
}

// All outputs of all rows; returns how many were computed in float32, or a negative status.
int64_t head_run(const HeadCall* call) {
    int64_t count = 0;
    const int64_t status = guarded([&]() -> int64_t {
        const HeadCall& a = *call;
        if (!a.outputs) return DONE;
        const int64_t width = rounded_up(a.depth, GROUP), pairs = rounded_up(a.outputs, PAIR) / PAIR;
        std::vector<Products::Integer> integers(a.rows * width);
        std::vector<Row> rows;
        for (int64_t row = 0; row < a.rows; ++row)
            rows.push_back(round_row(a.h + row * a.depth, integers.data() + row * width, a.depth, width));
        std::vector<std::vector<float>> best(a.threads, std::vector<float>(std::min(a.exact, a.outputs)));
        std::vector<int64_t> counts(a.threads);
        Barrier barrier(a.threads);
        team(a.threads, [&](int thread, int threads) {
            const Share own = share(pairs, true, thread, threads), refined = share(a.rows, true, thread, threads);
            for (int64_t pair = own.first; pair < own.end; ++pair) tiles(a, pair * PAIR, integers.data(), rows.data());
            barrier.wait(thread, threads);
            for (int64_t row = refined.first; row < refined.end; ++row)
                counts[thread] += refine(a, a.h + row * a.depth, rows[row], a.output + row * a.outputs, best[thread]);
        });
        for (const int64_t one : counts) count += one;
        return DONE;
    });
    return status == DONE ? count : status;
}

// To `output` (rows,) the largest bound of a row's errors; NaN or infinity where one has none.
int64_t head_bounds(const HeadCall* call) {
    return guarded([&]() -> int64_t {
        const HeadCall& a = *call;
        const int64_t width = rounded_up(a.depth, GROUP);
        std::vector<Products::Integer> integers(width);
        for (int64_t row = 0; row < a.rows; ++row) {
            const Bound bound(a, round_row(a.h + row * a.depth, integers.data(), a.depth, width));
            ivec widest = {};
            each_vector(a.outputs, [&](int64_t at, int inside) { widest = wider(widest, bound(at, inside)); });
            a.output[row] = largest_of((vec)widest);
        }
        return DONE;
    });
}

#endif

}  // extern "C"
