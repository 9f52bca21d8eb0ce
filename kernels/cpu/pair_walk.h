// The walk of one direction of a layer forward through time by vdpbf16ps, in a call with gradients. h and the output are
// bf16, as what multiplies them rounds them anyway, and what the walk back needs is kept as factors of the gradients.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "forward.h"
#include "matrices.h"
#include "pairs.h"
#include "rows.h"
#include "team.h"
#include "vectors.h"

#if defined(HAS_PAIRS)
namespace {

// What the walk back multiplies gradients with at a step, unit and sequence, [step][block of 16 units][row], six cache lines
// each: the factors of dc that give the gradients of i, f and g, of dh that give those of o and c, and f, by which dc goes on.
// In fewer bits they would round gradients to another neighbour in bf16 than the equations do.
class PairRecord {
    float* memory;
    int64_t batch, blocks;

public:
    enum Place : int64_t { OF_I, OF_F, OF_G, OF_O, OF_C, FORGET, PLACES };
    static constexpr int64_t NUMBERS = PLACES * LANES;
    PairRecord(const float* memory, int64_t batch, int64_t hidden)
        : memory(const_cast<float*>(memory)), batch(batch), blocks((hidden + LANES - 1) / LANES) {}
    static int64_t numbers(int64_t batch, int64_t steps, int64_t hidden) {
        return steps * ((hidden + LANES - 1) / LANES) * batch * NUMBERS;
    }
    float* at(int64_t t, int64_t block, int64_t row) const { return memory + ((t * blocks + block) * batch + row) * NUMBERS; }
};

// Features a row up to which each step projects its own input: reading weight_ih costs less than gates in memory.
#if !defined(FEATURES_A_ROW)
#define FEATURES_A_ROW 16
#endif

// Where everything lies in the memory of a team and of each thread, in bytes.
struct PairPlan {
    // Numbers of the projection of steps that the second-level cache still holds when they are reached.
    static constexpr int64_t PROJECTED_AHEAD = 1 << 17;
    int64_t state_bytes, input_bytes;  // of a row of h and of x in bf16
    bool in_step;
    int64_t chunk;  // steps that are projected at a time
    int64_t cells, gates, shared, own;

    PairPlan(int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads)
        : state_bytes(Pairs::row_bytes(hidden)), input_bytes(Pairs::row_bytes(features)) {
        const int64_t rows = by_rows ? batch / threads : batch, units = (hidden + LANES - 1) / LANES * LANES;
        const int64_t most_rows = by_rows ? (batch + threads - 1) / threads : batch;
        in_step = rows >= ROWS && features <= FEATURES_A_ROW * rows;
        chunk = in_step ? 0 : std::max<int64_t>(1, PROJECTED_AHEAD / std::max<int64_t>(1, 4 * batch * hidden));
        cells = 2 * batch * state_bytes;
        gates = cells + 4 * batch * units;
        shared = (gates + 16 * chunk * batch * hidden + 63) / 64 * 64;
        own = (in_step ? most_rows : PANEL) * input_bytes;
    }
};

// sums[r][v] of R rows += products of pairs with two matrices one after the other, each [pair][vector][lane][2]. In a
// function of its own: inlined, it would be a part of what GCC counts against the inlining of other walks.
template <int R>
__attribute__((noinline)) void two_pair_products(vec (&sums)[ROWS][4], const uint16_t* const (&x)[ROWS], int64_t features,
                                                 const uint16_t* w_x, const uint16_t* const (&h)[ROWS], int64_t states,
                                                 const uint16_t* w_h) {
    if constexpr (R <= 2) {
        pair_product<R, 4>(sums, x, features, w_x, 4 * PAIR_VECTOR, PAIR_VECTOR);
        pair_product<R, 4>(sums, h, states, w_h, 4 * PAIR_VECTOR, PAIR_VECTOR);
    } else {
        __m512 own[R][4];
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < 4; ++v) own[r][v] = (__m512)sums[r][v];
        const uint16_t* from[R];
        UNROLLED for (int r = 0; r < R; ++r) from[r] = x[r];
        for (int64_t k = 0; k < features; ++k) add_pairs(own, from, w_x + k * 4 * PAIR_VECTOR, PAIR_VECTOR, k);
        UNROLLED for (int r = 0; r < R; ++r) from[r] = h[r];
        for (int64_t k = 0; k < states; ++k) add_pairs(own, from, w_h + k * 4 * PAIR_VECTOR, PAIR_VECTOR, k);
        UNROLLED for (int r = 0; r < R; ++r)
            UNROLLED for (int v = 0; v < 4; ++v) sums[r][v] = (vec)own[r][v];
    }
}

// The same for a number of rows that is known only now.
template <int R = ROWS>
inline void two_pair_products(int rows, vec (&sums)[ROWS][4], const uint16_t* const (&x)[ROWS], int64_t features,
                              const uint16_t* w_x, const uint16_t* const (&h)[ROWS], int64_t states, const uint16_t* w_h) {
    if (rows == R) return two_pair_products<R>(sums, x, features, w_x, h, states, w_h);
    if constexpr (R > 1) two_pair_products<R - 1>(rows, sums, x, features, w_x, h, states, w_h);
}

ALWAYS_INLINE void store_rounded(uint16_t* to, __m512 x, __mmask16 lanes) {
    _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

// h of 16 units from their gates before the nonlinearities, and c, with a record for the walk back.
ALWAYS_INLINE __m512 recorded_cell(const vec (&sums)[4], __m512& c, float* record) {
    const __m512 i = sigmoid_of((__m512)sums[0]), f = sigmoid_of((__m512)sums[1]), g = tangent_of((__m512)sums[2]);
    const __m512 o = sigmoid_of((__m512)sums[3]), taken = _mm512_mul_ps(i, g), left = _mm512_mul_ps(f, c);
    c = _mm512_add_ps(left, taken);
    const __m512 narrowed = tangent_of(c), h = _mm512_mul_ps(o, narrowed);
    const auto keep = [=](PairRecord::Place place, __m512 x) { _mm512_storeu_ps(record + place * LANES, x); };
    keep(PairRecord::OF_I, _mm512_fnmadd_ps(taken, i, taken));  // g i (1 - i)
    keep(PairRecord::OF_F, _mm512_fnmadd_ps(left, f, left));    // c f (1 - f)
    keep(PairRecord::OF_G, _mm512_fnmadd_ps(taken, g, i));      // i (1 - g g)
    keep(PairRecord::OF_O, _mm512_fnmadd_ps(h, o, h));          // tanh(c) o (1 - o)
    keep(PairRecord::OF_C, _mm512_fnmadd_ps(h, narrowed, o));   // o (1 - tanh(c)^2)
    keep(PairRecord::FORGET, f);
    return h;
}

// One direction of a layer in one thread of a team: its own rows or its own blocks of hidden units.
class PairWalk {
    Forward given;
    const Forward* const a = &given;
    Barrier& barrier;
    const int thread, threads;
    const PairPlan plan;
    const Pairs input, recurrent;
    const int64_t hidden, blocks;
    Rows mine;
    const Share own;
    const int64_t first, last;  // hidden units of this thread
    char* const memory;
    char* const room;
    const PairRecord record;

    uint16_t* state(int64_t which, int64_t b) const {
        return reinterpret_cast<uint16_t*>(memory + (which * a->batch + b) * plan.state_bytes);
    }
    float* cells(int64_t b) const { return reinterpret_cast<float*>(memory + plan.cells) + b * blocks * LANES; }
    uint16_t* output(int64_t t, int64_t b) const { return reinterpret_cast<uint16_t*>(a->output) + t * a->out_step + b * a->out_row; }
    uint16_t* input_row(int64_t i) const { return reinterpret_cast<uint16_t*>(room + i * plan.input_bytes); }
    __mmask16 lanes(int64_t unit) const { return first_lanes(hidden - unit); }

    // h and c that the first step starts from, of own rows and units; past the last unit they are zero.
    void begin() const {
        if (first >= last) return;
        for (int64_t i = 0; i < mine.count; ++i) {
            const int64_t b = mine[i];
            for (int64_t which = 0; which < 2; ++which)
                std::memset(state(which, b) + first, 0, own.end == blocks ? plan.state_bytes - 2 * first : 2 * (last - first));
            std::memset(cells(b) + first, 0, 4 * (own.end - own.first) * LANES);
            if (a->c0) std::memcpy(cells(b) + first, a->c0 + b * hidden + first, 4 * (last - first));
            for (int64_t unit = first; a->h0 && unit < last; unit += LANES)
                store_rounded(state(0, b) + unit, _mm512_maskz_loadu_ps(lanes(unit), a->h0 + b * hidden + unit), lanes(unit));
        }
    }

    // Own units of the state that step s starts from become zero where it resets a row.
    void reset(int64_t s, int64_t which) {
        const int64_t t = a->reverse ? a->steps - 1 - s : s, running = mine.at_step(t);
        for (int64_t i = 0; i < running && first < last; ++i)
            if (a->resets[t * a->batch + mine[i]]) {
                std::memset(state(which, mine[i]) + first, 0, 2 * (last - first));
                std::memset(cells(mine[i]) + first, 0, 4 * (last - first));
            }
    }

    void project_from(int64_t start, int64_t end) {
        Cursor place(mine, start, end, a->x_row > a->x_step);
        // Hidden units, as in the steps, where places are too few for all: then each reads nothing but what it wrote.
        const bool shared = !a->by_rows && a->batch * plan.chunk >= 2 * ROWS * threads;
        const Share part = share(mine.steps(start, end), shared, thread, threads);
        place.advance(part.first);
        project(a, input, place, part.end - part.first, shared ? Share{0, blocks} : own, start, room);
        if (shared) barrier.wait(thread, threads);
    }

    // A block of units of the running rows of a step, whose state is `which`; gates_input begins at step `start`.
    void step(int64_t t, int64_t start, int64_t which, bool recurs, int64_t block, int64_t running) {
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(std::min<int64_t>(LANES, hidden - unit));
        vec begins[4] = {};
        for (int gate = 0; plan.in_step && a->bias_ih && gate < 4; ++gate)
            begins[gate] = load(a->bias_ih + gate * hidden + unit, n) + load(a->bias_hh + gate * hidden + unit, n);
        const uint16_t* const w_x = reinterpret_cast<const uint16_t*>(input.groups_of(block));
        const uint16_t* const w_h = reinterpret_cast<const uint16_t*>(recurrent.groups_of(block));
        const Pieces pieces(running, ROWS);
        for (int64_t piece = 0, row = 0; row < running; row += pieces[piece], ++piece) {
            const int rows = pieces[piece];
            vec sums[ROWS][4];
            const uint16_t *x[ROWS], *h[ROWS];
            for (int r = 0; r < rows; ++r) {
                const int64_t b = mine[row + r];
                x[r] = input_row(row + r);
                h[r] = state(which, b);
                const float* const in = a->gates_input + (t - start) * a->gi_step + b * a->gi_row + unit;
                for (int gate = 0; gate < 4; ++gate) sums[r][gate] = plan.in_step ? begins[gate] : load(in + gate * hidden, n);
                float* const kept = record.at(t, block, b);
                for (int64_t place = 0; place < PairRecord::PLACES; ++place) __builtin_prefetch(kept + place * LANES, 1);
            }
            two_pair_products(rows, sums, x, plan.in_step ? Pairs::groups(a->features) : 0, w_x, h,
                              recurs ? Pairs::groups(hidden) : 0, w_h);
            for (int r = 0; r < rows; ++r) {
                const int64_t b = mine[row + r];
                float* const c_at = cells(b) + unit;
                __m512 c = _mm512_loadu_ps(c_at);
                const __m512 value = recorded_cell(sums[r], c, record.at(t, block, b));
                _mm512_storeu_ps(c_at, c);
                store_rounded(state(1 - which, b) + unit, value, lanes(unit));
                store_rounded(output(t, b) + unit, value, lanes(unit));
            }
        }
        // Past its end a sequence holds its state, and its output is zero.
        for (int64_t row = running; row < mine.count; ++row) {
            const int64_t b = mine[row];
            std::memcpy(state(1 - which, b) + unit, state(which, b) + unit, 2 * n);
            std::memset(output(t, b) + unit, 0, 2 * n);
        }
    }

public:
    PairWalk(const Forward* call, const Lengths& lengths, Barrier& barrier, char* memory, char* room, int thread, int threads)
        : given(*call), barrier(barrier), thread(thread), threads(threads),
          plan(call->batch, call->hidden, call->features, call->by_rows, threads),
          input(call->packed_ih, nullptr, call->hidden, call->features),
          recurrent(call->packed, nullptr, call->hidden, call->hidden), hidden(call->hidden),
          blocks((call->hidden + LANES - 1) / LANES), mine(lengths, call->batch, call->by_rows, thread, threads),
          own(share(blocks, !call->by_rows, thread, threads)), first(own.first * LANES),
          last(std::min(own.end * LANES, call->hidden)), memory(memory), room(room), record(call->gates, call->batch, call->hidden) {
        given.gates_input = reinterpret_cast<float*>(memory + plan.gates);
        given.gi_step = 4 * call->batch * hidden;
        given.gi_row = 4 * hidden;
    }

    void run() {
        begin();
        if (a->resets && a->steps) reset(0, 0);
        if (!a->by_rows) barrier.wait(thread, threads);
        int64_t which = 0, start = 0, end = 0;
        for (int64_t s = 0; s < a->steps; ++s, which = 1 - which) {
            const int64_t t = a->reverse ? a->steps - 1 - s : s;
            if (!plan.in_step && (t < start || t >= end)) {
                start = t / plan.chunk * plan.chunk;
                end = std::min(start + plan.chunk, a->steps);
                project_from(start, end);
            }
            const int64_t running = mine.at_step(t);
            for (int64_t i = 0; plan.in_step && i < running && own.first < own.end; ++i)
                input.prepare(a->x + t * a->x_step + mine[i] * a->x_row, room + i * plan.input_bytes);
            for (int64_t i = own.first; i < own.end; ++i)
                // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
                step(t, start, which, s || a->h0, s % 2 ? own.end - 1 - (i - own.first) : i, running);
            if (a->resets && s + 1 < a->steps) reset(s + 1, 1 - which);
            // One meeting a step is enough: none reads the state before any more once all have left it.
            if (!a->by_rows) barrier.wait(thread, threads);
        }
        uint16_t *const h_n = reinterpret_cast<uint16_t*>(a->h_n), *const c_n = reinterpret_cast<uint16_t*>(a->c_n);
        for (int64_t i = 0; i < mine.count && first < last; ++i) {
            const int64_t b = mine[i];
            std::memcpy(h_n + b * hidden + first, state(which, b) + first, 2 * (last - first));
            for (int64_t unit = first; unit < last; unit += LANES)
                store_rounded(c_n + b * hidden + unit, _mm512_loadu_ps(cells(b) + unit), lanes(unit));
        }
    }
};

}  // namespace
#endif
