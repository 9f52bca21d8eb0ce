// One LSTM layer's recurrence on a CPU, forward and backward, in float32: the whole time loop in one team of threads.
// Weights may be kept in bfloat16 or, a scale per row, in int8, where reading them is what takes the time.
//
// Weights come packed so that a block of hidden units reads one stream. Where the batch is large enough each thread
// walks through time with its own rows and nobody waits for anybody; else threads share out the hidden units and meet
// once a step.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "backward.h"
#include "marks.h"
#include "pair_back.h"
#include "status.h"
#include "tile_gradients.h"
#include "walk.h"
#include "weights.h"

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

// What a caller of lstm_layers hands over, eight bytes each.
struct LayersCall {
    const Layers* layers;
    int64_t batch, steps, batch_first, threads, by_rows;
    int64_t look;              // at the weights: 0, not at all; 1, by samples of large ones; 2, by all values
    const void *x, *h0, *c0;   // h0, c0, lengths and resets may be null
    const int32_t* lengths;
    const uint8_t* resets;     // (directions, steps, batch)
    void *output, *h_n, *c_n;
    int64_t halves;            // what is bf16, of `Halves`; all else is float32
};

// X, H0 and C0 are widened for the walk, RESULTS are rounded after it.
enum Halves : int64_t { HALF_X = 1, HALF_H0 = 2, HALF_C0 = 4, HALF_RESULTS = 8 };

namespace {

// Weights up to this many are always looked at in full, which takes two microseconds.
constexpr int64_t SMALL = 1 << 16;

bool unchanged(const Source& source, bool whole) {
    if (whole || source.count <= SMALL) return mark_each(source.values, source.count) == source.all;
    return mark_some(source.values, source.count) == source.sampled;
}

bool overlap(const float* a, int64_t a_count, const float* b, int64_t b_count) {
    const std::less<const float*> before;
    return before(a, b + b_count) && before(b, a + a_count);
}

// Weights as a caller packed them; else packed here, where a caller gave them as they are.
class Weights {
    const Memory<char> own;

public:
    const void* const at;
    template <typename F>
    Weights(const void* packed, const float* weight, int64_t bytes, F pack)
        : own(packed || !weight ? 0 : bytes, "packed weights"), at(packed ? packed : own.data()) {
        if (own.data()) pack(weight, own.data());
    }
};

// Calls `use` with the way back through time of weights kept so.
template <typename F>
int64_t with_way_back(int64_t kept, F use) {
#if defined(HAS_PAIRS)
    if constexpr (in_part(BF16_TRAINED))
        if (kept == BF16_TRAINED) return use(PairsBack());
#endif
    if constexpr (in_part(FP32))
        if (kept == FP32) return use(FloatsBack());
    throw std::invalid_argument("weights kept so have no gradients");
}

// What one thread widens or rounds of an array; nothing where there is no array of bf16.
void widen(const void* from, float* to, int64_t count, int thread, int threads) {
    if (from == to) return;
    const Share own = share(count, true, thread, threads);
    for (int64_t i = own.first; i < own.end; ++i) to[i] = from_bfloat16(static_cast<const uint16_t*>(from)[i]);
}

void narrow(const float* from, void* to, int64_t count, int thread, int threads) {
    const Share own = share(count, true, thread, threads);
    for (int64_t i = own.first; i < own.end; ++i) static_cast<uint16_t*>(to)[i] = to_bfloat16(from[i]);
}

// Numbers of gates_input, at most, in a pass that keeps no gates: so many steps are projected at a time, at least one.
#if !defined(PROJECTED)
#define PROJECTED (1 << 21)
#endif

}  // namespace

extern "C" {

int64_t lanes() { return LANES; }

int64_t cores() { return usable_cores(); }

uint64_t mark(const float* values, int64_t count) { return mark_some(values, count); }

uint64_t mark_all(const float* values, int64_t count) { return mark_each(values, count); }

// Why the last call in this thread that returned a negative status failed.
const char* failure() { return said; }

// Instructions that multiply weights kept so, in walks forward of so many units and rows a thread.
const char* instructions(int64_t kept, int64_t hidden, int64_t rows) { return instructions_for(kept, hidden, rows); }

// Rows of a thread from which on float32 is multiplied by sums; beyond all numbers of rows where it never is.
int64_t sums_from(int64_t hidden) { return sums_from_rows(hidden); }

// Why weights cannot be kept so in this process, or an empty text.
const char* hindrance(int64_t kept) { return hinders(kept); }

// Asks the system for large pages of memory that begins at one and was not written yet; without them it serves as well.
void in_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    madvise(memory, bytes, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Bytes of packed weights (4H, depth).
int64_t packed_bytes(int64_t hidden, int64_t depth, int64_t kept) {
    return guarded([=] { return forward_bytes(hidden, depth, kept); });
}

int64_t pack_forward(const float* weight, void* packed, float* scale, int64_t hidden, int64_t depth, int64_t kept) {
    return guarded([=] {
        packed_forward(weight, packed, scale, hidden, depth, kept);
        return DONE;
    });
}

// Numbers of the packed weights (outputs, depth) of a linear layer.
int64_t linear_numbers(int64_t outputs, int64_t depth) { return linear_size(outputs, depth); }

int64_t pack_linear(const float* weight, float* packed, int64_t outputs, int64_t depth) {
    return guarded([=] {
        pack_linear_rows(weight, packed, outputs, depth);
        return DONE;
    });
}

// The same of the weights by which a backward pass multiplies gradients of gates.
int64_t packed_backward_bytes(int64_t hidden, int64_t depth, int64_t kept) { return backward_bytes(hidden, depth, kept); }

int64_t pack_backward(const float* weight, void* packed, int64_t hidden, int64_t depth, int64_t kept) {
    return guarded([=] {
        packed_backward(weight, packed, hidden, depth, kept);
        return DONE;
    });
}

int64_t lstm_forward(const Forward* given, int64_t kept) {
    return guarded([=] {
        Forward own = *given;
        const Forward* const a = &own;
        const bool has_states = a->scratch || trains_by_pairs(kept);
        const Memory<float> states(has_states ? 0 : 2 * a->batch * a->hidden, "the states");
        if (!a->scratch) own.scratch = states.data();
        const auto pack = [=](int64_t depth) {
            return [=](const float* weight, void* to) { packed_forward(weight, to, nullptr, a->hidden, depth, kept); };
        };
        if (in_bytes(kept) && (a->weight_ih || a->weight_hh)) throw std::invalid_argument("weights kept so come packed");
        const Weights input(a->packed_ih, a->weight_ih, a->weight_ih ? forward_bytes(a->hidden, a->features, kept) : 0, pack(a->features));
        const Weights recurrent(a->packed, a->weight_hh, forward_bytes(a->hidden, a->hidden, kept), pack(a->hidden));
        own.packed_ih = input.at;
        own.packed = recurrent.at;
        const Lengths lengths(a->lengths, a->batch);
        const auto room = [=](int64_t threads) {
            return room_of(kept, a->batch, a->steps, a->hidden, a->features, a->by_rows, threads);
        };
        // A record of nothing has no memory, but without steps the final state would still be that before the first.
        if (trains_by_pairs(kept) && ((!a->gates && a->batch * a->hidden) || a->features < 0))
            throw std::invalid_argument("bf16 with gradients keeps gates and projects x, of one step at least");
        if (a->gates && kept != FP32 && kept != BF16_TRAINED) throw std::invalid_argument("weights kept so keep no gates for gradients");
        const Memory<char> memory(room_bytes(kept, a->batch, a->steps, a->hidden, a->features, a->features, a->by_rows, a->threads),
                                  "converted rows");
        Barrier barrier(a->threads);
        team(a->threads, [=, &lengths, &barrier, &memory](int thread, int threads) {
            walk(a, kept, lengths, barrier, memory.data(), room(threads), thread, threads);
        });
        return DONE;
    });
}

// All layers of a module in one team of threads, nothing kept for gradients. h_n and c_n may be the memory of h0 and c0.
// Where weights no longer have the values that were packed, or x lies in memory that is written or nowhere, it does
// nothing and returns CHANGED.
int64_t lstm_layers(const LayersCall* call) {
    return guarded([=]() -> int64_t {
        const Layers* const a = call->layers;
        const int64_t batch = call->batch, steps = call->steps, batch_first = call->batch_first;
        const int64_t threads = call->threads, by_rows = call->by_rows, look = call->look;
        const int32_t* const lengths = call->lengths;
        const uint8_t* const resets = call->resets;
        for (int64_t i = 0; look && i < 2 * a->layers * a->directions; ++i)
            if (!unchanged(a->sources[i], look == 2)) return CHANGED;
        const int64_t hidden = a->hidden, size = batch * hidden, width = a->directions * hidden;
        const int64_t input = batch * steps * a->features, state = a->layers * a->directions * size;
        if ((input && !call->x) || (state && (!call->h_n || !call->c_n))) return CHANGED;
        // What the caller has in bf16 lies in memory of this call in float32.
        const int64_t halves = call->halves, result = steps * batch * width;
        const auto counted = [=](int64_t which, int64_t count) { return halves & which ? rounded(count) : 0; };
        const Memory<float> widened(counted(HALF_X, input) + counted(HALF_H0, state) + counted(HALF_C0, state) +
                                    counted(HALF_RESULTS, result) + 2 * counted(HALF_RESULTS, state), "numbers of bf16 in float32");
        float* next = widened.data();
        const auto in_floats = [=, &next](const void* given, int64_t which, int64_t count) {
            float* const place = halves & which && given ? next : static_cast<float*>(const_cast<void*>(given));
            next += counted(which, count);
            return place;
        };
        float *const x = in_floats(call->x, HALF_X, input), *const h0 = in_floats(call->h0, HALF_H0, state);
        float *const c0 = in_floats(call->c0, HALF_C0, state), *const output = in_floats(call->output, HALF_RESULTS, result);
        float *const h_n = in_floats(call->h_n, HALF_RESULTS, state), *const c_n = in_floats(call->c_n, HALF_RESULTS, state);
        if (overlap(x, input, h_n, state) || overlap(x, input, c_n, state)) return CHANGED;
        // gates_input, h of two steps, and two layers' outputs, one of which the next reads.
        const int64_t widest = a->layers > 1 && width > a->features ? width : a->features;
        const bool needed = needs_gates_input(a->kept, batch, hidden, widest, by_rows, threads, !lengths && !resets);
        const int64_t at_once = std::min(steps, std::max<int64_t>(1, PROJECTED / std::max<int64_t>(1, 4 * size)));
        const int64_t gates_size = !needed ? 0 : rounded(4 * at_once * size), states = rounded(size);
        const int64_t outputs = rounded(steps * batch * width), kept = std::min<int64_t>(a->layers - 1, 2);
        const Memory<float> memory(gates_size + 2 * states + kept * outputs, "the states and the output of inner layers");
        float* const gates_input = memory.data();
        float* const scratch = gates_input + gates_size;
        float* const between = scratch + 2 * states;
        const int64_t inner = a->layers > 1 ? width : a->features;
        const Memory<char> converted(room_bytes(a->kept, batch, steps, hidden, a->features, inner, by_rows, threads), "converted rows");
        const Lengths order(lengths, batch);
        Barrier barrier(threads);
        team(threads, [=, &order, &barrier, &converted](int thread, int members) {
            if (halves & (HALF_X | HALF_H0 | HALF_C0)) {
                widen(call->x, x, input, thread, members);
                widen(call->h0, h0, state, thread, members);
                widen(call->c0, c0, state, thread, members);
                barrier.wait(thread, members);
            }
            const float* from = x;
            const Room room = room_of(a->kept, batch, steps, hidden, a->features, inner, by_rows, members);
            for (int64_t layer = 0; layer < a->layers; ++layer) {
                float* to = layer + 1 == a->layers ? output : between + layer % 2 * outputs;
                for (int64_t d = 0; d < a->directions; ++d) {
                    const int64_t i = layer * a->directions + d, features = layer ? width : a->features;
                    const Direction& own = a->weights[i];
                    const auto step = [=](int64_t numbers) { return batch_first ? numbers : batch * numbers; };
                    const auto row = [=](int64_t numbers, int64_t of) { return batch_first ? of * numbers : numbers; };
                    const Forward direction = {
                        batch, steps, hidden, d, members, by_rows,
                        gates_input, step(4 * hidden), row(4 * hidden, at_once), at_once,
                        from, step(features), row(features, steps), features,
                        own.packed_ih, own.bias_ih, own.bias_hh, own.packed, own.scale_ih, own.scale,
                        h0 ? h0 + i * size : nullptr, c0 ? c0 + i * size : nullptr, lengths,
                        result ? to + d * hidden : to, step(width), row(width, steps), h_n + i * size, c_n + i * size,
                        nullptr, 0, 0, nullptr, 0, 0, scratch, resets ? resets + d * steps * batch : nullptr};
                    walk(&direction, a->kept, order, barrier, converted.data(), room, thread, members);
                }
                from = to;
            }
            if (halves & HALF_RESULTS) {
                barrier.wait(thread, members);
                narrow(output, call->output, result, thread, members);
                narrow(h_n, call->h_n, state, thread, members);
                narrow(c_n, call->c_n, state, thread, members);
            }
        });
        return DONE;
    });
}

// Whether lstm_backward needs no memory for the gradients of the gates.
int64_t backward_by_tiles(int64_t kept) { return trains_by_tiles(kept); }

// Whether output, h_n, c_n and the gradient of the output are bf16.
int64_t results_rounded(int64_t kept) { return trains_by_pairs(kept); }

// Numbers that lstm_forward keeps of a direction for lstm_backward in the memory of the gates. Where weights are kept in
// float32 these are the gates, and after them the cells.
int64_t numbers_kept(int64_t batch, int64_t steps, int64_t hidden, int64_t kept) {
#if defined(HAS_TILES)
    if (trains_by_tiles(kept)) return WalkRecord::numbers(batch, steps, hidden);
#endif
#if defined(HAS_PAIRS)
    if (trains_by_pairs(kept)) return PairRecord::numbers(batch, steps, hidden);
#endif
    return 5 * batch * steps * hidden;
}

int64_t lstm_backward(const Backward* given, int64_t kept) {
    return guarded([=]() -> int64_t {
        Backward own = *given;
        const Backward* const a = &own;
        const int64_t size = rounded(a->batch * a->hidden), bytes = 4 * a->batch * a->hidden;
        const Memory<float> states(a->grad_h0 ? 0 : 2 * size, "the gradients of the states");
        if (!a->grad_h0) own.grad_h0 = states.data(), own.grad_c0 = states.data() + size;
        const auto pack = [=](int64_t depth) {
            return [=](const float* weight, void* to) { packed_backward(weight, to, a->hidden, depth, kept); };
        };
        const Weights input(a->packed_ih, a->weight_ih, backward_bytes(a->hidden, a->features, kept), pack(a->features));
        const Weights recurrent(a->packed, a->weight_hh, backward_bytes(a->hidden, a->hidden, kept), pack(a->hidden));
        own.packed_ih = input.at;
        own.packed = recurrent.at;
        const bool weights = a->grad_ih || a->grad_hh || a->grad_bias;
        const Lengths lengths(a->lengths, a->batch);
        const bool by_tiles = trains_by_tiles(kept);
        const Listed listed(lengths, weights && !by_tiles ? a->batch : 0, a->steps, a->gg_row > a->gg_step);
        Barrier barrier(a->threads);
        if (bytes && a->grad_h_n) std::memcpy(a->grad_h0, a->grad_h_n, bytes);
        else if (bytes) std::memset(a->grad_h0, 0, bytes);
        if (bytes && a->grad_c_n) std::memcpy(a->grad_c0, a->grad_c_n, bytes);
        else if (bytes) std::memset(a->grad_c0, 0, bytes);
        const auto done = [=] {
            if (a->grad_bias_hh) std::memcpy(a->grad_bias_hh, a->grad_bias, 16 * a->hidden);
            return DONE;
        };
#if defined(HAS_PAIRS)
        const int64_t rounded_state = trains_by_pairs(kept) && a->h0 ? a->batch * a->hidden : 0;
        const Memory<uint16_t> state(rounded_state, "h0 in bf16");
        for (int64_t i = 0; i < rounded_state; ++i) state[i] = to_bfloat16(static_cast<const float*>(given->h0)[i]);
        if (rounded_state) own.h0 = state.data();
#endif
        const auto run = [&](auto way) {
            using W = decltype(way);
            const int64_t each = weights ? W::room(a, listed.count) : 0;
            const Memory<char> room(each * a->weight_threads, "the gradients of the weights");
            team(a->threads, [=, &lengths, &barrier](int thread, int threads) {
                W::walk(a, lengths, barrier, thread, threads);
            });
            if (weights || a->grad_x)
                team(a->weight_threads, [=, &listed, &room](int thread, int threads) {
                    if (weights) W::weight_gradients(StepRows<typename W::Output>(a, listed), room.data() + thread * each, thread, threads);
                    if constexpr (!std::is_same_v<W, FloatsBack>)
                        if (a->grad_x) W::input_gradient(a, thread, threads);
                });
            return done();
        };
#if defined(HAS_TILES)
        if (in_part(BF16_TRAINED) && by_tiles) {
            const StepOrder order(a, lengths);
            const GateGradients gradients(order.count(), a->hidden);
            const Memory<char> walks(BackPlan::bytes(a), "the gradients of the states");
            team(a->threads, [=, &lengths, &order, &gradients, &barrier, &walks](int thread, int threads) {
                const BackPlan plan(a->batch, a->hidden, a->by_rows, threads);
                char* const room = walks.data() + plan.shared + thread * plan.own;
                TileWalkBack(a, lengths, order, gradients, barrier, walks.data(), room, thread, threads).run();
            });
            const int64_t each = TileGradients::room(a, order.count());
            const Memory<char> room(each * a->weight_threads, "the gradients of the weights");
            if (weights || a->grad_x)
                team(a->weight_threads, [=, &lengths, &order, &gradients, &listed, &room](int thread, int threads) {
                    TileGradients(a, lengths, order, gradients, listed, room.data() + thread * each, thread, threads).run();
                });
            return done();
        }
#endif
        if (a->grad_x && kept == FP32) throw std::invalid_argument("the gradient of x is had in bf16 alone");
        return with_way_back(kept, run);
    });
}

}  // extern "C"
