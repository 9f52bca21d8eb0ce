// The walk of one direction of a layer forward through time with int8 weights by AVX2 alone: for whole sequences of which
// nothing is kept for gradients, one or a batch.
//
// The input of some steps is projected before them, rows of all of these steps together, so that a block of weights is read
// once for all of them, and widened where the input has 16 bits. Sums of both products stay integers until the cell, which
// takes two vectors of units at a time and many one after the other: a cell is a long chain of instructions that wait for
// each other.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "forward.h"
#include "paired_bytes.h"
#include "team.h"
#include "vectors.h"

#if defined(HAS_PAIRED_PRODUCTS)
namespace {

// 2^x - 1 = scale * p + (scale - 1), as `exponential` has it, of N vectors step by step: one alone would wait for itself. Cut
// at 2^62, since a cell divides by the product of two.
template <int N>
ALWAYS_INLINE void powers(const vec (&x)[N], Exponential (&to)[N]) {
    const vec magic = all(12582912.0f);
    vec shifted[N], r[N], p[N];
    UNROLLED for (int i = 0; i < N; ++i) {
        const vec y = within(x[i], 62.0f);
        shifted[i] = y + magic;
        r[i] = y - (shifted[i] - magic);
    }
    UNROLLED for (int i = 0; i < N; ++i) p[i] = all(1.5403508e-4f) * r[i] + 1.3390736e-3f;
    for (float next : {9.6182376e-3f, 5.5503573e-2f, 2.4022649e-1f, 6.9314718e-1f})
        UNROLLED for (int i = 0; i < N; ++i) p[i] = p[i] * r[i] + next;
    UNROLLED for (int i = 0; i < N; ++i) to[i] = {(vec)(((ivec)shifted[i] << 23) + 0x3f800000), p[i] * r[i]};
}

constexpr float LOG2_E = 1.44269502162933349609375f;
// What the gates are multiplied by before they come to `cells_of_powers`.
constexpr float GATE_BY[4] = {-LOG2_E, -LOG2_E, -2 * LOG2_E, -LOG2_E};

// h of N vectors of units and c, from their gates before the nonlinearities, times GATE_BY. By three divisions: i * tanh(g) is
// one, and o * tanh(c) another. Nothing cancels near zero.
template <int N>
ALWAYS_INLINE void cells_of_powers(const vec (&gates)[N][4], vec (&c)[N], vec (&h)[N]) {
    vec added[N], under[N], x[N];
    UNROLLED for (int j = 0; j < N; ++j) {
        Exponential both[2];
        powers<2>({gates[j][0], gates[j][2]}, both);
        const vec low = both[1].less();
        added[j] = low / ((low + 2.0f) * both[0].more());
    }
    Exponential e[N];
    UNROLLED for (int j = 0; j < N; ++j) x[j] = gates[j][1];
    powers<N>(x, e);
    UNROLLED for (int j = 0; j < N; ++j) c[j] = c[j] / e[j].more() - added[j], x[j] = gates[j][3];
    powers<N>(x, e);
    UNROLLED for (int j = 0; j < N; ++j) under[j] = e[j].more(), x[j] = c[j] * (-2 * LOG2_E);
    powers<N>(x, e);
    UNROLLED for (int j = 0; j < N; ++j) {
        const vec low = e[j].less();
        h[j] = low / ((-2.0f - low) * under[j]);
    }
}

template <typename Input>
class PairedWalk {
    using Recurrent = StateInBytes;
    static constexpr int64_t GATES = 4 * LANES;
    static constexpr int64_t ROWS_AHEAD = 64;  // of x that are projected together, unless a step has more
    static constexpr int64_t CELLS = 32;       // vectors of units, at least, whose cells follow each other

    // How a thread goes through its rows, and where in its memory everything lies, in bytes.
    struct Plan {
        int64_t rows, blocks, chunk, together;  // at most: rows of a step, blocks of units, steps ahead, blocks whose cells follow each other
        int64_t states, inputs, widened, projected, sums, cells, bias, scales_ih, scales, own;

        Plan(int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
            const int64_t all = (hidden + LANES - 1) / LANES;
            rows = std::max<int64_t>(1, by_rows ? (batch + threads - 1) / threads : batch);
            blocks = by_rows ? all : (all + threads - 1) / threads;
            chunk = std::max<int64_t>(1, ROWS_AHEAD / rows);
            together = std::min(blocks, std::max<int64_t>(1, CELLS / rows));
            int64_t end = 0;
            const auto take = [&end](int64_t bytes) { return end += (bytes + 63) / 64 * 64, end - (bytes + 63) / 64 * 64; };
            states = take(rows * Recurrent::row_bytes(hidden));
            inputs = take(chunk * rows * Input::row_bytes(features));
            widened = take(Input::WIDE ? WidenedBlock::BYTES : 0);
            projected = take(chunk * rows * blocks * GATES * 4);
            sums = take(together * rows * GATES * 4);
            cells = take(blocks * rows * LANES * 4);
            bias = take(blocks * GATES * 4);
            scales_ih = take(blocks * GATES * 4);
            scales = take(blocks * GATES * 4);
            own = end;
        }
    };

    const Forward* const a;
    Barrier& barrier;
    const int thread, threads;
    const Plan plan;
    const Input input;
    const Recurrent recurrent;
    const Share mine, own;  // rows of the batch and blocks of this thread
    char *const states, *const inputs;
    int16_t* const widened;
    int32_t *const projected, *const sums;  // [step of the chunk][block][row][gate][lane]; [block][row][gate][lane]
    float *const cells;                     // [block][row][lane]
    float *const bias, *const scales_ih, *const scales;  // [block][gate][lane]

    int64_t rows() const { return mine.end - mine.first; }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int lanes(int64_t block) const { return static_cast<int>(std::min<int64_t>(LANES, a->hidden - block * LANES)); }
    char* input_row(int64_t row) const { return inputs + row * Input::row_bytes(a->features); }
    char* state_row(int64_t row) const { return states + row * Recurrent::row_bytes(a->hidden); }
    // Sums of a block for a row of a step of the chunk.
    int32_t* projected_of(int64_t step, int64_t block, int64_t row) const {
        return projected + ((step * (own.end - own.first) + block - own.first) * rows() + row) * GATES;
    }
    // h of a row after a step.
    float* output_of(int64_t s, int64_t row) const { return a->output + time(s) * a->out_step + (mine.first + row) * a->out_row; }

    // Biases and scales of the own blocks, and c.
    void begin() const {
        for (int64_t block = own.first; block < own.end; ++block) {
            const int n = lanes(block);
            if (n == LANES) begin(block, [](const float* p) { return load(p); });
            else begin(block, [n](const float* p) { return load(p, n); });
        }
    }
    template <typename F>
    void begin(int64_t block, F get) const {
        const int64_t at = block - own.first, unit = block * LANES;
        UNROLLED for (int gate = 0; gate < 4; ++gate) {
            const int64_t from = gate * a->hidden + unit, to = at * GATES + gate * LANES;
            const vec by = all(GATE_BY[gate]);
            store(bias + to, a->bias_ih ? (get(a->bias_ih + from) + get(a->bias_hh + from)) * by : vec{});
            store(scales_ih + to, get(a->scale_ih + from) * by);
            store(scales + to, get(a->scale + from) * by);
        }
        for (int64_t r = 0; r < rows(); ++r)
            store(cells + (at * rows() + r) * LANES, a->c0 ? get(a->c0 + (mine.first + r) * a->hidden + unit) : vec{});
    }

    // h_n may be the memory of h0, which is read in the first step alone.
    void end() const {
        for (int64_t r = 0; r < rows(); ++r) {
            const int64_t row = (mine.first + r) * a->hidden;
            const float* const last = a->steps ? output_of(a->steps - 1, r) : a->h0 ? a->h0 + row : nullptr;
            for (int64_t block = own.first; block < own.end; ++block) {
                const int n = lanes(block);
                const int64_t unit = block * LANES;
                store(a->h_n + row + unit, last ? load(last + unit, n) : vec{}, n);
                store(a->c_n + row + unit, load(cells + ((block - own.first) * rows() + r) * LANES), n);
            }
        }
    }

    // Projects the input of the chunk that begins with step s.
    void project(int64_t s) const {
        const int64_t count = std::min(plan.chunk, a->steps - s) * rows();
        if (own.first == own.end) return;
        for (int64_t i = 0; i < count; ++i)
            input.prepare(a->x + time(s + i / rows()) * a->x_step + (mine.first + i % rows()) * a->x_row, input_row(i));
        if constexpr (!Input::WIDE)
            if (count == 1) {
                for (int64_t block = own.first; block < own.end; block += 2)
                    sum_one(input, input_row(0), projected_of(0, block, 0), block, own.end);
                return;
            }
        const bool widens = Input::WIDE && count >= Input::WORTH_WIDENING;
        const Pieces pieces(count, widens ? Input::WIDE_ROWS : Input::MOST_ROWS);
        for (int64_t block = own.first; block < own.end; ++block) {
            if (!widens) {
                for (int64_t piece = 0, row = 0; row < count; row += pieces[piece], ++piece)
                    project_some<false>(pieces[piece], row, block, 0);
                continue;
            }
            for (int64_t k = 0; k < std::max<int64_t>(1, a->features); k += WidenedBlock::DEPTH) {
                input.widen(block, k, widened);
                for (int64_t piece = 0, row = 0; row < count; row += pieces[piece], ++piece)
                    project_some<true>(pieces[piece], row, block, k);
            }
        }
    }
    // Sums of one row with a block and, before the end, the next one.
    template <typename M>
    static void sum_one(const M& matrix, const char* from, int32_t* to, int64_t block, int64_t end) {
        int32_t* const both[2] = {to, to + GATES};
        matrix.sum_one(block + 1 < end ? 2 : 1, both, from, block);
    }

    template <bool WIDENED>
    void project_some(int count, int64_t row, int64_t block, int64_t k) const {
        const char* from[Input::WIDE_ROWS];
        int32_t* to[Input::WIDE_ROWS];
        int64_t step = row / rows(), of_step = row % rows();
        for (int r = 0; r < count; ++r) {
            from[r] = input_row(row + r), to[r] = projected_of(step, block, of_step);
            if (++of_step == rows()) ++step, of_step = 0;
        }
        if constexpr (WIDENED) input.multiply_widened(count, to, from, widened, k);
        else input.sum(count, to, from, block);
    }

    // The cells of some blocks in step s, of which `first` is the first of the chunk, two at a time: of two blocks, or of two
    // rows of a block. In a function of its own, whose registers nothing else takes.
    template <bool RECURS, bool ALONE>
    __attribute__((noinline)) void cells_of(int64_t s, int64_t first, int64_t from, int64_t end) const {
        const int64_t n = rows(), input_bytes = Input::row_bytes(a->features), state_bytes = Recurrent::row_bytes(a->hidden);
        const char* const input_units = input_row((s - first) * n);
        float* const output = output_of(s, 0);
        for (int64_t block = from; block < end; block += ALONE ? 2 : 1) {
            const int32_t *const x = projected_of(s - first, block, 0), *const sum = sums + (block - from) * n * GATES;
            const int64_t at = block - own.first;
            const float *const plus = bias + at * GATES, *const by_ih = scales_ih + at * GATES, *const by = scales + at * GATES;
            float* const c_at = cells + at * n * LANES;
            for (int64_t row = 0; row < n; row += 2) {
                // An odd last one is computed twice.
                const bool both = ALONE ? block + 1 < end : row + 1 < n;
                vec gates[2][4], c[2], h[2];
                UNROLLED for (int j = 0; j < 2; ++j) {
                    const int64_t next = j && both, r = ALONE ? 0 : row + next, of = ALONE ? next : r, lane = ALONE ? next * GATES : 0;
                    float unit_ih, unit = 0.0f;
                    std::memcpy(&unit_ih, input_units + r * input_bytes, 4);
                    if (RECURS) std::memcpy(&unit, states + r * state_bytes, 4);
                    UNROLLED for (int gate = 0; gate < 4; ++gate) {
                        const auto number = [](const int32_t* p) { return __builtin_convertvector(load_integers(p), vec); };
                        const int64_t to = gate * LANES;
                        gates[j][gate] = load(plus + lane + to) + number(x + of * GATES + to) * (load(by_ih + lane + to) * unit_ih);
                        if (RECURS) gates[j][gate] += number(sum + of * GATES + to) * (load(by + lane + to) * unit);
                    }
                    c[j] = load(c_at + of * LANES);
                }
                cells_of_powers<2>(gates, c, h);
                UNROLLED for (int j = 0; j < 2; ++j) {
                    const int64_t next = j && both, r = ALONE ? 0 : row + next, unit = (block + (ALONE ? next : 0)) * LANES;
                    store(c_at + (ALONE ? next : r) * LANES, c[j]);
                    store(output + r * a->out_row + unit, h[j], static_cast<int>(std::min<int64_t>(LANES, a->hidden - unit)));
                }
            }
        }
    }

    template <bool RECURS, bool ALONE>
    void step(int64_t s, int64_t first) const {
        const int64_t count = own.end - own.first, n = rows();
        if (RECURS && count > 0)
            for (int64_t r = 0; r < n; ++r)
                recurrent.prepare(s ? output_of(s - 1, r) : a->h0 + (mine.first + r) * a->hidden, state_row(r));
        for (int64_t done = 0; done < count; done += plan.together) {
            // Every other step goes the other way: what a cache that is too small still holds is wanted first.
            const int64_t some = std::min(plan.together, count - done);
            const int64_t from = s % 2 ? own.end - done - some : own.first + done;
            if constexpr (RECURS) multiply<ALONE>(s, from, from + some);
            cells_of<RECURS, ALONE>(s, first, from, from + some);
        }
    }

    // Sums of some blocks with the state.
    template <bool ALONE>
    void multiply(int64_t s, int64_t from, int64_t end) const {
        const int64_t n = rows(), each = ALONE ? 2 : 1, turns = (end - from + each - 1) / each;
        const Pieces pieces(n, Recurrent::MOST_ROWS);
        for (int64_t turn = 0; turn < turns; ++turn) {
            const int64_t block = from + (s % 2 ? turns - 1 - turn : turn) * each;
            int32_t* const to_block = sums + (block - from) * n * GATES;
            if constexpr (ALONE) {
                sum_one(recurrent, state_row(0), to_block, block, end);
                continue;
            }
            for (int64_t r = 0; r < n; ++r) __builtin_prefetch(output_of(s, r) + block * LANES, 1);
            for (int64_t piece = 0, row = 0; row < n; row += pieces[piece], ++piece) {
                const char* rows_of[Recurrent::MOST_ROWS];
                int32_t* to[Recurrent::MOST_ROWS];
                for (int r = 0; r < pieces[piece]; ++r) rows_of[r] = state_row(row + r), to[r] = to_block + (row + r) * GATES;
                recurrent.sum(pieces[piece], to, rows_of, block);
            }
        }
    }

    template <bool ALONE>
    void steps() const {
        for (int64_t s = 0; s < a->steps; ++s) {
            const int64_t first = s / plan.chunk * plan.chunk;
            if (s == first) project(s);
            if (s || a->h0) step<true, ALONE>(s, first);
            else step<false, ALONE>(s, first);
            if (!a->by_rows) barrier.wait(thread, threads);
        }
    }

public:
    // Whether this walk is that of a call. One step of one sequence with near weights is shorter in `overlapped.h`: what is made
    // ready here for all steps serves but one.
    static bool serves(const Forward* a, int64_t threads) {
        const bool one_step = a->steps == 1 && is_one_sequence(a->batch, a->hidden, a->features, a->by_rows, threads) &&
                              Recurrent::size(a->hidden, a->hidden) <= NEAR;
        return a->features >= 0 && a->hidden > 0 && are_whole(a) && !one_step;
    }

    // Of each thread.
    static Room room(int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
        return {0, Plan(batch, hidden, features, by_rows, threads).own};
    }

    // `room` is the thread's own.
    PairedWalk(const Forward* a, Barrier& barrier, char* room, int thread, int threads)
        : a(a), barrier(barrier), thread(thread), threads(threads), plan(a->batch, a->hidden, a->features, a->by_rows, threads),
          input(a->packed_ih, a->scale_ih, a->hidden, a->features), recurrent(a->packed, a->scale, a->hidden, a->hidden),
          mine(share(a->batch, a->by_rows, thread, threads)),
          own(share((a->hidden + LANES - 1) / LANES, !a->by_rows, thread, threads)), states(room + plan.states),
          inputs(room + plan.inputs), widened(reinterpret_cast<int16_t*>(room + plan.widened)),
          projected(reinterpret_cast<int32_t*>(room + plan.projected)), sums(reinterpret_cast<int32_t*>(room + plan.sums)),
          cells(reinterpret_cast<float*>(room + plan.cells)), bias(reinterpret_cast<float*>(room + plan.bias)),
          scales_ih(reinterpret_cast<float*>(room + plan.scales_ih)), scales(reinterpret_cast<float*>(room + plan.scales)) {}

    // In a function of its own, since the frames of all types together would be too large for a small stack.
    __attribute__((noinline)) void run() const {
        begin();
        if (rows() == 1) steps<true>();
        else if (rows() > 1) steps<false>();
        end();
    }
};

}  // namespace
#endif
