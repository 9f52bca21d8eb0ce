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
#if !defined(__AVX512F__)
#define HAS_PAIRED_PRODUCTS 1
#endif

namespace {

#if defined(HAS_PAIRED_PRODUCTS)
// A part of a block of weights in 16 bits: [two k at a time][gate][lane][two k].
struct WidenedBlock {
    static constexpr int64_t DEPTH = 256;  // so that it stays in the first-level cache, beside rows
    static constexpr int64_t BYTES = 4 * LANES * DEPTH * 2;
};
#endif

// What errs is the rounding: of weights to 2^-8, and of a row as its type says.
//
// - 7 bits, of h, and of the input in W8A8: vpmaddubsw multiplies unsigned bytes q + 64, from 0 to 128, by signed ones and
//   adds two products in 16 bits, which hold 2 * 128 * 127; vpmaddwd by ones adds two of these.
// - 16 bits, of the input in INT8, whose values may lie far apart: vpmaddwd multiplies by weights widened to 16 bits and adds
//   two products in 32 bits. A row has as many levels as its sum has room for: 32767 up to 516 columns, 8256 for 2048.
template <int BITS>
class PairedBytes : public IntegerWeights {
    static constexpr int64_t EACH = BITS == 16 ? 2 : 1;      // bytes of a number
    static constexpr int MOST_SUMS = LANES == 16 ? 24 : 12;  // that registers hold

public:
    static constexpr bool WIDE = BITS == 16, INTERLEAVES = false;
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
    static ALWAYS_INLINE Sum dot(Sum sum, Word word, const char* weights) { return dot(sum, word, load_integers(weights)); }

    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const { some_rows(rows, sums, a, block); }

#if defined(HAS_PAIRED_PRODUCTS)
    static constexpr int WIDE_ROWS = 6, MOST_ROWS = WIDE ? AT_ONCE : 5;
    static constexpr int64_t WORTH_WIDENING = 10;  // rows

    // Sums of some rows with all of a block.
    void sum(int rows, int32_t* const* to, const char* const* from, int64_t block) const {
        if constexpr (WIDE) some_sums<MOST_ROWS>(rows, to, from, block);
        else some_rows<MOST_ROWS>(rows, to, from, block);
    }

    // Sums of one row with two blocks that follow each other, or with one.
    void sum_one(int blocks, int32_t* const* to, const char* from, int64_t block) const {
        if (blocks == 2) one_row<2>(to, from, block);
        else one_row<1>(to, from, block);
    }

    // Widens weights of a block from k on.
    void widen(int64_t block, int64_t k, int16_t* to) const {
        const int64_t first = k / 4, count = std::min(groups(depth) - first, WidenedBlock::DEPTH / 4);
        const int8_t* w = starts_of(block) + (4 + 4 * first) * VECTOR;
        // Bytes of four k a unit become the upper bytes of words, first of two k of four units, then of the others.
        const __m256i first_two = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
        const __m256i last_two = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
        for (int64_t g = 0; g < count; ++g, w += 4 * VECTOR, to += 2 * 4 * 2 * LANES)
            UNROLLED for (int gate = 0; gate < 4; ++gate) {
                const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + gate * VECTOR));
                const __m256i low = _mm256_srai_epi16(_mm256_shuffle_epi8(bytes, first_two), 8);
                const __m256i high = _mm256_srai_epi16(_mm256_shuffle_epi8(bytes, last_two), 8);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + gate * 2 * LANES), low);
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (4 + gate) * 2 * LANES), high);
            }
    }

    // Sums of some rows with what was widened, added to those of the k before.
    void multiply_widened(int rows, int32_t* const* to, const char* const* from, const int16_t* widened, int64_t k) const {
        some_widened<WIDE_ROWS>(rows, to, from, widened, k);
    }
#endif

private:
#if defined(HAS_PAIRED_PRODUCTS)
    static void put(int32_t* to, Sum sum) { std::memcpy(to, &sum, sizeof sum); }

    template <int R>
    void some_sums(int rows, int32_t* const* to, const char* const* from, int64_t block) const {
        if (rows == R) return sum<R>(to, from, block);
        if constexpr (R > 1) some_sums<R - 1>(rows, to, from, block);
    }
    template <int R>
    __attribute__((noinline)) void sum(int32_t* const* to, const char* const* from, int64_t block) const {
        const char* numbers[R];
        UNROLLED for (int r = 0; r < R; ++r) numbers[r] = words(from[r], 0);
        Sum total[R][WORDS][4];
        multiply_wide(total, numbers, block);
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int gate = 0; gate < 4; ++gate) put(to[r] + gate * LANES, total[r][0][gate]);
    }

    template <int R>
    static void some_widened(int rows, int32_t* const* to, const char* const* from, const int16_t* widened, int64_t k,
                             int64_t depth) {
        if (rows == R) return widened_sums<R>(to, from, widened, k, depth);
        if constexpr (R > 1) some_widened<R - 1>(rows, to, from, widened, k, depth);
    }
    template <int R>
    void some_widened(int rows, int32_t* const* to, const char* const* from, const int16_t* widened, int64_t k) const {
        some_widened<R>(rows, to, from, widened, k, depth);
    }

    // Two gates at a time: six rows then have twelve sums, and a word of a row serves two products.
    template <int R>
    __attribute__((noinline)) static void widened_sums(int32_t* const* to, const char* const* from, const int16_t* widened,
                                                       int64_t k, int64_t depth) {
        const int64_t pairs = 2 * std::min(groups(depth) - k / 4, WidenedBlock::DEPTH / 4);
        const char* numbers[R];
        UNROLLED for (int r = 0; r < R; ++r) numbers[r] = from[r] + 64 + 2 * k;
        for (int two = 0; two < 4; two += 2) {
            empty_registers();
            Sum own[R][2];
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int g = 0; g < 2; ++g) own[r][g] = k ? load_integers(to[r] + (two + g) * LANES) : Sum{};
            const int16_t* w = widened + two * 2 * LANES;
            for (int64_t pair = 0; pair < pairs; pair += 2, w += 2 * 4 * 2 * LANES)
                UNROLLED for (int i = 0; i < 2; ++i) {
                    const ivec first = load_integers(w + i * 4 * 2 * LANES), second = load_integers(w + (i * 4 + 1) * 2 * LANES);
                    UNROLLED for (int r = 0; r < R; ++r) {
                        const ivec x = in_each_lane(numbers[r] + 4 * (pair + i));
                        add_to(own[r][0], two_words(first, x));
                        add_to(own[r][1], two_words(second, x));
                    }
                    forget();
                }
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int g = 0; g < 2; ++g) put(to[r] + (two + g) * LANES, own[r][g]);
        }
    }

    // In words of our own, since GCC 12 copies the sums of its intrinsics to and fro.
    static void add_products(Sum& sum, ivec word, ivec weights, ivec ones) {
        ivec products;
        asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(products)
            : "x"(word), "x"(weights), "x"(ones));
    }
    static void add_products(Sum& sum, ivec word, const int8_t* weights, ivec ones) {
        ivec products;
        asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
            : "+x"(sum), "=&x"(products)
            : "x"(word), "m"(*reinterpret_cast<const loose*>(weights)), "x"(ones));
    }

    // Groups four at a time, since a loop's own instructions are a fifth of one.
    template <int BLOCKS>
    __attribute__((noinline)) void one_row(int32_t* const* to, const char* from, int64_t block) const {
        constexpr int AT = 4;
        const int64_t count = groups(depth), apart = (1 + count) * 4 * VECTOR;
        const char* numbers = words(from, 0);
        empty_registers();
        const int8_t* w = starts_of(block);
        const ivec ones = words_of_ones();
        Sum own[BLOCKS][4];
        UNROLLED for (int b = 0; b < BLOCKS; ++b)
            UNROLLED for (int gate = 0; gate < 4; ++gate) own[b][gate] = load_integers(w + b * apart + gate * VECTOR);
        w += 4 * VECTOR;
        int64_t k = 0;
        for (; k + AT <= count; k += AT, w += AT * 4 * VECTOR, numbers += AT * 4)
            UNROLLED for (int at = 0; at < AT; ++at) {
                const ivec x = in_each_lane(numbers + 4 * at);
                UNROLLED for (int b = 0; b < BLOCKS; ++b)
                    UNROLLED for (int gate = 0; gate < 4; ++gate)
                        add_products(own[b][gate], x, w + b * apart + (4 * at + gate) * VECTOR, ones);
            }
        for (; k < count; ++k, w += 4 * VECTOR, numbers += 4) {
            const ivec x = in_each_lane(numbers);
            UNROLLED for (int b = 0; b < BLOCKS; ++b)
                UNROLLED for (int gate = 0; gate < 4; ++gate)
                    add_products(own[b][gate], x, w + b * apart + gate * VECTOR, ones);
        }
        UNROLLED for (int b = 0; b < BLOCKS; ++b)
            UNROLLED for (int gate = 0; gate < 4; ++gate) put(to[b] + gate * LANES, own[b][gate]);
    }

    template <int R>
    void some_rows(int rows, int32_t* const* to, const char* const* from, int64_t block) const {
        if (rows == R) return two_gates<R>(to, from, block);
        if constexpr (R > 1) some_rows<R - 1>(rows, to, from, block);
    }

    // Sums of R rows of 7 bits for two gates at a time: with five rows, all registers are taken, and a word of a row serves two
    // products.
    template <int R>
    __attribute__((noinline)) void two_gates(int32_t* const* to, const char* const* from, int64_t block) const {
        const int64_t count = groups(depth);
        const char* numbers[R];
        UNROLLED for (int r = 0; r < R; ++r) numbers[r] = words(from[r], 0);
        for (int two = 0; two < 4; two += 2) {
            empty_registers();
            const int8_t* w = starts_of(block) + two * VECTOR;
            const ivec ones = words_of_ones();
            Sum own[R][2];
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int g = 0; g < 2; ++g) own[r][g] = load_integers(w + g * VECTOR);
            w += 4 * VECTOR;
            for (int64_t k = 0; k < count; ++k, w += 4 * VECTOR) {
                const ivec first = load_integers(w), second = load_integers(w + VECTOR);
                UNROLLED for (int r = 0; r < R; ++r) {
                    const ivec x = in_each_lane(numbers[r] + 4 * k);
                    add_products(own[r][0], x, first, ones);
                    add_products(own[r][1], x, second, ones);
                }
            }
            UNROLLED for (int r = 0; r < R; ++r)
                UNROLLED for (int g = 0; g < 2; ++g) put(to[r] + (two + g) * LANES, own[r][g]);
        }
    }
#endif

    static ALWAYS_INLINE Sum dot(Sum sum, Word word, ivec weights) {
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
        if constexpr (WIDE) multiply_wide(total, numbers, block);
        else multiply(total, numbers, block);
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

    // Sums of R rows of 16 bits.
    template <int R>
    void multiply_wide(Sum (&total)[R][WORDS][4], const char* const (&numbers)[R], int64_t block) const {
        if constexpr (R * 8 <= MOST_SUMS) {
            multiply<0, 4>(total, numbers, block);
        } else {
            multiply<0, 2>(total, numbers, block);
            multiply<2, 2>(total, numbers, block);
        }
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

// What multiplies h.
using StateInBytes = PairedBytes<7>;

}  // namespace
#endif
