// All steps of a decoder back through time, and the gradients of its weights.
//
// A step goes from what was decoded through the layer that combines, the attention and the LSTM's layers to what was fed,
// which is a gradient of the step before. What needs a product over all steps (weights, memory, keys that queries are
// multiplied with) waits for the end, with the gradients of every step kept for it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "backward.h"
#include "fed_steps.h"

// A layer's weights as they are, and where their gradients go: each null where it is not wanted.
struct FedLayerBack {
    const float *weight_ih, *weight_hh;
    float *grad_ih, *grad_hh, *grad_bias_ih, *grad_bias_hh;
};

struct FedBack {
    const FedCall* call;           // with what its steps kept and decoded; x and packed weights are not read
    const FedLayerBack* layers;
    const float* grad_decoded;     // (batch, steps, hidden), not read past a length
    const float *grad_h_n, *grad_c_n, *grad_fed_n;  // or null
    float* grad_x;                 // (batch, steps, inputs), written, as all that follows
    float *grad_h0, *grad_c0, *grad_fed0;
    float *grad_memory, *grad_keys;
    float *grad_query, *grad_query_bias, *grad_vector, *grad_combine, *grad_combine_bias;  // each or null
    int64_t weight_threads;        // of a team that need not meet at every step
};

namespace {

// weight (depth, outputs) by which gradients of what it gave are multiplied, in the order that `linear` reads.
inline void pack_linear_back(const float* weight, float* packed, int64_t outputs, int64_t depth) {
    for (int64_t first = 0; first < outputs; first += 4 * LANES)
        for (int64_t k = 0; k < depth; ++k, packed += 4 * LANES) {
            const int64_t width = std::min<int64_t>(4 * LANES, outputs - first);
            std::memcpy(packed, weight + k * outputs + first, 4 * width);
            std::fill(packed + width, packed + 4 * LANES, 0.0f);
        }
}

// Memory of several uses, one after the other, each at a cache line.
class Portions {
    int64_t sum = 0;

public:
    int64_t operator()(int64_t count) {
        sum += rounded(count);
        return sum - rounded(count);
    }
    int64_t total() const { return sum; }
};

// Weights in the order of a walk back, and the gradients of every step of all rows, in their order.
class FedGradients {
    const FedCall* const a;
    std::vector<int64_t> inputs, recurrents, gates_of;
    Portions portions;
    int64_t combine_at, query_at, combined_at, contexts_at, scores_at, queries_at, vectors_at;
    const Memory<float> memory;

    int64_t planned(const FedCall* a) {
        const int64_t rows = a->steps * a->batch;
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            inputs.push_back(portions(linear_size(layer ? a->hidden : a->width(), 4 * a->hidden)));
            recurrents.push_back(portions(back_size(4 * a->hidden, a->hidden)));
            gates_of.push_back(portions(rows * 4 * a->hidden));
        }
        combine_at = portions(linear_size(a->joint(), a->hidden));
        query_at = portions(a->query ? linear_size(a->hidden, a->key_size) : 0);
        combined_at = portions(rows * a->hidden);
        contexts_at = portions(rows * a->memory_size);
        scores_at = portions(a->vector ? 0 : rows * a->memory_steps);
        queries_at = portions(a->query ? rows * a->key_size : 0);
        vectors_at = portions(a->vector ? a->batch * a->key_size : 0);
        return portions.total();
    }
    float* of_step(int64_t from, int64_t t, int64_t size) const { return memory.data() + from + t * a->batch * size; }

public:
    explicit FedGradients(const FedBack* back) : a(back->call), memory(planned(a), "a decoder's gradients") {
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            const FedLayerBack& w = back->layers[layer];
            pack_linear_back(w.weight_ih, memory.data() + inputs[layer], layer ? a->hidden : a->width(), 4 * a->hidden);
            pack_back_rows(w.weight_hh, memory.data() + recurrents[layer], 4 * a->hidden, a->hidden);
        }
        pack_linear_back(a->combine, memory.data() + combine_at, a->joint(), a->hidden);
        if (a->query) pack_linear_back(a->query, memory.data() + query_at, a->hidden, a->key_size);
        if (a->vector) std::fill(vectors(), vectors() + a->batch * a->key_size, 0.0f);
    }

    const float* input(int64_t layer) const { return memory.data() + inputs[layer]; }
    const float* recurrent(int64_t layer) const { return memory.data() + recurrents[layer]; }
    const float* combine() const { return memory.data() + combine_at; }
    const float* query() const { return memory.data() + query_at; }
    // Of a step: gates, what was combined before tanh, the context, scores (0 for what is masked), queries.
    float* gates(int64_t layer, int64_t t) const { return of_step(gates_of[layer], t, 4 * a->hidden); }
    float* combined(int64_t t) const { return of_step(combined_at, t, a->hidden); }
    float* contexts(int64_t t) const { return of_step(contexts_at, t, a->memory_size); }
    float* scores(int64_t t) const { return of_step(scores_at, t, a->memory_steps); }
    float* queries(int64_t t) const { return of_step(queries_at, t, a->key_size); }
    // (batch, key_size), the vector's of all steps of a row.
    float* vectors() const { return memory.data() + vectors_at; }
};

// All steps of a part of the rows back, and the gradients of their memory.
class FedRowsBack {
    const FedBack* const back;
    const FedCall* const a;
    const FedOrder& order;
    const FedRecord& record;
    const FedGradients& own;
    const Share mine;
    const Unmasked unmasked;
    Portions portions;
    const int64_t hidden_at, cells_at, fed_at, joint_at, in_at, weights_at, scores_at, columns_at;
    const Memory<float> memory;
    const Lengths all_steps;
    Barrier alone;

    int64_t count() const { return mine.end - mine.first; }
    int64_t row(int64_t r) const { return order[mine.first + r]; }
    // What a row compared with the keys in a step: h itself where no query is made of it.
    const float* asked(int64_t t, int64_t place) const {
        return a->query ? record.query(t) + place * a->key_size : record.joint(t) + place * a->joint() + a->memory_size;
    }
    // The first of these rows in what all rows share.
    float* from(float* all, int64_t size) const { return all + mine.first * size; }
    float* hidden(int64_t layer) const { return memory.data() + hidden_at + layer * count() * a->hidden; }
    float* cells(int64_t layer) const { return memory.data() + cells_at + layer * count() * a->hidden; }
    float* fed(int64_t r) const { return memory.data() + fed_at + r * a->fed_size; }
    float* joint(int64_t r) const { return memory.data() + joint_at + r * a->joint(); }
    float* in() const { return memory.data() + in_at; }

    static void copy_or_clear(float* to, const float* given, int64_t count) {
        if (given) std::memcpy(to, given, 4 * count);
        else std::fill(to, to + count, 0.0f);
    }

    // Past its end a row holds its state, and the gradient passes through.
    void begin() const {
        for (int64_t r = 0; r < count(); ++r) {
            for (int64_t layer = 0; layer < a->layers; ++layer) {
                const int64_t at = (layer * a->batch + row(r)) * a->hidden;
                copy_or_clear(hidden(layer) + r * a->hidden, back->grad_h_n ? back->grad_h_n + at : nullptr, a->hidden);
                copy_or_clear(cells(layer) + r * a->hidden, back->grad_c_n ? back->grad_c_n + at : nullptr, a->hidden);
            }
            copy_or_clear(fed(r), back->grad_fed_n ? back->grad_fed_n + row(r) * a->fed_size : nullptr, a->fed_size);
            const int64_t steps = order.steps(mine.first + r);
            float* const past = back->grad_x + (row(r) * a->steps + steps) * a->inputs;
            std::fill(past, past + (a->steps - steps) * a->inputs, 0.0f);
        }
    }
    void end() const {
        for (int64_t r = 0; r < count(); ++r) {
            for (int64_t layer = 0; layer < a->layers; ++layer) {
                const int64_t at = (layer * a->batch + row(r)) * a->hidden;
                std::memcpy(back->grad_h0 + at, hidden(layer) + r * a->hidden, 4 * a->hidden);
                std::memcpy(back->grad_c0 + at, cells(layer) + r * a->hidden, 4 * a->hidden);
            }
            std::memcpy(back->grad_fed0 + row(r) * a->fed_size, fed(r), 4 * a->fed_size);
        }
    }

    // Gradients of context and h by the layer that combines them, to `joint`.
    void combined(int64_t t, int64_t rows) const {
        float* const before = from(own.combined(t), a->hidden);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t at = (row(r) * a->steps + t) * a->hidden;
            for (int64_t unit = 0; unit < a->hidden; unit += LANES) {
                const int n = lanes_at(a->hidden, unit, 0);
                const vec decoded = load(a->decoded + at + unit, n);
                vec grad = load(back->grad_decoded + at + unit, n);
                if (!a->feeds_context) grad += load(fed(r) + unit, n);
                store(before + r * a->hidden + unit, grad * (1.0f - decoded * decoded), n);
            }
        }
        linear(before, a->hidden, rows, own.combine(), nullptr, a->joint(),
               [this](int64_t r, int64_t column, int n, vec x) { store(joint(r) + column, x, n); });
    }

    // Gradients of what a row's query, keys and memory were multiplied with in a step; of the query itself to `to`.
    void attention(int64_t t, int64_t r, float* to) const {
        const int64_t place = mine.first + r, first = row(r) * a->memory_steps;
        float* const context = own.contexts(t) + place * a->memory_size;
        std::memcpy(context, joint(r), 4 * a->memory_size);
        for (int64_t k = 0; a->feeds_context && k < a->memory_size; ++k) context[k] += fed(r)[k];
        const MemoryRows keys = unmasked(r, a->keys + first * a->key_size, a->key_size);
        const float* const all = record.weights(t) + place * a->memory_steps;
        float* const weights = memory.data() + weights_at;
        float* const scores = memory.data() + scores_at;
        for (int64_t i = 0; i < keys.count; ++i) weights[i] = all[keys.unmasked[i]];
        all_scores<false>(context, unmasked(r, a->memory + first * a->memory_size, a->memory_size), nullptr, scores);
        softmax_back(weights, scores, keys.count, static_cast<float>(a->scale));
        if (a->vector) {
            additive_back(asked(t, place), keys, a->vector, scores, to,
                          back->grad_keys + first * a->key_size, own.vectors() + place * a->key_size);
            return;
        }
        float* const kept = own.scores(t) + place * a->memory_steps;
        std::fill(kept, kept + a->memory_steps, 0.0f);
        for (int64_t i = 0; i < keys.count; ++i) kept[keys.unmasked[i]] = scores[i];
        weighted_sum(keys, scores, 0.0f, to);
    }

    void attended(int64_t t, int64_t rows) const {
        const auto add = [this](int64_t r, int64_t unit, int n, vec x) {
            float* const to = joint(r) + a->memory_size + unit;
            store(to, load(to, n) + x, n);
        };
        float* const queries = a->query ? from(own.queries(t), a->key_size) : in();
        for (int64_t r = 0; r < rows; ++r) attention(t, r, queries + r * a->key_size);
        if (a->query) return linear(queries, a->key_size, rows, own.query(), nullptr, a->hidden, add);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t unit = 0; unit < a->hidden; unit += LANES) {
                const int n = lanes_at(a->hidden, unit, 0);
                add(r, unit, n, load(queries + r * a->hidden + unit, n));
            }
    }

    void lstm(int64_t t, int64_t rows) {
        const int64_t size = a->hidden;
        const float* grad = joint(0) + a->memory_size;
        int64_t apart = a->joint();
        for (int64_t layer = a->layers - 1; layer >= 0; --layer) {
            float* const gates = from(own.gates(layer, t), 4 * size);
            const Backward step = {
                rows, 1, size, 0, 1, 1,
                own.recurrent(layer), from(record.c(layer, t), size), nullptr,
                from(record.gates(layer, t), 4 * size), rows * 4 * size, 4 * size,
                from(record.c(layer, t + 1), size), rows * size, size,
                grad, rows * apart, apart, nullptr, nullptr,
                gates, rows * 4 * size, 4 * size, hidden(layer), cells(layer),
                nullptr, 0, 0, 0, nullptr, 0, 0, nullptr, nullptr, nullptr, nullptr, 1, nullptr,
                nullptr, nullptr, 0, nullptr, nullptr, nullptr};
            FloatsBack::walk(&step, all_steps, alone, 0, 1);
            const int64_t features = layer ? size : a->width();
            linear(gates, 4 * size, rows, own.input(layer), nullptr, features, [=](int64_t r, int64_t column, int n, vec x) {
                const bool drops = layer && a->dropped;
                store(in() + r * features + column, drops ? x * load(dropped_of(a, layer - 1, row(r), t) + column, n) : x, n);
            });
            grad = in();
            apart = size;
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float* const x = in() + r * a->width();
            std::memcpy(back->grad_x + (row(r) * a->steps + t) * a->inputs, x, 4 * a->inputs);
            std::memcpy(fed(r), x + a->inputs, 4 * a->fed_size);
        }
    }

    // Sums over a row's steps of `left` times `right`: to all steps of its memory of so many numbers.
    template <typename L, typename R>
    void over_steps(int64_t r, L left, R right, int64_t size, float* to) const {
        transposed_product(left, right, to + row(r) * a->memory_steps * size, order.steps(mine.first + r), a->memory_steps, size,
                           memory.data() + columns_at, 0, 1);
    }

    void of_memory(int64_t r) const {
        const int64_t place = mine.first + r;
        over_steps(r, [=](int64_t t) { return record.weights(t) + place * a->memory_steps; },
                   [=](int64_t t) { return own.contexts(t) + place * a->memory_size; }, a->memory_size, back->grad_memory);
        if (a->vector) return;
        over_steps(r, [=](int64_t t) { return own.scores(t) + place * a->memory_steps; },
                   [=](int64_t t) { return asked(t, place); }, a->key_size, back->grad_keys);
    }

public:
    FedRowsBack(const FedBack* back, const FedOrder& order, const FedRecord& record, const FedGradients& own, Share mine)
        : back(back), a(back->call), order(order), record(record), own(own), mine(mine), unmasked(a, order, mine),
          hidden_at(portions(a->layers * count() * a->hidden)), cells_at(portions(a->layers * count() * a->hidden)),
          fed_at(portions(count() * a->fed_size)), joint_at(portions(count() * a->joint())),
          in_at(portions(count() * std::max(a->width(), a->hidden))), weights_at(portions(a->memory_steps)),
          scores_at(portions(a->memory_steps)), columns_at(portions(COLUMNS)),
          memory(portions.total(), "a decoder's gradients"), all_steps(nullptr, count()), alone(1) {}

    void run() {
        begin();
        for (int64_t r = 0; a->vector && r < count(); ++r) {
            float* const keys = back->grad_keys + row(r) * a->memory_steps * a->key_size;
            std::fill(keys, keys + a->memory_steps * a->key_size, 0.0f);
        }
        int64_t running = 0;
        for (int64_t t = a->steps - 1; t >= 0; --t) {
            while (running < count() && order.steps(mine.first + running) > t) ++running;
            if (!running) continue;
            combined(t, running);
            attended(t, running);
            lstm(t, running);
        }
        end();
        for (int64_t r = 0; r < count(); ++r) of_memory(r);
    }
};

// The gradients of the weights: products over the steps that all rows have.
class FedWeights {
    const FedBack* const back;
    const FedCall* const a;
    const FedRecord& record;
    const FedGradients& own;
    const Lengths lengths;
    const Listed listed;
    std::vector<Backward> layers;
    int64_t each = COLUMNS * static_cast<int64_t>(sizeof(float));

    // A layer's weight (outputs, size) and bias.
    template <typename L, typename R>
    void of_linear(L grads, R from, int64_t outputs, int64_t size, float* weight, float* bias, float* columns, int thread,
                   int threads) const {
        if (weight) transposed_product(grads, from, weight, listed.count, outputs, size, columns, thread, threads);
        if (bias) column_sums(grads, bias, listed.count, outputs, thread, threads);
    }

public:
    FedWeights(const FedBack* back, const FedOrder& order, const FedRecord& record, const FedGradients& own)
        : back(back), a(back->call), record(record), own(own), lengths(a->lengths ? order.all_steps() : nullptr, a->batch),
          listed(lengths, a->batch, a->steps, false) {
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            const FedLayerBack& w = back->layers[layer];
            const int64_t features = layer ? a->hidden : a->width(), rows = a->batch, size = a->hidden;
            // The states of all steps are one step longer than the steps, so the first is where they start.
            layers.push_back({
                rows, a->steps, size, 0, 1, 1, nullptr, nullptr, nullptr, nullptr, 0, 0, nullptr, 0, 0,
                nullptr, 0, 0, nullptr, nullptr, own.gates(layer, 0), rows * 4 * size, 4 * size, nullptr, nullptr,
                layer ? record.below(layer, 0) : record.in(0), rows * features, features, features,
                record.h(layer, 1), rows * size, size, record.h(layer, 0), w.grad_ih, w.grad_hh, w.grad_bias_ih,
                back->weight_threads, nullptr, nullptr, nullptr, 0, nullptr, nullptr, nullptr});
            each = std::max(each, FloatsBack::room(&layers.back(), listed.count));
        }
    }
    // Bytes that a thread needs.
    int64_t room() const { return (each + 63) / 64 * 64; }

    void run(char* room, int thread, int threads) const {
        for (const Backward& layer : layers) FloatsBack::weight_gradients(StepRows(&layer, listed), room, thread, threads);
        float* const columns = reinterpret_cast<float*>(room);
        const int64_t joint = a->joint();
        of_linear([=](int64_t k) { return own.combined(0) + listed[k] * a->hidden; },
                  [=](int64_t k) { return record.joint(0) + listed[k] * joint; }, a->hidden, joint, back->grad_combine,
                  back->grad_combine_bias, columns, thread, threads);
        if (a->query)
            of_linear([=](int64_t k) { return own.queries(0) + listed[k] * a->key_size; },
                      [=](int64_t k) { return record.joint(0) + listed[k] * joint + a->memory_size; }, a->key_size, a->hidden,
                      back->grad_query, back->grad_query_bias, columns, thread, threads);
        if (back->grad_vector)
            column_sums([=](int64_t b) { return own.vectors() + b * a->key_size; }, back->grad_vector, a->batch, a->key_size,
                        thread, threads);
    }
    // One sum serves both biases, each in memory of its own.
    void copy_biases() const {
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            const FedLayerBack& w = back->layers[layer];
            if (w.grad_bias_hh) std::memcpy(w.grad_bias_hh, w.grad_bias_ih, 16 * a->hidden);
        }
    }
};

}  // namespace
