// Weights in int8 that are multiplied by the tile registers of AMX where there are enough rows, with the very sums of
// `Bytes`: they are packed alike, so that few rows go by vectors.

#pragma once

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
    static constexpr bool THREE_DIVISIONS = true;
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

}  // namespace
#endif
