// The tile registers of AMX, and weights in bf16 that are multiplied by them: rounded to bf16, or split into a high and a
// low part. -DEMULATED_TILES puts plain C++ in the place of the instructions, so that packing and blocking run on machines
// without them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "pairs.h"
#include "vectors.h"

#if !defined(WIDEN) && defined(__AVX512BF16__) && \
    (defined(EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)))
#define HAS_TILES 1
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && (defined(EMULATED_TILES) || defined(__AMX_INT8__))
#define HAS_BYTE_TILES 1
#endif

#if !defined(EMULATED_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64, TILE = TILE_ROWS * TILE_BYTES;

// Tiles 0 to 3 are sums, 4 and 5 left factors: of as many rows as they are configured for. 6 and 7, weights, have all 16.
// GCC's intrinsics are not used: GCC 12's _tile_loadconfig names 8 of its 64 bytes as read and its _tile_loadd no memory at
// all, so stores that they need may come too late.
constexpr int FIRST_WEIGHTS = 6;
#if defined(EMULATED_TILES)
struct EmulatedTiles {
    uint8_t tile[8][TILE_ROWS][TILE_BYTES];
    int rows;  // 0: not configured
};
thread_local EmulatedTiles emulated;

inline bool tiles_permitted() { return true; }
inline void configure_tiles(int rows) { emulated.rows = rows; }
inline void release_tiles() { emulated.rows = 0; }
template <int T>
int rows_of_tile() {
    if (!emulated.rows) std::abort();  // as the processor would end the process
    return T < FIRST_WEIGHTS ? emulated.rows : TILE_ROWS;
}
template <int T>
void load_tile(const void* from, int64_t stride) {
    for (int row = 0; row < rows_of_tile<T>(); ++row)
        std::memcpy(emulated.tile[T][row], static_cast<const char*>(from) + row * stride, TILE_BYTES);
}
template <int T>
void load_tile_past(const void* from, int64_t stride) { load_tile<T>(from, stride); }
template <int T>
void zero_tile() { std::memset(emulated.tile[T], 0, rows_of_tile<T>() * TILE_BYTES); }
template <int T>
void store_tile(void* to, int64_t stride) {
    for (int row = 0; row < rows_of_tile<T>(); ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, emulated.tile[T][row], TILE_BYTES);
}
// A row of sums at a time, in vectors, each by the factors of all columns in the order in which the processor adds them.
static_assert(TILE_BYTES == sizeof(vec), "a row of a tile is a vector");
template <int C, int A, int B>
void multiply_tiles() {
    for (int m = 0; m < rows_of_tile<C>(); ++m) {
        vec sums;
        std::memcpy(&sums, emulated.tile[C][m], TILE_BYTES);
        for (int k = 0; k < TILE_ROWS; ++k) {
            uint32_t pair;
            uvec pairs;
            std::memcpy(&pair, emulated.tile[A][m] + 4 * k, 4);
            std::memcpy(&pairs, emulated.tile[B][k], TILE_BYTES);
            for (int i = 0; i < 2; ++i) sums += (vec)(uvec{} + (pair >> 16 * i << 16)) * (vec)(pairs >> 16 * i << 16);
        }
        std::memcpy(emulated.tile[C][m], &sums, TILE_BYTES);
    }
}
// Unsigned bytes by signed ones, sums of 32 bits.
template <int C, int A, int B>
void multiply_byte_tiles() {
    for (int m = 0; m < rows_of_tile<C>(); ++m) {
        ivec sums;
        std::memcpy(&sums, emulated.tile[C][m], TILE_BYTES);
        for (int k = 0; k < TILE_ROWS; ++k) {
            uvec four;
            std::memcpy(&four, emulated.tile[B][k], TILE_BYTES);
            for (int i = 0; i < 4; ++i) sums += emulated.tile[A][m][4 * k + i] * ((ivec)(four << (24 - 8 * i)) >> 24);
        }
        std::memcpy(emulated.tile[C][m], &sums, TILE_BYTES);
    }
}
#else
// Linux gives a process the tile registers on request, all its threads at once.
inline bool tiles_permitted() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
inline void configure_tiles(int rows) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } of;
    for (int tile = 0; tile < 8; ++tile) {
        of.row_bytes[tile] = TILE_BYTES;
        of.rows[tile] = static_cast<uint8_t>(tile < FIRST_WEIGHTS ? rows : TILE_ROWS);
    }
    asm volatile("ldtilecfg %0" ::"m"(of) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
// What is read once a step only passes through the nearest cache, which keeps what is read for each block.
template <int T>
void load_tile_past(const void* from, int64_t stride) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
void zero_tile() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T>
void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
// Unsigned bytes by signed ones, sums of 32 bits.
template <int C, int A, int B>
void multiply_byte_tiles() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

// Adds to tiles 0 to R * C - 1, R tiles of rows by C of columns, the products of `count` tiles of 32 k: of left factors whose
// rows are `stride` bytes apart, tiles of k `next` and tiles of rows `down`, and of right factors whose tiles of k follow
// each other and whose columns are `apart`. `between` is called after each of the C, C times for a tile of k.
template <int R, int C, bool PAST, typename F>
inline void add_tiles(const char* a, int64_t stride, int64_t next, int64_t down, const char* b, int64_t apart, int64_t count,
                      F between) {
    static_assert(R <= 2 && C <= 4 && R * C <= 4);
    const auto column = [&](auto number) {
        constexpr int c = decltype(number)::value, right = FIRST_WEIGHTS + c % 2;
        if constexpr (c < C) {
            if constexpr (PAST) load_tile_past<right>(b + c * apart, TILE_BYTES);
            else load_tile<right>(b + c * apart, TILE_BYTES);
            multiply_tiles<c, 4, right>();
            if constexpr (R == 2) multiply_tiles<C + c, 5, right>();
            between();
        }
    };
    for (int64_t k = 0; k < count; ++k, a += next, b += TILE) {
        load_tile<4>(a, stride);
        if constexpr (R == 2) load_tile<5>(a + down, stride);
        column(std::integral_constant<int, 0>());
        column(std::integral_constant<int, 1>());
        column(std::integral_constant<int, 2>());
        column(std::integral_constant<int, 3>());
    }
}

template <int COUNT>
inline void zero_tiles() {
    zero_tile<0>();
    if constexpr (COUNT > 1) zero_tile<1>();
    if constexpr (COUNT > 2) zero_tile<2>();
    if constexpr (COUNT > 3) zero_tile<3>();
}
// To memory one after the other.
template <int COUNT>
inline void store_tiles(float* to) {
    store_tile<0>(to, TILE_BYTES);
    if constexpr (COUNT > 1) store_tile<1>(to + 256, TILE_BYTES);
    if constexpr (COUNT > 2) store_tile<2>(to + 512, TILE_BYTES);
    if constexpr (COUNT > 3) store_tile<3>(to + 768, TILE_BYTES);
}

// Weights of blocks of 16 hidden units in tiles of 32 k, in one part (bf16) or two: the number rounded to bf16, and the
// rest of it rounded to bf16. Rows of left factors are split alike. Two parts take three products, high by high, high by
// low and low by high, whose sum errs by 2^-16 of each term; the fourth is smaller than that.
//
// Order: [block][pair of gates][32 k at a time][part][gate of the pair][2 k at a time][lane][2 k], zeros past the end of k.
// Left factors: [part][tile of 16 rows][32 k at a time][row][32 k].
template <int NUMBER_OF_PARTS>
struct Tiles {
    static constexpr int PARTS = NUMBER_OF_PARTS;
    static constexpr bool TILED = true, INTERLEAVES = false;
    static constexpr int64_t PAIR = 2 * PARTS * TILE;  // bytes of 32 k of two gates
    // Calls of `between` for 32 k: of the two gates of one pair for two tiles of rows, of all four for one.
    static constexpr int CALLS = PARTS == 1 ? 2 : 3;

    static int64_t groups(int64_t depth) { return (depth + 31) / 32; }
    static int64_t size(int64_t hidden, int64_t depth) { return (hidden + 15) / 16 * groups(depth) * 2 * PAIR; }
    static int64_t place(int64_t depth, int64_t unit, int gate, int64_t k, int part) {
        const int64_t tile = (((unit / 16 * 2 + gate / 2) * groups(depth) + k / 32) * PARTS + part) * 2 + gate % 2;
        return tile * (TILE / 2) + k % 32 / 2 * 32 + unit % 16 * 2 + k % 2;
    }

    // 16 numbers, of which the first `n` are read, to 32 bytes; the low part `low` bytes further.
    static void put(const float* from, int n, char* to, int64_t low) { put(load_some(from, n), to, low); }
    static void put(__m512 x, char* to, int64_t low) {
        const __m256i high = (__m256i)_mm512_cvtneps_pbh(x);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), high);
        if constexpr (PARTS == 2) {
            const __m512 widened = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
            // Of a number that bf16 has as infinity nothing is left.
            const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(widened), _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ);
            const __m256i rest = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_sub_ps(finite, x, widened));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + low), rest);
        }
    }
    static __m512 load_some(const float* from, int n) {
        return _mm512_maskz_loadu_ps(n >= 16 ? 0xffff : static_cast<__mmask16>((1 << n) - 1), from);
    }

    // A row of `depth` numbers; `to` is its place in the first 32 k, whose tiles follow each other.
    static void put_row(const float* from, int64_t depth, char* to, int64_t low) {
        for (int64_t k = 0; k < depth; k += 32, to += TILE) {
            const int64_t rest = depth - k;
            put(from + k, rest < 16 ? static_cast<int>(rest) : 16, to, low);
            const int more = rest < 17 ? 0 : rest < 32 ? static_cast<int>(rest - 16) : 16;
            put(more ? from + k + 16 : from, more, to + 32, low);
        }
    }

    // Adds to tiles 0 to 3, gates i, f, g, o of the rows of `a`. Each tile of weights is loaded once.
    template <typename F>
    static void add_one(const char* a, int64_t low, const char* w, int64_t count, F between) {
        const char* w2 = w + count * PAIR;
        for (int64_t k = 0; k < count; ++k, a += TILE, w += PAIR, w2 += PAIR) {
            load_tile<4>(a, TILE_BYTES);
            if constexpr (PARTS == 2) load_tile<5>(a + low, TILE_BYTES);
            weights<6, true>(w);
            multiply_tiles<0, 4, 6>();
            if constexpr (PARTS == 2) multiply_tiles<0, 5, 6>();
            weights<7, true>(w + TILE);
            multiply_tiles<1, 4, 7>();
            if constexpr (PARTS == 2) multiply_tiles<1, 5, 7>();
            between();
            weights<6, true>(w2);
            multiply_tiles<2, 4, 6>();
            if constexpr (PARTS == 2) multiply_tiles<2, 5, 6>();
            weights<7, true>(w2 + TILE);
            multiply_tiles<3, 4, 7>();
            if constexpr (PARTS == 2) multiply_tiles<3, 5, 7>();
            between();
            if constexpr (PARTS == 2) {
                weights<6, true>(w + 2 * TILE);
                multiply_tiles<0, 4, 6>();
                weights<7, true>(w + 3 * TILE);
                multiply_tiles<1, 4, 7>();
                weights<6, true>(w2 + 2 * TILE);
                multiply_tiles<2, 4, 6>();
                weights<7, true>(w2 + 3 * TILE);
                multiply_tiles<3, 4, 7>();
                between();
            }
        }
    }

    // Adds to tiles 0 and 1 two gates of the rows of `a`, to 2 and 3 those of the rows of `b`. Weights come past the nearest
    // cache or, where they are read again at once, through it.
    template <bool PAST, typename F>
    static void add_two(const char* a, const char* b, int64_t low, const char* w, int64_t count, F between) {
        for (int64_t k = 0; k < count; ++k, a += TILE, b += TILE, w += PAIR) {
            load_tile<4>(a, TILE_BYTES);
            if constexpr (PARTS == 2) {
                weights<6, PAST>(w + 2 * TILE);
                multiply_tiles<0, 4, 6>();
                weights<7, PAST>(w + 3 * TILE);
                multiply_tiles<1, 4, 7>();
                load_tile<5>(b, TILE_BYTES);
                multiply_tiles<2, 5, 6>();
                multiply_tiles<3, 5, 7>();
                between();
            }
            weights<6, PAST>(w);
            multiply_tiles<0, 4, 6>();
            weights<7, PAST>(w + TILE);
            multiply_tiles<1, 4, 7>();
            between();
            if constexpr (PARTS == 1) load_tile<5>(b, TILE_BYTES);
            multiply_tiles<2, 5, 6>();
            multiply_tiles<3, 5, 7>();
            if constexpr (PARTS == 2) {
                load_tile<4>(a + low, TILE_BYTES);
                multiply_tiles<0, 4, 6>();
                multiply_tiles<1, 4, 7>();
                load_tile<5>(b + low, TILE_BYTES);
                multiply_tiles<2, 5, 6>();
                multiply_tiles<3, 5, 7>();
            }
            between();
        }
    }

private:
    template <int T, bool PAST>
    static void weights(const char* from) {
        if constexpr (PAST) load_tile_past<T>(from, TILE_BYTES);
        else load_tile<T>(from, TILE_BYTES);
    }
};

// weight (4H, depth) in that order in one part, 16 units by 32 k at a time: each row of a tile is a column of pairs.
inline void pack_tiles(const float* weight, char* to, int64_t hidden, int64_t depth) {
    for (int64_t unit = 0; unit < hidden; unit += 16)
        for (int pair = 0; pair < 4; pair += 2)
            for (int64_t k = 0; k < depth; k += 32)
                for (int gate = pair; gate < pair + 2; ++gate, to += TILE) {
                    const float* const rows = weight + (gate * hidden + unit) * depth + k;
                    __m512i r[16];
                    UNROLLED for (int i = 0; i < 16; ++i) {
                        const int64_t left = unit + i < hidden ? depth - k : 0;
                        r[i] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first_lanes(left - 16), rows + i * depth + 16),
                                                            _mm512_maskz_loadu_ps(first_lanes(left), rows + i * depth));
                    }
                    transpose(r);
                    UNROLLED for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * TILE_BYTES, r[i]);
                }
}

// weight (4H, depth) to tiles of [16 columns][16 hidden units at a time][gate][2 n at a time][column][2 n], zeros past H.
inline void pack_tiles_back(const float* weight, char* to, int64_t hidden, int64_t depth) {
    const int64_t down = (hidden + 15) / 16 * 4 * 8 * TILE_BYTES;  // bytes of 16 columns
    // Four times 16 columns together: a row's lines follow each other.
    for (int64_t first = 0; first < depth; first += 64, to += 4 * down) {
        char* row = to;
        for (int64_t unit = 0; unit < hidden; unit += 16)
            for (int gate = 0; gate < 4; ++gate)
                for (int64_t n = unit; n < unit + 16; n += 2, row += TILE_BYTES)
                    for (int64_t column = first; column < std::min(depth, first + 64); column += 16) {
                        const float* const from = weight + (gate * hidden + n) * depth + column;
                        const auto loaded = [=](int64_t i) {
                            return _mm512_maskz_loadu_ps(first_lanes(n + i < hidden ? depth - column : 0), from + i * depth);
                        };
                        _mm512_storeu_si512(row + (column - first) / 16 * down, side_by_side(loaded(0), loaded(1)));
                    }
    }
}

}  // namespace
#endif
