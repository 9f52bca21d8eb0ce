// The walk of one direction of a layer forward through time with the tile registers of AMX: the rows of a batch are the rows
// of tiles, and the cell of a block of 16 hidden units runs in vectors between the products of the next block.
//
// Two forms. In a step: sums begin with the biases and go over [x | h]. By chunks of steps: the projection of x comes
// before, over rows of many steps, so that few rows fill tiles too, and the sums of a step begin with what it left.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "forward.h"
#include "tiles.h"

#if defined(HAS_TILES)
namespace {

// How a thread goes through its rows, and where in its memory everything lies, in bytes.
struct TilePlan {
    // Bytes of gates and inputs of a chunk: more where weights that do not stay in the second-level cache come again for each.
    static constexpr int64_t LEAST_CHUNK = 1 << 18, LARGEST_CHUNK = 1 << 20;
    static constexpr int64_t NEAR_WEIGHTS = 3 << 19;  // bytes of all weights, where they are read in each step

    int64_t rows, row_tiles, inputs, states;  // rows at most; tiles: of rows, of 32 features, of 32 hidden units
    int64_t blocks;                           // at most, that this thread computes
    bool in_step;
    int64_t steps_in_tile, chunk_tiles, chunk;  // of the projection: few rows share a tile with those of other steps
    int64_t shared, x, gates, cells, bias, sums, places, active, own;  // `gates` are sums, before the nonlinearities

    TilePlan(int64_t parts, int64_t batch, int64_t steps, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
        rows = by_rows ? (batch + threads - 1) / threads : batch;
        row_tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        inputs = features > 0 ? (features + 31) / 32 : 0;
        states = (hidden + 31) / 32;
        const int64_t all_blocks = (hidden + 15) / 16;
        blocks = by_rows ? all_blocks : (all_blocks + threads - 1) / threads;
        const int64_t weights = (inputs + states) * blocks * 4 * TILE * parts;
        in_step = features >= 0 && (row_tiles > 1 ? weights <= NEAR_WEIGHTS : steps == 1);
        steps_in_tile = rows && rows < TILE_ROWS ? TILE_ROWS / rows : 1;
        const int64_t each = 4 * TILE * blocks + inputs * parts * TILE;
        const int64_t bytes = std::clamp(inputs * blocks * 2 * TILE * parts, LEAST_CHUNK, LARGEST_CHUNK);
        const int64_t needed = (steps + steps_in_tile - 1) / steps_in_tile * row_tiles;
        chunk_tiles = std::min(needed, std::max({int64_t{2}, row_tiles, bytes / std::max<int64_t>(1, each)}));
        chunk = row_tiles ? std::max<int64_t>(1, chunk_tiles / row_tiles * steps_in_tile) : steps;
        if (in_step) chunk_tiles = row_tiles;

        int64_t end = 0;
        const auto take = [&end](int64_t bytes) { return end += (bytes + 63) / 64 * 64, end - (bytes + 63) / 64 * 64; };
        shared = by_rows ? 0 : 2 * parts * row_tiles * states * TILE;
        if (by_rows) take(2 * parts * row_tiles * states * TILE);
        x = take(parts * chunk_tiles * inputs * TILE);
        gates = take(in_step ? 0 : chunk_tiles * blocks * 4 * TILE);
        cells = take(blocks * row_tiles * TILE);
        bias = take(blocks * 4 * 64);
        sums = take(2 * 8 * TILE);
        places = take(8 * rows);
        active = take(8 * chunk_tiles);
        own = end;
    }
};

// What the walk back needs of a step, unit and sequence: gates after their nonlinearities and c, where it is written and read
// without a gap, [step][block of 16 units][row][gate, c][lane], rows longest first and nothing past a length.
class WalkRecord {
    float* memory;
    int64_t batch, blocks;

public:
    static constexpr int64_t NUMBERS = 5 * 16;
    WalkRecord(const float* memory, int64_t batch, int64_t hidden)
        : memory(const_cast<float*>(memory)), batch(batch), blocks((hidden + 15) / 16) {}
    static int64_t numbers(int64_t batch, int64_t steps, int64_t hidden) {
        return steps * ((hidden + 15) / 16) * batch * NUMBERS;
    }
    float* at(int64_t t, int64_t block, int64_t row) const { return memory + ((t * blocks + block) * batch + row) * NUMBERS; }
};

// The cell of a block for up to 32 rows, which is done row by row between the products of the next block. KEEPS: gates and
// c go to memory too, for a backward pass.
template <typename W, bool KEEPS>
struct TileCells {
    const float* sums;  // [tile of rows][gate][row][16]
    float* c;           // [row][16]
    char* h;            // of the first row, in tiles `tile` bytes apart
    float* output;      // of the first row's unit, rows at `places`
    const int64_t* places;
    int64_t tile, low;
    int row, rows;
    __mmask16 lanes;
    float* kept;    // of the first row, rows `apart`
    int64_t apart;

    void next() {
        const int r = row++, at = r / TILE_ROWS, in = r % TILE_ROWS;
        const float* s = sums + at * TILE + in * 16;
        __m512 state = _mm512_loadu_ps(c + r * 16), value;
        if constexpr (KEEPS) {
            const __m512 gates[4] = {sigmoid_of(_mm512_loadu_ps(s)), sigmoid_of(_mm512_loadu_ps(s + 256)),
                                     tangent_of(_mm512_loadu_ps(s + 512)), sigmoid_of(_mm512_loadu_ps(s + 768))};
            state = _mm512_fmadd_ps(gates[1], state, _mm512_mul_ps(gates[0], gates[2]));
            value = _mm512_mul_ps(gates[3], tangent_of(state));
            float* const to = kept + r * apart;
            UNROLLED for (int gate = 0; gate < 4; ++gate) _mm512_storeu_ps(to + gate * 16, _mm512_maskz_mov_ps(lanes, gates[gate]));
            _mm512_storeu_ps(to + 64, _mm512_maskz_mov_ps(lanes, state));
        } else {
            value = cell_of(_mm512_loadu_ps(s), _mm512_loadu_ps(s + 256), _mm512_loadu_ps(s + 512), _mm512_loadu_ps(s + 768),
                            state);
        }
        // Units past the last one stay zero: of an infinite input their gates are infinity times zero, which is NaN, and so
        // would be all products with them in the next step.
        _mm512_storeu_ps(c + r * 16, _mm512_maskz_mov_ps(lanes, state));
        _mm512_mask_storeu_ps(output + places[r], lanes, value);
        W::put(_mm512_maskz_mov_ps(lanes, value), h + at * tile + in * TILE_BYTES, low);
    }
    void finish() {
        while (row < rows) next();
    }
};

// One direction of a layer in one thread of a team: its own rows or its own blocks of hidden units. KEEPS as above.
template <typename W, bool KEEPS = false>
class TileWalk {
    const Forward* const a;
    const Lengths& lengths;
    Barrier& barrier;
    const int thread, threads;
    const TilePlan plan;
    const int64_t all_blocks;
    Rows mine;
    const Share own;
    char* const states;
    char* const x;
    float* const gates;
    float* const cells;
    float* const bias;
    float* const sums;
    int64_t* const places;
    int64_t* const active;
    const int64_t state_low, state_bytes, x_low;
    int64_t start = 0;    // first step of the chunk, in the order of the walk
    int configured = 0;

public:
    TileWalk(const Forward* a, const Lengths& lengths, Barrier& barrier, char* shared, char* room, int thread, int threads)
        : a(a), lengths(lengths), barrier(barrier), thread(thread), threads(threads),
          plan(W::PARTS, a->batch, a->steps, a->hidden, a->features, a->by_rows, threads), all_blocks((a->hidden + 15) / 16),
          mine(lengths, a->batch, a->by_rows, thread, threads), own(share(all_blocks, !a->by_rows, thread, threads)),
          states(a->by_rows ? room : shared), x(room + plan.x), gates(reinterpret_cast<float*>(room + plan.gates)),
          cells(reinterpret_cast<float*>(room + plan.cells)), bias(reinterpret_cast<float*>(room + plan.bias)),
          sums(reinterpret_cast<float*>(room + plan.sums)), places(reinterpret_cast<int64_t*>(room + plan.places)),
          active(reinterpret_cast<int64_t*>(room + plan.active)), state_low(plan.row_tiles * plan.states * TILE),
          state_bytes(W::PARTS * state_low), x_low(plan.chunk_tiles * plan.inputs * TILE) {}

    void run() {
        begin();
        if (a->resets && a->steps) reset(0);
        meet();
        for (int64_t s = 0; s < a->steps; ++s) {
            if (plan.in_step) put_inputs(s, 0);
            else if (s == 0 || s == start + plan.chunk) start = s, project();
            step(s);
            if (a->resets && s + 1 < a->steps) reset(s + 1);
            meet();
        }
        release_tiles();
        end();
    }

private:
    void meet() {
        if (!a->by_rows) barrier.wait(thread, threads);
    }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int lanes_of(int64_t block) const { return static_cast<int>(std::min<int64_t>(16, a->hidden - block * 16)); }
    void configure(int rows) {
        if (rows != configured) configure_tiles(configured = rows);
    }
    // 32 bytes of h of a block: of its first row, in the first or second buffer.
    char* state(int64_t buffer, int64_t block) const {
        return states + buffer * state_bytes + block / 2 * TILE + block % 2 * 32;
    }

    // The state before the first step, biases, and where rows of the output begin.
    void begin() {
        for (int64_t i = 0; i < mine.count; ++i) places[i] = mine[i] * a->out_row;
        for (int64_t block = own.first; block < own.end; ++block) {
            const int64_t unit = block * 16, at = block - own.first;
            const int n = lanes_of(block);
            for (int gate = 0; gate < 4; ++gate) {
                const int64_t from = gate * a->hidden + unit;
                const bool given = a->features >= 0 && a->bias_ih;
                store(bias + (at * 4 + gate) * 16, given ? load(a->bias_ih + from, n) + load(a->bias_hh + from, n) : vec{});
            }
            for (int64_t r = 0; r < plan.row_tiles * TILE_ROWS; ++r) {
                const bool real = r < mine.count;
                const int64_t from = real ? mine[r] * a->hidden + unit : 0;
                store(cells + (at * plan.row_tiles * TILE_ROWS + r) * 16, real && a->c0 ? load(a->c0 + from, n) : vec{});
                const vec h = real && a->h0 ? load(a->h0 + from, n) : vec{};
                const int64_t row = r / TILE_ROWS * plan.states * TILE + r % TILE_ROWS * TILE_BYTES;
                for (int buffer = 0; buffer < 2; ++buffer) {
                    W::put((__m512)h, state(buffer, block) + row, state_low);
                    // Past the last block the second half of its 32 numbers is nobody else's.
                    if (block + 1 == all_blocks && block % 2 == 0)
                        W::put(_mm512_setzero_ps(), state(buffer, block + 1) + row, state_low);
                }
            }
        }
    }

    // Own units of the state that step s starts from become zero where it resets a row: before all meet.
    void reset(int64_t s) {
        const int64_t t = time(s), running = mine.at_step(t);
        for (int64_t i = 0; i < running; ++i) {
            if (!a->resets[t * a->batch + mine[i]]) continue;
            const int64_t row = i / TILE_ROWS * plan.states * TILE + i % TILE_ROWS * TILE_BYTES;
            for (int64_t block = own.first; block < own.end; ++block) {
                store(cells + ((block - own.first) * plan.row_tiles * TILE_ROWS + i) * 16, vec{});
                W::put(_mm512_setzero_ps(), state(s % 2, block) + row, state_low);
            }
        }
    }

    void end() {
        for (int64_t i = 0; i < mine.count; ++i) {
            const int64_t b = mine[i], steps = lengths.steps(b, 0, a->steps);
            const float* last = !steps ? a->h0 ? a->h0 + b * a->hidden : nullptr
                                       : a->output + (a->reverse ? 0 : steps - 1) * a->out_step + b * a->out_row;
            for (int64_t block = own.first; block < own.end; ++block) {
                const int n = lanes_of(block);
                store(a->h_n + b * a->hidden + block * 16, last ? load(last + block * 16, n) : vec{}, n);
                const float* c = cells + ((block - own.first) * plan.row_tiles * TILE_ROWS + i) * 16;
                store(a->c_n + b * a->hidden + block * 16, load(c), n);
            }
        }
    }

    // x of one step to tiles that begin at one of the chunk, from a row of it on.
    void put_inputs(int64_t s, int64_t tile, int64_t first = 0) {
        const int64_t t = time(s), running = mine.at_step(t);
        for (int64_t i = 0; i < running; ++i) {
            const int64_t row = first + i;
            W::put_row(a->x + t * a->x_step + mine[i] * a->x_row, a->features,
                       x + (tile + row / TILE_ROWS) * plan.inputs * TILE + row % TILE_ROWS * TILE_BYTES, x_low);
        }
    }

    // Tile of a step of the chunk, and its first row in it.
    int64_t tile_of(int64_t s) const { return (s - start) / plan.steps_in_tile * plan.row_tiles; }
    int64_t row_of(int64_t s) const { return (s - start) % plan.steps_in_tile * plan.rows; }

    // Gates of the steps of a chunk, as the sums of the steps begin: [tile of rows][block][gate][row][16].
    void project() {
        const int64_t end = std::min(start + plan.chunk, a->steps);
        if (a->features < 0) return take_gates(end);
        int64_t count = 0;
        for (int64_t s = start; s < end; ++s) {
            put_inputs(s, tile_of(s), row_of(s));
            const int64_t tiles = (mine.at_step(time(s)) + TILE_ROWS - 1) / TILE_ROWS;
            for (int64_t tile = tile_of(s); tile < tile_of(s) + tiles; ++tile)
                if (!count || active[count - 1] != tile) active[count++] = tile;
        }
        configure(TILE_ROWS);
        const auto nothing = [] {};
        const int64_t down = plan.blocks * 4 * 256;  // numbers of a tile's gates
        for (int64_t block = own.first; block < own.end; ++block) {
            const float* b = bias + (block - own.first) * 64;
            const char* w = static_cast<const char*>(a->packed_ih) + block * plan.inputs * 2 * W::PAIR;
            float* const to = gates + (block - own.first) * 4 * 256;
            const auto input = [this](int64_t tile) { return x + tile * plan.inputs * TILE; };
            for (int pair = 0; pair < 2; ++pair, b += 32, w += plan.inputs * W::PAIR)
                for (int64_t i = 0; i + 1 < count; i += 2) {
                    float* const above = to + active[i] * down + pair * 512;
                    float* const below = to + active[i + 1] * down + pair * 512;
                    load_tile<0>(b, 0);
                    load_tile<1>(b + 16, 0);
                    load_tile<2>(b, 0);
                    load_tile<3>(b + 16, 0);
                    W::template add_two<false>(input(active[i]), input(active[i + 1]), x_low, w, plan.inputs, nothing);
                    store_tile<0>(above, TILE_BYTES);
                    store_tile<1>(above + 256, TILE_BYTES);
                    store_tile<2>(below, TILE_BYTES);
                    store_tile<3>(below + 256, TILE_BYTES);
                }
            if (count % 2 == 0) continue;
            float* const last = to + active[count - 1] * down;
            load_four(b - 64, 0, 16);
            W::add_one(input(active[count - 1]), x_low, w - 2 * plan.inputs * W::PAIR, plan.inputs, nothing);
            store_four(last);
        }
    }

    // The same where the projection has been done.
    void take_gates(int64_t end) {
        for (int64_t s = start; s < end; ++s)
            for (int64_t i = 0, running = mine.at_step(time(s)); i < running; ++i) {
                const float* from = a->gates_input + time(s) * a->gi_step + mine[i] * a->gi_row;
                const int64_t row = row_of(s) + i, tile = tile_of(s) + row / TILE_ROWS;
                for (int64_t block = own.first; block < own.end; ++block)
                    for (int gate = 0; gate < 4; ++gate)
                        store(gates + ((tile * plan.blocks + block - own.first) * 4 + gate) * 256 + row % TILE_ROWS * 16,
                              load(from + gate * a->hidden + block * 16, lanes_of(block)));
            }
    }

    static void load_four(const float* from, int64_t stride, int64_t apart = 256) {
        load_tile<0>(from, stride);
        load_tile<1>(from + apart, stride);
        load_tile<2>(from + 2 * apart, stride);
        load_tile<3>(from + 3 * apart, stride);
    }
    static void store_four(float* to) {
        store_tile<0>(to, TILE_BYTES);
        store_tile<1>(to + 256, TILE_BYTES);
        store_tile<2>(to + 512, TILE_BYTES);
        store_tile<3>(to + 768, TILE_BYTES);
    }

    void step(int64_t s) {
        const int64_t t = time(s), running = mine.at_step(t), before = s % 2, after = 1 - before;
        const int64_t tiles = (running + TILE_ROWS - 1) / TILE_ROWS, tile_bytes = plan.states * TILE;
        const bool recurs = s || a->h0;
        const int64_t depth = (plan.in_step ? plan.inputs : 0) + (recurs ? plan.states : 0);
        float* const output = a->output + t * a->out_step;
        const WalkRecord kept(a->gates, a->batch, a->hidden);
        if (running) configure(static_cast<int>(plan.rows < TILE_ROWS ? running : TILE_ROWS));
        TileCells<W, KEEPS> cell{};
        int turn = 0;
        for (int64_t i = own.first; i < own.end; ++i) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? own.end - 1 - (i - own.first) : i, at = block - own.first;
            const char* const w_x = static_cast<const char*>(a->packed_ih) + block * plan.inputs * 2 * W::PAIR;
            const char* const w_h = static_cast<const char*>(a->packed) + block * plan.states * 2 * W::PAIR;
            for (int64_t tile = 0; tile < tiles; tile += 2) {
                float* const to = sums + (turn ^= 1) * 8 * 256;
                const bool two = tile + 1 < tiles;
                const float* const begins = plan.in_step ? bias + at * 64
                    : gates + ((tile_of(s) + tile) * plan.blocks + at) * 4 * 256 + row_of(s) * 16;
                const int64_t stride = plan.in_step ? 0 : TILE_BYTES, apart = plan.in_step ? 16 : 256;
                const int64_t down = plan.in_step ? 0 : plan.blocks * 4 * 256;
                const char* const x_rows = x + tile * plan.inputs * TILE;
                const char* const h_rows = states + before * state_bytes + tile * tile_bytes;
                // Rows of the last block's cell after each few products, so that none are left at the end.
                const int64_t calls = depth * W::CALLS * (two ? 2 : 1);
                const int64_t each = calls ? (cell.rows + calls - 1) / calls : 0;
                const auto between = [&cell, each] {
                    for (int64_t n = each; n > 0 && cell.row < cell.rows; --n) cell.next();
                };
                for (int pair = 0; two && pair < 2; ++pair) {
                    load_tile<0>(begins + 2 * pair * apart, stride);
                    load_tile<1>(begins + (2 * pair + 1) * apart, stride);
                    load_tile<2>(begins + down + 2 * pair * apart, stride);
                    load_tile<3>(begins + down + (2 * pair + 1) * apart, stride);
                    if (plan.in_step)
                        W::template add_two<true>(x_rows, x_rows + plan.inputs * TILE, x_low, w_x + pair * plan.inputs * W::PAIR, plan.inputs, between);
                    if (recurs)
                        W::template add_two<true>(h_rows, h_rows + tile_bytes, state_low, w_h + pair * plan.states * W::PAIR, plan.states, between);
                    store_tile<0>(to + pair * 512, TILE_BYTES);
                    store_tile<1>(to + pair * 512 + 256, TILE_BYTES);
                    store_tile<2>(to + 1024 + pair * 512, TILE_BYTES);
                    store_tile<3>(to + 1024 + pair * 512 + 256, TILE_BYTES);
                }
                if (!two) {
                    load_four(begins, stride, apart);
                    if (plan.in_step) W::add_one(x_rows, x_low, w_x, plan.inputs, between);
                    if (recurs) W::add_one(h_rows, state_low, w_h, plan.states, between);
                    store_four(to);
                }
                cell.finish();
                for (int64_t r = tile * TILE_ROWS; r < std::min(running, (tile + 2) * TILE_ROWS); ++r)
                    __builtin_prefetch(output + places[r] + block * 16, 1);
                cell = {to, cells + (at * plan.row_tiles + tile) * 256, state(after, block) + tile * tile_bytes,
                        output + block * 16, places + tile * TILE_ROWS, tile_bytes, state_low, 0,
                        static_cast<int>(std::min<int64_t>(2 * TILE_ROWS, running - tile * TILE_ROWS)),
                        static_cast<__mmask16>((1u << lanes_of(block)) - 1),
                        KEEPS ? kept.at(t, block, mine.place(tile * TILE_ROWS)) : nullptr,
                        (mine.place(1) - mine.place(0)) * WalkRecord::NUMBERS};
            }
            // Past its end a sequence holds its state, and its output is zero.
            for (int64_t row = running; row < mine.count; ++row) store(output + places[row] + block * 16, vec{}, lanes_of(block));
        }
        cell.finish();
    }
};

}  // namespace
#endif
