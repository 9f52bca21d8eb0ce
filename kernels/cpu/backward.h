// The walk of one direction of a layer back through time, and the gradients of its weights.

#pragma once

#include <algorithm>
#include <cstdint>

#include "copied_product.h"
#include "products.h"
#include "rows.h"
#include "status.h"
#include "team.h"
#include "vectors.h"

// As `Forward`, and as kernels/common/recurrence.py has it.
struct Backward {
    int64_t batch, steps, hidden, reverse, threads, by_rows;
    const void* packed;        // pack_backward of weight_hh
    const float* c0;
    const int32_t* lengths;
    const float* gates;        int64_t gates_step, gates_row;  // as `Forward` left them; by tiles and pairs a record, no cells
    const float* cells;        int64_t cells_step, cells_row;
    const void* grad_output;   int64_t go_step, go_row;        // float, by pairs bf16
    const float* grad_h_n;     // or null
    const float* grad_c_n;     // or null
    void* grad_gates;          int64_t gg_step, gg_row;  // float, or bf16 where weights are kept so; null by tiles
    float* grad_h0;            // (batch, hidden), also holds the running gradient of h; lstm_backward has its own for null
    float* grad_c0;            // the same of c
    // For the gradients of the weights, each null where it is not wanted; grad_gates is contiguous then.
    const float* x;            int64_t x_step, x_row, features;
    const void* output;        int64_t out_step, out_row;  // zero past the lengths; float, by pairs bf16
    const void* h0;            // (batch, hidden) in float or null; `StepRows` reads it in the type of the output
    float* grad_ih;            // (4 * hidden, features)
    float* grad_hh;            // (4 * hidden, hidden)
    float* grad_bias;          // (4 * hidden,)
    int64_t weight_threads;    // of a team that need not meet at every step
    const uint8_t* resets;     // as `Forward` has it: no gradient passes
    // In bf16 alone: the gradient of x, with its strides, or null; added to what is there if `grad_x_more`.
    const void* packed_ih;     // pack_backward of weight_ih
    float* grad_x;
    int64_t grad_x_more;
    const float* weight_ih;    // (4 * hidden, features) that lstm_backward packs itself where packed_ih is null
    const float* weight_hh;    // the same of packed
    float* grad_bias_hh;       // gets a copy of grad_bias, or null
};

namespace {

// Rows of the matrices over all steps whose products are the gradients of the weights, by their place in the list. H is the
// type of the output and of h0.
template <typename H = float>
class StepRows {
    Place place(int64_t k) const { return Place((*listed)[k], a->batch, a->steps, a->gg_row > a->gg_step); }

public:
    const Backward* a;
    const Listed* listed;

    StepRows(const Backward* a, const Listed& listed) : a(a), listed(&listed) {}
    int64_t count() const { return listed->count; }
    int64_t width() const { return 4 * a->hidden; }
    template <typename G>
    const G* gates(int64_t k) const { return static_cast<const G*>(a->grad_gates) + (*listed)[k] * width(); }
    const float* input(int64_t k) const { return input(place(k)); }
    const float* input(const Place& at) const { return a->x + at.t * a->x_step + at.b * a->x_row; }
    // The h that a step started from, or null for zeros. A sequence walked backward starts at its own last step.
    const H* before(int64_t k) const { return before(place(k)); }
    const H* before(const Place& at) const {
        if (a->resets && a->resets[at.t * a->batch + at.b]) return nullptr;
        // Memory that is shared with others may have changed since the lengths were checked.
        const int64_t length = a->lengths ? std::min<int64_t>(a->lengths[at.b], a->steps) : a->steps;
        const auto in = [](const void* values, int64_t offset) { return static_cast<const H*>(values) + offset; };
        if (at.t == (a->reverse ? length - 1 : 0)) return a->h0 ? in(a->h0, at.b * a->hidden) : nullptr;
        return in(a->output, (a->reverse ? at.t + 1 : at.t - 1) * a->out_step + at.b * a->out_row);
    }
};

// Gradients of gates in float32, and what multiplies them: pack_backward's weights in a walk, each other over all steps.
struct FloatsBack {
    using Output = float;  // type of the output of a walk forward

    template <int VECTORS>
    static void add(int rows, vec (&sums)[ROWS][4], const float* const (&from)[ROWS], int64_t depth, const float* w,
                    const char* ahead) {
        if constexpr (ASKS_AHEAD && VECTORS == 4)
            if (ahead) return product<4, true>(rows, sums, from, depth, w, LANES, depth * LANES, ahead);
        product<VECTORS>(rows, sums, from, depth, w, LANES, depth * LANES);
    }

    // Whether enough columns read a copy of the gradients of gates to pay for it.
    static bool copies(const Backward* a) {
        return copies_left(a->grad_ih ? a->features : 0) || copies_left(a->grad_hh ? a->hidden : 0);
    }

    // Bytes that a thread needs for the gradients of the weights.
    static int64_t room(const Backward* a, int64_t rows) {
        return (COLUMNS + (copies(a) ? left_copy(rows, 4 * a->hidden) : 0)) * static_cast<int64_t>(sizeof(float));
    }

    // A thread's share of the gradients of the weights, once all of grad_gates is there: products over all steps of which
    // the gradient is not known to be zero.
    static void weight_gradients(const StepRows<>& rows, char* room, int thread, int threads) {
        const Backward* const a = rows.a;
        float* const columns = reinterpret_cast<float*>(room);
        const int64_t count = rows.count(), width = rows.width();
        const auto grads = [=](int64_t k) { return rows.gates<float>(k); };
        const auto input = [=](int64_t k) { return rows.input(k); };
        const auto before = [=](int64_t k) { return rows.before(k); };
        if (!count || !copies(a)) {
            if (a->grad_ih) transposed_product(grads, input, a->grad_ih, count, width, a->features, columns, thread, threads);
            if (a->grad_hh) transposed_product(grads, before, a->grad_hh, count, width, a->hidden, columns, thread, threads);
            if (a->grad_bias) column_sums(grads, a->grad_bias, count, width, thread, threads);
            return;
        }
        const Share mine = share((width + ROWS - 1) / ROWS, true, thread, threads);
        float* const copy = columns + COLUMNS;
        for (int64_t start = 0; start < count; start += CHUNK) {
            const int64_t depth = std::min(CHUNK, count - start);
            copy_left(grads, start, depth, width, mine, copy, a->grad_bias);
            if (a->grad_ih) multiply_copy(copy, input, a->grad_ih, start, depth, width, a->features, columns, mine);
            if (a->grad_hh) multiply_copy(copy, before, a->grad_hh, start, depth, width, a->hidden, columns, mine);
        }
    }

    static void walk(const Backward* a, const Lengths& lengths, Barrier& barrier, int thread, int threads);
};

// A thread's share of the walk back through time: grad_gates of all steps, and the gradients of the first state.
inline void FloatsBack::walk(const Backward* a, const Lengths& lengths, Barrier& barrier, int thread, int threads) {
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
                float* grads = static_cast<float*>(a->grad_gates) + t * a->gg_step + b * a->gg_row + unit;
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
                const vec dh = load(dh_at, n) + load(static_cast<const float*>(a->grad_output) + t * a->go_step + b * a->go_row + unit, n);
                const vec dc = load(dc_at, n) + dh * o * (1.0f - tanh_c * tanh_c);
                store(grads, dc * g * i * (1.0f - i), n);
                store(grads + hidden, dc * c_before * f * (1.0f - f), n);
                store(grads + 2 * hidden, dc * i * (1.0f - g * g), n);
                store(grads + 3 * hidden, dh * tanh_c * o * (1.0f - o), n);
                store(dc_at, reset ? vec{} : dc * f, n);
            }
        }
        if (!a->by_rows) barrier.wait(thread, threads);
        const int64_t depth = 4 * hidden, groups = (own.end - own.first + 3) / 4;
        const bool far = (own.end - own.first) * depth * LANES * static_cast<int64_t>(sizeof(float)) > NEAR;
        for (int64_t group = 0; group < groups; ++group) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const auto block_of = [=](int64_t i) { return own.first + 4 * (s % 2 ? groups - 1 - i : i); };
            const int64_t block = block_of(group);
            const int vectors = static_cast<int>(own.end - block < 4 ? own.end - block : 4);
            const auto weights_of = [=](int64_t block) { return static_cast<const float*>(a->packed) + block * depth * LANES; };
            const float* const w = weights_of(block);
            const float* const next = far && group + 1 < groups ? weights_of(block_of(group + 1)) : nullptr;
            // Where a sequence has ended its state was held, and the gradient passes through.
            for (int64_t row = 0; row < running; row += ROWS) {
                const int rows = static_cast<int>(running - row < ROWS ? running - row : ROWS);
                const float* from[ROWS];
                for (int r = 0; r < rows; ++r) from[r] = static_cast<const float*>(a->grad_gates) + t * a->gg_step + mine[row + r] * a->gg_row;
                vec sums[ROWS][4] = {};
                const auto add = [&](auto count) {
                    FloatsBack::add<decltype(count)::value>(rows, sums, from, depth, w, ahead_of(next, row / ROWS, depth));
                };
                switch (vectors) {
                    case 1: add(std::integral_constant<int, 1>()); break;
                    case 2: add(std::integral_constant<int, 2>()); break;
                    case 3: add(std::integral_constant<int, 3>()); break;
                    default: add(std::integral_constant<int, 4>());
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

}  // namespace
