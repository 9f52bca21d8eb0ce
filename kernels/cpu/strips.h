// Weights in float32 for processors with AVX2 alone, in strips of two gates, each of which is read from one end to the other.
//
// Sixteen registers hold the sums of six rows by two vectors, or of three by four. The first reads weights half as often, and
// only as a stream: where the lines of two other gates lie between, lines from the third-level cache take a sixth longer than
// the products of four rows (Zen 3). One to three rows have too few sums for strips, and read two of them at a time.

#pragma once

#include <cstdint>

#include "matrices.h"
#include "vectors.h"

namespace {

#if defined(HAS_STRIPS)

// Order: [block][gates i and f, g and o][k][gate][lane].
class Strips : public FloatGroups {
    const float* packed;
    int64_t depth;

    static constexpr int64_t GATES = 4 * LANES, STEP = 2 * LANES;  // numbers of four gates, and of a k of a strip

public:
    static constexpr bool THREE_DIVISIONS = true, INTERLEAVES = false;
    static constexpr int AT_ONCE = 6;
    static constexpr int64_t GROUP = 4 * STEP;  // bytes of a strip's group

    Strips(const void* packed, const float*, int64_t, int64_t depth) : packed(static_cast<const float*>(packed)), depth(depth) {}
    static int64_t size(int64_t hidden, int64_t depth) { return (hidden + LANES - 1) / LANES * 4 * LANES * depth * 4; }
    static bool whole_blocks(int64_t) { return true; }
    const char* groups_of(int64_t block) const { return reinterpret_cast<const char*>(strips_of(block)); }
    int64_t block_bytes() const { return 2 * apart(depth); }
    // Bytes from the weights of gates i and f to those of g and o.
    static int64_t apart(int64_t depth) { return depth * GROUP; }

    void add(int rows, vec (&sums)[AT_ONCE][4], const Row (&a)[AT_ONCE], int64_t block) const {
        float* const at = reinterpret_cast<float*>(sums);
        add(rows, at, at, GATES, a, block);
    }
    // The same to numbers of [row][gate][lane], which begin as those at `begin` whose rows are `each` apart.
    void add(int rows, float* at, const float* begin, int64_t each, const Row (&a)[AT_ONCE], int64_t block) const {
        if (rows < FEW) add_few(rows, at, begin, each, a, block);
        for (int64_t strip = 0; rows >= FEW && strip < 2; ++strip) add_strip(rows, at, begin, each, a, block, strip);
    }
    // Rows from which one strip has sums enough to hide the latency of an addition.
    static constexpr int FEW = 4;
    void add_strip(int rows, float* at, const float* begin, int64_t each, const Row (&a)[AT_ONCE], int64_t block,
                   int64_t strip) const {
        const float* const w = strips_of(block) + strip * depth * STEP;
        at += strip * STEP, begin += strip * STEP;
        switch (rows) {
            case 4: return one_strip<4>(at, begin, each, a, w);
            case 5: return one_strip<5>(at, begin, each, a, w);
            default: return one_strip<6>(at, begin, each, a, w);
        }
    }
    void add_few(int rows, float* at, const float* begin, int64_t each, const Row (&a)[AT_ONCE], int64_t block) const {
        const float* const w = strips_of(block);
        switch (rows) {
            case 1: return one_row(at, begin, a[0], w);
            case 2: return both_strips<2>(at, begin, each, a, w);
            default: return both_strips<3>(at, begin, each, a, w);
        }
    }

private:
    const float* strips_of(int64_t block) const { return packed + block * depth * 2 * STEP; }

    // Even and odd k are summed apart, since four sums are too few to hide the latency of an addition.
    void one_row(float* at, const float* begin, const float* x, const float* w) const {
        const float* const other = w + depth * STEP;
        vec even[4], odd[4] = {};
        UNROLLED for (int gate = 0; gate < 4; ++gate) even[gate] = load(begin + gate * LANES);
        const auto add = [&](vec (&own)[4], int64_t k) {
            UNROLLED for (int gate = 0; gate < 2; ++gate) own[gate] += all(x[k]) * load(w + k * STEP + gate * LANES);
            UNROLLED for (int gate = 0; gate < 2; ++gate) own[2 + gate] += all(x[k]) * load(other + k * STEP + gate * LANES);
        };
        int64_t k = 0;
        for (; k + 1 < depth; k += 2) {
            add(even, k);
            add(odd, k + 1);
        }
        if (k < depth) add(even, k);
        UNROLLED for (int gate = 0; gate < 4; ++gate) store(at + gate * LANES, even[gate] + odd[gate]);
    }

    // Both in functions of their own, whose registers are full.
    template <int R>
    __attribute__((noinline)) void both_strips(float* at, const float* begin, int64_t each, const Row (&a)[AT_ONCE],
                                               const float* w) const {
        const float* const other = w + depth * STEP;
        vec own[R][4];
        const float* from[R];
        UNROLLED for (int r = 0; r < R; ++r) {
            from[r] = a[r];
            UNROLLED for (int gate = 0; gate < 4; ++gate) own[r][gate] = load(begin + r * each + gate * LANES);
        }
        for (int64_t k = 0; k < depth; ++k) {
            vec x[R];
            UNROLLED for (int r = 0; r < R; ++r) x[r] = all(from[r][k]);
            UNROLLED for (int gate = 0; gate < 4; ++gate) {
                vec weights = load((gate < 2 ? w : other) + k * STEP + gate % 2 * LANES);
                in_register(weights);
                UNROLLED for (int r = 0; r < R; ++r) own[r][gate] += x[r] * weights;
            }
        }
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int gate = 0; gate < 4; ++gate) store(at + r * GATES + gate * LANES, own[r][gate]);
    }

    template <int R>
    __attribute__((noinline)) void one_strip(float* at, const float* begin, int64_t each, const Row (&a)[AT_ONCE],
                                             const float* w) const {
        vec own[R][2];
        const float* from[R];
        UNROLLED for (int r = 0; r < R; ++r) {
            from[r] = a[r];
            UNROLLED for (int v = 0; v < 2; ++v) own[r][v] = load(begin + r * each + v * LANES);
        }
        for (int64_t k = 0; k < depth; ++k) {
            vec weights[2] = {load(w + k * STEP), load(w + k * STEP + LANES)};
            in_register(weights[0]);
            in_register(weights[1]);
            UNROLLED for (int r = 0; r < R; ++r) {
                const vec x = all(from[r][k]);
                UNROLLED for (int v = 0; v < 2; ++v) own[r][v] += x * weights[v];
            }
        }
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < 2; ++v) store(at + r * GATES + v * LANES, own[r][v]);
    }
};

// weight (4H, depth), eight rows at a time, to the order of strips with zeros past H.
inline void pack(Strips*, const float* weight, void* packed, float*, int64_t hidden, int64_t depth) {
    for (int64_t block = 0; block < (hidden + LANES - 1) / LANES; ++block)
        for (int64_t gate = 0; gate < 4; ++gate) {
            float* const strip = static_cast<float*>(packed) + ((2 * block + gate / 2) * depth * 2 + gate % 2) * LANES;
            for (int64_t k = 0; k < depth; k += LANES) {
                const int n = static_cast<int>(depth - k < LANES ? depth - k : LANES);
                __m256 r[LANES];
                UNROLLED for (int lane = 0; lane < LANES; ++lane) {
                    const int64_t unit = block * LANES + lane;
                    r[lane] = unit < hidden ? (__m256)load(weight + (gate * hidden + unit) * depth + k, n) : __m256{};
                }
                transpose(r);
                UNROLLED for (int i = 0; i < LANES; ++i)
                    if (i < n) store(strip + (k + i) * 2 * LANES, (vec)r[i]);
            }
        }
}

// Weights in float32, as the processor multiplies them.
using FloatWeights = Strips;
#else
using FloatWeights = Widened<float>;
#endif

}  // namespace
