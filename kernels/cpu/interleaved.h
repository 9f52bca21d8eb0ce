// The walk of one direction of a layer forward through time for one sequence: each step projects the input of later ones.
//
// A step reads all recurrent weights for one multiplication each: a line comes from the second-level cache in two
// cycles and is multiplied in one, so half of the multipliers' time is left over. The projection of the next few steps,
// whose weights are read once for all of them, takes that time. While one instruction of a cell waits for another, the
// first groups of the next block of units are multiplied. Where that does not pay (`beside_bytes`), many steps are
// projected before they come, float32 by sums.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "forward.h"
#include "matrices.h"
#include "processor.h"
#include "summed.h"
#include "team.h"
#include "vectors.h"

// Bytes of recurrent weights of a thread that stay in the first-level cache beside everything else.
#if !defined(NEAREST)
#define NEAREST (24 << 10)
#endif

// And bytes of them that the caches beyond the second level still bring as fast as steps and projection are multiplied.
#if !defined(FARTHEST)
#define FARTHEST (6 << 20)
#endif

namespace {

// Bytes of recurrent weights of a thread up to which steps project the input of later ones beside their own products. None on
// Intel's processors: the Xeon on which this was measured multiplies two lines a cycle, so little time is left over, and the
// input's weights take the place of recurrent ones in the second-level cache. Others of Intel's multiply one, and were not
// measured. A Zen 5 multiplies two as well, and gets lines from that cache in less than two cycles: it pays as long as both
// kinds of weights stay there. -DBESIDE=0 or 1 decides for all.
inline int64_t beside_bytes() {
#if defined(BESIDE)
    return BESIDE ? FARTHEST : 0;
#else
    static const int64_t found = is_intel() ? 0 : amd_family() >= 0x1a ? 640 << 10 : FARTHEST;
    return found;
#endif
}

template <typename W>
class InterleavedWalk {
    using Input = typename W::Input;
    using Recurrent = typename W::Recurrent;
    static constexpr int WORDS = Input::WORDS, GATES = 4 * LANES;
    static constexpr int AHEAD = WORDS == 1 ? 5 : 3;  // steps: with their sums and those of one more registers are full
    static constexpr int64_t SUMS = AHEAD * WORDS * GATES * 4;  // bytes
    static constexpr int64_t TOGETHER = 60;           // steps that are projected together where none is beside a step
    static constexpr int64_t FEW = 2;                 // steps of a call of which each projects its own input
#if defined(HAS_SUMS)
    static constexpr bool SUMMED = std::is_same_v<Input, Widened<float>>;  // what is projected together
#else
    static constexpr bool SUMMED = false;
#endif

    const Forward* a;
    Barrier& barrier;
    const int thread, threads;
    const Input input;
    const Recurrent recurrent;
    const int64_t groups, part;  // of the input, in all and beside a block of the step
    const Share own;             // blocks of this thread
    const bool beside;           // whether steps project the input of later ones beside their own products
    const int64_t kept;          // steps whose projection is kept
    char* const state_room;
    char* const input_room;
    typename Input::Sum (*const sums)[WORDS][4];  // of the block that is being projected
    float* const projected;      // [step % kept][block][gate][lane]
    int64_t next = 0;            // first of the steps that are being projected
    typename Input::Row rows[AHEAD];  // their input

    static int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    static int64_t blocks(int64_t hidden) { return (hidden + LANES - 1) / LANES; }
    int64_t time(int64_t s) const { return a->reverse ? a->steps - 1 - s : s; }
    int lanes(int64_t block) const { return static_cast<int>(std::min<int64_t>(LANES, a->hidden - block * LANES)); }
    float* projected_of(int64_t s, int64_t block) const {
        return projected + (s % kept * (own.end - own.first) + block - own.first) * GATES;
    }

    // Blocks of a thread, at most, and whether it projects beside its steps: recurrent weights that come from far away take
    // the time, and the input's, which are read once in AHEAD steps then, would come from there too.
    static int64_t most_blocks(int64_t hidden, int64_t threads) { return (blocks(hidden) + threads - 1) / threads; }
    static bool near(int64_t hidden, int64_t threads) {
        return most_blocks(hidden, threads) * Recurrent::groups(hidden) * 4 * GATES <= beside_bytes();
    }

    // Steps whose projection is kept, and those whose input is converted at a time.
    static int64_t kept_steps(bool beside) { return beside ? 2 * AHEAD : TOGETHER; }
    static int64_t converted_bytes(bool beside, int64_t hidden, int64_t features) {
#if defined(HAS_SUMS)
        if (SUMMED && !beside && multiplies_by_sums(hidden)) return TOGETHER * Summed::row_bytes(features);
#endif
        return lines((beside ? AHEAD : TOGETHER) * Input::row_bytes(features));
    }

    // Converts the input of a step; past the last step its own stands in for what is thrown away.
    typename Input::Row prepared(int64_t s, char* room) const {
        return input.prepare(a->x + time(std::min(s, a->steps - 1)) * a->x_step, room);
    }

    // Converts the input from a step on.
    void begin(int64_t s) {
        next = s;
        for (int r = 0; r < AHEAD && own.first < own.end; ++r)
            rows[r] = prepared(s + r, input_room + r * Input::row_bytes(a->features));
    }

    static ALWAYS_INLINE vec in_a_register(const char* weights) {
        vec x = load(reinterpret_cast<const float*>(weights));
        in_register(x);
        return x;
    }

    // Adds a group of k to the sums of a step.
    static ALWAYS_INLINE void one(typename Recurrent::Sum (&sums)[4], const char* word, const char* weights) {
        const auto x = Recurrent::word(word);
        UNROLLED for (int gate = 0; gate < 4; ++gate)
            sums[gate] = Recurrent::dot(sums[gate], x, weights + gate * GATES);
    }

    // Adds `count` groups. Sums are its own variables, as in the next one: GCC would store the caller's each time.
    static void multiply(typename Recurrent::Sum (&step)[4], const char* word, const char* weights, int64_t count) {
        typename Recurrent::Sum here[4];
        UNROLLED for (int gate = 0; gate < 4; ++gate) here[gate] = step[gate];
        for (; count > 0; --count, word += 4, weights += 4 * GATES) one(here, word, weights);
        UNROLLED for (int gate = 0; gate < 4; ++gate) step[gate] = here[gate];
    }

    // Adds `count` groups from `from` on to the sums of a block of the steps ahead, and meanwhile `left` groups to `step`.
    // In a function of its own, so that nothing else takes a register.
    __attribute__((noinline)) void multiply(int64_t block, int64_t from, int64_t count, typename Recurrent::Sum (&step)[4],
                                            const char* word, const char* weights, int64_t left) {
        typename Input::Sum ahead[AHEAD][WORDS][4];
        typename Recurrent::Sum here[4];
        const char* words[AHEAD][WORDS];
        UNROLLED for (int gate = 0; gate < 4; ++gate) here[gate] = step[gate];
        UNROLLED for (int r = 0; r < AHEAD; ++r)
            UNROLLED for (int w = 0; w < WORDS; ++w) {
                words[r][w] = input.words(rows[r], w) + 4 * from;
                UNROLLED for (int gate = 0; gate < 4; ++gate) ahead[r][w][gate] = sums[r][w][gate];
            }
        if (from == 0) UNROLLED for (int r = 0; r < AHEAD; ++r) input.start(ahead[r], block);
        const char* projecting = input.groups_of(block) + from * 4 * GATES;
        for (int64_t k = 0; k < count; ++k, projecting += 4 * GATES) {
            // All four, and 28 sums, would leave no register for a word.
            const vec three[3] = {in_a_register(projecting), in_a_register(projecting + GATES),
                                  in_a_register(projecting + 2 * GATES)};
            UNROLLED for (int r = 0; r < AHEAD; ++r)
                UNROLLED for (int w = 0; w < WORDS; ++w) {
                    const auto x = Input::word(words[r][w] + 4 * k);
                    UNROLLED for (int gate = 0; gate < 3; ++gate)
                        ahead[r][w][gate] = Input::dot(ahead[r][w][gate], x, three[gate]);
                    ahead[r][w][3] = Input::dot(ahead[r][w][3], x, projecting + 3 * GATES);
                }
            // As many as there are steps ahead: then both end together where the input is as wide as the state.
            if (left >= AHEAD) {
                left -= AHEAD;
                UNROLLED for (int e = 0; e < AHEAD; ++e) one(here, word + 4 * e, weights + e * 4 * GATES);
                word += 4 * AHEAD;
                weights += AHEAD * 4 * GATES;
            }
        }
        for (; left > 0; --left, word += 4, weights += 4 * GATES) one(here, word, weights);
        UNROLLED for (int gate = 0; gate < 4; ++gate) step[gate] = here[gate];
        if (from + count == groups) return finish(block, ahead);
        UNROLLED for (int r = 0; r < AHEAD; ++r)
            UNROLLED for (int w = 0; w < WORDS; ++w)
                UNROLLED for (int gate = 0; gate < 4; ++gate) sums[r][w][gate] = ahead[r][w][gate];
    }

    ALWAYS_INLINE void add_biases(vec (&to)[4], int64_t block) const {
        const int n = lanes(block);
        if (a->bias_ih) UNROLLED for (int gate = 0; gate < 4; ++gate) {
            const int64_t at = gate * a->hidden + block * LANES;
            to[gate] += load(a->bias_ih + at, n) + load(a->bias_hh + at, n);
        }
    }

    // Gates of a block from one step's input alone. A line of weights is multiplied once here; together with AHEAD - 1 steps
    // that a short call does not have, it would take twice the time in which it comes from the second-level cache.
    __attribute__((noinline)) void project_one(vec (&to)[4], const typename Input::Row& row, int64_t block) const {
        typename Input::Sum here[WORDS][4];
        const char* words[WORDS];
        UNROLLED for (int w = 0; w < WORDS; ++w) words[w] = input.words(row, w);
        input.start(here, block);
        const char* weights = input.groups_of(block);
        for (int64_t k = 0; k < groups; ++k, weights += 4 * GATES) {
            typename Input::Word x[WORDS];
            UNROLLED for (int w = 0; w < WORDS; ++w) x[w] = Input::word(words[w] + 4 * k);
            UNROLLED for (int gate = 0; gate < 4; ++gate) {
                const vec line = in_a_register(weights + gate * GATES);
                UNROLLED for (int w = 0; w < WORDS; ++w) here[w][gate] = Input::dot(here[w][gate], x[w], line);
            }
        }
        add_biases(to, block);
        input.finish(to, here, row, block);
    }

    // Scales the sums of a block that is done, adds the biases, and keeps what comes of them for the steps.
    ALWAYS_INLINE void finish(int64_t block, const typename Input::Sum (&done)[AHEAD][WORDS][4]) const {
        vec bias[4] = {};
        add_biases(bias, block);
        UNROLLED for (int r = 0; r < AHEAD; ++r) {
            vec gates[4] = {bias[0], bias[1], bias[2], bias[3]};
            input.finish(gates, done[r], rows[r], block);
            float* const to = projected_of(next + r, block);
            UNROLLED for (int gate = 0; gate < 4; ++gate) store(to + gate * LANES, gates[gate]);
        }
    }

    // Projects the input from a step on, with nothing beside it.
    void project(int64_t s) {
        typename Recurrent::Sum none[4] = {};
        begin(s);
        for (int64_t block = own.first; block < own.end; ++block) multiply(block, 0, groups, none, nullptr, nullptr, 0);
    }

    // Projects many steps from one on, block by block, so that the input's weights are read once for all of them.
    void project_many(int64_t s) {
#if defined(HAS_SUMS)
        if constexpr (SUMMED)
            if (multiplies_by_sums(a->hidden)) return project_by_sums(s);
#endif
        typename Recurrent::Sum none[4] = {};
        typename Input::Row inputs[TOGETHER];
        const int64_t count = std::min(TOGETHER, (a->steps - s + AHEAD - 1) / AHEAD * AHEAD);
        for (int64_t r = 0; r < count && own.first < own.end; ++r)
            inputs[r] = prepared(s + r, input_room + r * Input::row_bytes(a->features));
        for (int64_t block = own.first; block < own.end; ++block)
            for (int64_t done = 0; done < count; done += AHEAD) {
                next = s + done;
                for (int r = 0; r < AHEAD; ++r) rows[r] = inputs[done + r];
                multiply(block, 0, groups, none, nullptr, nullptr, 0);
            }
    }

#if defined(HAS_SUMS)
    // The same by sums. In a function of its own, for the sake of small stacks.
    __attribute__((noinline)) void project_by_sums(int64_t s) {
        const Summed matrix(a->packed_ih, nullptr, a->hidden, a->features);
        const int64_t count = std::min(TOGETHER, a->steps - s);
        Summed::Row inputs[TOGETHER];
        for (int64_t r = 0; r < count && own.first < own.end; ++r)
            inputs[r] = matrix.prepare(a->x + time(s + r) * a->x_step, input_room + r * Summed::row_bytes(a->features));
        const Pieces pieces(count, Summed::AT_ONCE);
        for (int64_t block = own.first; block < own.end; ++block) {
            vec bias[4] = {};
            add_biases(bias, block);
            for (int64_t piece = 0, row = 0; row < count; row += pieces[piece], ++piece) {
                const int count_of = pieces[piece];
                Summed::Row from[ROWS];
                vec gates[ROWS][4];
                for (int r = 0; r < count_of; ++r) {
                    from[r] = inputs[row + r];
                    UNROLLED for (int gate = 0; gate < 4; ++gate) {
                        gates[r][gate] = bias[gate];
                        __builtin_prefetch(projected_of(s + row + r, block) + gate * LANES, 1);
                    }
                }
                matrix.add(count_of, gates, from, block);
                for (int r = 0; r < count_of; ++r) {
                    float* const to = projected_of(s + row + r, block);
                    UNROLLED for (int gate = 0; gate < 4; ++gate) store(to + gate * LANES, gates[r][gate]);
                }
            }
        }
    }
#endif

    // The cell of a block whose product is done, and beside it the first groups of the next one's, if there is a `word`.
    void cell(const float* gates, int64_t block, float* after, float* output, typename Recurrent::Sum (&step)[4],
              const char* word, const char* weights) {
        const int64_t unit = block * LANES;
        const int n = lanes(block);
        vec c = load(a->c_n + unit, n), h;
        if (word) {
            typename Recurrent::Sum here[4];
            UNROLLED for (int gate = 0; gate < 4; ++gate) here[gate] = step[gate];
            h = cell_between<Recurrent::THREE_DIVISIONS>(gates, c, [&] {
                one(here, word, weights);
                word += 4;
                weights += 4 * GATES;
            });
            UNROLLED for (int gate = 0; gate < 4; ++gate) step[gate] = here[gate];
        } else {
            h = cell_between<Recurrent::THREE_DIVISIONS>(gates, c, [] {});
        }
        store(a->c_n + unit, c, n);
        store(after + unit, h, n);
        store(output + unit, h, n);
    }

public:
    // Whether a matrix of so many units can be walked through so.
    static bool serves(int64_t hidden) { return Recurrent::whole_blocks(hidden); }

    // Of each thread: h of a step, the input of the steps ahead, and what is projected.
    static Room room(int64_t hidden, int64_t features, int64_t threads) {
        const bool beside = near(hidden, threads);
        const int64_t rows = lines(Recurrent::row_bytes(hidden)) + converted_bytes(beside, hidden, features);
        return {0, rows + SUMS + kept_steps(beside) * most_blocks(hidden, threads) * GATES * 4};
    }

    // `room` is the thread's own.
    InterleavedWalk(const Forward* a, Barrier& barrier, char* room, int thread, int threads)
        : a(a), barrier(barrier), thread(thread), threads(threads), input(a->packed_ih, a->scale_ih, a->hidden, a->features),
          recurrent(a->packed, a->scale, a->hidden, a->hidden), groups(Input::groups(a->features)),
          part((groups + AHEAD - 1) / AHEAD), own(share(blocks(a->hidden), !a->by_rows, thread, threads)),
          beside(near(a->hidden, threads)), kept(kept_steps(beside)), state_room(room),
          input_room(state_room + lines(Recurrent::row_bytes(a->hidden))),
          sums(reinterpret_cast<typename Input::Sum (*)[WORDS][4]>(
              input_room + converted_bytes(beside, a->hidden, a->features))),
          projected(reinterpret_cast<float*>(sums) + SUMS / 4) {}

    // In a function of its own, since the frames of all types together would be too large for a small stack.
    __attribute__((noinline)) void run() {
        const int64_t hidden = a->hidden, count = own.end - own.first, state_groups = Recurrent::groups(hidden);
        const bool few = a->steps <= FEW;
        // Weights that stay in the first-level cache leave no time over, so their steps are projected between steps.
        const bool fills = beside && !few && groups > 0 && count * state_groups * 4 * GATES > NEAREST;
        const int64_t first = own.first * LANES, units = std::min(own.end * LANES, hidden) - first;
        begin_cells(a, first, units);
        typename Recurrent::Sum step[Recurrent::WORDS][4];
        const float* before = a->h0;
        float *after = a->scratch, *spare = a->scratch + hidden;
        for (int64_t s = 0; s < a->steps; ++s) {
            const int64_t at = s % AHEAD;
            const bool more = fills && s - at + AHEAD < a->steps;
            if (!few && !beside && s % TOGETHER == 0) project_many(s);
            if (!few && beside && at == 0 && (s == 0 || !fills)) project(s);
            if (at == 0 && more) begin(s + AHEAD);
            if (few && count > 0) rows[0] = prepared(s, input_room);
            typename Recurrent::Row state{};
            if (before && count > 0) state = recurrent.prepare(before, state_room);
            float* const output = a->output + time(s) * a->out_step;
            const int64_t open = before && state_groups >= BETWEEN ? BETWEEN : 0;  // groups multiplied beside a cell
            alignas(64) float gates_of[GATES];
            for (int64_t i = 0, past = -1; i < count; ++i) {
                // Every other step goes the other way: what a cache that is too small still holds is wanted first.
                const int64_t block = s % 2 ? own.end - 1 - i : own.first + i;
                const int64_t done = at * count + i, ahead = own.first + done / AHEAD, start_of = done % AHEAD * part;
                const char* word = before ? recurrent.words(state, 0) : nullptr;
                const char* weights = recurrent.groups_of(block);
                int64_t left = before ? state_groups : 0;
                if (before) recurrent.start(step, block);
                if (past >= 0) {
                    cell(gates_of, past, after, output, step[0], open ? word : nullptr, weights);
                    word += 4 * open;
                    weights += open * 4 * GATES;
                    left -= open;
                }
                past = block;
                if (more && start_of < groups)
                    multiply(ahead, start_of, std::min(part, groups - start_of), step[0], word, weights, left);
                else multiply(step[0], word, weights, left);
                vec gates[4] = {};
                const float* const from = projected_of(s, block);
                if (few) project_one(gates, rows[0], block);
                else for (int gate = 0; gate < 4; ++gate) gates[gate] = load(from + gate * LANES);
                if (before) recurrent.finish(gates, step, state, block);
                for (int gate = 0; gate < 4; ++gate) store(gates_of + gate * LANES, gates[gate]);
            }
            if (count > 0) cell(gates_of, s % 2 ? own.first : own.end - 1, after, output, step[0], nullptr, nullptr);
            if (!a->by_rows) barrier.wait(thread, threads);
            before = after;
            std::swap(after, spare);
        }
        end_hidden(a, before, first, units);
    }
};

}  // namespace
