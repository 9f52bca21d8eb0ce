// Packed weights and how rows of float32 are multiplied with them: one type for each way to keep weights and each kind
// of instructions that a processor has for it. All of them share one interface, so a walk through time is written once.
//
// A type converts a row with `prepare` (PREPARES) or reads it where it lies, and `add` adds the products of up to AT_ONCE
// rows with the weights of a block of LANES hidden units, gates i, f, g, o, to sums in float32.
//
// Where a type INTERLEAVES (interleaved.h), or one sequence has the walk of overlapped.h, the parts of `add` can be had one by
// one: weights and rows are groups of k, a group of a row has one or two WORDS of four bytes, and `dot` multiplies a word with
// a group's weights of one gate. APART sums of a gate hide the latency of an addition where there is one row.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "integers.h"
#include "pairs.h"
#include "products.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// How weights are kept: what Python calls fp32, bf16, int8, split, bf16-trained (bf16 with gradients) and w8a8.
enum Kept : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, SPLIT = 3, BF16_TRAINED = 4, W8A8 = 5 };

// The walks of one way to keep weights take a third of the time to compile that all of them take, and a program seldom needs
// two. So they are compiled apart: -DPART=n is for weights kept as n alone. Without it all are here.
#if defined(PART)
constexpr bool WHOLE = false;
constexpr bool in_part(int64_t kept) { return kept == PART; }
#else
constexpr bool WHOLE = true;
constexpr bool in_part(int64_t) { return true; }
#endif

// What weights that are multiplied in float32 have in common: rows stay where they lie, and a group is one k.
struct FloatGroups {
    static constexpr bool PREPARES = false, TILED = false;
    static constexpr int WORDS = 1, APART = 2;
    using Row = const float*;
    using Sum = vec;
    using Word = vec;

    static int64_t row_bytes(int64_t) { return 0; }
    static void begin(int64_t) {}
    static void end(int64_t) {}
    Row prepare(const float* from, char*) const { return from; }

    static int64_t groups(int64_t depth) { return depth; }
    ALWAYS_INLINE void start(Sum (&sums)[WORDS][4], int64_t) const {
        UNROLLED for (int gate = 0; gate < 4; ++gate) sums[0][gate] = vec{};
    }
    const char* words(Row row, int) const { return reinterpret_cast<const char*>(row); }
    static ALWAYS_INLINE Word word(const char* p) {
        float x;
        std::memcpy(&x, p, 4);
        return all(x);
    }
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, vec weights) { return sum + word * weights; }
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, const char* weights) {
        return sum + word * load(reinterpret_cast<const float*>(weights));
    }
    ALWAYS_INLINE void finish(vec (&to)[4], const Sum (&sums)[WORDS][4], Row, int64_t) const {
        UNROLLED for (int gate = 0; gate < 4; ++gate) to[gate] += sums[0][gate];
    }
};

// Weights of type W, widened to float32 as they are read. `scale` (4H,) belongs to int8 and is null otherwise.
template <typename W>
class Widened : public FloatGroups {
    const W* packed;
    const float* scale;
    int64_t hidden, depth;
    static constexpr bool SHARES = HALVES && std::is_same_v<W, float>;  // two gates a vector, where few units are left

public:
    static constexpr bool THREE_DIVISIONS = false, INTERLEAVES = std::is_same_v<W, float> && LANES == 16;
    static constexpr int AT_ONCE = ROWS;

    Widened(const void* packed, const float* scale, int64_t hidden, int64_t depth)
        : packed(static_cast<const W*>(packed)), scale(scale), hidden(hidden), depth(depth) {}
    static int64_t size(int64_t hidden, int64_t depth) {
        const int64_t blocks = (hidden + LANES - 1) / LANES;
        const int64_t vectors = 4 * blocks - (SHARES && blocks && half_a_vector(hidden, blocks - 1) ? 2 : 0);
        return vectors * LANES * depth * static_cast<int64_t>(sizeof(W));
    }
    static bool whole_blocks(int64_t hidden) { return !SHARES || !half_a_vector(hidden, (hidden - 1) / LANES); }
    const char* groups_of(int64_t block) const {
        return reinterpret_cast<const char*>(packed + block * depth * 4 * LANES);
    }

    // `add` to sums of a whole block of float32 which asks for the lines from `ahead` on meanwhile. In a function of its own:
    // inlined, it would take registers from the loops around it.
    __attribute__((noinline)) void add_asking(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block,
                                              const char* ahead) const {
        product<4, true>(rows, sums, a, depth, packed + block * depth * 4 * LANES, 4 * LANES, LANES, ahead);
    }

    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        const W* weights = packed + block * depth * 4 * LANES;
        if (SHARES && half_a_vector(hidden, block)) {
            vec own[ROWS][4] = {};
            product<2>(rows, own, a, depth, weights, 2 * LANES, LANES);
            for (int r = 0; r < rows; ++r)
                for (int v = 0; v < 2; ++v) {
                    sums[r][2 * v] += own[r][v];
                    sums[r][2 * v + 1] += upper_half(own[r][v]);
                }
            return;
        }
        // Of float32 there is no scale; said here, it spares the stack what the rest takes.
        if (std::is_same_v<W, float> || !scale) return product<4>(rows, sums, a, depth, weights, 4 * LANES, LANES);
        vec own[ROWS][4] = {};
        product<4>(rows, own, a, depth, weights, 4 * LANES, LANES);
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
        for (int gate = 0; gate < 4; ++gate) {
            const vec by = load(scale + gate * hidden + unit, n);
            for (int r = 0; r < rows; ++r) sums[r][gate] += own[r][gate] * by;
        }
    }
};

// The order of int8 weights that are multiplied as integers: [block][start as int32, then 4 k at a time][gate][lane][4 k],
// zeros past the end of k.
struct Int8Order {
    static constexpr int64_t VECTOR = 4 * LANES, GROUP = 4 * VECTOR;
    // Bytes from a group's weights of gates i and f to those of g and o.
    static constexpr int64_t apart(int64_t) { return 2 * VECTOR; }
    // Sums of products of an unsigned and a signed byte stay in 32 bits: 65536 * 255 * 127 < 2^31.
    static constexpr int64_t DEEPEST = 65536;

    static int64_t groups(int64_t depth) { return (depth + 3) / 4; }
    static int64_t size(int64_t hidden, int64_t depth) {
        return (hidden + LANES - 1) / LANES * (1 + groups(depth)) * 4 * VECTOR;
    }
    // Where the weight of a unit's gate and k stands, and the start of its sum.
    static int64_t place(int64_t depth, int64_t unit, int gate, int64_t k) {
        return (((unit / LANES) * (1 + groups(depth)) + 1 + k / 4) * 4 + gate) * VECTOR + unit % LANES * 4 + k % 4;
    }
    static int64_t place_of_start(int64_t depth, int64_t unit, int gate) { return place(depth, unit, gate, 0) - 4 * VECTOR; }
};

// -DWIDEN builds without integer and bf16 products, as for a processor without them.
#if !defined(WIDEN) && defined(HAS_INTEGERS)
// int8 weights with a scale per row, multiplied as integers by rows of float32 that get a scale of their own, by their largest
// value. All sums are exact, so what errs is the rounding. The offset that makes a row's bytes unsigned leaves again with the
// start of a sum, which is as many times the sum of a row of weights.
class IntegerWeights : public Int8Order {
protected:
    const int8_t* packed;
    const float* scale;
    int64_t hidden, depth;

    static int64_t padded(int64_t depth) { return (depth + LANES - 1) / LANES * LANES; }
    const int8_t* starts_of(int64_t block) const { return packed + block * (1 + groups(depth)) * 4 * VECTOR; }
    vec vector(const float* from, int64_t k) const {
        return load(from + k, static_cast<int>(depth - k < LANES ? depth - k : LANES));
    }

public:
    static constexpr bool PREPARES = true, TILED = false, THREE_DIVISIONS = true;
    using Row = const char*;  // scale, [64] numbers
    using Sum = ivec;
    using Word = ivec;

    IntegerWeights(const void* packed, const float* scale, int64_t hidden, int64_t depth)
        : packed(static_cast<const int8_t*>(packed)), scale(scale), hidden(hidden), depth(depth) {}
    static void begin(int64_t) {}
    static void end(int64_t) {}

    static bool whole_blocks(int64_t) { return true; }
    const char* groups_of(int64_t block) const { return reinterpret_cast<const char*>(starts_of(block)) + 4 * VECTOR; }
    template <int PARTS>
    ALWAYS_INLINE void start(Sum (&sums)[PARTS][4], int64_t block) const {
        UNROLLED for (int part = 0; part < PARTS; ++part)
            UNROLLED for (int gate = 0; gate < 4; ++gate)
                sums[part][gate] = part ? Sum{} : load_integers(starts_of(block) + gate * VECTOR);
    }
    static ALWAYS_INLINE Word word(const char* p) { return in_each_lane(p); }
    template <int PARTS>
    ALWAYS_INLINE void finish(vec (&to)[4], const Sum (&sums)[PARTS][4], Row row, int64_t block) const {
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
        float unit_of_row;
        std::memcpy(&unit_of_row, row, 4);
        UNROLLED for (int gate = 0; gate < 4; ++gate) {
            vec sum = __builtin_convertvector(sums[0][gate], vec);
            UNROLLED for (int part = 1; part < PARTS; ++part)
                sum = sum * 256.0f + __builtin_convertvector(sums[part][gate], vec);
            to[gate] += sum * (load(scale + gate * hidden + unit, n) * unit_of_row);
        }
    }
};
#endif

#if !defined(WIDEN) && defined(HAS_FOUR_BYTES)
#define HAS_BYTES 1

// By vpdpbusd: a value q of a row has 8 bits (PARTS 1) or 16 (PARTS 2), as unsigned bytes: q + 128, or the high and the low byte
// of q + 32768. What errs is the rounding of a row to 2^-8 or 2^-16 of its largest value, and of weights to 2^-8.
template <int PARTS>
class Bytes : public IntegerWeights {
    static constexpr int MOST_SUMS = LANES == 16 ? 24 : 12;  // that registers hold

public:
    static constexpr bool INTERLEAVES = LANES == 16;
    static constexpr int WORDS = PARTS, APART = 3;
    static constexpr int AT_ONCE = PARTS == 1 ? ROWS : 3;
    static constexpr int LARGEST = PARTS == 1 ? 127 : 32767;
    static constexpr int64_t START = -128;

    using IntegerWeights::IntegerWeights;
    static int64_t row_bytes(int64_t depth) { return 64 + (PARTS * padded(depth) + 63) / 64 * 64; }

    const char* words(Row row, int part) const { return row + 64 + part * padded(depth); }
    // Four products a lane.
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, vec weights) {
        add_four_bytes(sum, word, (ivec)weights);
        return sum;
    }
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, const char* weights) {
        add_four_bytes(sum, word, weights);
        return sum;
    }

    // The low bytes, if any, begin `apart` bytes after the high ones.
    Row prepare(const float* from, char* room) const { return prepare(from, room, padded(depth)); }
    Row prepare(const float* from, char* room, int64_t apart) const {
        const RowScale scale(from, depth, LARGEST);
        std::memcpy(room, &scale.unit, 4);
        char* const high = room + 64;
        for (int64_t k = 0; k < depth; k += LANES) {
            const ivec q = nearest(vector(from, k) * scale.by) + (LARGEST + 1);
            store_bytes(high + (PARTS - 1) * apart + k, q);
            if constexpr (PARTS == 2) store_bytes(high + k, q >> 8);
        }
        return room;
    }

    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        add(rows, sums, a, block, padded(depth));
    }
    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block, int64_t between) const {
        switch (rows) {
            case 1: return add<1>(sums, a, block, between);
            case 2: return add<2>(sums, a, block, between);
            case 4: return add<AT_ONCE < 4 ? AT_ONCE : 4>(sums, a, block, between);
            case 5: return add<AT_ONCE < 5 ? AT_ONCE : 5>(sums, a, block, between);
            case 6: return add<AT_ONCE>(sums, a, block, between);
            default: return add<3>(sums, a, block, between);
        }
    }

private:
    static ALWAYS_INLINE vec weights_at(const int8_t* w) {
        vec x = load(reinterpret_cast<const float*>(w));
        in_register(x);
        return x;
    }

    // Adds a group of k to the sums of some gates of R rows.
    template <int R, int GATES>
    static ALWAYS_INLINE void group(Sum (&own)[R][PARTS][GATES], const char* const (&bytes)[R][PARTS], const int8_t* w, int64_t k) {
        if constexpr (GATES == 4) {
            Word words[R][PARTS];
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int part = 0; part < PARTS; ++part) words[r][part] = word(bytes[r][part] + 4 * k);
            UNROLLED for (int gate = 0; gate < GATES; ++gate) {
                const vec weights = weights_at(w + (4 * k + gate) * VECTOR);
                UNROLLED for (int r = 0; r < R; ++r)
                    UNROLLED for (int part = 0; part < PARTS; ++part)
                        own[r][part][gate] = dot(own[r][part][gate], words[r][part], weights);
            }
        } else {  // fewer registers, so weights stay in them and not all words
            const vec weights[2] = {weights_at(w + 4 * k * VECTOR), weights_at(w + (4 * k + 1) * VECTOR)};
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int part = 0; part < PARTS; ++part) {
                    const Word x = word(bytes[r][part] + 4 * k);
                    UNROLLED for (int gate = 0; gate < GATES; ++gate)
                        own[r][part][gate] = dot(own[r][part][gate], x, weights[gate]);
                }
        }
    }

    // Sums of R rows for GATES of the gates.
    template <int FIRST, int GATES, int R>
    void multiply(Sum (&total)[R][PARTS][4], const char* const (&bytes)[R][PARTS], int64_t block) const {
        // Few rows have too few sums to hide the latency of an instruction, so their groups are summed in turns.
        constexpr int SUMS = R * PARTS * GATES, ENOUGH = LANES == 16 ? 16 : 12, TURNS = SUMS < ENOUGH ? ENOUGH / SUMS : 1;
        empty_registers();
        const int8_t* w = starts_of(block) + FIRST * VECTOR;
        Sum own[TURNS][R][PARTS][GATES];
        UNROLLED for (int turn = 0; turn < TURNS; ++turn)
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int part = 0; part < PARTS; ++part)
                    UNROLLED for (int gate = 0; gate < GATES; ++gate)
                        own[turn][r][part][gate] = turn || part ? Sum{} : load_integers(w + gate * VECTOR);
        w += 4 * VECTOR;
        const int64_t count = groups(depth);
        int64_t k = 0;
        for (; k + TURNS <= count; k += TURNS)
            UNROLLED for (int turn = 0; turn < TURNS; ++turn) group(own[turn], bytes, w, k + turn);
        for (; TURNS > 1 && k < count; ++k) group(own[0], bytes, w, k);
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int part = 0; part < PARTS; ++part)
                UNROLLED for (int gate = 0; gate < GATES; ++gate) {
                    total[r][part][FIRST + gate] = own[0][r][part][gate];
                    UNROLLED for (int turn = 1; turn < TURNS; ++turn) total[r][part][FIRST + gate] += own[turn][r][part][gate];
                }
    }

    template <int R>
    void add(vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block, int64_t between) const {
        const char* bytes[R][PARTS];
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int part = 0; part < PARTS; ++part) bytes[r][part] = a[r] + 64 + part * between;
        Sum total[R][PARTS][4];
        if constexpr (R * PARTS * 4 <= MOST_SUMS) {
            multiply<0, 4>(total, bytes, block);
        } else {
            multiply<0, 2>(total, bytes, block);
            multiply<2, 2>(total, bytes, block);
        }
        UNROLLED for (int r = 0; r < R; ++r) finish(sums[r], total[r], a[r], block);
    }
};

// What multiplies h.
using StateInBytes = Bytes<1>;
#endif

#if defined(HAS_PAIRS)
// bf16 weights, multiplied two at a time with rows rounded to bf16; sums are float32.
//
// Order: [block][2 k at a time][gate][lane][2 k], a zero past an odd end of k.
class Pairs {
    const uint16_t* packed;
    int64_t depth;

public:
    static constexpr bool PREPARES = true, TILED = false, THREE_DIVISIONS = true, INTERLEAVES = true;
    static constexpr int AT_ONCE = ROWS, WORDS = 1;
    using Row = const uint16_t*;
    using Sum = __m512;
    using Word = __m512bh;

    Pairs(const void* packed, const float*, int64_t, int64_t depth)
        : packed(static_cast<const uint16_t*>(packed)), depth(depth) {}
    static int64_t size(int64_t hidden, int64_t depth) {
        return (hidden + LANES - 1) / LANES * groups(depth) * 4 * PAIR_VECTOR * 2;
    }
    static int64_t row_bytes(int64_t depth) { return (2 * depth + 63) / 64 * 64; }
    static void begin(int64_t) {}
    static void end(int64_t) {}

    Row prepare(const float* from, char* room) const {
        uint16_t* const to = reinterpret_cast<uint16_t*>(room);
        for (int64_t k = 0; k < depth; k += LANES) {
            const vec x = load(from + k, static_cast<int>(depth - k < LANES ? depth - k : LANES));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), (__m256i)_mm512_cvtneps_pbh((__m512)x));
        }
        return to;
    }

    static bool whole_blocks(int64_t) { return true; }
    static int64_t groups(int64_t depth) { return (depth + 1) / 2; }
    const char* groups_of(int64_t block) const {
        return reinterpret_cast<const char*>(packed + block * groups(depth) * 4 * PAIR_VECTOR);
    }
    ALWAYS_INLINE void start(Sum (&sums)[WORDS][4], int64_t) const {
        UNROLLED for (int gate = 0; gate < 4; ++gate) sums[0][gate] = Sum{};
    }
    const char* words(Row row, int) const { return reinterpret_cast<const char*>(row); }
    static ALWAYS_INLINE Word word(const char* p) { return pair_of(reinterpret_cast<const uint16_t*>(p)); }
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, vec weights) { return _mm512_dpbf16_ps(sum, (__m512bh)weights, word); }
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, const char* weights) {
        return dot(sum, word, load(reinterpret_cast<const float*>(weights)));
    }
    ALWAYS_INLINE void finish(vec (&to)[4], const Sum (&sums)[WORDS][4], Row, int64_t) const {
        UNROLLED for (int gate = 0; gate < 4; ++gate) to[gate] += (vec)sums[0][gate];
    }

    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        const uint16_t* w = packed + block * groups(depth) * 4 * PAIR_VECTOR;
        pair_product<4>(rows, sums, a, groups(depth), w, 4 * PAIR_VECTOR, PAIR_VECTOR);
    }
};
#endif

}  // namespace
