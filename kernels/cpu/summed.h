// Products of float32 in which sums take the place of half of the multiplications, by Winograd's inner product (1968):
// x1 w1 + x2 w2 = (x1 + w2) (x2 + w1) - x1 x2 - w1 w2.
//
// The two products that are taken off again belong to the row alone and to the weights alone, so each is computed once for
// many sums. What is left are one multiplication and two additions where there were two multiplications. A processor of AMD's
// with AVX-512 adds a vector in each cycle beside the one that it multiplies, so five of eight pairs by sums and three by
// products take 0.69 of the cycles of products alone. On Intel's processors both take the same pipes.
//
// Of every 32 k the last 16 are subtracted, (w2 - x1) (x2 - w1), so that what is taken off stays small where all of a row have
// one sign. That such runs are no shorter has a reason: an instruction that reads 2 KB further on in each turn, and lines that are
// read out of their order, get them from the second-level cache at half the rate (Zen 5).
// A row is scaled by a power of two, so that its values are as large as the weights: the roundoff is then that of a product of
// the lengths of both. It is no more than that of products (1 to 1.5 times, as measured) as long as neither the row nor what
// the weights make of it lies in a few values, and the signs of its neighbors take no turns as those of runs do; `prepare`
// marks the rows of which that is not so, and those are multiplied.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matrices.h"
#include "processor.h"
#include "products.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
#define HAS_SUMS 1

// Whether batches of so many units are multiplied by sums: where the processor adds beside its multiplications, and where it
// pays, since with fewer units preparing a row takes more than its products gain. -DBY_SUMS=0 or 1 decides for all.
inline bool multiplies_by_sums(int64_t hidden) {
#if defined(BY_SUMS)
    (void)hidden;
    return BY_SUMS;
#else
    static const bool adds_beside = is_amd();
    return adds_beside && hidden >= 48;
#endif
}

// What is known of packed float32 weights (4H, depth), behind them: of each k the mean square of its weights, their sum over
// all k, and of each block and gate the products of neighbors that sums by pairs have too much.
class Summary {
    float* at;
    int64_t columns;

    static int64_t padded(int64_t depth) { return (depth + LANES - 1) / LANES * LANES; }

public:
    // Pairs of each four k of which gates are summed: i, f, g of the first, f and o of the second.
    static constexpr int FIRST = 0b0111, SECOND = 0b1010;
    static constexpr int64_t GROUP = 4;
    static int64_t whole(int64_t depth) { return depth / GROUP * GROUP; }
    // Whether pairs of the run of LANES k that has this one are subtracted.
    static bool subtracts(int64_t k) { return k / LANES % 2; }

    Summary(const void* packed, int64_t hidden, int64_t depth)
        : at(static_cast<float*>(const_cast<void*>(packed)) + Widened<float>::size(hidden, depth) / 4), columns(padded(depth)) {}
    static int64_t size(int64_t hidden, int64_t depth) {
        return !multiplies_by_sums(hidden) ? 0 : 4 * (padded(depth) + LANES + (hidden + LANES - 1) / LANES * 4 * LANES);
    }
    const float* squares() const { return at; }
    float total() const { return at[columns]; }
    const float* excess(int64_t block) const { return at + columns + LANES + block * 4 * LANES; }

    void fill(const float* weight, const float* packed, int64_t hidden, int64_t depth) {
        float total = 0.0f;
        std::memset(at, 0, 4 * (columns + LANES));
        for (int64_t row = 0; row < 4 * hidden; row += 8)
            for (int64_t k = 0; k < depth; k += LANES) {
                const int n = static_cast<int>(depth - k < LANES ? depth - k : LANES);
                vec sum = {};
                for (int64_t r = row; r < row + 8 && r < 4 * hidden; ++r) {
                    const vec w = load(weight + r * depth + k, n);
                    sum += w * w;
                }
                store(at + k, load(at + k) + sum);
            }
        for (int64_t k = 0; k < depth; ++k) total += at[k] /= static_cast<float>(4 * hidden);
        at[columns] = total;
        for (int64_t block = 0; block < (hidden + LANES - 1) / LANES; ++block) {
            vec sums[4] = {};
            const float* w = packed + block * depth * 4 * LANES;
            for (int64_t k = 0; !half_a_vector(hidden, block) && k < whole(depth); k += GROUP, w += GROUP * 4 * LANES)
                UNROLLED for (int pair = 0; pair < GROUP / 2; ++pair)
                    UNROLLED for (int gate = 0; gate < 4; ++gate)
                        if ((pair ? SECOND : FIRST) >> gate & 1) {
                            const vec product = load(w + (8 * pair + gate) * LANES) * load(w + (8 * pair + 4 + gate) * LANES);
                            sums[gate] += subtracts(k) ? -product : product;
                        }
            for (int gate = 0; gate < 4; ++gate) store(at + columns + LANES + (4 * block + gate) * LANES, sums[gate]);
        }
    }
};

// Weights in float32 with their summary behind them. A row is converted: [how it was scaled, 16 numbers][values].
class Summed {
    struct Head {
        float back;           // what undoes the scale
        float first, second;  // products of neighbors that sums by the first and by the second kind of pair have too much
        uint32_t summed;      // whether sums are precise enough
    };

    const Widened<float> direct;
    const Summary summary;
    const float* packed;
    int64_t hidden, depth;

    static Head head(const float* row) {
        Head found;
        std::memcpy(&found, row, sizeof found);
        return found;
    }

    static int32_t exponent_of(float x) {
        int32_t bits;
        std::memcpy(&bits, &x, 4);
        return bits >> 23;
    }

public:
    static constexpr bool PREPARES = true, TILED = false, THREE_DIVISIONS = false, INTERLEAVES = false;
    static constexpr int AT_ONCE = 5;
    static constexpr int64_t LEAST = 3;  // rows: fewer wait for weights from the second-level cache, not for products
    // How much less precise sums may be by estimate, squared, and how large a value by the mean square of its row. What pairs
    // have too much grows in n steps to `both`: its roundoff, squared, is n both^2 / 3 by that of products, the product of the row's
    // sum of squares and the weights'.
    static constexpr float PRECISION = 4.0f, CREST = 36.0f;
    using Row = const float*;

    Summed(const void* packed, const float* scale, int64_t hidden, int64_t depth)
        : direct(packed, scale, hidden, depth), summary(packed, hidden, depth < 0 ? 0 : depth), packed(static_cast<const float*>(packed)),
          hidden(hidden), depth(depth) {}
    static int64_t size(int64_t hidden, int64_t depth) { return Widened<float>::size(hidden, depth); }
    static int64_t row_bytes(int64_t depth) { return 4 * (LANES + (depth + LANES - 1) / LANES * LANES); }
    static void begin(int64_t) {}
    static void end(int64_t) {}

    const char* groups_of(int64_t block) const { return direct.groups_of(block); }

    Row prepare(const float* from, char* room) const {
        float* const row = reinterpret_cast<float*>(room);
        float* const values = row + LANES;
        const auto lanes = [=](int64_t k) { return static_cast<int>(depth - k < LANES ? depth - k : LANES); };
        __m512 square = {}, weighed = {}, most = {};
        for (int64_t k = 0; k < depth; k += LANES) {
            const __m512 x = (__m512)load(from + k, lanes(k)), x2 = x * x;
            square += x2;
            weighed += x2 * (__m512)load(summary.squares() + k);
            most = _mm512_max_ps(most, x2);
        }
        const float squares = _mm512_reduce_add_ps(square), weights = summary.total(), n = static_cast<float>(depth);
        Head own = {1.0f, 0.0f, 0.0f, 0};
        // Not where a square is infinite, no number, or so small that it has lost digits.
        if (squares > 1e-24f && squares < 1e24f && weights > 1e-24f && weights < 1e24f &&
            squares * weights <= PRECISION * n * _mm512_reduce_add_ps(weighed) && n * _mm512_reduce_max_ps(most) <= CREST * squares) {
            // Of the root of their quotient, to one: the quotient itself may be beyond all floats.
            const int32_t exponent = (exponent_of(weights) - exponent_of(squares)) >> 1;
            const int32_t up = (127 + exponent) << 23, down = (127 - exponent) << 23;
            float by;
            std::memcpy(&by, &up, 4);
            std::memcpy(&own.back, &down, 4);
            __m512 pairs = {};
            for (int64_t k = 0; k < depth; k += LANES) {
                const vec x = load(from + k, lanes(k)) * by;
                store(values + k, x);
                const int64_t whole = Summary::whole(depth) - k;
                const __m512 summed = whole >= LANES ? (__m512)x : _mm512_maskz_mov_ps(first_lanes(whole), (__m512)x);
                const __m512 products = summed * _mm512_permute_ps(summed, 0xb1);
                pairs = Summary::subtracts(k) ? pairs - products : pairs + products;
            }
            own.first = _mm512_mask_reduce_add_ps(0x1111, pairs);
            own.second = _mm512_mask_reduce_add_ps(0x4444, pairs);
            const float scaled = squares * by * by, both = own.first + own.second;
            const float most_pairs = std::max({own.first * own.first, own.second * own.second, both * both});
            own.summed = n * most_pairs <= 3.0f * PRECISION * scaled * weights;
        } else {
            for (int64_t k = 0; k < depth; k += LANES) store(values + k, load(from + k, lanes(k)));
        }
        std::memcpy(row, &own, sizeof own);
        return row;
    }

    // Adds the products of some rows with the weights of a block, and asks for the lines from `ahead` on, if any.
    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block, const char* ahead = nullptr) const {
        bool summed = rows >= LEAST && !half_a_vector(hidden, block);
        for (int r = 0; r < rows; ++r) summed = summed && head(a[r]).summed;
        if (summed) return ahead ? add_sums<true>(rows, sums, a, block, ahead) : add_sums<false>(rows, sums, a, block, ahead);
        Row values[ROWS];
        // Not on a stack, which may be small.
        alignas(64) static thread_local vec own[ROWS][4];
        std::memset(own, 0, sizeof own);
        for (int r = 0; r < rows; ++r) values[r] = a[r] + LANES;
        if (ahead) direct.add_asking(rows, own, values, block, ahead); else direct.add(rows, own, values, block);
        for (int r = 0; r < rows; ++r)
            for (int gate = 0; gate < 4; ++gate) sums[r][gate] += own[r][gate] * head(a[r]).back;
    }

private:
    // As an instruction for integers: that for floats takes the time of an addition on a Zen 4.
    static ALWAYS_INLINE vec in_all(const float* x) {
        vec found;
        asm volatile("vpbroadcastd %1, %0" : "=v"(found) : "m"(*x));
        return found;
    }
    static ALWAYS_INLINE void in_order(vec& to, const float* from) {
        to = load(from);
        asm volatile("" : "+v"(to));
    }

    // Adds two k to the sums of R rows, to those of the gates in SUMMED by sums.
    template <int R, int SUMMED, bool SUBTRACTED>
    static ALWAYS_INLINE void pair(vec (&own)[R][4], const float* const (&x)[R], int64_t k, const float* w) {
        vec w1[4], w2[4];
        // In the order of their addresses, and before all else: see above.
        UNROLLED for (int gate = 0; gate < 4; ++gate) in_order(w1[gate], w + gate * LANES);
        UNROLLED for (int gate = 0; gate < 4; ++gate) in_order(w2[gate], w + (4 + gate) * LANES);
        UNROLLED for (int r = 0; r < R; ++r) {
            const vec x1 = in_all(x[r] + k), x2 = in_all(x[r] + k + 1);
            UNROLLED for (int gate = 0; gate < 4; ++gate)
                if (SUMMED >> gate & 1) {
                    const vec left = SUBTRACTED ? w2[gate] - x1 : w2[gate] + x1, right = SUBTRACTED ? x2 - w1[gate] : x2 + w1[gate];
                    own[r][gate] += left * right;
                } else {
                    own[r][gate] += x1 * w1[gate];
                    own[r][gate] += x2 * w2[gate];
                }
        }
    }

    // Adds the k up to `end`, which is a whole number of groups away.
    template <int R, bool ASKS, bool SUBTRACTED>
    static ALWAYS_INLINE void run(vec (&own)[R][4], const float* const (&x)[R], int64_t& k, int64_t end, const float*& w,
                                  const char* ahead) {
        for (; k < end; k += Summary::GROUP, w += Summary::GROUP * 4 * LANES) {
            for (int line = 0; ASKS && line < LINES * Summary::GROUP; ++line) __builtin_prefetch(ahead + (k * LINES + line) * 64, 0, 2);
            pair<R, Summary::FIRST, SUBTRACTED>(own, x, k, w);
            pair<R, Summary::SECOND, SUBTRACTED>(own, x, k + 2, w + 8 * LANES);
        }
    }

    // In a function of its own, whose registers are full.
    template <int R, bool ASKS>
    __attribute__((noinline)) void add_sums(vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block, const char* ahead) const {
        const float* w = packed + block * depth * 4 * LANES;
        const float* x[R];
        vec own[R][4] = {};
        UNROLLED for (int r = 0; r < R; ++r) x[r] = a[r] + LANES;
        int64_t k = 0;
        for (const int64_t whole = Summary::whole(depth); k < whole;)
            if (const int64_t end = k + LANES < whole ? k + LANES : whole; Summary::subtracts(k))
                run<R, ASKS, true>(own, x, k, end, w, ahead);
            else
                run<R, ASKS, false>(own, x, k, end, w, ahead);
        for (; k < depth; ++k, w += 4 * LANES)
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int gate = 0; gate < 4; ++gate) own[r][gate] += in_all(x[r] + k) * load(w + gate * LANES);
        const float* const excess = summary.excess(block);
        UNROLLED for (int r = 0; r < R; ++r) {
            const Head of = head(a[r]);
            const float more[4] = {of.first, of.first + of.second, of.first, of.second};
            UNROLLED for (int gate = 0; gate < 4; ++gate)
                sums[r][gate] += (own[r][gate] - (load(excess + gate * LANES) + more[gate])) * of.back;
        }
    }

    template <bool ASKS>
    void add_sums(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block, const char* ahead) const {
        switch (rows) {
            case 3: return add_sums<3, ASKS>(sums, a, block, ahead);
            case 4: return add_sums<4, ASKS>(sums, a, block, ahead);
            default: return add_sums<5, ASKS>(sums, a, block, ahead);
        }
    }
};
#endif

// Rows of a thread from which on float32 is multiplied by sums; beyond all numbers of rows where it never is.
inline int64_t sums_from_rows(int64_t hidden) {
#if defined(HAS_SUMS)
    if (multiplies_by_sums(hidden)) return Summed::LEAST;
#endif
    (void)hidden;
    return INT64_MAX;
}

// Bytes of the summary behind a packed matrix, and what is written there.
template <typename M>
int64_t summary_bytes(int64_t hidden, int64_t depth) {
#if defined(HAS_SUMS)
    if constexpr (std::is_same_v<M, Widened<float>>) return Summary::size(hidden, depth);
#endif
    (void)hidden, (void)depth;
    return 0;
}
template <typename M>
void summarize(const float* weight, void* packed, int64_t hidden, int64_t depth) {
#if defined(HAS_SUMS)
    if constexpr (std::is_same_v<M, Widened<float>>)
        if (multiplies_by_sums(hidden)) Summary(packed, hidden, depth).fill(weight, static_cast<const float*>(packed), hidden, depth);
#endif
    (void)weight, (void)packed, (void)hidden, (void)depth;
}

}  // namespace
