// The walk of one direction of a layer forward through time for one sequence without AVX-512, where the cell of a block of
// units is computed beside the first products of the next.
//
// A cell is a long chain of instructions that wait for each other, longer than the processor looks ahead, so products that
// merely follow it would wait too. Sixteen registers leave none for projecting later steps beside these, as `interleaved.h`
// does: a loop over both has few sums for its loads, which then take the time. So the input is projected before the steps.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "forward.h"
#include "matrices.h"
#include "paired_bytes.h"
#include "strips.h"
#include "team.h"
#include "vectors.h"

namespace {

// Whether one sequence has this walk where weights are kept so.
template <typename M>
constexpr bool OVERLAPPED = false;
#if defined(HAS_STRIPS)
template <>
constexpr bool OVERLAPPED<Strips> = true;
#endif
#if defined(HAS_BYTES) || defined(HAS_PAIRED_BYTES)
template <>
constexpr bool OVERLAPPED<StateInBytes> = LANES == 8;
#endif
template <typename W>
constexpr bool OVERLAPS = OVERLAPPED<typename W::Recurrent>;

template <typename W>
class OverlappedWalk {
    using Input = typename W::Input;
    using Recurrent = typename W::Recurrent;
    using Sum = typename Recurrent::Sum;
    static constexpr int64_t GATES = 4 * LANES;        // numbers of four gates
    static constexpr int64_t GROUP = Recurrent::GROUP;  // bytes from a group's weights to the next one's
    static constexpr int64_t AHEAD = 64;              // steps that are projected together
    // Groups of k that are multiplied each time that a cell is interrupted: a group is one k of float32 or four.
    static constexpr int EACH = std::is_same_v<Sum, vec> ? 2 : 1;

    const Forward* a;
    Barrier& barrier;
    const int thread, threads;
    const Input input;
    const Recurrent recurrent;
    const Share own;         // blocks of this thread
    char* const state_room;
    char* const input_room;
    float* const projected;  // [step % AHEAD][block][gate][lane]

    static int64_t blocks(int64_t hidden) { return (hidden + LANES - 1) / LANES; }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int lanes(int64_t block) const { return static_cast<int>(std::min<int64_t>(LANES, a->hidden - block * LANES)); }
    float* projected_of(int64_t s, int64_t block) const {
        return projected + (s % AHEAD * (own.end - own.first) + block - own.first) * GATES;
    }

    // Projects the input from a step on; the last steps may be fewer.
    void project(int64_t s) const {
        const int64_t count = std::min(AHEAD, a->steps - s);
        typename Input::Row inputs[AHEAD];
        for (int64_t r = 0; r < count && own.first < own.end; ++r)
            inputs[r] = input.prepare(a->x + time(s + r) * a->x_step, input_room + r * Input::row_bytes(a->features));
        const Pieces pieces(count, Input::AT_ONCE);
        for (int64_t block = own.first; block < own.end; ++block) {
            const int n = lanes(block);
            vec bias[4] = {};
            for (int gate = 0; a->bias_ih && gate < 4; ++gate) {
                const int64_t at = gate * a->hidden + block * LANES;
                bias[gate] = load(a->bias_ih + at, n) + load(a->bias_hh + at, n);
            }
            for (int64_t piece = 0, row = 0; row < count; row += pieces[piece], ++piece) {
                const int rows = pieces[piece];
                typename Input::Row from[most_rows<Input>];
                vec gates[most_rows<Input>][4];
                for (int r = 0; r < rows; ++r) {
                    from[r] = inputs[row + r];
                    for (int gate = 0; gate < 4; ++gate) gates[r][gate] = bias[gate];
                }
                input.add(rows, gates, from, block);
                for (int r = 0; r < rows; ++r)
                    for (int gate = 0; gate < 4; ++gate) store(projected_of(s + row + r, block) + gate * LANES, gates[r][gate]);
            }
        }
    }

    // Adds a group of k to the sums of a block.
    ALWAYS_INLINE void one(Sum (&sums)[4], const char* word, const char* weights) const {
        const auto x = Recurrent::word(word);
        const char* const halves[2] = {weights, weights + Recurrent::apart(a->hidden)};
        UNROLLED for (int gate = 0; gate < 4; ++gate)
            sums[gate] = Recurrent::dot(sums[gate], x, halves[gate / 2] + gate % 2 * 4 * LANES);
    }

    // Adds `count` groups, APART of them at a time to sums of their own, since four are too few to hide the latency of a sum.
    void multiply(Sum (&sums)[4], const char* word, const char* weights, int64_t count) const {
        constexpr int APART = Recurrent::APART;
        Sum own[APART][4] = {};
        UNROLLED for (int gate = 0; gate < 4; ++gate) own[0][gate] = sums[gate];
        if constexpr (APART > 1)
            for (; count >= APART; count -= APART, word += 4 * APART, weights += APART * GROUP)
                UNROLLED for (int at = 0; at < APART; ++at) one(own[at], word + 4 * at, weights + at * GROUP);
        for (; count > 0; --count, word += 4, weights += GROUP) one(own[0], word, weights);
        UNROLLED for (int gate = 0; gate < 4; ++gate) {
            sums[gate] = own[0][gate];
            UNROLLED for (int at = 1; at < APART; ++at) sums[gate] += own[at][gate];
        }
    }

    // The cell of a block whose product is done, and beside it the first of the next one's, if there is a `word`.
    void cell(const float* gates, int64_t block, float* after, float* output, Sum (&sums)[4], const char* word,
              const char* weights) const {
        const int64_t unit = block * LANES;
        const int n = lanes(block);
        vec c = load(a->c_n + unit, n), value;
        if (word) {
            Sum own_sums[4];
            UNROLLED for (int gate = 0; gate < 4; ++gate) own_sums[gate] = sums[gate];
            value = cell_between<Recurrent::THREE_DIVISIONS>(gates, c, [&] {
                UNROLLED for (int e = 0; e < EACH; ++e) one(own_sums, word + 4 * e, weights + e * GROUP);
                word += 4 * EACH;
                weights += EACH * GROUP;
            });
            UNROLLED for (int gate = 0; gate < 4; ++gate) sums[gate] = own_sums[gate];
        } else {
            value = cell_between<Recurrent::THREE_DIVISIONS>(gates, c, [] {});
        }
        store(a->c_n + unit, c, n);
        store(after + unit, value, n);
        store(output + unit, value, n);
    }

public:
    // Whether a matrix of so many units can be walked through so.
    static bool serves(int64_t) { return true; }

    // Of each thread: h of a step, the input of the steps ahead, and what is projected.
    static Room room(int64_t hidden, int64_t features, int64_t threads) {
        const int64_t projected = AHEAD * ((blocks(hidden) + threads - 1) / threads) * GATES * 4;
        return {0, Recurrent::row_bytes(hidden) + AHEAD * Input::row_bytes(features) + projected};
    }

    // `room` is the thread's own.
    OverlappedWalk(const Forward* a, Barrier& barrier, char* room, int thread, int threads)
        : a(a), barrier(barrier), thread(thread), threads(threads), input(a->packed_ih, a->scale_ih, a->hidden, a->features),
          recurrent(a->packed, a->scale, a->hidden, a->hidden), own(share(blocks(a->hidden), !a->by_rows, thread, threads)),
          state_room(room), input_room(state_room + Recurrent::row_bytes(a->hidden)),
          projected(reinterpret_cast<float*>(input_room + AHEAD * Input::row_bytes(a->features))) {}

    // In a function of its own, since the frames of all types together would be too large for a small stack.
    __attribute__((noinline)) void run() const {
        const int64_t hidden = a->hidden, count = own.end - own.first, groups = Recurrent::groups(hidden);
        const int64_t first = own.first * LANES, units = std::min(own.end * LANES, hidden) - first;
        begin_cells(a, first, units);
        const float* before = a->h0;
        float *after = a->scratch, *spare = a->scratch + hidden;
        for (int64_t s = 0; s < a->steps; ++s) {
            if (s % AHEAD == 0) project(s);
            float* const output = a->output + time(s) * a->out_step;
            typename Recurrent::Row state{};
            if (before && count > 0) state = recurrent.prepare(before, state_room);
            const char* const word = before && count > 0 ? recurrent.words(state, 0) : nullptr;
            const int64_t open = before && groups >= BETWEEN * EACH ? BETWEEN * EACH : 0;  // groups multiplied beside a cell
            alignas(64) float gates_of[GATES];
            Sum sums[1][4];
            for (int64_t i = 0, past = -1; i < count; ++i) {
                // Every other step goes the other way: what a cache that is too small still holds is wanted first.
                const int64_t block = s % 2 ? own.end - 1 - i : own.first + i;
                const char* const weights = recurrent.groups_of(block);
                if (before) recurrent.start(sums, block);
                if (past >= 0) cell(gates_of, past, after, output, sums[0], open ? word : nullptr, weights);
                const int64_t done = past >= 0 ? open : 0;
                past = block;
                if (before) multiply(sums[0], word + 4 * done, weights + done * GROUP, groups - done);
                vec gates[4];
                const float* const projection = projected_of(s, block);
                for (int gate = 0; gate < 4; ++gate) gates[gate] = load(projection + gate * LANES);
                if (before) recurrent.finish(gates, sums, state, block);
                for (int gate = 0; gate < 4; ++gate) store(gates_of + gate * LANES, gates[gate]);
            }
            if (count > 0) cell(gates_of, s % 2 ? own.first : own.end - 1, after, output, sums[0], nullptr, nullptr);
            if (!a->by_rows) barrier.wait(thread, threads);
            before = after;
            std::swap(after, spare);
        }
        end_hidden(a, before, first, units);
    }
};

}  // namespace
