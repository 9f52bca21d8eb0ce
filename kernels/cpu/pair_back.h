// The walk back through time by vdpbf16ps, and the gradients of the weights: gradients of gates, weights, x and h in bf16, sums
// in float32.

#pragma once

#include <algorithm>
#include <cstdint>

#include "backward.h"
#include "pair_walk.h"
#include "pairs.h"
#include "rows.h"
#include "team.h"
#include "vectors.h"

#if defined(HAS_PAIRS)
namespace {

ALWAYS_INLINE __m512 widened(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

struct PairsBack {
    using Output = uint16_t;  // type of the output of a walk forward

    static int64_t tiles(const Backward* a) { return (4 * a->hidden + LEFT_TILE - 1) / LEFT_TILE; }
    static int64_t pairs(int64_t rows) { return (std::min<int64_t>(rows, PAIR_ROWS) + 1) / 2; }

    // Of all tiles of gradients of gates, since a team may become smaller than asked for; of one of x or h; of its rows.
    static int64_t room(const Backward* a, int64_t rows) {
        const int64_t most = pairs(rows);
        return 2 * (tiles(a) * left_numbers(most) + right_numbers(most)) + rounded(2 * most) * static_cast<int64_t>(sizeof(void*));
    }

    static void weight_gradients(const StepRows<uint16_t>& rows, char* room, int thread, int threads) {
        const Backward* const a = rows.a;
        const int64_t count = rows.count(), width = rows.width();
        const Share mine = share(tiles(a), true, thread, threads);
        const int64_t left_size = left_numbers(pairs(count));
        uint16_t* const left = reinterpret_cast<uint16_t*>(room);
        uint16_t* const right = left + tiles(a) * left_size;
        const void** const found = reinterpret_cast<const void**>(right + right_numbers(pairs(count)));
        const auto columns_of = [=](int64_t tile) { return std::min(LEFT_TILE, width - tile * LEFT_TILE); };
        // At least once, so that what has no rows becomes zero.
        for (int64_t start = 0; start == 0 || start < count; start += PAIR_ROWS) {
            const int64_t depth = std::min<int64_t>(PAIR_ROWS, count - start);
            for (int64_t tile = mine.first; tile < mine.end; ++tile) {
                const int64_t column = tile * LEFT_TILE;
                __m512 sums[2] = {};
                pack_left([=](int64_t k) { return rows.gates<uint16_t>(start + k) + column; }, depth, columns_of(tile),
                          left + (tile - mine.first) * left_size, sums);
                for (int64_t half = 0; a->grad_bias && half * LANES < columns_of(tile); ++half) {
                    float* const to = a->grad_bias + column + half * LANES;
                    const int lanes = static_cast<int>(std::min<int64_t>(LANES, columns_of(tile) - half * LANES));
                    store(to, start ? load(to, lanes) + (vec)sums[half] : (vec)sums[half], lanes);
                }
            }
            const auto multiply = [=](auto row, float* out, int64_t features) {
                for (int64_t k = 0; k < depth; ++k) found[k] = row(start + k);
                for (int64_t column = 0; column < features; column += RIGHT_TILE) {
                    const int64_t columns = std::min(RIGHT_TILE, features - column);
                    pack_right(reinterpret_cast<decltype(row(0))*>(found), depth, column, columns, right);
                    for (int64_t tile = mine.first; tile < mine.end; ++tile)
                        outer_tile(left + (tile - mine.first) * left_size, columns_of(tile), right, columns, (depth + 1) / 2,
                                   out + tile * LEFT_TILE * features + column, features, start > 0);
                }
            };
            if (a->grad_ih) multiply([=](int64_t k) { return rows.input(k); }, a->grad_ih, a->features);
            if (a->grad_hh) multiply([=](int64_t k) { return rows.before(k); }, a->grad_hh, a->hidden);
        }
    }

    // A thread's share of the gradient of x: gradients of gates times weight_ih, in all steps.
    static void input_gradient(const Backward* a, int thread, int threads) {
        const int64_t depth = 4 * a->hidden, features = a->features;
        const Share mine = share(a->batch * a->steps, true, thread, threads);
        const Pieces panels(mine.end - mine.first, PANEL);
        for (int64_t first = mine.first, panel = 0; first < mine.end; first += panels[panel], ++panel)
            for (int64_t column = 0; column < features; column += 4 * LANES) {
                const int64_t width = std::min<int64_t>(4 * LANES, features - column);
                const uint16_t* const w = static_cast<const uint16_t*>(a->packed_ih) + column * depth;
                const Pieces pieces(panels[panel], ROWS);
                for (int64_t piece = 0, row = 0; row < panels[panel]; row += pieces[piece], ++piece) {
                    const int rows = pieces[piece];
                    const uint16_t* from[ROWS];
                    for (int r = 0; r < rows; ++r) from[r] = static_cast<const uint16_t*>(a->grad_gates) + (first + row + r) * depth;
                    vec sums[ROWS][4] = {};
                    multiply(vectors_of(width), rows, sums, from, depth, w);
                    store_sums(sums, rows, width, a->grad_x_more, a->grad_x + (first + row) * features + column, features);
                }
            }
    }

    // sums[r][v] += row r of so many gradients of gates times the weights of a vector of columns, `vectors` of them.
    __attribute__((noinline)) static void multiply(int64_t vectors, int rows, vec (&sums)[ROWS][4], const uint16_t* const (&from)[ROWS], int64_t depth,
                         const uint16_t* w) {
        switch (vectors) {
            case 1: return pair_product<1>(rows, sums, from, depth / 2, w, PAIR_VECTOR, depth * LANES);
            case 2: return pair_product<2>(rows, sums, from, depth / 2, w, PAIR_VECTOR, depth * LANES);
            case 3: return pair_product<3>(rows, sums, from, depth / 2, w, PAIR_VECTOR, depth * LANES);
            default: return pair_product<4>(rows, sums, from, depth / 2, w, PAIR_VECTOR, depth * LANES);
        }
    }

    // Gradients of the gates of a block of units by what the walk forward kept, and of c before the step.
    static ALWAYS_INLINE void cell(const float* record, const uint16_t* grad_output, const float* dh_at, float* dc_at, uint16_t* to,
                                   int64_t hidden, __mmask16 lanes, bool reset) {
        const auto factor = [=](PairRecord::Place place) { return _mm512_loadu_ps(record + place * LANES); };
        const auto keep = [=](int gate, __m512 x) { store_rounded(to + gate * hidden, x, lanes); };
        const __m512 dh = _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, dh_at), widened(_mm256_maskz_loadu_epi16(lanes, grad_output)));
        const __m512 dc = _mm512_fmadd_ps(dh, factor(PairRecord::OF_C), _mm512_maskz_loadu_ps(lanes, dc_at));
        keep(0, _mm512_mul_ps(dc, factor(PairRecord::OF_I)));
        keep(1, _mm512_mul_ps(dc, factor(PairRecord::OF_F)));
        keep(2, _mm512_mul_ps(dc, factor(PairRecord::OF_G)));
        keep(3, _mm512_mul_ps(dh, factor(PairRecord::OF_O)));
        _mm512_mask_storeu_ps(dc_at, lanes, reset ? _mm512_setzero_ps() : _mm512_mul_ps(dc, factor(PairRecord::FORGET)));
    }

    // A thread's share of the walk back through time: grad_gates of all steps, and the gradients of the first state.
    static void walk(const Backward* a, const Lengths& lengths, Barrier& barrier, int thread, int threads) {
        const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
        const PairRecord record(a->gates, a->batch, hidden);
        Rows mine(lengths, a->batch, a->by_rows, thread, threads);
        const Share own = share(blocks, !a->by_rows, thread, threads);
        for (int64_t s = a->steps - 1; s >= 0; --s) {
            const int64_t t = a->reverse ? a->steps - 1 - s : s, running = mine.at_step(t);
            const auto grads = [=](int64_t b) { return static_cast<uint16_t*>(a->grad_gates) + t * a->gg_step + b * a->gg_row; };
            for (int64_t block = own.first; block < own.end; ++block) {
                const int64_t unit = block * LANES;
                const __mmask16 lanes = first_lanes(hidden - unit);
                for (int64_t i = 0; i < mine.count; ++i) {
                    const int64_t b = mine[i];
                    if (i >= running) {
                        for (int gate = 0; gate < 4; ++gate) store_rounded(grads(b) + gate * hidden + unit, __m512{}, lanes);
                        continue;
                    }
                    cell(record.at(t, block, b), static_cast<const uint16_t*>(a->grad_output) + t * a->go_step + b * a->go_row + unit,
                         a->grad_h0 + b * hidden + unit, a->grad_c0 + b * hidden + unit, grads(b) + unit, hidden, lanes,
                         a->resets && a->resets[t * a->batch + b]);
                }
            }
            if (!a->by_rows) barrier.wait(thread, threads);
            const int64_t depth = 4 * hidden, groups = (own.end - own.first + 3) / 4;
            const Pieces pieces(running, ROWS);
            for (int64_t group = 0; group < groups; ++group) {
                // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
                const int64_t block = own.first + 4 * (s % 2 ? groups - 1 - group : group);
                const int64_t vectors = std::min<int64_t>(own.end - block, 4);
                const uint16_t* const w = static_cast<const uint16_t*>(a->packed) + block * depth * LANES;
                // Where a sequence has ended its state was held, and the gradient passes through.
                for (int64_t piece = 0, row = 0; row < running; row += pieces[piece], ++piece) {
                    const int rows = pieces[piece];
                    const uint16_t* from[ROWS];
                    for (int r = 0; r < rows; ++r) from[r] = grads(mine[row + r]);
                    vec sums[ROWS][4] = {};
                    multiply(vectors, rows, sums, from, depth, w);
                    for (int r = 0; r < rows; ++r) {
                        const bool reset = a->resets && a->resets[t * a->batch + mine[row + r]];
                        for (int64_t v = 0; v < vectors; ++v) {
                            const int64_t unit = (block + v) * LANES;
                            store(a->grad_h0 + mine[row + r] * hidden + unit, reset ? vec{} : sums[r][v],
                                  static_cast<int>(std::min<int64_t>(LANES, hidden - unit)));
                        }
                    }
                }
            }
        }
    }
};

}  // namespace
#endif
