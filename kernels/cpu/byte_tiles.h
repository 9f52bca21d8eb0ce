// Weights in int8 that are multiplied by the tile registers of AMX. `ByteTiles` has the very sums of `Bytes`, in the walk for
// vectors; `ByteProducts` takes rows of two bytes a number as the walk of byte_walk.h keeps them. All read one order of
// weights.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matrices.h"
#include "status.h"
#include "tiles.h"

#if defined(HAS_BYTE_TILES)
namespace {

// Rows follow each other in memory, and there is memory, of any content, up to a whole number of tiles.
template <int PARTS>
class ByteTiles : public Bytes<PARTS> {
    using Base = Bytes<PARTS>;
    static constexpr int64_t GATES = 4 * Base::VECTOR;  // bytes of 4 k of all gates

    // Where a tile of weights ends beyond them, rows have zeros.
    static int64_t whole(int64_t depth) { return (depth + 63) / 64 * 64; }

public:
    static constexpr int AT_ONCE = TILE_ROWS;
    static constexpr int LEAST = 4;  // rows that are worth a tile
    static constexpr bool THREE_DIVISIONS = true, INTERLEAVES = false;
    using typename Base::Row;
    using Base::Base;

    // With what the last tile reads past the last weights.
    static int64_t size(int64_t hidden, int64_t depth) {
        return Base::size(hidden, depth) + (whole(depth) / 4 - Base::groups(depth)) * GATES;
    }
    static int64_t row_bytes(int64_t depth) { return 64 + PARTS * whole(depth) + 64; }

    static void begin(int64_t rows) {
        if (rows >= LEAST) configure_tiles(TILE_ROWS);
    }
    static void end(int64_t rows) {
        if (rows >= LEAST) release_tiles();
    }

    Row prepare(const float* from, char* room) const {
        const int64_t end = 4 * Base::groups(this->depth), all = whole(this->depth);
        Base::prepare(from, room, all);
        for (int part = 0; part < PARTS; ++part) std::memset(room + 64 + part * all + end, 0, all - end);
        return room;
    }

    void add(int rows, vec (&sums)[AT_ONCE][4], const Row (&a)[AT_ONCE], int64_t block) const {
        if (rows >= LEAST) return tiles(rows, sums, a, block);
        for (int done = 0; done < rows; done += Base::AT_ONCE) {
            const int count = rows - done < Base::AT_ONCE ? rows - done : Base::AT_ONCE;
            vec own[ROWS][4];
            Row from[ROWS];
            for (int r = 0; r < count; ++r) {
                from[r] = a[done + r];
                for (int gate = 0; gate < 4; ++gate) own[r][gate] = sums[done + r][gate];
            }
            Base::add(count, own, from, block, whole(this->depth));
            for (int r = 0; r < count; ++r)
                for (int gate = 0; gate < 4; ++gate) sums[done + r][gate] = own[r][gate];
        }
    }

private:
    void tiles(int rows, vec (&sums)[AT_ONCE][4], const Row (&a)[AT_ONCE], int64_t block) const {
        const int64_t stride = row_bytes(this->depth), count = whole(this->depth) / 64, all = whole(this->depth);
        const int8_t* const starts = this->packed + block * (1 + Base::groups(this->depth)) * GATES;
        const int8_t* const w = starts + GATES;
        const char* const high = a[0] + 64;
        alignas(64) static thread_local int32_t found[4][PARTS][TILE_ROWS][16];
        if constexpr (PARTS == 1) {
            load_tile<0>(starts, 0);
            load_tile<1>(starts + 64, 0);
            load_tile<2>(starts + 128, 0);
            load_tile<3>(starts + 192, 0);
            for (int64_t k = 0; k < count; ++k) {
                const int8_t* const now = w + k * 16 * GATES;
                load_tile<4>(high + 64 * k, stride);
                load_tile<6>(now, GATES);
                multiply_byte_tiles<0, 4, 6>();
                load_tile<7>(now + 64, GATES);
                multiply_byte_tiles<1, 4, 7>();
                load_tile<6>(now + 128, GATES);
                multiply_byte_tiles<2, 4, 6>();
                load_tile<7>(now + 192, GATES);
                multiply_byte_tiles<3, 4, 7>();
            }
            store_tile<0>(found[0], 64);
            store_tile<1>(found[1], 64);
            store_tile<2>(found[2], 64);
            store_tile<3>(found[3], 64);
        } else {
            alignas(64) static constexpr int32_t zeros[16] = {};
            for (int gate = 0; gate < 4; gate += 2) {
                load_tile<0>(starts + 64 * gate, 0);
                load_tile<1>(zeros, 0);
                load_tile<2>(starts + 64 * gate + 64, 0);
                load_tile<3>(zeros, 0);
                for (int64_t k = 0; k < count; ++k) {
                    const int8_t* const now = w + k * 16 * GATES + 64 * gate;
                    load_tile<4>(high + 64 * k, stride);
                    load_tile<6>(now, GATES);
                    multiply_byte_tiles<0, 4, 6>();
                    load_tile<5>(high + all + 64 * k, stride);
                    multiply_byte_tiles<1, 5, 6>();
                    load_tile<7>(now + 64, GATES);
                    multiply_byte_tiles<2, 4, 7>();
                    multiply_byte_tiles<3, 5, 7>();
                }
                store_tile<0>(found[gate][0], 64);
                store_tile<1>(found[gate][PARTS - 1], 64);
                store_tile<2>(found[gate + 1][0], 64);
                store_tile<3>(found[gate + 1][PARTS - 1], 64);
            }
        }
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(this->hidden - unit < LANES ? this->hidden - unit : LANES);
        for (int gate = 0; gate < 4; ++gate) {
            const vec by = load(this->scale + gate * this->hidden + unit, n);
            for (int r = 0; r < rows; ++r) {
                vec sum = {};
                for (int part = 0; part < PARTS; ++part)
                    sum = sum * 256.0f + (vec)_mm512_cvtepi32_ps(_mm512_load_si512(found[gate][part][r]));
                float unit_of_row;
                std::memcpy(&unit_of_row, a[r], 4);
                sums[r][gate] += sum * (by * unit_of_row);
            }
        }
    }
};

// How numbers become the two bytes of q + offset: multiplied so that the largest is `most`, rounded, high byte first.
struct TwoBytes {
    float most;
    int offset;
};
// x has a scale per row. |h| is at most 1, so its scale is fixed; its low byte counts from -128, as the high one does.
constexpr TwoBytes INPUT_BYTES = {32767.0f, 32768}, STATE_BYTES = {32512.0f, 32768 + 128};

// Rows of bytes lie in tiles: [16 rows][64 k at a time][row][64 k] for the high bytes, then the same for the low ones. Up
// to 8 rows share one tile, high bytes above low ones, and then a product of tiles does both.
struct ByteRows {
    int64_t half;    // rows of high bytes in a tile
    int64_t groups;  // of 64 k

    ByteRows(int64_t rows, int64_t depth, bool together) : half(together && rows <= 8 ? std::max<int64_t>(rows, 1) : 16), groups((depth + 63) / 64) {}
    bool together() const { return half < TILE_ROWS; }
    int configured() const { return static_cast<int>(together() ? 2 * half : TILE_ROWS); }
    int64_t low() const { return together() ? half * TILE_BYTES : groups * TILE; }   // bytes from a number's high byte
    int64_t tile_bytes() const { return (together() ? 1 : 2) * groups * TILE; }      // of 16 rows
    int64_t part() const { return (together() ? half : TILE_ROWS) * 16; }            // numbers from a sum of high bytes
    static int64_t at(int64_t k) { return k / 64 * TILE + k % 64; }
    int64_t row(int64_t r) const { return r / TILE_ROWS * tile_bytes() + r % TILE_ROWS * TILE_BYTES; }

    // 16 numbers times `by`; zeros where there is no lane, since tiles of weights go on past the last of them.
    static void put(__m512 x, float by, const TwoBytes& bytes, __mmask16 lanes, char* high, int64_t low) {
        const __m512i q = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(by))), _mm512_set1_epi32(bytes.offset));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_maskz_cvtepi32_epi8(lanes, _mm512_srli_epi32(q, 8)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(high + low), _mm512_maskz_cvtepi32_epi8(lanes, q));
    }
};

// Sums of a block of 16 hidden units for up to 16 rows: [gate][high and low, `part()` apart][row][16], gates BYTE_SUMS apart.
constexpr int64_t BYTE_SUMS = 2 * 256;

// Sums of up to 16 rows of two bytes a number by tiles, from the order of `Bytes`.
class ByteProducts {
    static constexpr int64_t GATES = 256;  // bytes of 4 k of all gates

public:
    static constexpr int64_t LEAST = 4;  // rows that are worth a tile
    static constexpr int64_t CALLS = 4;  // calls of `between` for 64 k

    // Sums of a tile of rows at `a` with the weights of a block. `from_zero`: the low bytes, in a tile of their own, count from 0.
    template <typename F>
    static void add(const char* a, const ByteRows& in, const void* packed, int64_t block, int64_t depth, bool from_zero, int32_t* sums, F between) {
        alignas(64) static constexpr int8_t zeros[GATES] = {};
        const int8_t* const starts = static_cast<const int8_t*>(packed) + block * (1 + (depth + 3) / 4) * GATES;
        if (in.together()) one(a, in, starts, starts + GATES, sums, between);
        else two(a, in, starts, from_zero ? zeros : starts, starts + GATES, sums, between);
    }

private:
    // Both bytes of few rows in a tile: each tile of weights is multiplied once.
    template <typename F>
    static void one(const char* a, const ByteRows& in, const int8_t* starts, const int8_t* w, int32_t* sums, F between) {
        load_tile<0>(starts, 0);
        load_tile<1>(starts + 64, 0);
        load_tile<2>(starts + 128, 0);
        load_tile<3>(starts + 192, 0);
        for (int64_t k = 0; k < in.groups; ++k, w += 16 * GATES) {
            load_tile<4>(a + k * TILE, TILE_BYTES);
            load_tile_past<6>(w, GATES);
            multiply_byte_tiles<0, 4, 6>();
            load_tile_past<7>(w + 64, GATES);
            multiply_byte_tiles<1, 4, 7>();
            between();
            between();
            load_tile_past<6>(w + 128, GATES);
            multiply_byte_tiles<2, 4, 6>();
            load_tile_past<7>(w + 192, GATES);
            multiply_byte_tiles<3, 4, 7>();
            between();
            between();
        }
        store_tile<0>(sums, TILE_BYTES);
        store_tile<1>(sums + BYTE_SUMS, TILE_BYTES);
        store_tile<2>(sums + 2 * BYTE_SUMS, TILE_BYTES);
        store_tile<3>(sums + 3 * BYTE_SUMS, TILE_BYTES);
    }

    // Bytes of up to 16 rows in two tiles, by two gates at a time.
    template <typename F>
    static void two(const char* a, const ByteRows& in, const int8_t* starts, const int8_t* lows, const int8_t* from, int32_t* sums, F between) {
        for (int gate = 0; gate < 4; gate += 2) {
            const int8_t* w = from + 64 * gate;
            load_tile<0>(starts + 64 * gate, 0);
            load_tile<1>(starts + 64 * gate + 64, 0);
            load_tile<2>(lows + 64 * gate, 0);
            load_tile<3>(lows + 64 * gate + 64, 0);
            for (int64_t k = 0; k < in.groups; ++k, w += 16 * GATES) {
                load_tile<4>(a + k * TILE, TILE_BYTES);
                load_tile<6>(w, GATES);
                multiply_byte_tiles<0, 4, 6>();
                load_tile<7>(w + 64, GATES);
                multiply_byte_tiles<1, 4, 7>();
                between();
                load_tile<5>(a + in.low() + k * TILE, TILE_BYTES);
                multiply_byte_tiles<2, 5, 6>();
                multiply_byte_tiles<3, 5, 7>();
                between();
            }
            store_tile<0>(sums + gate * BYTE_SUMS, TILE_BYTES);
            store_tile<1>(sums + (gate + 1) * BYTE_SUMS, TILE_BYTES);
            store_tile<2>(sums + gate * BYTE_SUMS + 256, TILE_BYTES);
            store_tile<3>(sums + (gate + 1) * BYTE_SUMS + 256, TILE_BYTES);
        }
    }
};

}  // namespace
#endif
