// The head of a decoder over a large vocabulary: all outputs by products of 8-bit integers, and those that may be among a
// row's largest once more in float32. Reading the weights is what such a head costs, and so it reads a quarter of them.
//
// A bound on the error of each output says which may be among the largest: with w = s q + r and h = t p + d, q and p the
// integers, |w.h - s t q.p| <= |r| |h| + |s q| |d|. The k-th largest lower bound is exceeded by k outputs; what cannot
// reach it stays as it is, and is below them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "status.h"
#include "team.h"

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
#include <immintrin.h>
#define HAS_VNNI
#endif

// Weights (outputs, depth) as they lie in the parameter, and as they were packed.
struct HeadCall {
    const float *weight, *bias;        // bias may be null
    const uint8_t* packed;
    const float *scale, *rest, *kept;  // of each row of weights: s, |r| and |s q|
    const float* h;                    // (rows, depth)
    float* output;                     // (rows, outputs)
    int64_t rows, outputs, depth, exact, threads;
};

namespace {

constexpr int64_t LANES16 = 16;  // outputs of a vector
constexpr int64_t PAIR = 2 * LANES16;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

#if defined(HAS_VNNI)

// A row of h as integers: t, 128 times their sum, and the norms of h and of what rounding leaves.
struct Row {
    float scale, norm, rest;
    int32_t offset;
};

Row round_row(const float* h, int8_t* to, int64_t depth, int64_t width) {
    float largest = 0.0f, spoilt = 0.0f;
    double norm = 0.0, rest = 0.0;
    for (int64_t k = 0; k < depth; ++k) {
        largest = std::max(largest, std::fabs(h[k]));
        spoilt += 0.0f * h[k];
        norm += static_cast<double>(h[k]) * h[k];
    }
    const bool usable = spoilt == 0.0f && largest > 1e-30f;
    const float scale = usable ? largest / 127.0f : 0.0f, inverse = usable ? 127.0f / largest : 0.0f;
    int32_t sum = 0;
    for (int64_t k = 0; k < width; ++k) {
        const int q = k < depth && usable ? static_cast<int>(std::lrintf(h[k] * inverse)) : 0;
        to[k] = static_cast<int8_t>(q);
        sum += q;
        const double left = k < depth ? h[k] - static_cast<double>(scale) * q : 0.0;
        rest += left * left;
    }
    // A row with a NaN or an infinity has no bound: all of its outputs are computed in float32.
    const float nothing = spoilt == 0.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    return {scale, static_cast<float>(std::sqrt(norm) * 1.0001) + nothing, static_cast<float>(std::sqrt(rest) * 1.0001), 128 * sum};
}

inline __mmask16 lanes_of(int64_t output, int64_t outputs) {
    return output + LANES16 <= outputs ? 0xffff : output < outputs ? static_cast<__mmask16>((1 << (outputs - output)) - 1) : 0;
}

// The outputs of two vectors of rows of weights for ROWS rows of h.
template <int ROWS>
void tile(const HeadCall& a, int64_t first, const int8_t* h, const Row* rows, float* output) {
    const int64_t quads = (a.depth + 3) / 4, width = 4 * quads;
    const uint8_t* const packed = a.packed + first * width;
    __m512i sums[2][ROWS];
    for (int n = 0; n < 2; ++n)
        for (int b = 0; b < ROWS; ++b) sums[n][b] = _mm512_setzero_si512();
    for (int64_t k = 0; k < quads; ++k) {
        const __m512i w0 = _mm512_loadu_si512(packed + k * 64), w1 = _mm512_loadu_si512(packed + (quads + k) * 64);
        for (int b = 0; b < ROWS; ++b) {
            int32_t four;
            std::memcpy(&four, h + b * width + 4 * k, 4);
            const __m512i value = _mm512_set1_epi32(four);
            sums[0][b] = _mm512_dpbusd_epi32(sums[0][b], w0, value);
            sums[1][b] = _mm512_dpbusd_epi32(sums[1][b], w1, value);
        }
    }
    for (int n = 0; n < 2; ++n) {
        const int64_t at = first + n * LANES16;
        const __mmask16 inside = lanes_of(at, a.outputs);
        const __m512 scale = _mm512_maskz_loadu_ps(inside, a.scale + at);
        const __m512 bias = a.bias ? _mm512_maskz_loadu_ps(inside, a.bias + at) : _mm512_setzero_ps();
        for (int b = 0; b < ROWS; ++b) {
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[n][b], _mm512_set1_epi32(rows[b].offset)));
            const __m512 found = _mm512_fmadd_ps(_mm512_mul_ps(sum, _mm512_set1_ps(rows[b].scale)), scale, bias);
            _mm512_mask_storeu_ps(output + b * a.outputs + at, inside, found);
        }
    }
}

void tiles(const HeadCall& a, int64_t first, const int8_t* h, const Row* rows) {
    const int64_t width = rounded_up(a.depth, 4);
    for (int64_t row = 0; row < a.rows; row += 8) {
        const int8_t* const from = h + row * width;
        float* const to = a.output + row * a.outputs;
        switch (std::min<int64_t>(8, a.rows - row)) {
            case 1: tile<1>(a, first, from, rows + row, to); break;
            case 2: tile<2>(a, first, from, rows + row, to); break;
            case 3: tile<3>(a, first, from, rows + row, to); break;
            case 4: tile<4>(a, first, from, rows + row, to); break;
            case 5: tile<5>(a, first, from, rows + row, to); break;
            case 6: tile<6>(a, first, from, rows + row, to); break;
            case 7: tile<7>(a, first, from, rows + row, to); break;
            default: tile<8>(a, first, from, rows + row, to);
        }
    }
}

float exactly(const float* w, const float* h, int64_t depth) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k += LANES16) {
        const __mmask16 inside = lanes_of(k, depth);
        sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(inside, w + k), _mm512_maskz_loadu_ps(inside, h + k), sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// Bounds of the error of a vector of outputs. The roundings of float32, of both ways, are in it.
struct Bound {
    const HeadCall& a;
    __m512 norm, rest, rounding;
    Bound(const HeadCall& a, const Row& row) : a(a) {
        norm = _mm512_set1_ps(row.norm);
        rest = _mm512_set1_ps(row.rest);
        rounding = _mm512_set1_ps(2.0f * (a.depth / 16 + 16) * 5.97e-8f);
    }
    __m512 operator()(int64_t at, __mmask16 inside) const {
        const __m512 r = _mm512_maskz_loadu_ps(inside, a.rest + at), kept = _mm512_maskz_loadu_ps(inside, a.kept + at);
        const __m512 bias = a.bias ? _mm512_abs_ps(_mm512_maskz_loadu_ps(inside, a.bias + at)) : _mm512_setzero_ps();
        const __m512 size = _mm512_fmadd_ps(_mm512_add_ps(r, kept), _mm512_add_ps(norm, rest), bias);
        return _mm512_fmadd_ps(r, norm, _mm512_fmadd_ps(kept, rest, _mm512_mul_ps(size, rounding)));
    }
};

// Computes in float32 what may be among the largest of a row; `best` has room for as many as are wanted.
int64_t refine(const HeadCall& a, const float* h, const Row& row, float* output, std::vector<float>& best) {
    const Bound bound(a, row);
    std::fill(best.begin(), best.end(), -INFINITE);
    for (int64_t at = 0; at < a.outputs; at += LANES16) {
        const __mmask16 inside = lanes_of(at, a.outputs);
        const __m512 low = _mm512_sub_ps(_mm512_maskz_loadu_ps(inside, output + at), bound(at, inside));
        if (!_mm512_mask_cmp_ps_mask(inside, low, _mm512_set1_ps(best.back()), _CMP_GT_OQ)) continue;
        float values[LANES16];
        _mm512_storeu_ps(values, low);
        for (int lane = 0; lane < LANES16; ++lane) {
            if (!(inside >> lane & 1) || !(values[lane] > best.back())) continue;
            size_t place = best.size() - 1;
            for (; place > 0 && best[place - 1] < values[lane]; --place) best[place] = best[place - 1];
            best[place] = values[lane];
        }
    }
    int64_t count = 0;
    for (int64_t at = 0; at < a.outputs; at += LANES16) {
        const __mmask16 inside = lanes_of(at, a.outputs);
        const __m512 high = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, output + at), bound(at, inside));
        // Not below: where there is no bound, and so none of the two is larger, too.
        unsigned reaches = _mm512_mask_cmp_ps_mask(inside, high, _mm512_set1_ps(best.back()), _CMP_NLT_UQ);
        for (; reaches; reaches &= reaches - 1, ++count) {
            const int64_t found = at + __builtin_ctz(reaches);
            output[found] = exactly(a.weight + found * a.depth, h, a.depth) + (a.bias ? a.bias[found] : 0.0f);
        }
    }
    return count;
}

#endif

}  // namespace

extern "C" {

const char* head_failure() { return said; }

// Why this processor cannot, or an empty text.
const char* head_hindrance() {
#if defined(HAS_VNNI)
    return "";
#else
    return "this processor has no products of bytes (AVX512-VNNI), or the compiler does not know them";
#endif
}

int64_t head_bytes(int64_t outputs, int64_t depth) { return rounded_up(outputs, PAIR) * rounded_up(depth, 4); }

// weight (outputs, depth) to [16 outputs][4 numbers of depth][output][number], q + 128, zeros past the end.
int64_t head_pack(const float* weight, uint8_t* packed, float* scale, float* rest, float* kept, int64_t outputs, int64_t depth) {
    const int64_t width = rounded_up(depth, 4);
    for (int64_t row = 0; row < rounded_up(outputs, PAIR); ++row) {
        const float* const from = weight + row * depth;
        const int64_t own = row < outputs ? depth : 0;
        float largest = 0.0f, spoilt = 0.0f;
        for (int64_t k = 0; k < own; ++k) {
            largest = std::max(largest, std::fabs(from[k]));
            spoilt += 0.0f * from[k];
        }
        const bool usable = spoilt == 0.0f && largest > 1e-30f;
        const float step = usable ? largest / 127.0f : 0.0f;
        double left = 0.0, size = 0.0;
        for (int64_t k = 0; k < width; ++k) {
            const long q = k < own && usable ? std::lrintf(from[k] / largest * 127.0f) : 0;
            packed[((row / LANES16 * width / 4 + k / 4) * LANES16 + row % LANES16) * 4 + k % 4] = static_cast<uint8_t>(q + 128);
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
#if defined(HAS_VNNI)
    int64_t count = 0;
    const int64_t status = guarded([&]() -> int64_t {
        const HeadCall& a = *call;
        const int64_t width = rounded_up(a.depth, 4), pairs = rounded_up(a.outputs, PAIR) / PAIR;
        std::vector<int8_t> integers(a.rows * width);
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
#else
    (void)call;
    return FAILED;
#endif
}

}  // extern "C"
