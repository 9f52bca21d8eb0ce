// The walk of one direction of a layer back through time with the tile registers of AMX: the gradient of h is a product
// whose left factor are the gradients of gates, and the cell of the step before runs row by row between the products of the
// next blocks of hidden units.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "backward.h"
#include "tile_walk.h"
#include "tiles.h"

#if defined(HAS_TILES)
namespace {

// Gradients of gates are kept in bf16 as tiles multiply them: [block of 16 units][gate][lane], 64 of them two tiles of 32 k.
constexpr int64_t GATES_BYTES = 2 * TILE_BYTES, GATES_TILES = 2;

// Rows of the matrix of these gradients, one for each step of each sequence within the lengths: steps as the walk forward
// takes them, sequences in their order.
class StepOrder {
    int64_t steps;
    Memory<int64_t> begins, places;

public:
    StepOrder(const Backward* a, const Lengths& lengths)
        : steps(a->steps), begins(steps + 1, "the order of the steps"), places(steps * a->batch, "the order of the steps") {
        int64_t row = 0;
        for (int64_t s = 0; s < steps; ++s) {
            begins[s] = row;
            const int64_t t = a->reverse ? steps - 1 - s : s;
            for (int64_t i = 0; i < a->batch && !lengths.ended(lengths.row(i), t); ++i)
                places[row++] = t * a->batch + lengths.row(i);
        }
        begins[steps] = row;
    }
    int64_t count() const { return begins[steps]; }
    int64_t begin(int64_t s) const { return begins[s]; }
    int64_t running(int64_t s) const { return s < 0 || s >= steps ? 0 : begins[s + 1] - begins[s]; }
    int64_t operator[](int64_t row) const { return places[row]; }  // t * batch + b
};

// That matrix, [32 rows][block][row]: what is written and read together lies together.
class GateGradients {
    int64_t blocks;
    Memory<char> memory;

public:
    static constexpr int64_t ROWS_TOGETHER = 2 * TILE_ROWS, BLOCK_BYTES = ROWS_TOGETHER * GATES_BYTES;

    GateGradients(int64_t rows, int64_t hidden)
        : blocks((hidden + 15) / 16),
          memory((rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER * blocks * BLOCK_BYTES, "the gradients of the gates") {}
    char* at(int64_t row, int64_t block) const {
        return memory.data() + (row / ROWS_TOGETHER * blocks + block) * BLOCK_BYTES + row % ROWS_TOGETHER * GATES_BYTES;
    }
};

// Memory of a team of threads: a step's gradients of gates in tiles, twice, and each thread's sums and gradients of h and c.
struct BackPlan {
    int64_t rows, row_tiles, blocks, k_tiles;
    int64_t shared, sums, h, c, own;

    BackPlan(int64_t batch, int64_t hidden, bool by_rows, int64_t threads) {
        rows = by_rows ? (batch + threads - 1) / threads : batch;
        row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        const int64_t all_blocks = (hidden + 15) / 16;
        k_tiles = all_blocks * GATES_TILES;
        blocks = by_rows ? all_blocks : (all_blocks + threads - 1) / threads;
        const int64_t gates = 2 * row_tiles * k_tiles * TILE;
        shared = by_rows ? 0 : gates;
        sums = by_rows ? gates : 0;
        h = sums + 2 * 4 * TILE;
        c = h + blocks * row_tiles * TILE;
        own = c + blocks * row_tiles * TILE;
    }
    // For a team that may become smaller than asked for: its rows or blocks are then more a thread.
    static int64_t bytes(const Backward* a) {
        int64_t most = 0;
        for (int64_t threads = 1; threads <= a->threads; ++threads) {
            const BackPlan plan(a->batch, a->hidden, a->by_rows, threads);
            most = std::max(most, plan.shared + threads * plan.own);
        }
        return most;
    }
};

// One direction of a layer in one thread of a team: its own rows or its own blocks of hidden units.
class TileWalkBack {
    const Backward* const a;
    const StepOrder& order;
    const GateGradients& gradients;
    Barrier& barrier;
    const int thread, threads;
    const BackPlan plan;
    const WalkRecord kept;
    Rows mine;
    const Share own;
    char* const gates;  // [buffer][tile of rows][32 k at a time][row][32 k]
    float* const sums;
    float* const h;  // gradients, [block][row][16], and so c
    float* const c;
    int configured = 0;

    // Cells of a step for some tiles of rows and blocks of hidden units: `sums` has the gradients of h of the first rows, which
    // a product made, [tile of rows][block][row][16].
    struct Cells {
        const float* sums;
        int64_t s, block, blocks, row;
        int64_t summed;  // rows from `row` on that have sums
        int64_t done, all;
    };

public:
    TileWalkBack(const Backward* a, const Lengths& lengths, const StepOrder& order, const GateGradients& gradients,
                 Barrier& barrier, char* shared, char* room, int thread, int threads)
        : a(a), order(order), gradients(gradients), barrier(barrier), thread(thread), threads(threads),
          plan(a->batch, a->hidden, a->by_rows, threads), kept(a->gates, a->batch, a->hidden),
          mine(lengths, a->batch, a->by_rows, thread, threads),
          own(share((a->hidden + 15) / 16, !a->by_rows, thread, threads)), gates(a->by_rows ? room : shared),
          sums(reinterpret_cast<float*>(room + plan.sums)), h(reinterpret_cast<float*>(room + plan.h)),
          c(reinterpret_cast<float*>(room + plan.c)) {}

    void run() {
        each_state([](float* kept, float* given, int n) { store(kept, load(given, n)); });
        for (int64_t s = a->steps; s >= 0; --s) {
            step(s);
            if (!a->by_rows) barrier.wait(thread, threads);
        }
        release_tiles();
        each_state([](float* kept, float* given, int n) { store(given, load(kept), n); });
    }

private:
    template <typename F>
    void each_state(F use) const {
        for (int64_t i = 0; i < mine.count; ++i)
            for (int64_t block = own.first; block < own.end; ++block) {
                const int64_t at = mine[i] * a->hidden + block * 16;
                use(h + state(block, i), a->grad_h0 + at, lanes_of(block));
                use(c + state(block, i), a->grad_c0 + at, lanes_of(block));
            }
    }
    int lanes_of(int64_t block) const { return static_cast<int>(std::min<int64_t>(16, a->hidden - block * 16)); }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int64_t state(int64_t block, int64_t row) const { return ((block - own.first) * plan.row_tiles * TILE_ROWS + row) * 16; }
    bool reset(int64_t s, int64_t row) const { return a->resets && a->resets[time(s) * a->batch + mine[row]]; }
    char* tiles(int64_t s, int64_t tile) const { return gates + (s % 2 * plan.row_tiles + tile) * plan.k_tiles * TILE; }

    // Gradients of h before step s, by those of its gates, and the gates of step s - 1.
    void step(int64_t s) {
        const int64_t running = mine.before(order.running(s)), next = mine.before(order.running(s - 1));
        const int64_t rows = std::max(running, next), at_once = plan.row_tiles > 1 ? 2 : 1, together = 4 / at_once;
        const int used = static_cast<int>(plan.rows < TILE_ROWS ? running : TILE_ROWS);
        if (running && used != configured) configure_tiles(configured = used);
        Cells cells{};
        int turn = 0;
        for (int64_t i = own.first; i < own.end; i += together) {
            const int64_t blocks = std::min(together, own.end - i);
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? own.end - blocks - (i - own.first) : i;
            for (int64_t row = 0; row < rows; row += at_once * TILE_ROWS) {
                float* const to = sums + (turn ^= 1) * 4 * 256;
                const int64_t end = std::min(rows, row + at_once * TILE_ROWS);
                for (int64_t r = row; r < std::min(next, end); ++r)
                    for (int64_t other = block; other < block + blocks; ++other) prefetch(s - 1, r, other);
                if (row < running) multiply(s, row, running - row > TILE_ROWS ? at_once : 1, block, blocks, to, cells);
                while (cells.done < cells.all) cell(cells);
                const auto sum = [=](int64_t r, int64_t other) {
                    return to + ((r - row) / TILE_ROWS * blocks + other - block) * 256 + r % TILE_ROWS * 16;
                };
                // A state that was reset passes no gradient, and a sequence that begins here leaves its own.
                for (int64_t r = row; a->resets && r < std::min(running, end); ++r)
                    for (int64_t other = block; reset(s, r) && other < block + blocks; ++other) store(sum(r, other), vec{});
                for (int64_t r = std::max(row, next); r < std::min(running, end); ++r)
                    for (int64_t other = block; other < block + blocks; ++other) store(h + state(other, r), load(sum(r, other)));
                const int64_t rest = std::max<int64_t>(0, std::min(next, end) - row);
                cells = {to, s - 1, block, blocks, row, running - row, 0, rest * blocks};
            }
        }
        while (cells.done < cells.all) cell(cells);
    }

    void multiply(int64_t s, int64_t row, int64_t row_tiles, int64_t block, int64_t blocks, float* to, Cells& cells) {
        const int64_t count = plan.k_tiles, each = (cells.all + count * blocks - 1) / (count * blocks);
        const char* const from = tiles(s, row / TILE_ROWS);
        const char* const w = static_cast<const char*>(a->packed) + block * count * TILE;
        const auto run = [&](auto rows, auto columns) {
            constexpr int R = decltype(rows)::value, C = decltype(columns)::value;
            zero_tiles<R * C>();
            add_tiles<R, C, true>(from, TILE_BYTES, TILE, count * TILE, w, count * TILE, count, [this, &cells, each] {
                for (int64_t n = each; n > 0 && cells.done < cells.all; --n) cell(cells);
            });
            store_tiles<R * C>(to);
        };
        using std::integral_constant;
        if (row_tiles == 2) {
            if (blocks == 2) run(integral_constant<int, 2>(), integral_constant<int, 2>());
            else run(integral_constant<int, 2>(), integral_constant<int, 1>());
            return;
        }
        switch (blocks) {
            case 1: return run(integral_constant<int, 1>(), integral_constant<int, 1>());
            case 2: return run(integral_constant<int, 1>(), integral_constant<int, 2>());
            case 3: return run(integral_constant<int, 1>(), integral_constant<int, 3>());
            default: return run(integral_constant<int, 1>(), integral_constant<int, 4>());
        }
    }

    void prefetch(int64_t s, int64_t row, int64_t block) const {
        __builtin_prefetch(static_cast<const float*>(a->grad_output) + time(s) * a->go_step + mine[row] * a->go_row + block * 16);
        if (s) __builtin_prefetch(kept.at(time(s - 1), block, mine.place(row)) + 64);
    }

    // The next of some cells: from the gradients of h and c after its step to those of its gates and of c before it.
    void cell(Cells& of) const {
        const int64_t in = of.done / of.blocks, block = of.block + of.done % of.blocks, row = of.row + in, unit = block * 16;
        ++of.done;
        const int64_t s = of.s, t = time(s), b = mine[row], place = mine.place(row);
        const __mmask16 lanes = static_cast<__mmask16>((1u << lanes_of(block)) - 1);
        const bool anew = reset(s, row);
        const auto read = [lanes](const float* from) { return _mm512_maskz_loadu_ps(lanes, from); };
        const float* const now = kept.at(t, block, place);
        const __m512 i = _mm512_loadu_ps(now), f = _mm512_loadu_ps(now + 16);
        const __m512 g = _mm512_loadu_ps(now + 32), o = _mm512_loadu_ps(now + 48);
        const __m512 tanh_c = tangent_of(_mm512_loadu_ps(now + 64));
        __m512 c_before = _mm512_setzero_ps();
        if (!anew && place < order.running(s - 1)) c_before = _mm512_loadu_ps(kept.at(time(s - 1), block, place) + 64);
        else if (!anew && a->c0) c_before = read(a->c0 + b * a->hidden + unit);
        const float* const dh_at = in < of.summed
            ? of.sums + (in / TILE_ROWS * of.blocks + block - of.block) * 256 + in % TILE_ROWS * 16 : h + state(block, row);
        const __m512 dh = _mm512_add_ps(read(dh_at), read(static_cast<const float*>(a->grad_output) + t * a->go_step + b * a->go_row + unit));
        float* const dc_at = c + state(block, row);
        const __m512 one = _mm512_set1_ps(1.0f);
        const auto times = [](__m512 x, __m512 y) { return _mm512_mul_ps(x, y); };
        const __m512 through = times(dh, o);
        const __m512 dc = _mm512_fmadd_ps(through, _mm512_fnmadd_ps(tanh_c, tanh_c, one), _mm512_loadu_ps(dc_at));
        const __m512 dc_i = times(dc, i), dc_f = times(dc, f);
        const __m512 di = times(times(dc_i, g), _mm512_sub_ps(one, i)), df = times(times(dc_f, c_before), _mm512_sub_ps(one, f));
        const __m512 dg = times(dc_i, _mm512_fnmadd_ps(g, g, one)), d_o = times(times(through, tanh_c), _mm512_sub_ps(one, o));
        _mm512_storeu_ps(dc_at, anew ? _mm512_setzero_ps() : dc_f);
        const __m512i halves[2] = {(__m512i)_mm512_cvtne2ps_pbh(df, di), (__m512i)_mm512_cvtne2ps_pbh(d_o, dg)};
        char* const row_of_all = gradients.at(order.begin(s) + place, block);
        char* const row_of_tile = tiles(s, row / TILE_ROWS) + block * GATES_TILES * TILE + row % TILE_ROWS * TILE_BYTES;
        for (int half = 0; half < 2; ++half) {
            _mm512_storeu_si512(row_of_all + half * TILE_BYTES, halves[half]);
            _mm512_storeu_si512(row_of_tile + half * TILE, halves[half]);
        }
    }
};

}  // namespace
#endif
