// The walk of one direction of a layer forward through time by vectors, with the projection of its input.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "matrices.h"
#include "products.h"
#include "rows.h"
#include "strips.h"
#include "summed.h"
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
    float* gates;              int64_t gates_step, gates_row;  // null: not kept; by tiles a `WalkRecord`, and no cells
    float* cells;              int64_t cells_step, cells_row;
    float* scratch;            // 2 * batch * hidden; lstm_forward has its own where this is null
    const uint8_t* resets;     // (steps, batch) or null: rows whose h and c are zero before a step; not past a length
    const float* weight_ih;    // (4 * hidden, features) that lstm_forward packs itself where packed_ih is null
    const float* weight_hh;    // the same of packed
};

namespace {

// Whether each step projects its own input beside the recurrent product: nothing of gates_input is then written and read
// back, but the input's weights are read at each step.
inline bool projects_in_step(int64_t batch, int64_t features, bool by_rows, int64_t threads) {
    const int64_t rows = by_rows ? batch / threads : batch;
    return rows >= ROWS && features <= 2 * rows;
}

// Whether the batch is one sequence, of which threads share out the units, and its projection is not done yet.
inline bool is_one_sequence(int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
    return batch == 1 && features >= 0 && hidden > 0 && (!by_rows || threads == 1);
}
// Whether no sequence ends early or begins anew, and nothing is kept for gradients.
inline bool are_whole(const Forward* a) { return !a->lengths && !a->resets && !a->gates && !a->cells; }
inline bool is_one_whole_sequence(const Forward* a, int64_t threads) {
    return is_one_sequence(a->batch, a->hidden, a->features, a->by_rows, threads) && are_whole(a);
}

// The state of one sequence before its first step and after its last, of `count` units from `first` on: c begins, h ends.
inline void begin_cells(const Forward* a, int64_t first, int64_t count) {
    if (count > 0 && !a->c0) std::memset(a->c_n + first, 0, 4 * count);
    else if (count > 0 && a->c0 != a->c_n) std::memcpy(a->c_n + first, a->c0 + first, 4 * count);
}
// `last` is null without steps and without h0. h_n may be the memory of h0, which is read in the first step alone.
inline void end_hidden(const Forward* a, const float* last, int64_t first, int64_t count) {
    if (count > 0 && !last) std::memset(a->h_n + first, 0, 4 * count);
    else if (count > 0 && last != a->h_n) std::memcpy(a->h_n + first, last + first, 4 * count);
}

// Pieces of at most so many rows, as equal as can be: 32 by 6 are 6 + 6 + 5 + 5 + 5 + 5, and no last one of 2.
class Pieces {
    int64_t least, larger;

public:
    Pieces(int64_t rows, int64_t at_once) {
        const int64_t count = rows <= at_once ? 1 : (rows + at_once - 1) / at_once;
        least = rows / count;
        larger = rows - least * count;
    }
    int operator[](int64_t i) const { return static_cast<int>(least + (i < larger)); }
};

// Rows that are projected together, by all blocks of a thread, while they and what comes of them stay in a near cache;
// more where the weights do not stay in one either.
constexpr int64_t PANEL = 48, TALL_PANEL = 192;

// Rows that a matrix multiplies at once, for which variables have room.
template <typename M>
constexpr int most_rows = M::AT_ONCE < ROWS ? ROWS : M::AT_ONCE;

// Adds the products of some rows with the weights of a block, and asks for those of the `next` one, if any.
template <typename M>
inline void add(const M& matrix, int rows, vec (&sums)[most_rows<M>][4], const typename M::Row (&from)[most_rows<M>],
                int64_t block, int64_t piece, int64_t depth, int64_t next) {
    if constexpr (ASKS_AHEAD && std::is_same_v<M, Widened<float>>)
        if (next >= 0 && piece < PIECES_AHEAD)
            return matrix.add_asking(rows, sums, from, block, ahead_of(matrix.groups_of(next), piece, depth));
#if defined(HAS_SUMS)
    if constexpr (std::is_same_v<M, Summed>)
        if (next >= 0 && piece < PIECES_AHEAD) return matrix.add(rows, sums, from, block, ahead_of(matrix.groups_of(next), piece, depth));
#endif
    matrix.add(rows, sums, from, block);
}

// Sums of these rows: a variable of the caller's, or memory of the thread where they are too many for a small stack.
template <typename M>
constexpr int rows_on_stack = sizeof(vec[most_rows<M>][4]) <= 1536 ? most_rows<M> : 1;
template <typename M>
auto& sums_of(vec (&own)[rows_on_stack<M>][4]) {
    if constexpr (rows_on_stack<M> == most_rows<M>) {
        return own;
    } else {
        alignas(64) static thread_local vec kept[most_rows<M>][4];
        return kept;
    }
}

// Rows of a step that one thread converts, up to what is multiplied at once.
template <typename W>
int64_t converted_rows(int64_t batch, bool by_rows, int64_t threads) {
    const int64_t rows = by_rows ? (batch + threads - 1) / threads : batch, whole = W::Recurrent::AT_ONCE;
    return W::Recurrent::PREPARES && whole > ROWS ? (rows + whole - 1) / whole * whole : rows;
}

// Bytes of memory of a team beside the tensors: of all threads together, and of each.
struct Room {
    int64_t shared, own;
    int64_t of(int64_t threads) const { return shared + threads * own; }
};

// The same where rows are converted for a matrix: those of a step, and a panel.
template <typename W>
Room vector_room(int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
    const int64_t input = features >= 0 ? W::Input::row_bytes(features) : 0;
    const int64_t rows = converted_rows<W>(batch, by_rows, threads);
    return {0, rounded(rows * (W::Recurrent::row_bytes(hidden) + input) + PANEL * input)};
}

// gates_input of `count` of a thread's places from a cursor on, in its blocks of hidden units: x times weight_ih and
// biases. `room` is for a panel of converted rows.
template <typename M>
inline void project(const Forward* a, const M& input, Cursor place, int64_t count, Share own, int64_t start, char* room) {
    const int64_t hidden = a->hidden;
    constexpr int64_t TALLEST = M::PREPARES ? PANEL : TALL_PANEL;
    const int64_t most = M::size(hidden, a->features) <= NEAR ? PANEL : TALLEST;
    typename M::Row panel[TALLEST];
    float* to[TALLEST];
    const Pieces panels(count, most);
    for (int64_t done = 0, which = 0; done < count; done += panels[which], ++which) {
        const int64_t height = panels[which];
        for (int64_t r = 0; r < height; ++r, place.advance(1)) {
            panel[r] = input.prepare(a->x + place.t * a->x_step + place.b() * a->x_row,
                                     room + r * M::row_bytes(a->features));
            to[r] = a->gates_input + (place.t - start) * a->gi_step + place.b() * a->gi_row;
        }
        const Pieces pieces(height, M::AT_ONCE);
        vec own_sums[rows_on_stack<M>][4];
        auto& sums = sums_of<M>(own_sums);
        for (int64_t block = own.first; block < own.end; ++block) {
            const int64_t unit = block * LANES;
            const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
            const int64_t next = M::size(hidden, a->features) > NEAR && block + 1 < own.end ? block + 1 : -1;
            vec plus[4];
            for (int gate = 0; gate < 4; ++gate) {
                const int64_t at = gate * hidden + unit;
                plus[gate] = a->bias_ih ? load(a->bias_ih + at, n) + load(a->bias_hh + at, n) : vec{};
            }
            for (int64_t piece = 0, row = 0; row < height; row += pieces[piece], ++piece) {
                const int rows = pieces[piece];
                typename M::Row from[most_rows<M>];
                for (int r = 0; r < rows; ++r) {
                    from[r] = panel[row + r];
                    for (int gate = 0; gate < 4; ++gate) {
                        sums[r][gate] = vec{};
                        __builtin_prefetch(to[row + r] + unit + gate * hidden, 1);
                    }
                }
                add(input, rows, sums, from, block, piece, a->features, next);
                // Where a vector is full, its length is known as this is compiled: a question less at each load and store.
                const auto keep = [&](auto n) {
                    for (int r = 0; r < rows; ++r)
                        for (int gate = 0; gate < 4; ++gate)
                            store(to[row + r] + unit + gate * hidden, sums[r][gate] + plus[gate], n);
                };
                if (n == LANES) keep(std::integral_constant<int, LANES>()); else keep(n);
            }
        }
    }
}

// A row as a matrix takes it: where it was converted to, or where it lies.
template <typename M>
typename M::Row prepared(const float* from, const char* converted) {
    if constexpr (M::PREPARES) return reinterpret_cast<typename M::Row>(converted);
    else return from;
}

// One direction of a layer, in each thread of a team: `blocks` of hidden units or rows of the batch are shared out.
// `room` is the thread's own.
template <typename W>
void vector_walk(const Forward* a, const Lengths& lengths, Barrier& barrier, char* room, int thread, int threads) {
    using Input = typename W::Input;
    using Recurrent = typename W::Recurrent;
    const Input input(a->packed_ih, a->scale_ih, a->hidden, a->features);
    const Recurrent recurrent(a->packed, a->scale, a->hidden, a->hidden);
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
    Rows mine(lengths, a->batch, a->by_rows, thread, threads);
    const Share own = share(blocks, !a->by_rows, thread, threads);
    const int64_t first = own.first * LANES;  // hidden units of this thread
    const int64_t last = own.end * LANES < hidden ? own.end * LANES : hidden;
    float* after = a->scratch;  // where this step's h goes
    float* spare = a->scratch + a->batch * hidden;
    const float* before = a->h0 && !a->resets ? a->h0 : spare;
    for (int64_t i = 0; i < mine.count && first < last; ++i) {
        const int64_t at = mine[i] * hidden + first, bytes = 4 * (last - first);
        if (!a->h0) std::memset(spare + at, 0, bytes);
        else if (a->resets) std::memcpy(spare + at, a->h0 + at, bytes);
        if (!a->c0) std::memset(a->c_n + at, 0, bytes);
        else if (a->c0 != a->c_n) std::memcpy(a->c_n + at, a->c0 + at, bytes);
    }
    // Own units of the state that step s starts from become zero where it resets a row. Before the meeting of all, so that
    // none reads them meanwhile.
    const auto reset = [&](int64_t s, float* h) {
        const int64_t t = a->reverse ? a->steps - 1 - s : s, running = mine.at_step(t);
        for (int64_t i = 0; i < running && first < last; ++i)
            if (a->resets[t * a->batch + mine[i]]) {
                std::memset(h + mine[i] * hidden + first, 0, 4 * (last - first));
                std::memset(a->c_n + mine[i] * hidden + first, 0, 4 * (last - first));
            }
    };
    if (a->resets && a->steps) {
        reset(0, spare);
        if (!a->by_rows) barrier.wait(thread, threads);
    }
    const bool given = a->features >= 0;
    const bool in_step = given && projects_in_step(a->batch, a->features, a->by_rows, threads);
    const bool before_steps = given && !in_step;
    const bool far = Recurrent::size((own.end - own.first) * LANES, hidden) > NEAR;
    const int64_t state_bytes = Recurrent::row_bytes(hidden);
    const int64_t input_bytes = a->features >= 0 ? Input::row_bytes(a->features) : 0;
    const int64_t converted = converted_rows<W>(a->batch, a->by_rows, threads);
    char* const states_room = room;
    char* const inputs_room = states_room + converted * state_bytes;
    char* const panel_room = inputs_room + converted * input_bytes;
    vec own_sums[rows_on_stack<Recurrent>][4];
    auto& sums = sums_of<Recurrent>(own_sums);
    Recurrent::begin(a->batch * a->steps);
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
            project(a, input, place, part.end - part.first, shared ? Share{0, blocks} : own, start, panel_room);
            if (shared) barrier.wait(thread, threads);
        }
        const int64_t running = mine.at_step(t);
        const bool recurs = s || a->h0;
        const auto input_row = [=](int64_t b) { return a->x + t * a->x_step + b * a->x_row; };
        if constexpr (Recurrent::PREPARES)
            for (int64_t i = 0; i < running && own.first < own.end; ++i) {
                const int64_t b = mine[i];
                if (in_step) input.prepare(input_row(b), inputs_room + i * input_bytes);
                if (recurs) recurrent.prepare(before + b * hidden, states_room + i * state_bytes);
            }
        const Pieces pieces(running, in_step ? std::min(Input::AT_ONCE, Recurrent::AT_ONCE) : Recurrent::AT_ONCE);
        for (int64_t i = own.first; i < own.end; ++i) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? own.end - 1 - (i - own.first) : i;
            const int64_t unit = block * LANES;
            const bool half = half_a_vector(hidden, block);
            const int64_t next = far && !half && i + 1 < own.end ? block + (s % 2 ? -1 : 1) : -1;
            const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
            vec plus[4] = {};
            for (int gate = 0; in_step && a->bias_ih && gate < 4; ++gate)
                plus[gate] = load(a->bias_ih + gate * hidden + unit, n) + load(a->bias_hh + gate * hidden + unit, n);
            for (int gate = 0; half && gate < 4; ++gate) plus[gate] = joined(plus[gate], plus[gate]);
            for (int64_t piece = 0, row = 0; row < running; row += pieces[piece], ++piece) {
                const int rows = pieces[piece];
                typename Input::Row inputs[most_rows<Input>];
                typename Recurrent::Row states[most_rows<Recurrent>];
                for (int r = 0; r < rows; ++r) {
                    const int64_t b = mine[row + r];
                    if (in_step) inputs[r] = prepared<Input>(input_row(b), inputs_room + (row + r) * input_bytes);
                    states[r] = prepared<Recurrent>(before + b * hidden, states_room + (row + r) * state_bytes);
                    for (int gate = 0; gate < 4; ++gate) sums[r][gate] = vec{};
                }
                // What comes after the product has by then arrived in the nearest cache: gates to add, and lines to write.
                for (int r = 0; r < rows; ++r) {
                    const int64_t b = mine[row + r];
                    const float* in = in_step ? nullptr : a->gates_input + (t - start) * a->gi_step + b * a->gi_row + unit;
                    for (int gate = 0; !in_step && gate < 4; ++gate) __builtin_prefetch(in + gate * hidden);
                    __builtin_prefetch(a->output + t * a->out_step + b * a->out_row + unit, 1);
                }
                if (in_step) input.add(rows, sums, inputs, block);
                if (recurs) add(recurrent, rows, sums, states, block, piece, hidden, next);
                // Few units leave room in a vector for a second row.
                const auto cells = [&](auto two, auto n) {
                    constexpr int AT_ONCE = decltype(two)::value ? 2 : 1;
                    for (int r = 0; r < rows; r += AT_ONCE) {
                        const int second = r + AT_ONCE <= rows ? r + AT_ONCE - 1 : r;
                        const int64_t b = mine[row + r], other = mine[row + second];
                        const auto get = [=](const float* p, int64_t each) {
                            const vec x = load(p + b * each, n);
                            return AT_ONCE == 1 ? x : joined(x, load(p + other * each, n));
                        };
                        const auto put = [=](float* p, int64_t each, vec x) {
                            store(p + b * each, x, n);
                            if (AT_ONCE == 2) store(p + other * each, upper_half(x), n);
                        };
                        vec c = get(a->c_n + unit, hidden);
                        const float* in = in_step ? nullptr : a->gates_input + (t - start) * a->gi_step + unit;
                        for (int gate = 0; gate < 4; ++gate) {
                            if (AT_ONCE == 2) sums[r][gate] = joined(sums[r][gate], sums[second][gate]);
                            sums[r][gate] += in_step ? plus[gate] : get(in + gate * hidden, a->gi_row);
                        }
                        float* const output = a->output + t * a->out_step + unit;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
                        if (Recurrent::THREE_DIVISIONS && !a->gates) {
                            __m512 state = (__m512)c;
                            const vec value = (vec)cell_of((__m512)sums[r][0], (__m512)sums[r][1], (__m512)sums[r][2], (__m512)sums[r][3], state);
                            put(a->c_n + unit, hidden, (vec)state);
                            put(after + unit, hidden, value);
                            put(output, a->out_row, value);
                            continue;
                        }
#endif
                        const vec i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]);
                        const vec g = tanh_of(sums[r][2]), o = sigmoid(sums[r][3]);
                        c = f * c + i * g;
                        const vec h = o * tanh_of(c);
                        put(a->c_n + unit, hidden, c);
                        put(after + unit, hidden, h);
                        put(output, a->out_row, h);
                        if (a->gates) {
                            float* const kept = a->gates + t * a->gates_step + unit;
                            put(kept, a->gates_row, i);
                            put(kept + hidden, a->gates_row, f);
                            put(kept + 2 * hidden, a->gates_row, g);
                            put(kept + 3 * hidden, a->gates_row, o);
                        }
                        if (a->cells) put(a->cells + t * a->cells_step + unit, a->cells_row, c);
                    }
                };
                if (half) cells(std::true_type(), n);
                else if (n == LANES) cells(std::false_type(), std::integral_constant<int, LANES>());
                else cells(std::false_type(), n);
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
        if (a->resets && s + 1 < a->steps) reset(s + 1, after);
        // One meeting a step is enough: nobody reads `before` any more once all have left it.
        if (!a->by_rows) barrier.wait(thread, threads);
        before = after;
        after = spare;
        spare = const_cast<float*>(before);
    }
    Recurrent::end(a->batch * a->steps);
    // h_n may be the memory of h0, which is read in the first step alone.
    for (int64_t i = 0; i < mine.count && first < last; ++i)
        std::memcpy(a->h_n + mine[i] * hidden + first, before + mine[i] * hidden + first, 4 * (last - first));
}

}  // namespace
