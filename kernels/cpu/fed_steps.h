// A decoder's call, the order and the memory of its rows, and all steps of a thread's rows forward.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fed_attention.h"
#include "forward.h"
#include "matrices.h"
#include "products.h"
#include "strips.h"
#include "rows.h"
#include "status.h"
#include "team.h"
#include "vectors.h"

// A layer of the decoder's LSTM, as `pack_forward` has it; biases may be null.
struct FedLayer {
    const void *packed_ih, *packed;
    const float *bias_ih, *bias_hh;
};

// What a caller hands over, eight bytes each. Everything is contiguous.
struct FedCall {
    int64_t batch, steps, inputs, fed_size, hidden, layers, memory_steps, memory_size, key_size, feeds_context;
    int64_t parts;                // that the rows are shared out in; those of a walk back are the same
    const FedLayer* weights;      // of each layer
    const float* x;               // (batch, steps, inputs)
    const float* memory;          // (batch, memory_steps, memory_size)
    const float* keys;            // (batch, memory_steps, key_size)
    const uint8_t* mask;          // (batch, memory_steps), 0 for padding; or null
    const float* query;           // pack_linear of (key_size, hidden), in a walk back as it is; or null: h is the query
    const float* query_bias;      // or null
    const float* vector;          // (key_size,): scores are vector . tanh(query + key); or null: query . key
    double scale;                 // of the scores
    const float* combine;         // pack_linear of (hidden, memory_size + hidden), in a walk back as it is
    const float* combine_bias;    // or null
    const int32_t* lengths;       // (batch,), steps after which a row keeps its state; or null
    const float* dropped;         // (layers - 1, batch, steps, hidden), factors of what each layer hands on; or null
    const float *h0, *c0;         // (layers, batch, hidden)
    const float* fed0;            // (batch, fed_size)
    float *h_n, *c_n, *fed_n;     // as these
    float* decoded;               // (batch, steps, hidden), zero past a length
    float* kept;                  // so many numbers as a `FedRecord` has, for a walk back; or null

    int64_t width() const { return inputs + fed_size; }
    int64_t joint() const { return memory_size + hidden; }
};

namespace {

struct Floats {
    using Input = FloatWeights;
    using Recurrent = FloatWeights;
};

// Rows of the batch in the order in which they lie in memory: part by part, and in each part the longest first, so that
// those that have ended are a tail that no product needs to see. Each part gets long and short ones.
class FedOrder {
    Memory<int64_t> rows;
    Memory<int32_t> lasts;
    const int64_t batch, parts;

public:
    explicit FedOrder(const FedCall* a)
        : rows(a->batch, "the order of the rows"), lasts(a->batch, "the order of the rows"), batch(a->batch), parts(a->parts) {
        const Lengths longest_first(a->lengths, batch);
        int64_t place = 0;
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t i = part; i < batch; i += parts, ++place) {
                rows[place] = longest_first.row(i);
                lasts[place] = static_cast<int32_t>(longest_first.steps(rows[place], 0, a->steps));
            }
    }
    // The places of a part.
    Share part(int64_t number) const {
        const auto before = [=](int64_t n) { return n * (batch / parts) + std::min(n, batch % parts); };
        return {before(number), before(number + 1)};
    }
    int64_t operator[](int64_t place) const { return rows[place]; }
    int64_t steps(int64_t place) const { return lasts[place]; }
    const int32_t* all_steps() const { return lasts.data(); }
};

// What the steps write and read, of all rows in their order: of every step where it is kept, else of two, or of one where
// the next step does not look back.
class FedRecord {
    const FedCall* const a;
    const bool every;
    const int64_t states, once;
    float *ins, *hs, *cs, *all_gates, *dropped, *joints, *queries, *all_weights;

    int64_t slot(int64_t t) const { return every ? t : t % 2; }
    int64_t state(int64_t layer, int64_t t) const { return (layer * states + slot(t)) * a->batch * a->hidden; }
    int64_t step(int64_t t) const { return every ? t : 0; }
    template <typename F>
    static void lay_out(const FedCall* a, bool every, F each) {
        const int64_t states = every ? a->steps + 1 : 2, once = every ? a->steps : 1;
        each(&FedRecord::ins, states * a->batch * a->width());
        each(&FedRecord::hs, a->layers * states * a->batch * a->hidden);
        each(&FedRecord::cs, a->layers * states * a->batch * a->hidden);
        each(&FedRecord::all_gates, (every ? a->layers * once : 1) * a->batch * 4 * a->hidden);
        each(&FedRecord::dropped, a->dropped ? (a->layers - 1) * once * a->batch * a->hidden : 0);
        each(&FedRecord::joints, once * a->batch * a->joint());
        each(&FedRecord::queries, a->query ? once * a->batch * a->key_size : 0);
        each(&FedRecord::all_weights, every ? once * a->batch * a->memory_steps : 0);
    }

public:
    static int64_t numbers(const FedCall* a, bool every) {
        int64_t sum = 0;
        lay_out(a, every, [&sum](auto, int64_t count) { sum += rounded(count); });
        return sum;
    }
    FedRecord(const FedCall* a, float* memory, bool every)
        : a(a), every(every), states(every ? a->steps + 1 : 2), once(every ? a->steps : 1) {
        lay_out(a, every, [this, &memory](auto part, int64_t count) {
            this->*part = memory;
            memory += rounded(count);
        });
    }

    // Each is (batch, ...) of a step t; a state is the one that step t starts from, and what it is fed the end of `in`.
    float* in(int64_t t) const { return ins + slot(t) * a->batch * a->width(); }
    float* h(int64_t layer, int64_t t) const { return hs + state(layer, t); }
    float* c(int64_t layer, int64_t t) const { return cs + state(layer, t); }
    float* gates(int64_t layer, int64_t t) const {
        return all_gates + ((every ? layer * once : 0) + step(t)) * a->batch * 4 * a->hidden;
    }
    // What a layer above the first one reads: h of the layer below, or that times what is dropped.
    float* below(int64_t layer, int64_t t) const {
        return a->dropped ? dropped + ((layer - 1) * once + step(t)) * a->batch * a->hidden : h(layer - 1, t + 1);
    }
    float* joint(int64_t t) const { return joints + step(t) * a->batch * a->joint(); }
    float* query(int64_t t) const { return queries + step(t) * a->batch * a->key_size; }
    // Zero for what is masked; NaN, as torch has it, where all of a row is. Only where every step is kept.
    float* weights(int64_t t) const { return all_weights + t * a->batch * a->memory_steps; }
};

// Factors of what a layer hands on, in a step of a row of the batch.
inline const float* dropped_of(const FedCall* a, int64_t layer, int64_t row, int64_t t) {
    return a->dropped + ((layer * a->batch + row) * a->steps + t) * a->hidden;
}

// What of the memory counts for some rows.
class Unmasked {
    Memory<int32_t> steps;
    Memory<int64_t> counts;
    const int64_t memory_steps;

public:
    Unmasked(const FedCall* a, const FedOrder& order, Share rows)
        : steps((rows.end - rows.first) * a->memory_steps, "what is not masked"),
          counts(rows.end - rows.first, "what is not masked"), memory_steps(a->memory_steps) {
        for (int64_t r = 0; r < rows.end - rows.first; ++r) {
            const uint8_t* const mask = a->mask ? a->mask + order[rows.first + r] * memory_steps : nullptr;
            int32_t* const to = steps.data() + r * memory_steps;
            int64_t count = 0;
            for (int64_t s = 0; s < memory_steps; ++s)
                if (!mask || mask[s]) to[count++] = static_cast<int32_t>(s);
            counts[r] = count;
        }
    }
    MemoryRows operator()(int64_t r, const float* numbers, int64_t size) const {
        return {numbers, size, steps.data() + r * memory_steps, counts[r]};
    }
};

// Rows of `from` times packed weights, and `done(row, column, lanes, sums)` for each vector of what comes of it.
template <typename F>
void linear(const float* from, int64_t width, int64_t rows, const float* packed, const float* bias, int64_t outputs, F done) {
    const Pieces pieces(rows, ROWS);
    for (int64_t first = 0; first < outputs; first += 4 * LANES, packed += 4 * LANES * width)
        for (int64_t piece = 0, row = 0; row < rows; row += pieces[piece], ++piece) {
            const float* a[ROWS];
            vec sums[ROWS][4] = {};
            for (int r = 0; r < pieces[piece]; ++r) a[r] = from + (row + r) * width;
            product<4>(pieces[piece], sums, a, width, packed, 4 * LANES, LANES);
            for (int v = 0; v < 4 && first + v * LANES < outputs; ++v) {
                const int64_t column = first + v * LANES;
                const int n = static_cast<int>(std::min<int64_t>(LANES, outputs - column));
                const vec plus = bias ? load(bias + column, n) : vec{};
                for (int r = 0; r < pieces[piece]; ++r) done(row + r, column, n, sums[r][v] + plus);
            }
        }
}

// All steps of a part of the rows.
class FedRows {
    const FedCall* const a;
    const FedOrder& order;
    const FedRecord& record;
    const Share mine;
    const Unmasked unmasked;
    const Memory<float> states, scores;
    const Memory<char> room;
    const Lengths all_steps;
    Barrier alone;

    static Memory<char> converted(const FedCall* a, int64_t rows) {
        return {vector_room<Floats>(rows, a->hidden, std::max(a->width(), a->hidden), true, 1).own, "converted rows"};
    }
    int64_t count() const { return mine.end - mine.first; }
    int64_t row(int64_t r) const { return order[mine.first + r]; }
    int64_t state(int64_t layer, int64_t r) const { return (layer * a->batch + row(r)) * a->hidden; }
    float* h(int64_t layer, int64_t t) const { return record.h(layer, t) + mine.first * a->hidden; }
    float* c(int64_t layer, int64_t t) const { return record.c(layer, t) + mine.first * a->hidden; }
    float* in(int64_t t) const { return record.in(t) + mine.first * a->width(); }
    float* joint(int64_t t) const { return record.joint(t) + mine.first * a->joint(); }
    float* query(int64_t t) const { return record.query(t) + mine.first * a->key_size; }
    float* decoded(int64_t t, int64_t r) const { return a->decoded + (row(r) * a->steps + t) * a->hidden; }

    void begin() const {
        for (int64_t r = 0; r < count(); ++r) {
            for (int64_t layer = 0; layer < a->layers; ++layer) {
                std::memcpy(h(layer, 0) + r * a->hidden, a->h0 + state(layer, r), 4 * a->hidden);
                std::memcpy(c(layer, 0) + r * a->hidden, a->c0 + state(layer, r), 4 * a->hidden);
            }
            std::memcpy(in(0) + r * a->width() + a->inputs, a->fed0 + row(r) * a->fed_size, 4 * a->fed_size);
        }
    }
    // The state of a row that has no step t, and what it has decoded past its end.
    void end(int64_t t, int64_t r) const {
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            std::memcpy(a->h_n + state(layer, r), h(layer, t) + r * a->hidden, 4 * a->hidden);
            std::memcpy(a->c_n + state(layer, r), c(layer, t) + r * a->hidden, 4 * a->hidden);
        }
        std::memcpy(a->fed_n + row(r) * a->fed_size, in(t) + r * a->width() + a->inputs, 4 * a->fed_size);
        std::memset(decoded(t, r), 0, 4 * (a->steps - t) * a->hidden);
    }

    // h of the last layer, of the first `rows`.
    const float* lstm(int64_t t, int64_t rows) {
        const float* from = in(t);
        int64_t features = a->width();
        for (int64_t layer = 0; layer < a->layers; ++layer, features = a->hidden) {
            const FedLayer& w = a->weights[layer];
            float* const to = h(layer, t + 1);
            // The projection is overwritten by the gates that come of it, where they are kept.
            float* const gates = record.gates(layer, t) + mine.first * 4 * a->hidden;
            const Forward step = {
                rows, 1, a->hidden, 0, 1, 1,
                gates, rows * 4 * a->hidden, 4 * a->hidden, 1,
                from, rows * features, features, features,
                w.packed_ih, w.bias_ih, w.bias_hh, w.packed, nullptr, nullptr,
                h(layer, t), c(layer, t), nullptr, to, rows * a->hidden, a->hidden, to, c(layer, t + 1),
                a->kept ? gates : nullptr, rows * 4 * a->hidden, 4 * a->hidden, nullptr, 0, 0,
                states.data(), nullptr, nullptr, nullptr};
            vector_walk<Floats>(&step, all_steps, alone, room.data(), 0, 1);
            from = layer + 1 < a->layers ? handed_on(layer, t, rows) : to;
        }
        return from;
    }
    // What the layer above reads of a step.
    const float* handed_on(int64_t layer, int64_t t, int64_t rows) const {
        float* const to = record.below(layer + 1, t) + mine.first * a->hidden;
        for (int64_t r = 0; a->dropped && r < rows; ++r)
            for (int64_t unit = 0; unit < a->hidden; ++unit)
                to[r * a->hidden + unit] = h(layer, t + 1)[r * a->hidden + unit] * dropped_of(a, layer, row(r), t)[unit];
        return to;
    }

    // Weights of a row, as they are kept.
    void keep(int64_t t, int64_t r, const MemoryRows& keys) const {
        float* const to = record.weights(t) + (mine.first + r) * a->memory_steps;
        if (keys.count < a->memory_steps)
            std::fill(to, to + a->memory_steps, keys.count ? 0.0f : std::numeric_limits<float>::quiet_NaN());
        for (int64_t i = 0; i < keys.count; ++i) to[keys.unmasked[i]] = scores[i];
    }

    void attend(int64_t t, int64_t rows, const float* h) const {
        float* const queries = query(t);
        if (a->query)
            linear(h, a->hidden, rows, a->query, a->query_bias, a->key_size, [=](int64_t r, int64_t column, int n, vec x) {
                store(queries + r * a->key_size + column, x, n);
            });
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t first = row(r) * a->memory_steps;
            const MemoryRows keys = unmasked(r, a->keys + first * a->key_size, a->key_size);
            const float* const asks = a->query ? queries + r * a->key_size : h + r * a->hidden;
            if (a->vector) all_scores<true>(asks, keys, a->vector, scores.data());
            else all_scores<false>(asks, keys, nullptr, scores.data());
            softmax(scores.data(), keys.count, static_cast<float>(a->scale));
            if (a->kept) keep(t, r, keys);
            float* const found = joint(t) + r * a->joint();
            weighted_sum(unmasked(r, a->memory + first * a->memory_size, a->memory_size), scores.data(),
                         std::numeric_limits<float>::quiet_NaN(), found);
            std::memcpy(found + a->memory_size, h + r * a->hidden, 4 * a->hidden);
        }
    }

public:
    FedRows(const FedCall* a, const FedOrder& order, const FedRecord& record, Share mine)
        : a(a), order(order), record(record), mine(mine), unmasked(a, order, mine),
          states(2 * (mine.end - mine.first) * a->hidden, "a decoder's steps"), scores(a->memory_steps, "a decoder's memory"),
          room(converted(a, mine.end - mine.first)), all_steps(nullptr, mine.end - mine.first), alone(1) {}

    void run() {
        begin();
        int64_t running = count();
        for (int64_t t = 0; t < a->steps; ++t) {
            for (; running && order.steps(mine.first + running - 1) <= t; --running) end(t, running - 1);
            for (int64_t r = 0; r < running; ++r)
                std::memcpy(in(t) + r * a->width(), a->x + (row(r) * a->steps + t) * a->inputs, 4 * a->inputs);
            attend(t, running, lstm(t, running));
            linear(joint(t), a->joint(), running, a->combine, a->combine_bias, a->hidden,
                   [=](int64_t r, int64_t column, int n, vec x) { store(decoded(t, r) + column, tanh_of(x), n); });
            for (int64_t r = 0; r < running; ++r) {
                const float* const found = a->feeds_context ? joint(t) + r * a->joint() : decoded(t, r);
                std::memcpy(in(t + 1) + r * a->width() + a->inputs, found, 4 * a->fed_size);
            }
        }
        for (; running; --running) end(a->steps, running - 1);
    }
};

}  // namespace
