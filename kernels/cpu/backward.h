// The walk of one direction of a layer back through time, and the gradients of its weights.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "products.h"
#include "rows.h"
#include "team.h"
#include "vectors.h"

// As `Forward`, and as kernels/common/recurrence.py has it.
struct Backward {
    int64_t batch, steps, hidden, reverse, threads, by_rows;
    const float* packed;       // pack_backward
    const float* c0;
    const int32_t* lengths;
    const float* gates;        int64_t gates_step, gates_row;
    const float* cells;        int64_t cells_step, cells_row;
    const float* grad_output;  int64_t go_step, go_row;
    const float* grad_h_n;     // or null
    const float* grad_c_n;     // or null
    float* grad_gates;         int64_t gg_step, gg_row;
    float* grad_h0;            // (batch, hidden), also holds the running gradient of h
    float* grad_c0;            // the same of c
    // For the gradients of the weights, each null where it is not wanted; grad_gates is contiguous then.
    const float* x;            int64_t x_step, x_row, features;
    const float* output;       int64_t out_step, out_row;  // zero past the lengths
    const float* h0;           // (batch, hidden) or null
    float* grad_ih;            // (4 * hidden, features)
    float* grad_hh;            // (4 * hidden, hidden)
    float* grad_bias;          // (4 * hidden,)
    int64_t weight_threads;    // of a team that need not meet at every step
    const uint8_t* resets;     // as `Forward` has it: no gradient passes
};

namespace {

// A thread's share of the walk back through time: grad_gates of all steps, and the gradients of the first state.
void walk_back(const Backward* a, const Lengths& lengths, Barrier& barrier, int thread, int threads) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
    Rows mine(lengths, a->batch, a->by_rows, thread, threads);
    const Share own = share(blocks, !a->by_rows, thread, threads);
    for (int64_t s = a->steps - 1; s >= 0; --s) {
        const int64_t t = a->reverse ? a->steps - 1 - s : s;
        const int64_t earlier = a->reverse ? t + 1 : t - 1;
        const int64_t running = mine.at_step(t);
        for (int64_t i = 0; i < mine.count; ++i) {
            const int64_t b = mine[i];
            for (int64_t block = own.first; block < own.end; ++block) {
                const int64_t unit = block * LANES;
                const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
                float* grads = a->grad_gates + t * a->gg_step + b * a->gg_row + unit;
                if (i >= running) {
                    for (int gate = 0; gate < 4; ++gate) store(grads + gate * hidden, vec{}, n);
                    continue;
                }
                const bool reset = a->resets && a->resets[t * a->batch + b];
                const float* kept = a->gates + t * a->gates_step + b * a->gates_row + unit;
                const vec i = load(kept, n), f = load(kept + hidden, n);
                const vec g = load(kept + 2 * hidden, n), o = load(kept + 3 * hidden, n);
                const vec tanh_c = tanh_of(load(a->cells + t * a->cells_step + b * a->cells_row + unit, n));
                vec c_before = {};
                if (reset) c_before = vec{};
                else if (s) c_before = load(a->cells + earlier * a->cells_step + b * a->cells_row + unit, n);
                else if (a->c0) c_before = load(a->c0 + b * hidden + unit, n);
                float* dh_at = a->grad_h0 + b * hidden + unit;
                float* dc_at = a->grad_c0 + b * hidden + unit;
                const vec dh = load(dh_at, n) + load(a->grad_output + t * a->go_step + b * a->go_row + unit, n);
                const vec dc = load(dc_at, n) + dh * o * (1.0f - tanh_c * tanh_c);
                store(grads, dc * g * i * (1.0f - i), n);
                store(grads + hidden, dc * c_before * f * (1.0f - f), n);
                store(grads + 2 * hidden, dc * i * (1.0f - g * g), n);
                store(grads + 3 * hidden, dh * tanh_c * o * (1.0f - o), n);
                store(dc_at, reset ? vec{} : dc * f, n);
            }
        }
        if (!a->by_rows) barrier.wait(thread, threads);
        for (int64_t block = own.first; block < own.end; block += 4) {
            const int vectors = static_cast<int>(own.end - block < 4 ? own.end - block : 4);
            const int64_t depth = 4 * hidden, next = 4 * hidden * LANES;
            const float* w = a->packed + block * next;
            // Where a sequence has ended its state was held, and the gradient passes through.
            for (int64_t row = 0; row < running; row += ROWS) {
                const int rows = static_cast<int>(running - row < ROWS ? running - row : ROWS);
                const float* from[ROWS];
                for (int r = 0; r < rows; ++r) from[r] = a->grad_gates + t * a->gg_step + mine[row + r] * a->gg_row;
                vec sums[ROWS][4] = {};
                switch (vectors) {
                    case 1: product<1>(rows, sums, from, depth, w, LANES, next); break;
                    case 2: product<2>(rows, sums, from, depth, w, LANES, next); break;
                    case 3: product<3>(rows, sums, from, depth, w, LANES, next); break;
                    default: product<4>(rows, sums, from, depth, w, LANES, next);
                }
                for (int r = 0; r < rows; ++r) {
                    const bool reset = a->resets && a->resets[t * a->batch + mine[row + r]];
                    for (int v = 0; v < vectors; ++v) {
                        const int64_t unit = (block + v) * LANES;
                        store(a->grad_h0 + mine[row + r] * hidden + unit, reset ? vec{} : sums[r][v],
                              static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES));
                    }
                }
            }
        }
    }
}

// A thread's share of the gradients of the weights, once all of grad_gates is there: products over all steps of which
// the gradient is not known to be zero. `columns` has room for COLUMNS numbers.
void weight_gradients(const Backward* a, const Listed& listed, float* columns, int thread, int threads) {
    const int64_t count = listed.count, width = 4 * a->hidden;
    const bool rows_first = a->gg_row > a->gg_step;
    const auto place = [=, &listed](int64_t k) { return Place(listed[k], a->batch, a->steps, rows_first); };
    const auto grads = [=, &listed](int64_t k) { return a->grad_gates + listed[k] * width; };
    const auto input = [=](int64_t k) {
        const Place at = place(k);
        return a->x + at.t * a->x_step + at.b * a->x_row;
    };
    // The h that a step started from. A sequence walked backward starts at its own last step.
    const auto before = [=](int64_t k) -> const float* {
        const Place at = place(k);
        if (a->resets && a->resets[at.t * a->batch + at.b]) return nullptr;
        // Memory that is shared with others may have changed since the lengths were checked.
        const int64_t length = a->lengths ? std::min<int64_t>(a->lengths[at.b], a->steps) : a->steps;
        if (at.t == (a->reverse ? length - 1 : 0)) return a->h0 ? a->h0 + at.b * a->hidden : nullptr;
        return a->output + (a->reverse ? at.t + 1 : at.t - 1) * a->out_step + at.b * a->out_row;
    };
    if (a->grad_ih) transposed_product(grads, input, a->grad_ih, count, width, a->features, columns, thread, threads);
    if (a->grad_hh) transposed_product(grads, before, a->grad_hh, count, width, a->hidden, columns, thread, threads);
    if (a->grad_bias) column_sums(grads, a->grad_bias, count, width, thread, threads);
}

}  // namespace
