// int8 weights multiplied as integers where a processor has AVX2 or AVX-512, and no instruction that multiplies bytes and adds
// the products to sums of 32 bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "integers.h"
#include "matrices.h"
#include "vectors.h"

#if !defined(WIDEN) && defined(HAS_INTEGERS) && !defined(HAS_BYTES)
#define HAS_PAIRED_BYTES 1

namespace {

// What errs is the rounding: of weights to 2^-8, and of a row as its type says.
//
// - 7 bits, of h: vpmaddubsw multiplies unsigned bytes q + 64, from 0 to 128, by signed ones and adds two products in 16
//   bits, which hold 2 * 128 * 127; vpmaddwd by ones adds two of these.
// - 16 bits, of the input, whose values may lie far apart: vpmaddwd multiplies by weights widened to 16 bits and adds two
//   products in 32 bits. A row has as many levels as its sum has room for: 32767 up to 516 columns, 8256 for 2048.
template <int BITS>
class PairedBytes : public IntegerWeights {
    static constexpr bool WIDE = BITS == 16;
    static constexpr int64_t EACH = WIDE ? 2 : 1;            // bytes of a number
    static constexpr int MOST_SUMS = LANES == 16 ? 24 : 12;  // that registers hold

public:
    static constexpr bool INTERLEAVES = false;
    static constexpr int AT_ONCE = ROWS, WORDS = 1, APART = 1;
    static constexpr int64_t START = -64;

    using IntegerWeights::IntegerWeights;
    static int64_t row_bytes(int64_t depth) { return 64 + (EACH * padded(depth) + 63) / 64 * 64; }

    // The integer that a row's largest value becomes.
    static int64_t largest_of(int64_t depth) {
        return WIDE ? std::min<int64_t>(32767, INT32_MAX / (127 * std::max<int64_t>(depth, 1))) : -START;
    }

    Row prepare(const float* from, char* room) const {
        const RowScale scale(from, depth, static_cast<float>(largest_of(depth)));
        std::memcpy(room, &scale.unit, 4);
        for (int64_t k = 0; k < depth; k += LANES) {
            const ivec q = nearest(vector(from, k) * scale.by);
            if constexpr (WIDE) store_words(room + 64 + 2 * k, q);
            else store_bytes(room + 64 + k, q - static_cast<int>(START));
        }
        return room;
    }

    const char* words(Row row, int) const { return row + 64; }
    // Four products of 7 bits a lane.
    static Sum dot(Sum sum, Word word, const char* weights) { return dot(sum, word, load_integers(weights)); }

    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const { some_rows(rows, sums, a, block); }

private:
    static Sum dot(Sum sum, Word word, ivec weights) {
        add_to(sum, two_words(two_bytes(word, weights), words_of_ones()));
        return sum;
    }

    // What was read from memory must be read again: rather that than a sum on the stack.
    static void forget() { asm volatile("" ::: "memory"); }

    template <int R = ROWS>
    void some_rows(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        if (rows == R) return add<R>(sums, a, block);
        if constexpr (R > 1) some_rows<R - 1>(rows, sums, a, block);
    }

    // In a function of its own: inlined into a walk, GCC 12 would keep its sums on the stack.
    template <int R>
    __attribute__((noinline)) void add(vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        const char* numbers[R];
        UNROLLED for (int r = 0; r < R; ++r) numbers[r] = words(a[r], 0);
        Sum total[R][WORDS][4];
        if constexpr (!WIDE) {
            multiply(total, numbers, block);
        } else if constexpr (R * 8 <= MOST_SUMS) {
            multiply<0, 4>(total, numbers, block);
        } else {
            multiply<0, 2>(total, numbers, block);
            multiply<2, 2>(total, numbers, block);
        }
        UNROLLED for (int r = 0; r < R; ++r) finish(sums[r], total[r], a[r], block);
    }

    // Sums of R rows of 7 bits. With three rows, or six of AVX-512, all registers are taken, so each word is read anew for each
    // gate.
    template <int R>
    void multiply(Sum (&total)[R][WORDS][4], const char* const (&numbers)[R], int64_t block) const {
        empty_registers();
        const int64_t count = groups(depth);
        Sum own[R][WORDS][4];
        UNROLLED for (int r = 0; r < R; ++r) start(own[r], block);
        const int8_t* w = starts_of(block) + 4 * VECTOR;
        for (int64_t k = 0; k < count; ++k, w += 4 * VECTOR)
            UNROLLED for (int gate = 0; gate < 4; ++gate) {
                const ivec weights = load_integers(w + gate * VECTOR);
                UNROLLED for (int r = 0; r < R; ++r)
                    own[r][0][gate] = dot(own[r][0][gate], word(numbers[r] + 4 * k), weights);
                if (R > 1) forget();
            }
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int gate = 0; gate < 4; ++gate) total[r][0][gate] = own[r][0][gate];
    }

    // Sums of R rows of 16 bits for GATES of the gates: widened, the weights of four k of a unit fill two lanes, whose sums
    // are added at the end. More gates at a time would take more sums than there are registers.
    template <int FIRST, int GATES, int R>
    void multiply(Sum (&total)[R][WORDS][4], const char* const (&numbers)[R], int64_t block) const {
        constexpr int MOST_WORDS = LANES == 16 ? 4 : 2;  // that stay in registers
        constexpr int KEPT_ROWS = R < MOST_WORDS ? R : MOST_WORDS;
        empty_registers();
        const int64_t count = groups(depth);
        Sum own[R][GATES][2];
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int g = 0; g < GATES; ++g) own[r][g][0] = own[r][g][1] = Sum{};
        const int8_t* w = starts_of(block) + (4 + FIRST) * VECTOR;
        for (int64_t k = 0; k < count; ++k, w += 4 * VECTOR) {
            ivec kept[KEPT_ROWS];
            UNROLLED for (int r = 0; r < KEPT_ROWS; ++r) kept[r] = in_each_two_lanes(numbers[r] + 8 * k);
            UNROLLED for (int i = 0; i < 2 * GATES; ++i) {
                const ivec weights = widened_bytes(w + i * (VECTOR / 2));
                UNROLLED for (int r = 0; r < R; ++r) {
                    const ivec x = r < KEPT_ROWS ? kept[r < KEPT_ROWS ? r : 0] : in_each_two_lanes(numbers[r] + 8 * k);
                    add_to(own[r][i / 2][i % 2], two_words(weights, x));
                }
                if (R > KEPT_ROWS) forget();
            }
        }
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int g = 0; g < GATES; ++g) total[r][0][FIRST + g] = sums_of_pairs(own[r][g][0], own[r][g][1]);
    }
};

}  // namespace
#endif
