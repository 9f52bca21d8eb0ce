// One LSTM layer's recurrence on a CPU, forward and backward, in float32: the whole time loop in one team of threads.
// Weights may be kept in bfloat16 or, a scale a row, in int8, where reading them is what takes the time.
//
// Weights come packed so that a block of hidden units reads one stream. Where the batch is large enough each thread
// walks through time with its own rows and nobody waits for anybody; else threads share out the hidden units and meet
// once a step.

#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "products.h"
#include "rows.h"
#include "team.h"
#include "vectors.h"
#include "weights.h"

// Sizes and pointers as kernels/recurrence.py has them, strides in elements, one direction a call.
struct Forward {
    int64_t batch, steps, hidden, reverse, threads, by_rows;
    float* gates_input;        int64_t gi_step, gi_row;  // where x is given: written first, or not needed
    const float* x;            int64_t x_step, x_row, features;  // or null: the projection has been done
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

// Weights as they lie in a parameter, and the marks of what was packed.
struct Source {
    const float* values;       int64_t count;
    uint64_t sampled, all;
};

struct Direction {
    const void* packed_ih;
    const void* packed;
    const float* bias_ih;      // or null, and so below
    const float* bias_hh;
    const float* scale_ih;
    const float* scale;
};

struct Layers {
    int64_t layers, directions, features, hidden, kept;
    const Source* sources;     // weight_ih and weight_hh of each direction of each layer
    const Direction* weights;  // of each direction of each layer
};

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
};

namespace {

// Whether the projection shares out rows, of which it has batch * steps.
inline bool projected_by_rows(const Forward* a, int threads) { return a->batch * a->steps >= 2 * ROWS * threads; }

// Whether each step projects its own input beside the recurrent product: nothing of gates_input is then written and read
// back, but the input's weights are read at each step. int8 weights have two scales, which one sum cannot have.
inline bool projects_in_step(int64_t batch, int64_t features, bool by_rows, bool scaled, int64_t threads) {
    const int64_t rows = by_rows ? batch / threads : batch;
    return !scaled && rows >= ROWS && features <= 2 * rows;
}

// gates_input of a thread's share of places (all, where none are named) or of hidden units: x times weight_ih and biases.
template <typename W>
inline void project(const Forward* a, const std::vector<int64_t>& places, int thread, int threads) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
    const bool by_rows = projected_by_rows(a, threads), rows_first = a->x_row > a->x_step;
    const int64_t count = a->lengths ? static_cast<int64_t>(places.size()) : a->batch * a->steps;
    const Share mine = share(count, by_rows, thread, threads), own = share(blocks, !by_rows, thread, threads);
    for (int64_t block = own.first; block < own.end; ++block) {
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
        vec plus[4], by[4];
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t at = gate * hidden + unit;
            plus[gate] = a->bias_ih ? load(a->bias_ih + at, n) + load(a->bias_hh + at, n) : vec{};
            by[gate] = a->scale_ih ? load(a->scale_ih + at, n) : all(1.0f);
        }
        for (int64_t row = mine.first; row < mine.end; row += ROWS) {
            const int rows = static_cast<int>(mine.end - row < ROWS ? mine.end - row : ROWS);
            const float* from[ROWS];
            float* to[ROWS];
            for (int r = 0; r < rows; ++r) {
                const Place at(a->lengths ? places[row + r] : row + r, a->batch, a->steps, rows_first);
                from[r] = a->x + at.t * a->x_step + at.b * a->x_row;
                to[r] = a->gates_input + at.t * a->gi_step + at.b * a->gi_row + unit;
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

// What a forward pass of several layers finds out once about its sequences.
struct Sequences {
    Lengths lengths;
    std::vector<int64_t> places;  // those within the lengths, where a projection before the steps asks for them
    Sequences(const int32_t* given, int64_t batch, int64_t steps, bool rows_first, bool projected)
        : lengths(given, batch) {
        if (projected) places = lengths.places(batch, steps, rows_first);
    }
};

// One direction of a layer, in each thread of a team: `blocks` of hidden units or rows of the batch are shared out.
template <typename W>
void walk(const Forward* a, const Sequences& sequences, Barrier& barrier, int thread, int threads) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
    Rows mine(sequences.lengths, a->batch, a->by_rows, thread, threads);
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
    const bool in_step = a->x && projects_in_step(a->batch, a->features, a->by_rows, a->scale, threads);
    if (a->x && !in_step) {
        project<W>(a, sequences.places, thread, threads);
        // Whoever shares out hidden units both times reads nothing but what it wrote.
        if (a->by_rows || projected_by_rows(a, threads)) barrier.wait(thread, threads);
    }
    for (int64_t s = 0; s < a->steps; ++s) {
        const int64_t t = a->reverse ? a->steps - 1 - s : s;
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
                    inputs[r] = a->x ? a->x + t * a->x_step + mine[row + r] * a->x_row : nullptr;
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
                    const float* in = a->gates_input + t * a->gi_step + b * a->gi_row + unit;
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

void walk(const Forward* a, int64_t kept, const Sequences& sequences, Barrier& barrier, int thread, int threads) {
    if (kept == 0) walk<float>(a, sequences, barrier, thread, threads);
    if (kept == 1) walk<uint16_t>(a, sequences, barrier, thread, threads);
    if (kept == 2) walk<int8_t>(a, sequences, barrier, thread, threads);
}

// A thread's share of the gradients of the weights, once all of grad_gates is there: products over all steps of which
// the gradient is not known to be zero (all, where no places are named).
void weight_gradients(const Backward* a, const std::vector<int64_t>& places, int thread, int threads) {
    const int64_t count = a->lengths ? static_cast<int64_t>(places.size()) : a->batch * a->steps, width = 4 * a->hidden;
    const bool rows_first = a->gg_row > a->gg_step;
    const int64_t* named = a->lengths ? places.data() : nullptr;
    const auto place = [=](int64_t k) { return Place(named ? named[k] : k, a->batch, a->steps, rows_first); };
    const auto grads = [=](int64_t k) { return a->grad_gates + (named ? named[k] : k) * width; };
    const auto input = [=](int64_t k) {
        const Place at = place(k);
        return a->x + at.t * a->x_step + at.b * a->x_row;
    };
    // The h that a step started from. A sequence walked backward starts at its own last step.
    const auto before = [=](int64_t k) -> const float* {
        const Place at = place(k);
        const int64_t length = a->lengths ? a->lengths[at.b] : a->steps;
        if (at.t == (a->reverse ? length - 1 : 0)) return a->h0 ? a->h0 + at.b * a->hidden : nullptr;
        return a->output + (a->reverse ? at.t + 1 : at.t - 1) * a->out_step + at.b * a->out_row;
    };
    if (a->grad_ih) transposed_product(grads, input, a->grad_ih, count, width, a->features, thread, threads);
    if (a->grad_hh) transposed_product(grads, before, a->grad_hh, count, width, a->hidden, thread, threads);
    if (a->grad_bias) column_sums(grads, a->grad_bias, count, width, thread, threads);
}

// Weights up to this many are always looked at in full, which takes two microseconds.
constexpr int64_t SMALL = 1 << 16;

bool unchanged(const Source& source, bool whole) {
    if (whole || source.count <= SMALL) return mark_each(source.values, source.count) == source.all;
    return mark_some(source.values, source.count) == source.sampled;
}

inline int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }  // to what begins at a cache line

// Memory for one call, that begins at a cache line.
struct Workspace {
    float* values;
    explicit Workspace(int64_t count)
        : values(static_cast<float*>(::operator new(4 * count, std::align_val_t(64)))) {}
    ~Workspace() { ::operator delete(values, std::align_val_t(64)); }
    Workspace(const Workspace&) = delete;
};

}  // namespace

extern "C" {

int64_t lanes() { return LANES; }

uint64_t mark(const float* values, int64_t count) { return mark_some(values, count); }

uint64_t mark_all(const float* values, int64_t count) { return mark_each(values, count); }

void pack_forward(const float* weight, void* packed, float* scale, int64_t hidden, int64_t depth, int64_t kept) {
    packed_forward(weight, packed, scale, hidden, depth, kept);
}

void pack_backward(const float* weight, float* packed, int64_t hidden) { packed_backward(weight, packed, hidden); }

void lstm_forward(const Forward* a, int64_t kept) {
    // Of fewer threads than asked for, each has more rows, and projects in the step all the more.
    const bool projected = a->x && !projects_in_step(a->batch, a->features, a->by_rows, a->scale, a->threads);
    const Sequences sequences(a->lengths, a->batch, a->steps, a->x_row > a->x_step, projected);
    Barrier barrier(a->threads);
    team(a->threads, [=, &sequences, &barrier](int thread, int threads) {
        walk(a, kept, sequences, barrier, thread, threads);
    });
}

// All layers of a module in one team of threads, nothing kept for gradients. h_n and c_n may be the memory of h0 and c0.
// Returns 0; or 1, and has done nothing, where weights no longer have the values that were packed. `look` says how that
// is found out: 0, not at all; 1, by samples of large weights; 2, by all values.
int64_t lstm_layers(const Layers* a, int64_t batch, int64_t steps, int64_t batch_first, int64_t threads,
                    int64_t by_rows, int64_t look, const float* x, const float* h0, const float* c0,
                    const int32_t* lengths, float* output, float* h_n, float* c_n) {
    for (int64_t i = 0; look && i < 2 * a->layers * a->directions; ++i)
        if (!unchanged(a->sources[i], look == 2)) return 1;
    const int64_t hidden = a->hidden, size = batch * hidden, width = a->directions * hidden;
    // gates_input, h of two steps, and two layers' outputs, one of which the next reads.
    const int64_t gates_size = rounded(4 * steps * size), states = rounded(size), outputs = rounded(steps * batch * width);
    Workspace memory(gates_size + 2 * states + (a->layers > 1 ? 2 * outputs : 0));
    float* between = memory.values + gates_size + 2 * states;
    const int64_t widest = a->layers > 1 && width > a->features ? width : a->features;
    const bool projected = !projects_in_step(batch, widest, by_rows, a->kept == 2, threads);
    const Sequences sequences(lengths, batch, steps, batch_first, projected);
    Barrier barrier(threads);
    team(threads, [=, &sequences, &barrier, &memory](int thread, int members) {
        const float* from = x;
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            float* to = layer + 1 == a->layers ? output : between + layer % 2 * outputs;
            for (int64_t d = 0; d < a->directions; ++d) {
                const int64_t i = layer * a->directions + d, features = layer ? width : a->features;
                const Direction& own = a->weights[i];
                const auto step = [=](int64_t numbers) { return batch_first ? numbers : batch * numbers; };
                const auto row = [=](int64_t numbers) { return batch_first ? steps * numbers : numbers; };
                const Forward call = {
                    batch, steps, hidden, d, members, by_rows, memory.values, step(4 * hidden), row(4 * hidden),
                    from, step(features), row(features), features, own.packed_ih, own.bias_ih, own.bias_hh, own.packed,
                    own.scale_ih, own.scale, h0 ? h0 + i * size : nullptr, c0 ? c0 + i * size : nullptr, lengths,
                    to + d * hidden, step(width), row(width), h_n + i * size, c_n + i * size,
                    nullptr, 0, 0, nullptr, 0, 0, memory.values + gates_size};
                walk(&call, a->kept, sequences, barrier, thread, members);
                // Who shares out rows has met nobody since, and other rows may be projected next.
                if (by_rows) barrier.wait(thread, members);
            }
            from = to;
        }
    });
    return 0;
}

void lstm_backward(const Backward* a) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES, size = a->batch * hidden;
    if (a->grad_h_n) std::memcpy(a->grad_h0, a->grad_h_n, 4 * size); else std::memset(a->grad_h0, 0, 4 * size);
    if (a->grad_c_n) std::memcpy(a->grad_c0, a->grad_c_n, 4 * size); else std::memset(a->grad_c0, 0, 4 * size);
    const bool weights = a->grad_ih || a->grad_hh || a->grad_bias;
    const Lengths lengths(a->lengths, a->batch);
    std::vector<int64_t> places;
    if (weights) places = lengths.places(a->batch, a->steps, a->gg_row > a->gg_step);
    Barrier barrier(a->threads);
    team(a->threads, [=, &lengths, &places, &barrier](int thread, int threads) {
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
                    const float* kept = a->gates + t * a->gates_step + b * a->gates_row + unit;
                    const vec i = load(kept, n), f = load(kept + hidden, n);
                    const vec g = load(kept + 2 * hidden, n), o = load(kept + 3 * hidden, n);
                    const vec tanh_c = tanh_of(load(a->cells + t * a->cells_step + b * a->cells_row + unit, n));
                    vec c_before = {};
                    if (s) c_before = load(a->cells + earlier * a->cells_step + b * a->cells_row + unit, n);
                    else if (a->c0) c_before = load(a->c0 + b * hidden + unit, n);
                    float* dh_at = a->grad_h0 + b * hidden + unit;
                    float* dc_at = a->grad_c0 + b * hidden + unit;
                    const vec dh = load(dh_at, n) + load(a->grad_output + t * a->go_step + b * a->go_row + unit, n);
                    const vec dc = load(dc_at, n) + dh * o * (1.0f - tanh_c * tanh_c);
                    store(grads, dc * g * i * (1.0f - i), n);
                    store(grads + hidden, dc * c_before * f * (1.0f - f), n);
                    store(grads + 2 * hidden, dc * i * (1.0f - g * g), n);
                    store(grads + 3 * hidden, dh * tanh_c * o * (1.0f - o), n);
                    store(dc_at, dc * f, n);
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
                    for (int r = 0; r < rows; ++r)
                        for (int v = 0; v < vectors; ++v) {
                            const int64_t unit = (block + v) * LANES;
                            store(a->grad_h0 + mine[row + r] * hidden + unit, sums[r][v],
                                  static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES));
                        }
                }
            }
        }
    });
    if (weights) team(a->weight_threads, [=, &places](int thread, int threads) { weight_gradients(a, places, thread, threads); });
}

}  // extern "C"
