// The walk of one direction of a layer forward through time, with the projection of its input.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "products.h"
#include "rows.h"
#include "team.h"
#include "vectors.h"

// Sizes and pointers as kernels/common/recurrence.py has them, strides in elements, one direction a call.
struct Forward {
    int64_t batch, steps, hidden, reverse, threads, by_rows;
    float* gates_input;        int64_t gi_step, gi_row, gi_steps;  // where x is given: for so many steps at a time, or null
    const float* x;            int64_t x_step, x_row, features;  // features -1: the projection has been done
    const void* packed_ih;     // pack_forward of weight_ih
    const float* bias_ih;      // (4 * hidden,) or null, with x alone
    const float* bias_hh;
    const void* packed;        // pack_forward of weight_hh
    const float* scale_ih;     // (4 * hidden,) scales of int8 weights, else null
    const float* scale;
    const float* h0;           // (batch, hidden) or null
    const float* c0;           // (batch, hidden) or null
    const int32_t* lengths;    // (batch,) or null
    float* output;             int64_t out_step, out_row;
    float* h_n;                // (batch, hidden)
    float* c_n;                // (batch, hidden)
    float* gates;              int64_t gates_step, gates_row;  // null: not kept
    float* cells;              int64_t cells_step, cells_row;
    float* scratch;            // 2 * batch * hidden
};

namespace {

// Whether each step projects its own input beside the recurrent product: nothing of gates_input is then written and read
// back, but the input's weights are read at each step. int8 weights have two scales, which one sum cannot have.
inline bool projects_in_step(int64_t batch, int64_t features, bool by_rows, bool scaled, int64_t threads) {
    const int64_t rows = by_rows ? batch / threads : batch;
    return !scaled && rows >= ROWS && features <= 2 * rows;
}

// gates_input of `count` of a thread's places from a cursor on, in its blocks of hidden units: x times weight_ih and
// biases.
template <typename W>
inline void project(const Forward* a, const Cursor& from_here, int64_t count, Share own, int64_t start) {
    const int64_t hidden = a->hidden;
    for (int64_t block = own.first; block < own.end; ++block) {
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
        vec plus[4], by[4];
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t at = gate * hidden + unit;
            plus[gate] = a->bias_ih ? load(a->bias_ih + at, n) + load(a->bias_hh + at, n) : vec{};
            by[gate] = a->scale_ih ? load(a->scale_ih + at, n) : all(1.0f);
        }
        Cursor place = from_here;
        for (int64_t row = 0; row < count; row += ROWS) {
            const int rows = static_cast<int>(count - row < ROWS ? count - row : ROWS);
            const float* from[ROWS];
            float* to[ROWS];
            for (int r = 0; r < rows; ++r, place.advance(1)) {
                from[r] = a->x + place.t * a->x_step + place.b() * a->x_row;
                to[r] = a->gates_input + (place.t - start) * a->gi_step + place.b() * a->gi_row + unit;
            }
            vec sums[ROWS][4] = {};
            product<4>(rows, sums, from, a->features,
                       static_cast<const W*>(a->packed_ih) + block * a->features * 4 * LANES, 4 * LANES, LANES);
            for (int r = 0; r < rows; ++r)
                for (int gate = 0; gate < 4; ++gate)
                    store(to[r] + gate * hidden, sums[r][gate] * by[gate] + plus[gate], n);
        }
    }
}

// One direction of a layer, in each thread of a team: `blocks` of hidden units or rows of the batch are shared out.
template <typename W>
void walk(const Forward* a, const Lengths& lengths, Barrier& barrier, int thread, int threads) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
    Rows mine(lengths, a->batch, a->by_rows, thread, threads);
    const Share own = share(blocks, !a->by_rows, thread, threads);
    const int64_t first = own.first * LANES;  // hidden units of this thread
    const int64_t last = own.end * LANES < hidden ? own.end * LANES : hidden;
    float* after = a->scratch;  // where this step's h goes
    float* spare = a->scratch + a->batch * hidden;
    const float* before = a->h0 ? a->h0 : spare;
    for (int64_t i = 0; i < mine.count && first < last; ++i) {
        const int64_t at = mine[i] * hidden + first, bytes = 4 * (last - first);
        if (!a->h0) std::memset(spare + at, 0, bytes);
        if (!a->c0) std::memset(a->c_n + at, 0, bytes);
        else if (a->c0 != a->c_n) std::memcpy(a->c_n + at, a->c0 + at, bytes);
    }
    const bool given = a->features >= 0;
    const bool in_step = given && projects_in_step(a->batch, a->features, a->by_rows, a->scale, threads);
    const bool before_steps = given && !in_step;
    int64_t start = 0, end = 0;  // steps that gates_input holds
    for (int64_t s = 0; s < a->steps; ++s) {
        const int64_t t = a->reverse ? a->steps - 1 - s : s;
        if (before_steps && (t < start || t >= end)) {
            start = t / a->gi_steps * a->gi_steps;
            end = std::min(start + a->gi_steps, a->steps);
            Cursor place(mine, start, end, a->x_row > a->x_step);
            const int64_t places = mine.steps(start, end);
            // Who has rows of its own projects them. Else places are shared out where they are enough for all: hidden
            // units, as in the steps, where they are not, and then each reads nothing but what it wrote.
            const bool shared = !a->by_rows && a->batch * a->gi_steps >= 2 * ROWS * threads;
            const Share part = share(places, shared, thread, threads);
            place.advance(part.first);
            project<W>(a, place, part.end - part.first, shared ? Share{0, blocks} : own, start);
            if (shared) barrier.wait(thread, threads);
        }
        const int64_t running = mine.at_step(t);
        for (int64_t i = own.first; i < own.end; ++i) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? own.end - 1 - (i - own.first) : i;
            const int64_t unit = block * LANES;
            const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
            vec plus[4] = {};
            for (int gate = 0; in_step && a->bias_ih && gate < 4; ++gate)
                plus[gate] = load(a->bias_ih + gate * hidden + unit, n) + load(a->bias_hh + gate * hidden + unit, n);
            for (int64_t row = 0; row < running; row += ROWS) {
                const int rows = static_cast<int>(running - row < ROWS ? running - row : ROWS);
                const float* inputs[ROWS];
                const float* states[ROWS];
                for (int r = 0; r < rows; ++r) {
                    inputs[r] = in_step ? a->x + t * a->x_step + mine[row + r] * a->x_row : nullptr;
                    states[r] = before + mine[row + r] * hidden;
                }
                vec sums[ROWS][4] = {};
                if (in_step)
                    product<4>(rows, sums, inputs, a->features,
                               static_cast<const W*>(a->packed_ih) + block * a->features * 4 * LANES, 4 * LANES, LANES);
                if (s || a->h0)
                    product<4>(rows, sums, states, hidden,
                               static_cast<const W*>(a->packed) + block * hidden * 4 * LANES, 4 * LANES, LANES);
                for (int gate = 0; a->scale && gate < 4; ++gate)
                    for (int r = 0; r < rows; ++r) sums[r][gate] *= load(a->scale + gate * hidden + unit, n);
                for (int r = 0; r < rows; ++r) {
                    const int64_t b = mine[row + r];
                    float* c_at = a->c_n + b * hidden + unit;
                    vec c = load(c_at, n);
                    const float* in = in_step ? nullptr : a->gates_input + (t - start) * a->gi_step + b * a->gi_row + unit;
                    for (int gate = 0; gate < 4; ++gate)
                        sums[r][gate] += in_step ? plus[gate] : load(in + gate * hidden, n);
                    const vec i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]);
                    const vec g = tanh_of(sums[r][2]), o = sigmoid(sums[r][3]);
                    c = f * c + i * g;
                    const vec h = o * tanh_of(c);
                    store(c_at, c, n);
                    store(after + b * hidden + unit, h, n);
                    store(a->output + t * a->out_step + b * a->out_row + unit, h, n);
                    if (a->gates) {
                        float* kept = a->gates + t * a->gates_step + b * a->gates_row + unit;
                        store(kept, i, n);
                        store(kept + hidden, f, n);
                        store(kept + 2 * hidden, g, n);
                        store(kept + 3 * hidden, o, n);
                    }
                    if (a->cells) store(a->cells + t * a->cells_step + b * a->cells_row + unit, c, n);
                }
            }
            // Past its end a sequence holds its state, and its output is zero.
            for (int64_t row = running; row < mine.count; ++row) {
                const int64_t b = mine[row];
                store(after + b * hidden + unit, load(before + b * hidden + unit, n), n);
                store(a->output + t * a->out_step + b * a->out_row + unit, vec{}, n);
                float* kept = a->gates ? a->gates + t * a->gates_step + b * a->gates_row + unit : nullptr;
                for (int gate = 0; kept && gate < 4; ++gate) store(kept + gate * hidden, vec{}, n);
                if (a->cells)
                    store(a->cells + t * a->cells_step + b * a->cells_row + unit, load(a->c_n + b * hidden + unit, n), n);
            }
        }
        // One meeting a step is enough: nobody reads `before` any more once all have left it.
        if (!a->by_rows) barrier.wait(thread, threads);
        before = after;
        after = spare;
        spare = const_cast<float*>(before);
    }
    // h_n may be the memory of h0, which is read in the first step alone.
    for (int64_t i = 0; i < mine.count && first < last; ++i)
        std::memcpy(a->h_n + mine[i] * hidden + first, before + mine[i] * hidden + first, 4 * (last - first));
}

void walk(const Forward* a, int64_t kept, const Lengths& lengths, Barrier& barrier, int thread, int threads) {
    if (kept == 0) walk<float>(a, lengths, barrier, thread, threads);
    if (kept == 1) walk<uint16_t>(a, lengths, barrier, thread, threads);
    if (kept == 2) walk<int8_t>(a, lengths, barrier, thread, threads);
}

}  // namespace
