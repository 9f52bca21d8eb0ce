// A decoder with attention that is fed what it found: all steps of a batch in one call, in float32.
//
// A step's input is [x; fed]. The LSTM makes h of it, h asks the memory (scores, softmax, weighted mean: the context), and
// tanh(W [context; h] + b) is what the step decoded. The next step is fed that, or the context. Each step needs the one
// before, so no product spans the steps; what a call saves is a dozen operators a step and what they write and read. Rows
// of a batch need nothing of each other: threads share them out and never meet.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "forward.h"
#include "matrices.h"
#include "products.h"
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
    int64_t batch, steps, inputs, fed_size, hidden, layers, memory_steps, memory_size, key_size, feeds_context, threads;
    const FedLayer* weights;      // of each layer
    const float* x;               // (batch, steps, inputs)
    const float* memory;          // (batch, memory_steps, memory_size)
    const float* keys;            // (batch, memory_steps, key_size)
    const uint8_t* mask;          // (batch, memory_steps), 0 for padding; or null
    const float* query;           // pack_linear of (key_size, hidden), or null: h itself is the query
    const float* query_bias;      // or null
    const float* vector;          // (key_size,): scores are vector . tanh(query + key); or null: query . key
    double scale;                 // of the scores
    const float* combine;         // pack_linear of (hidden, memory_size + hidden)
    const float* combine_bias;    // or null
    const int64_t* lengths;       // (batch,), steps after which a row keeps its state; or null
    const float *h0, *c0;         // (layers, batch, hidden)
    const float* fed0;            // (batch, fed_size)
    float *h_n, *c_n, *fed_n;     // as these
    float* decoded;               // (batch, steps, hidden); past a length what the row's padding gives
};

namespace {

struct Floats {
    using Input = Widened<float>;
    using Recurrent = Widened<float>;
};

ALWAYS_INLINE float sum_of_lanes(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float sum = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
    return sum;
#endif
}

// Of what is at most zero; below -87 it is exp(-87), 2e-38.
ALWAYS_INLINE vec exp_of(vec x) {
    const Exponential e = exponential<1>(x);
    return e.scale * e.p + e.scale;
}

// What a thread computes in, for `rows` of its own.
class Scratch {
    Memory<float> numbers;
    Memory<int64_t> positions;
    Memory<char> room;

    static int64_t widest(const FedCall* a) { return std::max(a->inputs + a->fed_size, a->hidden); }
    static int64_t total(const FedCall* a, int64_t rows) {
        const int64_t each = rounded(a->inputs + a->fed_size) + 9 * rounded(a->hidden) + 2 * a->layers * rounded(a->hidden) +
                             rounded(a->memory_size + a->hidden) + rounded(a->key_size);
        return rows * each + rounded(a->memory_steps) + 16 * 16;
    }
    float* take(int64_t count) {
        float* const from = next;
        next += rounded(count);
        return from;
    }
    float* next;

public:
    float *in, *h, *c, *outputs[2], *gates, *states, *joint, *query, *scores;
    int64_t* unmasked;

    Scratch(const FedCall* a, int64_t rows)
        : numbers(total(a, rows), "a decoder's steps"), positions(a->memory_steps, "a decoder's memory"),
          room(vector_room<Floats>(rows, a->hidden, widest(a), true, 1).own, "converted rows"), next(numbers.data()) {
        in = take(rows * (a->inputs + a->fed_size));
        h = take(a->layers * rows * a->hidden);
        c = take(a->layers * rows * a->hidden);
        for (float*& output : outputs) output = take(rows * a->hidden);
        gates = take(4 * rows * a->hidden);
        states = take(2 * rows * a->hidden);
        joint = take(rows * (a->memory_size + a->hidden));
        query = take(rows * a->key_size);
        scores = take(a->memory_steps);
        unmasked = positions.data();
    }
    char* converted() const { return room.data(); }
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

// Scores of P steps of the memory for a query.
template <bool ADDITIVE, int P>
void scores_of(const float* query, const float* const (&keys)[P], int64_t size, const float* vector, float* to) {
    vec sums[P] = {};
    for (int64_t k = 0; k < size; k += LANES) {
        const int n = static_cast<int>(std::min<int64_t>(LANES, size - k));
        const vec asked = load(query + k, n), by = ADDITIVE ? load(vector + k, n) : vec{};
        for (int p = 0; p < P; ++p) {
            const vec key = load(keys[p] + k, n);
            sums[p] += ADDITIVE ? by * tanh_of(asked + key) : asked * key;
        }
    }
    for (int p = 0; p < P; ++p) to[p] = sum_of_lanes(sums[p]);
}

template <bool ADDITIVE>
void all_scores(const FedCall* a, const float* query, const float* keys, const int64_t* unmasked, int64_t count, float* scores) {
    constexpr int AT_ONCE = 4;
    int64_t i = 0;
    for (; i + AT_ONCE <= count; i += AT_ONCE) {
        const float* at[AT_ONCE];
        for (int p = 0; p < AT_ONCE; ++p) at[p] = keys + unmasked[i + p] * a->key_size;
        scores_of<ADDITIVE>(query, at, a->key_size, a->vector, scores + i);
    }
    for (; i < count; ++i) {
        const float* const at[1] = {keys + unmasked[i] * a->key_size};
        scores_of<ADDITIVE>(query, at, a->key_size, a->vector, scores + i);
    }
}

// Scores become weights that sum up to one. NaN, as torch has it, where there is nothing to weigh.
void softmax(float* scores, int64_t count, float scale) {
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) {
        scores[i] *= scale;
        most = scores[i] > most ? scores[i] : most;
    }
    vec sums = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const int n = static_cast<int>(std::min<int64_t>(LANES, count - i));
        const vec weight = exp_of(load(scores + i, n) - most);
        store(scores + i, weight, n);
        sums += load(scores + i, n);
    }
    const float part = 1.0f / sum_of_lanes(sums);
    for (int64_t i = 0; i < count; ++i) scores[i] *= part;
}

// Weighted mean of the memory.
void mean(const FedCall* a, const float* memory, const float* weights, const int64_t* unmasked, int64_t count, float* to) {
    const float nothing = count ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    for (int64_t column = 0; column < a->memory_size; column += 4 * LANES) {
        vec sums[4] = {all(nothing), all(nothing), all(nothing), all(nothing)};
        int lanes[4];
        for (int v = 0; v < 4; ++v)
            lanes[v] = static_cast<int>(std::clamp<int64_t>(a->memory_size - column - v * LANES, 0, LANES));
        for (int64_t i = 0; i < count; ++i) {
            const float* const from = memory + unmasked[i] * a->memory_size + column;
            for (int v = 0; v < 4 && lanes[v]; ++v) sums[v] += weights[i] * load(from + v * LANES, lanes[v]);
        }
        for (int v = 0; v < 4 && lanes[v]; ++v) store(to + column + v * LANES, sums[v], lanes[v]);
    }
}

// All steps of a thread's rows of the batch.
class FedRows {
    const FedCall* const a;
    const int64_t first, rows, width;
    const Scratch& own;
    const Lengths all_steps;
    Barrier alone;

    int64_t last_of(int64_t r) const { return a->lengths ? std::min(a->lengths[first + r], a->steps) : a->steps; }
    float* fed(int64_t r) const { return own.in + r * width + a->inputs; }
    int64_t state(int64_t layer, int64_t r) const { return (layer * a->batch + first + r) * a->hidden; }

    void begin() const {
        for (int64_t layer = 0; layer < a->layers; ++layer)
            for (int64_t r = 0; r < rows; ++r) {
                std::memcpy(own.h + (layer * rows + r) * a->hidden, a->h0 + state(layer, r), 4 * a->hidden);
                std::memcpy(own.c + (layer * rows + r) * a->hidden, a->c0 + state(layer, r), 4 * a->hidden);
            }
        for (int64_t r = 0; r < rows; ++r) std::memcpy(fed(r), a->fed0 + (first + r) * a->fed_size, 4 * a->fed_size);
    }
    // The state of a row once its last step is done.
    void end(int64_t r) const {
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            std::memcpy(a->h_n + state(layer, r), own.h + (layer * rows + r) * a->hidden, 4 * a->hidden);
            std::memcpy(a->c_n + state(layer, r), own.c + (layer * rows + r) * a->hidden, 4 * a->hidden);
        }
        std::memcpy(a->fed_n + (first + r) * a->fed_size, fed(r), 4 * a->fed_size);
    }

    // h of the last layer.
    const float* lstm() {
        const float* from = own.in;
        int64_t features = width;
        for (int64_t layer = 0; layer < a->layers; ++layer, features = a->hidden) {
            const FedLayer& w = a->weights[layer];
            float* const to = own.outputs[layer % 2];
            float* const h = own.h + layer * rows * a->hidden;
            float* const c = own.c + layer * rows * a->hidden;
            const Forward step = {
                rows, 1, a->hidden, 0, 1, 1,
                own.gates, rows * 4 * a->hidden, 4 * a->hidden, 1,
                from, rows * features, features, features,
                w.packed_ih, w.bias_ih, w.bias_hh, w.packed, nullptr, nullptr,
                h, c, nullptr, to, rows * a->hidden, a->hidden, h, c,
                nullptr, 0, 0, nullptr, 0, 0, own.states, nullptr};
            vector_walk<Floats>(&step, all_steps, alone, own.converted(), 0, 1);
            from = to;
        }
        return from;
    }

    void attend(const float* h) const {
        const float* queries = h;
        if (a->query) {
            linear(h, a->hidden, rows, a->query, a->query_bias, a->key_size, [this](int64_t r, int64_t column, int n, vec x) {
                store(own.query + r * a->key_size + column, x, n);
            });
            queries = own.query;
        }
        const int64_t joint = a->memory_size + a->hidden;
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t b = first + r;
            int64_t count = 0;
            for (int64_t s = 0; s < a->memory_steps; ++s)
                if (!a->mask || a->mask[b * a->memory_steps + s]) own.unmasked[count++] = s;
            const float* const keys = a->keys + b * a->memory_steps * a->key_size;
            const float* const query = queries + r * a->key_size;
            if (a->vector) all_scores<true>(a, query, keys, own.unmasked, count, own.scores);
            else all_scores<false>(a, query, keys, own.unmasked, count, own.scores);
            softmax(own.scores, count, static_cast<float>(a->scale));
            mean(a, a->memory + b * a->memory_steps * a->memory_size, own.scores, own.unmasked, count, own.joint + r * joint);
            std::memcpy(own.joint + r * joint + a->memory_size, h + r * a->hidden, 4 * a->hidden);
        }
    }

public:
    FedRows(const FedCall* a, int64_t first, int64_t rows, const Scratch& own)
        : a(a), first(first), rows(rows), width(a->inputs + a->fed_size), own(own), all_steps(nullptr, rows), alone(1) {}

    void run() {
        begin();
        for (int64_t r = 0; r < rows; ++r)
            if (last_of(r) <= 0) end(r);
        const int64_t joint = a->memory_size + a->hidden;
        for (int64_t t = 0; t < a->steps; ++t) {
            for (int64_t r = 0; r < rows; ++r)
                std::memcpy(own.in + r * width, a->x + ((first + r) * a->steps + t) * a->inputs, 4 * a->inputs);
            attend(lstm());
            float* const decoded = a->decoded + (first * a->steps + t) * a->hidden;
            linear(own.joint, joint, rows, a->combine, a->combine_bias, a->hidden, [=](int64_t r, int64_t column, int n, vec x) {
                store(decoded + r * a->steps * a->hidden + column, tanh_of(x), n);
            });
            for (int64_t r = 0; r < rows; ++r) {
                const float* const found = a->feeds_context ? own.joint + r * joint : decoded + r * a->steps * a->hidden;
                std::memcpy(fed(r), found, 4 * a->fed_size);
                if (t + 1 == last_of(r)) end(r);
            }
        }
    }
};

}  // namespace

extern "C" {

const char* decoder_failure() { return said; }

int64_t decoder_run(const FedCall* a) {
    return guarded([=]() -> int64_t {
        const int64_t threads = std::max<int64_t>(1, std::min(a->threads, a->batch));
        // All memory is taken before a team starts; one that becomes smaller than asked for shares the same rows out.
        std::vector<std::unique_ptr<Scratch>> scratch;
        std::vector<std::unique_ptr<FedRows>> parts;
        for (int64_t part = 0; part < threads; ++part) {
            const Share mine = share(a->batch, true, static_cast<int>(part), static_cast<int>(threads));
            scratch.push_back(std::make_unique<Scratch>(a, mine.end - mine.first));
            parts.push_back(std::make_unique<FedRows>(a, mine.first, mine.end - mine.first, *scratch.back()));
        }
        team(threads, [&parts](int thread, int members) {
            for (size_t part = thread; part < parts.size(); part += members) parts[part]->run();
        });
        return DONE;
    });
}

}  // extern "C"
