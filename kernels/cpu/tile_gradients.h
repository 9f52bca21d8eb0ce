// The gradients of a layer's weights and of its input with the tile registers of AMX: products of the gradients of gates
// over all steps, once the walk back has left them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "backward.h"
#include "tile_back.h"
#include "tiles.h"

#if defined(HAS_TILES)
namespace {

// Bytes of factors in bf16 that stay in a near cache while the others pass by.
#if !defined(NEAR_FACTORS)
#define NEAR_FACTORS (1 << 20)
#endif

// A thread's part of them: of the weights some blocks of hidden units, of the input some steps.
class TileGradients {
    const Backward* const a;
    const Lengths& lengths;
    const StepOrder& order;
    const GateGradients& gradients;
    const StepRows<> rows;
    const int thread, threads;
    const int64_t blocks, deepest;
    float* const sums;
    const float** const found;  // rows of x or h
    char* const left;           // gates of a block: [gate][32 rows at a time][lane][32 rows]
    char* const right;          // x or h: [16 columns at a time][32 rows at a time][pair of rows][column][2 rows]

    static int64_t tiles_of(int64_t columns) { return (columns + 15) / 16; }
    static int64_t deep_of(int64_t rows) { return (rows + 31) / 32; }
    // Tiles of 32 rows that are taken together for so many columns, and for those of x and h at most.
    static int64_t depth_of(int64_t columns, int64_t count) {
        const int64_t near = NEAR_FACTORS / (TILE * std::max<int64_t>(1, tiles_of(columns)));
        return std::max<int64_t>(1, std::min(near, deep_of(count)));
    }
    // Whether x and h of all rows stay near at once, so that gradients of gates are transposed once.
    static bool fit_together(const Backward* a, int64_t count) {
        return (tiles_of(a->features) + tiles_of(a->hidden)) * deep_of(count) * TILE <= NEAR_FACTORS;
    }
    static int64_t deepest_of(const Backward* a, int64_t count) {
        if (fit_together(a, count)) return std::max<int64_t>(1, deep_of(count));
        return std::max(depth_of(a->features, count), depth_of(a->hidden, count));
    }

public:
    // Bytes that a thread needs.
    static int64_t room(const Backward* a, int64_t count) {
        const int64_t most = fit_together(a, count) ? (tiles_of(a->features) + tiles_of(a->hidden)) * deep_of(count)
            : std::max(depth_of(a->features, count) * tiles_of(a->features), depth_of(a->hidden, count) * tiles_of(a->hidden));
        return 4 * TILE + deepest_of(a, count) * (4 * TILE + 32 * static_cast<int64_t>(sizeof(float*))) + most * TILE;
    }

    TileGradients(const Backward* a, const Lengths& lengths, const StepOrder& order, const GateGradients& gradients,
                  const Listed& listed, char* room, int thread, int threads)
        : a(a), lengths(lengths), order(order), gradients(gradients), rows(a, listed), thread(thread), threads(threads),
          blocks((a->hidden + 15) / 16), deepest(deepest_of(a, order.count())), sums(reinterpret_cast<float*>(room)),
          found(reinterpret_cast<const float**>(room + 4 * TILE)), left(room + 4 * TILE + deepest * 32 * sizeof(float*)),
          right(left + deepest * 4 * TILE) {}

    void run() {
        configure_tiles(TILE_ROWS);
        const Factor factors[2] = {{true, a->features, a->grad_ih}, {false, a->hidden, a->grad_hh}};
        if (fit_together(a, order.count())) {
            multiply(factors, 2, a->grad_bias);
        } else {
            multiply(factors, 1, a->grad_bias);
            multiply(factors + 1, 1, nullptr);
        }
        if (a->grad_x) input_gradients();
        release_tiles();
    }

private:
    int units_of(int64_t block) const { return static_cast<int>(std::min<int64_t>(16, a->hidden - block * 16)); }

    // A matrix of all steps that the gradients of gates are multiplied with, and the gradient of weights that comes of it.
    struct Factor {
        bool input;  // x, or the h before a step
        int64_t columns;
        float* out;
        int64_t tiles() const { return out ? tiles_of(columns) : 0; }
    };

    // out (4H, columns) = gradients of gates, transposed, times a factor, for each of some; and the sums of these gradients,
    // unless `bias` is null.
    void multiply(const Factor* factors, int number, float* bias) {
        const Share mine = share(blocks, true, thread, threads);
        const bool wanted = bias || std::any_of(factors, factors + number, [](const Factor& factor) { return factor.out; });
        if (!wanted || mine.first == mine.end) return;
        int64_t columns = 0;
        for (int i = 0; i < number; ++i) columns += 16 * tiles_of(factors[i].columns);
        const int64_t count = order.count(), depth = 32 * depth_of(columns, count);
        // At least once, so that what has no rows becomes zero.
        for (int64_t start = 0; start == 0 || start < count; start += depth) {
            const int64_t taken = std::min(depth, count - start), deep = deep_of(taken);
            char* to = right;
            for (int i = 0; i < number; to += factors[i++].tiles() * deep * TILE) {
                for (int64_t r = 0; factors[i].out && r < taken; ++r) {
                    const Place at(order[start + r], a->batch, a->steps, false);
                    found[r] = factors[i].input ? rows.input(at) : rows.before(at);
                }
                for (int64_t tile = 0; tile < factors[i].tiles(); ++tile)
                    pack_right(taken, deep, tile, factors[i].columns, to);
            }
            for (int64_t block = mine.first; block < mine.end; ++block) {
                pack_left(start, taken, deep, block, bias);
                char* from = right;
                for (int i = 0; i < number; from += factors[i++].tiles() * deep * TILE)
                    for (int gate = 0; gate < 4; gate += 2)
                        for (int64_t tile = 0; tile < factors[i].tiles(); tile += 2) {
                            if (tile + 1 < factors[i].tiles()) outer<2>(block, gate, tile, deep, factors[i], from, start > 0);
                            else outer<1>(block, gate, tile, deep, factors[i], from, start > 0);
                        }
            }
        }
    }

    // 16 columns of rows, two rows side by side, zeros where there is none.
    void pack_right(int64_t taken, int64_t deep, int64_t tile, int64_t columns, char* to) const {
        const __mmask16 lanes = first_lanes(columns - tile * 16);
        const auto loaded = [=](int64_t r) {
            return r < taken && found[r] ? _mm512_maskz_loadu_ps(lanes, found[r] + tile * 16) : _mm512_setzero_ps();
        };
        to += tile * deep * TILE;
        for (int64_t r = 0; r < 32 * deep; r += 2, to += TILE_BYTES) _mm512_storeu_si512(to, side_by_side(loaded(r), loaded(r + 1)));
    }

    // Gradients of the gates of a block, transposed, and their sums.
    void pack_left(int64_t start, int64_t taken, int64_t deep, int64_t block, float* bias) const {
        const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                             35, 3, 34, 2, 33, 1, 32, 0);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        for (int gate = 0; gate < 4; ++gate) {
            __m512 totals[4] = {};  // several, since one would wait for itself
            for (int64_t k = 0; k < deep; ++k) {
                const char* const from = gradients.at(start + 32 * k, block) + gate / 2 * TILE_BYTES;
                const __m512i which = gate % 2 ? high : low;
                const int64_t rest = taken - 32 * k;
                __m512i r[16];
                UNROLLED for (int pair = 0; pair < 16; ++pair) {
                    const auto loaded = [=](int64_t row) {
                        return row < rest ? _mm512_loadu_si512(from + row * GATES_BYTES) : _mm512_setzero_si512();
                    };
                    r[pair] = _mm512_permutex2var_epi16(loaded(2 * pair), which, loaded(2 * pair + 1));
                    totals[pair % 4] = _mm512_dpbf16_ps(totals[pair % 4], (__m512bh)r[pair], ones);
                }
                transpose(r);
                char* const to = left + (gate * deep + k) * TILE;
                UNROLLED for (int lane = 0; lane < 16; ++lane) _mm512_storeu_si512(to + lane * TILE_BYTES, r[lane]);
            }
            if (!bias) continue;
            float* const sum = bias + gate * a->hidden + block * 16;
            const vec total = (vec)totals[0] + (vec)totals[1] + ((vec)totals[2] + (vec)totals[3]);
            const int n = units_of(block);
            store(sum, start ? load(sum, n) + total : total, n);
        }
    }

    // Two gates of a block by C tiles of columns, on top of what is there if `more`.
    template <int C>
    void outer(int64_t block, int gate, int64_t tile, int64_t deep, const Factor& factor, const char* from, bool more) const {
        const int64_t columns = factor.columns;
        float* const out = factor.out;
        float* const to = out + (gate * a->hidden + block * 16) * columns + tile * 16;
        const int64_t down = a->hidden * columns, stride = columns * static_cast<int64_t>(sizeof(float));
        const int units = units_of(block);
        const bool whole = units == 16 && (tile + C) * 16 <= columns;
        if (more && whole) {
            load_tile<0>(to, stride);
            load_tile<C>(to + down, stride);
            if constexpr (C == 2) load_tile<1>(to + 16, stride);
            if constexpr (C == 2) load_tile<3>(to + down + 16, stride);
        } else {
            zero_tiles<2 * C>();
        }
        add_tiles<2, C, false>(left + gate * deep * TILE, TILE_BYTES, TILE, deep * TILE, from + tile * deep * TILE, deep * TILE,
                               deep, [] {});
        if (whole) {
            store_tile<0>(to, stride);
            store_tile<C>(to + down, stride);
            if constexpr (C == 2) store_tile<1>(to + 16, stride);
            if constexpr (C == 2) store_tile<3>(to + down + 16, stride);
            return;
        }
        store_tiles<2 * C>(sums);
        for (int which = 0; which < 2 * C; ++which)
            for (int unit = 0; unit < units; ++unit)
                put(sums + which * 256 + unit * 16, to + which / C * down + unit * columns + which % C * 16,
                    columns - (tile + which % C) * 16, more);
    }

    // 16 sums to memory that has room for n.
    static void put(const float* from, float* to, int64_t n, bool more) {
        const int lanes = static_cast<int>(std::min<int64_t>(n, 16));
        store(to, more ? load(to, lanes) + load(from) : load(from), lanes);
    }

    // The gradients of the input, zero past the lengths.
    void input_gradients() const {
        // 32 rows lie together.
        const Share together = share(deep_of(order.count()), true, thread, threads);
        const int64_t columns = tiles_of(a->features);
        const int64_t at_once = std::max<int64_t>(1, NEAR_FACTORS / 4 / std::max<int64_t>(1, blocks * GATES_TILES * TILE));
        for (int64_t first = together.first; first < together.end; first += at_once)
            for (int64_t column = 0; column < columns; column += 2)
                for (int64_t i = first; i < std::min(together.end, first + at_once); ++i) {
                    const bool two = 2 * TILE_ROWS * i + TILE_ROWS < order.count();
                    if (column + 1 < columns) two ? input<2, 2>(i, column) : input<1, 2>(i, column);
                    else two ? input<2, 1>(i, column) : input<1, 1>(i, column);
                }
        const Share own = share(lengths.differ() && !a->grad_x_more ? a->batch : 0, true, thread, threads);
        for (int64_t b = own.first; b < own.end; ++b)
            for (int64_t t = a->steps - 1; t >= 0 && lengths.ended(b, t); --t)
                std::memset(a->grad_x + t * a->x_step + b * a->x_row, 0, a->features * sizeof(float));
    }

    template <int R, int C>
    void input(int64_t together, int64_t column) const {
        const int64_t count = blocks * GATES_TILES, first = together * GateGradients::ROWS_TOGETHER;
        const char* const w = static_cast<const char*>(a->packed_ih) + column * count * TILE;
        zero_tiles<R * C>();
        for (int64_t block = 0; block < blocks; ++block)
            add_tiles<R, C, false>(gradients.at(first, block), GATES_BYTES, TILE_BYTES, TILE_ROWS * GATES_BYTES,
                                   w + block * GATES_TILES * TILE, count * TILE, GATES_TILES, [] {});
        store_tiles<R * C>(sums);
        for (int64_t r = 0; r < std::min<int64_t>(R * TILE_ROWS, order.count() - first); ++r) {
            const Place at(order[first + r], a->batch, a->steps, false);
            float* const to = a->grad_x + at.t * a->x_step + at.b * a->x_row;
            for (int c = 0; c < C; ++c)
                put(sums + (r / TILE_ROWS * C + c) * 256 + r % TILE_ROWS * 16, to + (column + c) * 16,
                    a->features - (column + c) * 16, a->grad_x_more);
        }
    }
};

}  // namespace
#endif
