// The walk of one direction of a layer forward through time by tiles of bytes, with weights in int8 and a state of two bytes
// a number and a fixed scale: |h| is at most 1, so the cell writes the bytes that the next step multiplies, and nobody
// looks for a row's largest value. A state that a caller gives may be of any size and has a scale per row, for the first
// step alone. One byte would not do: where |h| is small, most of it would be rounded away.
//
// The input of some steps is projected before them, rows of all of these steps together. The sums of a step are
// integers; scale and projection come to them in the cell, which runs in vectors between the products of the next block.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "byte_tiles.h"
#include "forward.h"

#if defined(HAS_BYTE_TILES)
namespace {

// How a thread goes through its rows, and where in its memory everything lies, in bytes.
struct BytePlan {
    // Whether threads have enough rows for this walk.
    static bool serves(int64_t batch, bool by_rows, int64_t threads) {
        return (by_rows ? (batch + threads - 1) / threads : batch) >= ByteProducts::LEAST;
    }

    // Bytes of gates of a chunk of steps: more where weights that do not stay in the second-level cache come again for each.
    static constexpr int64_t LEAST_CHUNK = 1 << 18, LARGEST_CHUNK = 1 << 20;

    int64_t rows, row_tiles;  // of a step, at most
    int64_t blocks;           // of 16 hidden units that this thread computes, at most
    ByteRows state, input;
    int64_t chunk, chunk_tiles;  // steps, and tiles of their rows
    int64_t shared, states, broken, x, x_units, gates, cells, bias, scales, sums, units, spoilt, places, firsts, own;

    BytePlan(int64_t batch, int64_t steps, int64_t hidden, int64_t features, bool by_rows, int64_t threads)
        : rows(by_rows ? (batch + threads - 1) / threads : batch), row_tiles((rows + TILE_ROWS - 1) / TILE_ROWS),
          blocks(by_rows ? (hidden + 15) / 16 : ((hidden + 15) / 16 + threads - 1) / threads), state(rows, hidden, true),
          input(TILE_ROWS, std::max<int64_t>(features, 0), false) {
        const int64_t each = std::max<int64_t>(1, rows * (blocks * 4 * 64 + input.groups * 128));
        const int64_t bytes = std::clamp(input.groups * 64 * blocks * 32, LEAST_CHUNK, LARGEST_CHUNK);
        chunk = std::min(std::max<int64_t>(steps, 1), std::max<int64_t>({1, bytes / each, 2 * TILE_ROWS / std::max<int64_t>(rows, 1)}));
        chunk_tiles = (chunk * rows + TILE_ROWS - 1) / TILE_ROWS;

        int64_t end = 0;
        const auto take = [&end](int64_t bytes) { return end += (bytes + 63) / 64 * 64, end - (bytes + 63) / 64 * 64; };
        states = take(2 * row_tiles * state.tile_bytes());
        broken = take(2 * threads * rows * 4);
        shared = by_rows ? 0 : end;
        if (!by_rows) end = 0;
        x = take(chunk_tiles * input.tile_bytes());
        x_units = take(4 * TILE_ROWS * chunk_tiles);
        gates = take(chunk_tiles * blocks * 4 * TILE);
        cells = take(blocks * row_tiles * TILE);
        bias = take(blocks * 4 * 64);
        scales = take(2 * blocks * 4 * 64);
        sums = take(2 * 4 * BYTE_SUMS * 4);
        units = take(4 * rows);
        spoilt = take(2 * rows);
        places = take(8 * rows);
        firsts = take(8 * (chunk + 1));
        own = end;
    }
};

// A sum of both bytes.
ALWAYS_INLINE __m512 whole_sum(const int32_t* high, int64_t part) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(high)), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(_mm512_loadu_si512(high + part)));
}

// The gates of a block for up to 16 rows from the sums of the projection, row by row.
struct ProjectedRows {
    const int32_t* sums;
    const float *units, *scales, *bias;
    float* to;
    int64_t part;
    int row, rows;

    void next() {
        const int r = row++;
        const __m512 unit = _mm512_set1_ps(units[r]);
        for (int gate = 0; gate < 4; ++gate) {
            const __m512 sum = whole_sum(sums + gate * BYTE_SUMS + r * 16, part);
            const __m512 by = _mm512_mul_ps(unit, _mm512_loadu_ps(scales + gate * 16));
            _mm512_storeu_ps(to + gate * 256 + r * 16, _mm512_fmadd_ps(sum, by, _mm512_loadu_ps(bias + gate * 16)));
        }
    }
};

// The cell of a block for up to 16 rows, row by row.
struct ByteCells {
    const int32_t* sums;  // null where there is no state yet
    const float *units, *scales, *gates;
    int64_t first, down;  // row of the chunk of the first of them; numbers of gates between tiles of rows
    float* c;             // [row][16]
    char* h;              // bytes of the first row
    float* output;        // of the first row's unit, rows at `places`
    const int64_t* places;
    uint16_t* spoilt;     // lanes of a row that are NaN
    int64_t part, low;
    int row, rows;
    __mmask16 lanes;

    void next() {
        const int r = row++;
        const int64_t at = first + r;
        const float* const from = gates + at / TILE_ROWS * down + at % TILE_ROWS * 16;
        __m512 gate[4];
        for (int i = 0; i < 4; ++i) gate[i] = _mm512_loadu_ps(from + i * 256);
        if (sums) {
            const __m512 unit = _mm512_set1_ps(units[r]);
            for (int i = 0; i < 4; ++i)
                gate[i] = _mm512_fmadd_ps(whole_sum(sums + i * BYTE_SUMS + r * 16, part), _mm512_mul_ps(unit, _mm512_loadu_ps(scales + i * 16)), gate[i]);
        }
        __m512 state = _mm512_loadu_ps(c + r * 16);
        const __m512 value = cell_of(gate[0], gate[1], gate[2], gate[3], state);
        _mm512_storeu_ps(c + r * 16, state);
        _mm512_mask_storeu_ps(output + places[r], lanes, value);
        ByteRows::put(value, STATE_BYTES.most, STATE_BYTES, lanes, h + r * TILE_BYTES, low);
        spoilt[r] = static_cast<uint16_t>(spoilt[r] | _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q));
    }
};

// Does the rows of one piece of work between the products of the next one.
template <typename Work>
struct Meanwhile {
    Work work{};
    int64_t each = 0;
    void spread(int64_t calls) { each = calls ? (work.rows + calls - 1) / calls : 0; }
    void some() {
        for (int64_t n = each; n > 0 && work.row < work.rows; --n) work.next();
    }
    void finish() {
        while (work.row < work.rows) work.next();
    }
};

// One direction of a layer in one thread of a team: its own rows or its own blocks of hidden units.
class ByteWalk {
    const Forward* const a;
    const Lengths& lengths;
    Barrier& barrier;
    const int thread, threads;
    const BytePlan plan;
    const int64_t all_blocks;
    Rows mine;
    const Share own;
    char* const states;
    float* const broken;  // [buffer][thread][row] 0, or NaN for a row that became one
    char* const x;
    float *const x_units, *const gates, *const cells, *const bias, *const scales_ih, *const scales;
    int32_t* const sums;
    float* const units;
    uint16_t* const spoilt;
    int64_t *const places, *const firsts;
    int64_t start = 0;  // first step of the chunk, in the order of the walk
    int configured = 0;

    template <typename T>
    static T* part_of(char* room, int64_t at) { return reinterpret_cast<T*>(room + at); }

public:
    ByteWalk(const Forward* a, const Lengths& lengths, Barrier& barrier, char* shared, char* room, int thread, int threads)
        : a(a), lengths(lengths), barrier(barrier), thread(thread), threads(threads),
          plan(a->batch, a->steps, a->hidden, a->features, a->by_rows, threads), all_blocks((a->hidden + 15) / 16),
          mine(lengths, a->batch, a->by_rows, thread, threads), own(share(all_blocks, !a->by_rows, thread, threads)),
          states((a->by_rows ? room : shared) + plan.states), broken(part_of<float>(a->by_rows ? room : shared, plan.broken)),
          x(room + plan.x), x_units(part_of<float>(room, plan.x_units)), gates(part_of<float>(room, plan.gates)),
          cells(part_of<float>(room, plan.cells)), bias(part_of<float>(room, plan.bias)), scales_ih(part_of<float>(room, plan.scales)),
          scales(scales_ih + plan.blocks * 64), sums(part_of<int32_t>(room, plan.sums)), units(part_of<float>(room, plan.units)),
          spoilt(part_of<uint16_t>(room, plan.spoilt)), places(part_of<int64_t>(room, plan.places)), firsts(part_of<int64_t>(room, plan.firsts)) {}

    void run() {
        begin();
        if (a->resets && a->steps) reset(0);
        meet();
        for (int64_t s = 0; s < a->steps; ++s) {
            if (s == 0 || s == start + plan.chunk) start = s, project();
            step(s);
            if (a->resets && s + 1 < a->steps) reset(s + 1);
            meet();
        }
        if (configured) release_tiles();
        end();
    }

private:
    void meet() {
        if (!a->by_rows) barrier.wait(thread, threads);
    }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int lanes_of(int64_t block) const { return static_cast<int>(std::min<int64_t>(16, a->hidden - block * 16)); }
    __mmask16 mask_of(int64_t block) const { return static_cast<__mmask16>((1u << lanes_of(block)) - 1); }
    void configure(int rows) {
        if (rows != configured) configure_tiles(configured = rows);
    }
    char* state(int64_t buffer, int64_t block, int64_t row) const {
        return states + buffer * plan.row_tiles * plan.state.tile_bytes() + plan.state.row(row) + ByteRows::at(block * 16);
    }
    float* broken_by(int64_t buffer, int64_t who) const { return broken + (buffer * (a->by_rows ? 1 : threads) + who) * plan.rows; }

    // The state before the first step, biases and scales, and where rows of the output begin.
    void begin() {
        const int64_t bytes = plan.row_tiles * plan.state.tile_bytes();
        if (a->by_rows) std::memset(states, 0, 2 * bytes);
        for (int64_t i = 0; i < mine.count; ++i) {
            places[i] = mine[i] * a->out_row;
            spoilt[i] = 0;
            for (int buffer = 0; buffer < 2; ++buffer) broken_by(buffer, a->by_rows ? 0 : thread)[i] = 0.0f;
        }
        for (int64_t block = own.first; block < own.end; ++block) {
            const int64_t unit = block * 16, at = block - own.first;
            const int n = lanes_of(block);
            for (int gate = 0; gate < 4; ++gate) {
                const int64_t from = gate * a->hidden + unit, to = (at * 4 + gate) * 16;
                const bool given = a->features >= 0 && a->bias_ih;
                store(bias + to, given ? load(a->bias_ih + from, n) + load(a->bias_hh + from, n) : vec{});
                store(scales_ih + to, a->features >= 0 ? load(a->scale_ih + from, n) : vec{});
                store(scales + to, load(a->scale + from, n));
            }
            for (int64_t r = 0; r < plan.row_tiles * TILE_ROWS; ++r) {
                const bool real = r < mine.count && a->c0;
                store(cells + (at * plan.row_tiles * TILE_ROWS + r) * 16, real ? load(a->c0 + mine[r] * a->hidden + unit, n) : vec{});
            }
        }
        // Numbers past the last unit are zeros: whoever has the last block writes them.
        for (int64_t r = 0; !a->by_rows && own.end == all_blocks && own.first < own.end && r < mine.count; ++r)
            for (int64_t block = all_blocks; block < 4 * plan.state.groups; ++block)
                for (int buffer = 0; buffer < 2; ++buffer) put_state(buffer, block, r, _mm512_setzero_ps(), 0.0f, 0);
        for (int64_t r = 0; r < mine.count; ++r) {
            const float* const h = a->h0 ? a->h0 + mine[r] * a->hidden : nullptr;
            const RowScale scale(h, h ? a->hidden : 0, STATE_BYTES.most);
            units[r] = scale.unit;
            for (int64_t block = own.first; block < own.end; ++block) {
                const __m512 value = h ? Tiles<1>::load_some(h + block * 16, lanes_of(block)) : _mm512_setzero_ps();
                for (int buffer = 0; buffer < 2; ++buffer) put_state(buffer, block, r, value, scale.by, mask_of(block));
            }
        }
    }
    void put_state(int64_t buffer, int64_t block, int64_t row, __m512 value, float by, __mmask16 lanes) const {
        ByteRows::put(value, by, STATE_BYTES, lanes, state(buffer, block, row), plan.state.low());
    }

    // Own units of the state that step s starts from become zero where it resets a row, and a NaN in it is forgotten: before
    // all meet.
    void reset(int64_t s) {
        const int64_t t = time(s), running = mine.at_step(t);
        for (int64_t r = 0; r < running; ++r) {
            if (!a->resets[t * a->batch + mine[r]]) continue;
            units[r] = 1.0f / STATE_BYTES.most;
            broken_by(s % 2, a->by_rows ? 0 : thread)[r] = 0.0f;
            for (int64_t block = own.first; block < own.end; ++block) {
                store(cells + ((block - own.first) * plan.row_tiles * TILE_ROWS + r) * 16, vec{});
                put_state(s % 2, block, r, _mm512_setzero_ps(), 0.0f, mask_of(block));
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

    // Gates of the steps of a chunk without what the state brings: [16 rows][block][gate][row][16], rows step after step.
    void project() {
        const int64_t end = std::min(start + plan.chunk, a->steps);
        int64_t count = 0;
        for (int64_t s = start; s < end; ++s) {
            firsts[s - start] = count;
            const int64_t t = time(s), running = mine.at_step(t);
            for (int64_t i = 0; i < running; ++i, ++count)
                if (a->features >= 0) put_input(a->x + t * a->x_step + mine[i] * a->x_row, count);
                else take_gates(a->gates_input + t * a->gi_step + mine[i] * a->gi_row, count);
        }
        if (a->features < 0 || !count) return;
        configure(TILE_ROWS);
        Meanwhile<ProjectedRows> before;
        int turn = 0;
        for (int64_t block = own.first; block < own.end; ++block)
            for (int64_t row = 0; row < count; row += TILE_ROWS) {
                const int64_t rows = std::min<int64_t>(TILE_ROWS, count - row), at = block - own.first;
                int32_t* const to = sums + (turn ^= 1) * 4 * BYTE_SUMS;
                before.spread(plan.input.groups * ByteProducts::CALLS);
                // A whole tile, though the last one may have few rows: the others have whatever bytes there are.
                ByteProducts::add(x + plan.input.row(row), plan.input, a->packed_ih, block, a->features, true, to, [&before] { before.some(); });
                before.finish();
                before.work = {to, x_units + row, scales_ih + at * 64, bias + at * 64, gates + (row / TILE_ROWS * plan.blocks + at) * 1024,
                               plan.input.part(), 0, static_cast<int>(rows)};
            }
        before.finish();
    }

    void put_input(const float* from, int64_t row) {
        const RowScale scale(from, a->features, INPUT_BYTES.most);
        x_units[row] = scale.unit;
        char* const to = x + plan.input.row(row);
        for (int64_t k = 0; k < plan.input.groups * 64; k += 16) {
            const int n = static_cast<int>(std::clamp<int64_t>(a->features - k, 0, 16));
            const __m512 value = n ? Tiles<1>::load_some(from + k, n) : _mm512_setzero_ps();
            ByteRows::put(value, scale.by, INPUT_BYTES, static_cast<__mmask16>((1u << n) - 1), to + ByteRows::at(k), plan.input.low());
        }
    }

    // Where the projection has been done.
    void take_gates(const float* from, int64_t row) {
        for (int64_t block = own.first; block < own.end; ++block)
            for (int gate = 0; gate < 4; ++gate)
                store(gates + ((row / TILE_ROWS * plan.blocks + block - own.first) * 4 + gate) * 256 + row % TILE_ROWS * 16,
                      load(from + gate * a->hidden + block * 16, lanes_of(block)));
    }

    void step(int64_t s) {
        const int64_t t = time(s), running = mine.at_step(t), before = s % 2, after = 1 - before;
        const bool recurs = s || a->h0;
        float* const output = a->output + t * a->out_step;
        // Rows that became NaN in the step before are NaN from now on, in all units.
        for (int64_t r = 0; s && r < running; ++r) {
            for (int who = 0; who < (a->by_rows ? 1 : threads); ++who) units[r] += broken_by(before, who)[r];
        }
        if (recurs && running) configure(plan.state.configured());
        Meanwhile<ByteCells> cell;
        int turn = 0;
        for (int64_t i = own.first; i < own.end; ++i) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? own.end - 1 - (i - own.first) : i, at = block - own.first;
            for (int64_t row = 0; row < running; row += TILE_ROWS) {
                const int64_t rows = std::min<int64_t>(TILE_ROWS, running - row);
                int32_t* const to = sums + (turn ^= 1) * 4 * BYTE_SUMS;
                cell.spread(plan.state.groups * ByteProducts::CALLS);
                if (recurs)
                    ByteProducts::add(state(before, 0, row), plan.state, a->packed, block, a->hidden, false, to, [&cell] { cell.some(); });
                cell.finish();
                for (int64_t r = row; r < row + rows; ++r) __builtin_prefetch(output + places[r] + block * 16, 1);
                cell.work = {recurs ? to : nullptr, units + row, scales + at * 64, gates + at * 1024, firsts[s - start] + row, plan.blocks * 1024,
                             cells + (at * plan.row_tiles * TILE_ROWS + row) * 16, state(after, block, row), output + block * 16, places + row,
                             spoilt + row, plan.state.part(), plan.state.low(), 0, static_cast<int>(rows), mask_of(block)};
            }
            // Past its end a sequence holds its state, and its output is zero.
            for (int64_t row = running; row < mine.count; ++row) store(output + places[row] + block * 16, vec{}, lanes_of(block));
        }
        cell.finish();
        for (int64_t r = 0; r < running; ++r) {
            broken_by(after, a->by_rows ? 0 : thread)[r] = spoilt[r] ? NAN : 0.0f;
            spoilt[r] = 0;
            units[r] = 1.0f / STATE_BYTES.most;
        }
    }
};

}  // namespace
#endif
