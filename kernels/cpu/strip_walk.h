// The walk of one direction of a layer forward through time for several whole sequences in float32 without AVX-512.
//
// What is projected lies as it is read: [block][step][row][gate][lane], of some steps at a time. Recurrent products are added to
// it where it lies, and the cells of all rows of a block follow each other, so that the chain of one fills the waiting of the
// next. `vector_walk` serves what this does not: sequences that end early or begin anew, and gates that are kept for gradients.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "forward.h"
#include "strips.h"
#include "team.h"
#include "vectors.h"

namespace {

#if defined(HAS_STRIPS)
class StripWalk {
    static constexpr int64_t GATES = 4 * LANES;
    static constexpr int64_t ROWS_AHEAD = 64;  // rows of x that are projected together, unless a step has more
    static constexpr int64_t FIRST_CACHE = 16 << 10;  // bytes that stay in the nearest cache beside what they are multiplied with

    // How a thread goes through its rows, and where in its memory everything lies, in bytes.
    struct Plan {
        int64_t rows, blocks, chunk;  // at most: rows of a step, blocks of units, steps projected at a time
        int64_t cells, bias, own;     // behind what is projected

        Plan(int64_t batch, int64_t steps, int64_t hidden, bool by_rows, int64_t threads) {
            const int64_t all = (hidden + LANES - 1) / LANES;
            rows = std::max<int64_t>(1, by_rows ? (batch + threads - 1) / threads : batch);
            blocks = by_rows ? all : (all + threads - 1) / threads;
            chunk = std::max<int64_t>(1, std::min(steps, ROWS_AHEAD / rows));
            cells = rounded(blocks * chunk * rows * GATES * 4);
            bias = cells + rounded(blocks * rows * LANES * 4);
            own = bias + rounded(blocks * GATES * 4);
        }
    };

    const Forward* const a;
    Barrier& barrier;
    const int thread, threads;
    const Plan plan;
    const Strips input, recurrent;
    const Share mine, own;    // rows of the batch and blocks of this thread
    float* const projected;   // [block][step of the chunk][row][gate][lane]
    float* const cells;       // [block][row][lane]
    float* const bias;        // [block][gate][lane]

    int64_t rows() const { return mine.end - mine.first; }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int lanes(int64_t block) const { return static_cast<int>(std::min<int64_t>(LANES, a->hidden - block * LANES)); }
    float* projected_of(int64_t block, int64_t step) const {
        return projected + ((block - own.first) * plan.chunk + step) * rows() * GATES;
    }
    float* cells_of(int64_t block) const { return cells + (block - own.first) * rows() * LANES; }
    float* bias_of(int64_t block) const { return bias + (block - own.first) * GATES; }
    // h of the own rows after a step that is even or odd.
    float* state(int64_t s) const { return a->scratch + (s % 2 * a->batch + mine.first) * a->hidden; }

    void begin() const {
        for (int64_t block = own.first; block < own.end; ++block) {
            const int n = lanes(block);
            const int64_t unit = block * LANES;
            for (int gate = 0; gate < 4; ++gate) {
                const int64_t at = gate * a->hidden + unit;
                store(bias_of(block) + gate * LANES, a->bias_ih ? load(a->bias_ih + at, n) + load(a->bias_hh + at, n) : vec{});
            }
            for (int64_t r = 0; r < rows(); ++r)
                store(cells_of(block) + r * LANES, a->c0 ? load(a->c0 + (mine.first + r) * a->hidden + unit, n) : vec{});
        }
    }

    // h_n may be the memory of h0, which is read in the first step alone.
    void end() const {
        for (int64_t r = 0; r < rows(); ++r) {
            const int64_t row = (mine.first + r) * a->hidden;
            const float* const last = a->steps ? state(a->steps - 1) + r * a->hidden : a->h0 ? a->h0 + row : nullptr;
            for (int64_t block = own.first; block < own.end; ++block) {
                const int n = lanes(block);
                const int64_t unit = block * LANES;
                store(a->h_n + row + unit, last ? load(last + unit, n) : vec{}, n);
                store(a->c_n + row + unit, load(cells_of(block) + r * LANES), n);
            }
        }
    }

    // Projects the input of some steps from s on.
    void project(int64_t s, int64_t steps) const {
        const int64_t count = steps * rows();
        for (int64_t block = own.first; block < own.end; ++block) {
            add(input, block, projected_of(block, 0), bias_of(block), 0, count, [=] {
                return [this, step = s, row = int64_t{0}]() mutable {
                    const float* const x = a->x + time(step) * a->x_step + (mine.first + row) * a->x_row;
                    if (++row == rows()) ++step, row = 0;
                    return x;
                };
            });
        }
    }

    // Adds the products of `count` rows with the weights of a block: `rows_from` gives what gives their addresses. Where both
    // strips are too much for the nearest cache, all rows take one before the other.
    template <typename F>
    static void add(const Strips& matrix, int64_t block, float* at, const float* begin, int64_t each, int64_t count,
                    F rows_from) {
        const Pieces pieces(count, Strips::AT_ONCE);
        const int passes = matrix.block_bytes() > FIRST_CACHE && count > Strips::AT_ONCE ? 2 : 1;
        for (int pass = 0; pass < passes; ++pass) {
            auto next = rows_from();
            for (int64_t piece = 0, first = 0; first < count; first += pieces[piece], ++piece) {
                const int rows = pieces[piece];
                Strips::Row from[Strips::AT_ONCE];
                for (int r = 0; r < rows; ++r) from[r] = next();
                float* const to = at + first * GATES;
                const float* const with = begin + first * each;
                if (passes == 1) matrix.add(rows, to, with, each, from, block);
                else if (rows >= Strips::FEW) matrix.add_strip(rows, to, with, each, from, block, pass);
                else if (!pass) matrix.add_few(rows, to, with, each, from, block);
            }
        }
    }

    // The cells of a block in a step, two rows at a time. In a function of its own, whose registers nothing else takes.
    template <bool WHOLE_BLOCK>
    __attribute__((noinline)) void cells_in(int64_t s, int64_t block, const float* gates) const {
        const int64_t unit = block * LANES;
        float *c = cells_of(block), *after = state(s) + unit;
        float* output = a->output + time(s) * a->out_step + mine.first * a->out_row + unit;
        const int n = WHOLE_BLOCK ? LANES : lanes(block);
        const auto some = [&](auto together) {
            constexpr int N = decltype(together)::value;
            vec in[N][4], states[N], h[N];
            UNROLLED for (int j = 0; j < N; ++j) {
                UNROLLED for (int gate = 0; gate < 4; ++gate) in[j][gate] = load(gates + j * GATES + gate * LANES);
                states[j] = load(c + j * LANES);
            }
            cells_by_three(in, states, h, [] {});
            UNROLLED for (int j = 0; j < N; ++j) {
                store(c + j * LANES, states[j]);
                store(after, h[j], n);
                store(output, h[j], n);
                after += a->hidden;
                output += a->out_row;
            }
            gates += N * GATES;
            c += N * LANES;
        };
        int64_t row = 0;
        for (; row + 1 < rows(); row += 2) some(std::integral_constant<int, 2>());
        if (row < rows()) some(std::integral_constant<int, 1>());
    }

    void step(int64_t s, int64_t of_chunk) const {
        const float* const before = s ? state(s - 1) : a->h0 ? a->h0 + mine.first * a->hidden : nullptr;
        float* const output = a->output + time(s) * a->out_step + mine.first * a->out_row;
        for (int64_t i = own.first; i < own.end; ++i) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? own.end - 1 - (i - own.first) : i;
            float* const gates = projected_of(block, of_chunk);
            for (int64_t r = 0; r < rows(); ++r) __builtin_prefetch(output + r * a->out_row + block * LANES, 1);
            if (before)
                add(recurrent, block, gates, gates, GATES, rows(), [=] {
                    return [this, row = before]() mutable { return std::exchange(row, row + a->hidden); };
                });
            if (lanes(block) == LANES) cells_in<true>(s, block, gates); else cells_in<false>(s, block, gates);
        }
    }

public:
    // Whether this walk is that of a call.
    static bool serves(const Forward* a, int64_t threads) {
        return are_whole(a) && serves(a->batch, a->hidden, a->features, a->by_rows, threads);
    }
    static bool serves(int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
        return batch > 0 && hidden > 0 && features >= 0 && !is_one_sequence(batch, hidden, features, by_rows, threads);
    }

    // Of each thread.
    static Room room(int64_t batch, int64_t steps, int64_t hidden, bool by_rows, int64_t threads) {
        return {0, Plan(batch, steps, hidden, by_rows, threads).own};
    }

    // `room` is the thread's own.
    StripWalk(const Forward* a, Barrier& barrier, char* room, int thread, int threads)
        : a(a), barrier(barrier), thread(thread), threads(threads), plan(a->batch, a->steps, a->hidden, a->by_rows, threads),
          input(a->packed_ih, nullptr, a->hidden, a->features), recurrent(a->packed, nullptr, a->hidden, a->hidden),
          mine(share(a->batch, a->by_rows, thread, threads)),
          own(share((a->hidden + LANES - 1) / LANES, !a->by_rows, thread, threads)),
          projected(reinterpret_cast<float*>(room)), cells(reinterpret_cast<float*>(room + plan.cells)),
          bias(reinterpret_cast<float*>(room + plan.bias)) {}

    // In a function of its own, since the frames of all types together would be too large for a small stack.
    __attribute__((noinline)) void run() const {
        begin();
        // As many steps in all chunks, as far as they can be.
        const int64_t chunks = (a->steps + plan.chunk - 1) / plan.chunk, chunk = chunks ? (a->steps + chunks - 1) / chunks : 1;
        for (int64_t s = 0; s < a->steps; ++s) {
            if (s % chunk == 0) project(s, std::min(chunk, a->steps - s));
            step(s, s % chunk);
            if (!a->by_rows) barrier.wait(thread, threads);
        }
        end();
    }
};
#endif

}  // namespace
