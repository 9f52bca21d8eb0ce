// How the head of a decoder multiplies: weights rounded to 8 bits, by rows of h rounded to integers. All sums are exact, so
// rounding alone errs. `Products` is the kind of instructions that the build has; without any, HAS_PRODUCTS is not defined.
//
// A lane of a vector is an output. Its weights come a GROUP of depth at a time, which four bytes of a row of h multiply.
// Order of the weights: [BLOCK outputs][GROUP of depth][output][number], zeros past the end.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "integers.h"
#include "vectors.h"

namespace {

#if defined(HAS_INTEGERS)
#define HAS_PRODUCTS

// -DEMULATED_VNNI: vpdpbusd in plain C++, so that its packing and rounding run on other machines.
#if defined(EMULATED_VNNI) || defined(HAS_FOUR_BYTES)
// vpdpbusd: four unsigned by four signed bytes. Weights are kept as q + 128, which adds 128 times the sum of h.
struct Products {
    using Integer = int8_t;
    static constexpr int64_t GROUP = 4, BLOCK = LANES;
    static constexpr int OFFSET = 128, MOST = 127;
    static constexpr const char* NAME = LANES == 16 ? "avx512-vnni" : "avx-vnni";
    // Rows whose sums registers hold, and so many sums of an output hide the latency of an instruction.
    static constexpr int ROWS_AT_ONCE = LANES == 16 ? 8 : 6;
    static constexpr int turns(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

    static ivec weights(const uint8_t* p) { return load_integers(p); }
    static ivec dot(ivec sum, ivec weights, ivec h) {
#if defined(EMULATED_VNNI)
        uint8_t w[4 * LANES];
        int8_t x[4 * LANES];
        uint32_t found[LANES];  // whose sums may pass over, as the processor's
        std::memcpy(w, &weights, sizeof w);
        std::memcpy(x, &h, sizeof x);
        std::memcpy(found, &sum, sizeof found);
        for (int lane = 0; lane < LANES; ++lane)
            for (int i = 4 * lane; i < 4 * lane + 4; ++i) found[lane] += static_cast<uint32_t>(w[i] * x[i]);
        std::memcpy(&sum, found, sizeof found);
#else
        add_four_bytes(sum, weights, h);
#endif
        return sum;
    }
};
#else
// vpmaddwd: two by two numbers of 16 bits, so that h has as many bits as its sums leave room for. Weights are widened as
// they are read.
struct Products {
    using Integer = int16_t;
    static constexpr int64_t GROUP = 2, BLOCK = 2 * LANES;
    static constexpr int OFFSET = 0, MOST = 32767;
    static constexpr const char* NAME = LANES == 16 ? "avx512-int16" : "avx2-int16";
    static constexpr int ROWS_AT_ONCE = LANES == 16 ? 8 : 4;
    static constexpr int turns(int) { return 1; }

    static ivec weights(const uint8_t* p) { return widened_bytes(p); }
    static ivec dot(ivec sum, ivec weights, ivec h) { return sum + two_words(weights, h); }
};
#endif

constexpr int64_t GROUP = Products::GROUP, BLOCK = Products::BLOCK, PAIR = 2 * LANES;  // outputs of two vectors
constexpr int ROWS_AT_ONCE = Products::ROWS_AT_ONCE;
constexpr float ROUNDOFF = 6e-8f;                             // of float32, with a margin
constexpr float LEAST = 1e-30f;                               // the scale of smaller numbers would be rounded too much
static_assert(LANES % GROUP == 0, "round_row writes a row of h up to its width by whole vectors of its depth");

inline int64_t rounded_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
inline int lanes_left(int64_t at, int64_t end) { return static_cast<int>(std::min<int64_t>(LANES, end - at)); }
inline unsigned first_bits(int n) { return n < LANES ? (1u << n) - 1 : (1u << LANES) - 1; }
inline vec size_of(vec x) { return (vec)((ivec)x & 0x7fffffff); }

// A bit for each lane in which a is below b; none where one of them is NaN.
inline unsigned below(vec a, vec b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ);
#else
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)));
#endif
}

// Calls with the start and the number of lanes of each vector of so many numbers.
template <typename F>
inline void each_vector(int64_t count, F call) {
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) call(at, LANES);
    if (at < count) call(at, static_cast<int>(count - at));
}

// Positive numbers by their bits, whose order is that of the numbers, with NaN above all.
inline ivec wider(ivec widest, vec x) { return larger(widest, (ivec)x); }

// Of positive numbers; a NaN is above all.
inline float largest_of(vec x) {
    const int32_t bits = largest_of((ivec)x);
    float largest;
    std::memcpy(&largest, &bits, 4);
    return largest;
}

inline float total(vec x) {
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
}

// A row of h as integers: its scale, what the offset of the weights adds to its sums, and the norms of h and of what rounding leaves.
// The norms are NaN for a row without a bound, all of whose outputs are computed in float32.
struct Row {
    float scale, norm, rest;
    int32_t offset;
};

// Largest integer of a row: sums of its products with 127 stay in 32 bits. None of a row that is too deep.
inline int levels(int64_t depth) {
    return static_cast<int>(std::min<int64_t>(Products::MOST, std::numeric_limits<int32_t>::max() / (127 * std::max<int64_t>(1, depth))));
}

// Largest number of a row whose sums of products with 127 are finite after they are scaled, with a margin for rounding.
inline float largest_scaled(int64_t depth) {
    return std::numeric_limits<float>::max() / (128.0f * static_cast<float>(std::max<int64_t>(1, depth)));
}

inline Row round_row(const float* h, Products::Integer* to, int64_t depth, int64_t width) {
    ivec sizes = {};
    for (int64_t k = 0; k < depth; k += LANES) sizes = wider(sizes, size_of(load(h + k, lanes_left(k, depth))));
    const float largest = largest_of((vec)sizes);
    const int most = levels(depth);
    const bool usable = largest > LEAST && largest <= largest_scaled(depth) && most;  // not where it is NaN
    if (!usable) {
        std::fill(to, to + width, Products::Integer{});
        const float norm = largest == 0.0f ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        return {0.0f, norm, norm, 0};
    }
    // In units of the scale, whose squares neither vanish nor become infinite.
    const float scale = largest / static_cast<float>(most), inverse = static_cast<float>(most) / largest;
    const float magic = 12582912.0f;  // 1.5 * 2^23: added to it, a number is rounded to an integer in the last bits
    vec norm = {}, rest = {};
    ivec sum = {};
    for (int64_t k = 0; k < depth; k += LANES) {
        const vec x = load(h + k, lanes_left(k, depth)) * inverse, shifted = x + magic, left = x - (shifted - magic);
        const ivec q = (ivec)shifted - (ivec)all(magic);
        norm += x * x;
        rest += left * left;
        sum += q;
        for (int lane = 0; lane < LANES && k + lane < width; ++lane) to[k + lane] = static_cast<Products::Integer>(q[lane]);
    }
    int64_t integers = 0;
    for (int lane = 0; lane < LANES; ++lane) integers += sum[lane];
    // Sums of squares lose at most a roundoff a term; x is off by three of them from h over the scale.
    const float margin = 1.0f + static_cast<float>(depth / LANES + 16) * ROUNDOFF;
    const float size = scale * std::sqrt(total(norm)) * margin;
    return {scale, size, scale * std::sqrt(total(rest)) * margin + 4.0f * ROUNDOFF * size,
            static_cast<int32_t>(static_cast<uint32_t>(Products::OFFSET * integers))};
}

// Where the weight of an output and of a number of depth lies.
inline int64_t place(int64_t output, int64_t k, int64_t width) {
    return ((output / BLOCK * (width / GROUP) + k / GROUP) * BLOCK + output % BLOCK) * GROUP + k % GROUP;
}

// Adds a GROUP of depth, whose weights are those at w and `next` bytes after it, to the sums of a PAIR of outputs.
template <int R>
ALWAYS_INLINE void add_group(ivec (&sums)[2][R], const uint8_t* w, int64_t next, const Products::Integer* h, int64_t width) {
    const ivec w0 = Products::weights(w), w1 = Products::weights(w + next);
    UNROLLED for (int r = 0; r < R; ++r) {
        const ivec value = in_each_lane(h + r * width);
        sums[0][r] = Products::dot(sums[0][r], w0, value);
        sums[1][r] = Products::dot(sums[1][r], w1, value);
    }
}

// The integer sums of the PAIR of outputs whose weights begin at `packed`, for R rows of h.
template <int R>
inline void multiply(ivec (&sums)[2][R], const uint8_t* packed, const Products::Integer* h, int64_t width) {
    constexpr int TURNS = Products::turns(R);
    const int64_t next = place(LANES, 0, width);
    ivec own[TURNS][2][R];
    UNROLLED for (int turn = 0; turn < TURNS; ++turn)
        UNROLLED for (int n = 0; n < 2; ++n)
            UNROLLED for (int r = 0; r < R; ++r) own[turn][n][r] = ivec{};
    int64_t k = 0;
    for (; k + TURNS * GROUP <= width; k += TURNS * GROUP)
        UNROLLED for (int turn = 0; turn < TURNS; ++turn) {
            const int64_t at = k + turn * GROUP;
            add_group(own[turn], packed + at * BLOCK, next, h + at, width);
        }
    for (; TURNS > 1 && k < width; k += GROUP) add_group(own[0], packed + k * BLOCK, next, h + k, width);
    UNROLLED for (int n = 0; n < 2; ++n)
        UNROLLED for (int r = 0; r < R; ++r) {
            sums[n][r] = own[0][n][r];
            // Without a sign: on the way to a sum that 32 bits hold, others may pass over.
            UNROLLED for (int turn = 1; turn < TURNS; ++turn) sums[n][r] = (ivec)((uvec)sums[n][r] + (uvec)own[turn][n][r]);
        }
}

#endif

}  // namespace
