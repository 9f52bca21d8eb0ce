// int8 weights multiplied as integers where a processor has AVX2 and no AVX-512, and so no instruction that multiplies bytes
// and adds the products to sums of 32 bits.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matrices.h"
#include "vectors.h"

// -DWIDEN builds without integer and bf16 products, as for a processor without them.
#if !defined(WIDEN) && defined(__AVX2__) && !defined(__AVX512F__)
#define HAS_AVX2_BYTES 1

namespace {

// int8 weights with a scale a row, and rows of float32 that get a scale of their own, by their largest value. All sums are
// exact, so what errs is the rounding: of weights to 2^-8, and of a row as its type says.
//
// - 7 bits, of h: vpmaddubsw multiplies unsigned bytes q + 64, from 0 to 128, by signed ones and adds two products in 16
//   bits, which hold 2 * 128 * 127; vpmaddwd by ones adds two of these. The offset leaves with the start of a sum.
// - 16 bits, of the input, whose values may lie far apart: vpmaddwd multiplies by weights widened to 16 bits and adds two
//   products in 32 bits. A row has as many levels as its sum has room for: 32767 up to 516 columns, 8256 for 2048.
template <int BITS>
class Avx2Bytes : public Int8Order {
    static constexpr bool WIDE = BITS == 16;
    static constexpr int64_t EACH = WIDE ? 2 : 1;  // bytes of a number

    const int8_t* packed;
    const float* scale;
    int64_t hidden, depth;

    static int64_t padded(int64_t depth) { return (depth + LANES - 1) / LANES * LANES; }

public:
    static constexpr bool PREPARES = true, TILED = false, THREE_DIVISIONS = false, INTERLEAVES = false;
    static constexpr int AT_ONCE = ROWS, WORDS = 1;
    static constexpr int64_t START = -64;  // times a row's sum of weights, which takes the offset away again
    using Row = const char*;               // scale, [64] numbers
    using Sum = ivec;
    using Word = __m256i;

    Avx2Bytes(const void* packed, const float* scale, int64_t hidden, int64_t depth)
        : packed(static_cast<const int8_t*>(packed)), scale(scale), hidden(hidden), depth(depth) {}
    static int64_t row_bytes(int64_t depth) { return 64 + (EACH * padded(depth) + 63) / 64 * 64; }
    static void begin(int64_t) {}
    static void end(int64_t) {}

    // The integer that a row's largest value becomes.
    static int64_t largest_of(int64_t depth) {
        return WIDE ? std::min<int64_t>(32767, INT32_MAX / (127 * std::max<int64_t>(depth, 1))) : -START;
    }

    Row prepare(const float* from, char* room) const {
        const auto vector = [=](int64_t k) {
            return load(from + k, static_cast<int>(depth - k < LANES ? depth - k : LANES));
        };
        // Without their signs, numbers are in the order of their bits; infinity and NaN come last.
        __m256i largest = {};
        for (int64_t k = 0; k < depth; k += LANES)
            largest = _mm256_max_epi32(largest, _mm256_and_si256((__m256i)vector(k), _mm256_set1_epi32(0x7fffffff)));
        __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
        half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
        const float most = _mm_cvtss_f32(_mm_castsi128_ps(half)), levels = static_cast<float>(largest_of(depth));
        // A row this small counts as zeros: its inverse would be no number. Integers have no NaN and no infinity, so the
        // scale is NaN then.
        const float by = most > 1e-30f ? levels / most : 0.0f, unit = most / levels + 0.0f * most;
        std::memcpy(room, &unit, 4);
        char* const to = room + 64;
        for (int64_t k = 0; k < depth; k += LANES) {
            const __m256i q = _mm256_cvtps_epi32((__m256)(vector(k) * by));
            const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
            if constexpr (WIDE) {
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * k), words);
            } else {
                const __m128i offset = _mm_adds_epi16(words, _mm_set1_epi16(-START));
                _mm_storel_epi64(reinterpret_cast<__m128i*>(to + k), _mm_packus_epi16(offset, offset));
            }
        }
        return room;
    }

    const char* groups_of(int64_t block) const { return reinterpret_cast<const char*>(starts_of(block) + 4 * VECTOR); }
    void start(Sum (&sums)[WORDS][4], int64_t block) const {
        UNROLLED for (int gate = 0; gate < 4; ++gate) sums[0][gate] = (Sum)vector_of(starts_of(block) + gate * VECTOR);
    }
    const char* words(Row row, int) const { return row + 64; }
    // Four numbers of a row in each lane, or in two lanes together.
    static Word word(const char* p) {
        if constexpr (WIDE) {
            int64_t x;
            std::memcpy(&x, p, 8);
            return _mm256_set1_epi64x(x);
        } else {
            int32_t x;
            std::memcpy(&x, p, 4);
            return _mm256_set1_epi32(x);
        }
    }
    // Four products of 7 bits a lane.
    static Sum dot(Sum sum, Word word, const char* weights) {
        return dot(sum, word, vector_of(reinterpret_cast<const int8_t*>(weights)));
    }
    void finish(vec (&to)[4], const Sum (&sums)[WORDS][4], Row row, int64_t block) const {
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
        float unit_of_row;
        std::memcpy(&unit_of_row, row, 4);
        UNROLLED for (int gate = 0; gate < 4; ++gate)
            to[gate] += __builtin_convertvector(sums[0][gate], vec) * (load(scale + gate * hidden + unit, n) * unit_of_row);
    }

    void add(int rows, vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        switch (rows) {
            case 1: return add<1>(sums, a, block);
            case 2: return add<2>(sums, a, block);
            default: return add<3>(sums, a, block);
        }
    }

private:
    static __m256i vector_of(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    const int8_t* starts_of(int64_t block) const { return packed + block * (1 + groups(depth)) * 4 * VECTOR; }

    // In words of our own, since GCC 12 copies the sums of its intrinsic to and fro.
    static void add_to(Sum& sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }

    static Sum dot(Sum sum, Word word, __m256i weights) {
        add_to(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(word, weights), _mm256_set1_epi16(1)));
        return sum;
    }

    // What was read from memory must be read again: rather that than a sum on the stack.
    static void forget() { asm volatile("" ::: "memory"); }

    // In a function of its own: inlined into a walk, GCC 12 would keep its sums on the stack.
    template <int R>
    __attribute__((noinline)) void add(vec (&sums)[ROWS][4], const Row (&a)[ROWS], int64_t block) const {
        const char* numbers[R];
        UNROLLED for (int r = 0; r < R; ++r) numbers[r] = words(a[r], 0);
        Sum total[R][WORDS][4];
        if constexpr (!WIDE) {
            multiply(total, numbers, block);
        } else if constexpr (R == 1) {
            multiply<0, 4>(total, numbers, block);
        } else {
            multiply<0, 2>(total, numbers, block);
            multiply<2, 2>(total, numbers, block);
        }
        UNROLLED for (int r = 0; r < R; ++r) finish(sums[r], total[r], a[r], block);
    }

    // Sums of R rows of 7 bits. With three rows all registers are taken, so each word is read anew for each gate.
    template <int R>
    void multiply(Sum (&total)[R][WORDS][4], const char* const (&numbers)[R], int64_t block) const {
        empty_registers();
        const int64_t count = groups(depth);
        Sum own[R][WORDS][4];
        UNROLLED for (int r = 0; r < R; ++r) start(own[r], block);
        const int8_t* w = starts_of(block) + 4 * VECTOR;
        for (int64_t k = 0; k < count; ++k, w += 4 * VECTOR)
            UNROLLED for (int gate = 0; gate < 4; ++gate) {
                const __m256i weights = vector_of(w + gate * VECTOR);
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
        constexpr int KEPT_ROWS = R < 2 ? R : 2;  // whose words stay in registers
        empty_registers();
        const int64_t count = groups(depth);
        Sum own[R][GATES][2];
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int g = 0; g < GATES; ++g) own[r][g][0] = own[r][g][1] = Sum{};
        const int8_t* w = starts_of(block) + (4 + FIRST) * VECTOR;
        for (int64_t k = 0; k < count; ++k, w += 4 * VECTOR) {
            __m256i kept[KEPT_ROWS];
            UNROLLED for (int r = 0; r < KEPT_ROWS; ++r) kept[r] = word(numbers[r] + 8 * k);
            UNROLLED for (int i = 0; i < 2 * GATES; ++i) {
                const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i * (VECTOR / 2)));
                const __m256i weights = _mm256_cvtepi8_epi16(narrow);
                UNROLLED for (int r = 0; r < R; ++r) {
                    const __m256i x = r < KEPT_ROWS ? kept[r < KEPT_ROWS ? r : 0] : word(numbers[r] + 8 * k);
                    add_to(own[r][i / 2][i % 2], _mm256_madd_epi16(weights, x));
                }
                if (R > KEPT_ROWS) forget();
            }
        }
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int g = 0; g < GATES; ++g) {
                const __m256i pairs = _mm256_hadd_epi32((__m256i)own[r][g][0], (__m256i)own[r][g][1]);  // units 0 1 4 5, 2 3 6 7
                total[r][0][FIRST + g] = (Sum)_mm256_permute4x64_epi64(pairs, 0xd8);
            }
    }
};

}  // namespace
#endif
