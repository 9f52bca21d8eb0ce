// The tile registers of AMX, and weights in bf16 that are multiplied by them. -DEMULATED_TILES puts plain C++ in the place
// of the instructions, so that packing and blocking run on machines without them.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "vectors.h"

#if !defined(WIDEN) && defined(__AVX512BF16__) && \
    (defined(EMULATED_TILES) || (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)))
#define HAS_TILES 1

#if !defined(EMULATED_TILES)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;

// Tiles 0 to 7, all of 16 rows of 64 bytes. GCC's intrinsics are not used: GCC 12's _tile_loadconfig names 8 of its 64 bytes as
// read and its _tile_loadd no memory at all, so stores that they need may come too late.
#if defined(EMULATED_TILES)
struct EmulatedTiles {
    uint8_t tile[8][TILE_ROWS][TILE_BYTES];
    bool configured;
};
thread_local EmulatedTiles emulated;

inline bool tiles_permitted() { return true; }
inline void configure_tiles() { emulated.configured = true; }
inline void release_tiles() { emulated.configured = false; }
template <int T>
void load_tile(const void* from, int64_t stride) {
    if (!emulated.configured) std::abort();  // as the processor would end the process
    for (int row = 0; row < TILE_ROWS; ++row)
        std::memcpy(emulated.tile[T][row], static_cast<const char*>(from) + row * stride, TILE_BYTES);
}
template <int T>
void store_tile(void* to, int64_t stride) {
    if (!emulated.configured) std::abort();
    for (int row = 0; row < TILE_ROWS; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, emulated.tile[T][row], TILE_BYTES);
}
template <int C, int A, int B>
void multiply_tiles() {
    if (!emulated.configured) std::abort();
    const auto half = [](const uint8_t* row, int i) {
        uint32_t bits = 0;
        std::memcpy(reinterpret_cast<char*>(&bits) + 2, row + 2 * i, 2);
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    };
    for (int m = 0; m < TILE_ROWS; ++m)
        for (int n = 0; n < 16; ++n) {
            float sum;
            std::memcpy(&sum, emulated.tile[C][m] + 4 * n, 4);
            for (int k = 0; k < TILE_ROWS; ++k)
                for (int i = 0; i < 2; ++i)
                    sum += half(emulated.tile[A][m], 2 * k + i) * half(emulated.tile[B][k], 2 * n + i);
            std::memcpy(emulated.tile[C][m] + 4 * n, &sum, 4);
        }
}
#else
// Linux gives a process the tile registers on request, all its threads at once.
inline bool tiles_permitted() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
}
inline void configure_tiles() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    } of;
    for (int tile = 0; tile < 8; ++tile) of.row_bytes[tile] = TILE_BYTES, of.rows[tile] = TILE_ROWS;
    asm volatile("ldtilecfg %0" ::"m"(of) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }
template <int T>
void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

// bf16 weights, multiplied 32 at a time with 16 rows in bf16; sums are float32. Rows follow each other in memory, and there
// is memory, of any content, up to a whole number of tiles.
//
// Order: [block][32 k at a time][gate][2 k at a time][lane][2 k], zeros past the end of k.
class Tiles {
    const uint16_t* packed;
    int64_t depth;

    static constexpr int64_t TILE = TILE_ROWS * TILE_BYTES / 2;  // bf16 numbers
    static int64_t groups(int64_t depth) { return (depth + 31) / 32; }

public:
    static constexpr bool PREPARES = true, TILED = true;
    static constexpr int AT_ONCE = 2 * TILE_ROWS;
    using Row = const uint16_t*;

    Tiles(const void* packed, const float*, int64_t, int64_t depth)
        : packed(static_cast<const uint16_t*>(packed)), depth(depth) {}
    static int64_t size(int64_t hidden, int64_t depth) { return (hidden + 15) / 16 * groups(depth) * 4 * TILE * 2; }
    // One line more than needed: rows a power of two apart would share few sets of the nearest cache.
    static int64_t row_bytes(int64_t depth) { return (groups(depth) + 1) * TILE_BYTES; }
    static int64_t place(int64_t depth, int64_t unit, int gate, int64_t k) {
        return ((unit / 16 * groups(depth) + k / 32) * 4 + gate) * TILE + k % 32 / 2 * 32 + unit % 16 * 2 + k % 2;
    }
    static void begin() { configure_tiles(); }
    static void end() { release_tiles(); }

    Row prepare(const float* from, char* room) const {
        uint16_t* const to = reinterpret_cast<uint16_t*>(room);
        for (int64_t k = 0; k < 32 * groups(depth); k += LANES) {
            const int64_t rest = depth - k < 0 ? 0 : depth - k;
            const vec x = load(from + (rest ? k : 0), static_cast<int>(rest < LANES ? rest : LANES));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), (__m256i)_mm512_cvtneps_pbh((__m512)x));
        }
        return to;
    }

    template <int N>
    void add(int rows, vec (&sums)[N][4], const Row (&a)[N], int64_t block) const {
        const int64_t stride = row_bytes(depth), down = TILE_ROWS * stride / 2, count = groups(depth);
        const uint16_t* const w = packed + block * count * 4 * TILE;
        constexpr int64_t APART = sizeof(vec[4]);  // rows of sums
        if (rows <= TILE_ROWS) {
            load_tile<0>(&sums[0][0], APART);
            load_tile<1>(&sums[0][1], APART);
            load_tile<2>(&sums[0][2], APART);
            load_tile<3>(&sums[0][3], APART);
            for (int64_t k = 0; k < count; ++k) {
                load_tile<4>(a[0] + 32 * k, stride);
                load_tile<5>(w + 4 * k * TILE, TILE_BYTES);
                multiply_tiles<0, 4, 5>();
                load_tile<6>(w + (4 * k + 1) * TILE, TILE_BYTES);
                multiply_tiles<1, 4, 6>();
                load_tile<7>(w + (4 * k + 2) * TILE, TILE_BYTES);
                multiply_tiles<2, 4, 7>();
                load_tile<5>(w + (4 * k + 3) * TILE, TILE_BYTES);
                multiply_tiles<3, 4, 5>();
            }
            store_tile<0>(&sums[0][0], APART);
            store_tile<1>(&sums[0][1], APART);
            store_tile<2>(&sums[0][2], APART);
            store_tile<3>(&sums[0][3], APART);
            return;
        }
        // Each tile that is loaded serves two products: weights come from a cache further away.
        for (int gate = 0; gate < 4; gate += 2) {
            load_tile<0>(&sums[0][gate], APART);
            load_tile<1>(&sums[0][gate + 1], APART);
            load_tile<2>(&sums[TILE_ROWS][gate], APART);
            load_tile<3>(&sums[TILE_ROWS][gate + 1], APART);
            for (int64_t k = 0; k < count; ++k) {
                load_tile<6>(w + (4 * k + gate) * TILE, TILE_BYTES);
                load_tile<4>(a[0] + 32 * k, stride);
                multiply_tiles<0, 4, 6>();
                load_tile<7>(w + (4 * k + gate + 1) * TILE, TILE_BYTES);
                multiply_tiles<1, 4, 7>();
                load_tile<5>(a[0] + down + 32 * k, stride);
                multiply_tiles<2, 5, 6>();
                multiply_tiles<3, 5, 7>();
            }
            store_tile<0>(&sums[0][gate], APART);
            store_tile<1>(&sums[0][gate + 1], APART);
            store_tile<2>(&sums[TILE_ROWS][gate], APART);
            store_tile<3>(&sums[TILE_ROWS][gate + 1], APART);
        }
    }
};

}  // namespace
#endif
