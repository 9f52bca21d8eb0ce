// The walk of one direction of a layer forward through time, by vectors or by tiles, as its weights are kept, and the memory
// that it takes.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "byte_walk.h"
#include "forward.h"
#include "interleaved.h"
#include "matrices.h"
#include "overlapped.h"
#include "pair_walk.h"
#include "paired_walk.h"
#include "strip_walk.h"
#include "tile_walk.h"
#include "weights.h"

namespace {

// The walk of one sequence, and whether there is one where weights are kept so.
template <typename W>
using OneSequence = std::conditional_t<OVERLAPS<W>, OverlappedWalk<W>, InterleavedWalk<W>>;
template <typename W>
constexpr bool WALKS_ALONE = OVERLAPS<W> || W::Recurrent::INTERLEAVES;

#if defined(HAS_PAIRED_PRODUCTS)
template <typename W>
constexpr bool PAIRED = std::is_same_v<typename W::Recurrent, StateInBytes>;
#endif
#if defined(HAS_STRIPS)
template <typename W>
constexpr bool STRIPS = std::is_same_v<typename W::Recurrent, Strips>;
#endif

#if defined(HAS_SUMS)
// The way by which float32 is multiplied by sums, and whether a walk takes it.
using BySums = Way<Summed, Summed>;
template <typename W>
constexpr bool SUMS = std::is_same_v<typename W::Recurrent, Widened<float>>;
inline bool by_sums(const Forward* a, int64_t threads) {
    return (a->by_rows ? a->batch / threads : a->batch) >= sums_from_rows(a->hidden);
}
#endif

// Bytes of a packed matrix of a walk forward.
inline int64_t forward_bytes(int64_t hidden, int64_t depth, int64_t kept) {
    return with_way<int64_t>(kept, [=](auto way) {
        using M = typename decltype(way)::Recurrent;
        return M::size(hidden, depth) + summary_bytes<M>(hidden, depth);
    });
}

// Memory of a team for a direction of a layer with so many features.
inline Room room_of(int64_t kept, int64_t batch, int64_t steps, int64_t hidden, int64_t features, bool by_rows, int64_t threads) {
    return with_way<Room>(kept, [=](auto way) -> Room {
        using W = decltype(way);
#if defined(HAS_BYTE_TILES)
        if constexpr (std::is_same_v<typename W::Recurrent, ByteTiles<1>>)
            if (BytePlan::serves(batch, by_rows, threads)) {
                const BytePlan plan(batch, steps, hidden, features, by_rows, threads);
                return {plan.shared, plan.own};
            }
#endif
#if defined(HAS_TILES)
        if constexpr (W::Recurrent::TILED) {
            const TilePlan plan(W::Recurrent::PARTS, batch, steps, hidden, features, by_rows, threads);
            return {plan.shared, plan.own};
        } else
#endif
        {
            Room room = vector_room<W>(batch, hidden, features, by_rows, threads);
            const auto enlarge = [&room](const Room& other) {
                room = {std::max(room.shared, other.shared), std::max(room.own, other.own)};
            };
#if defined(HAS_SUMS)
            if constexpr (SUMS<W>)
                if (multiplies_by_sums(hidden)) enlarge(vector_room<BySums>(batch, hidden, features, by_rows, threads));
#endif
#if defined(HAS_PAIRS)
            if (kept == BF16_TRAINED && features >= 0) {
                const PairPlan plan(batch, hidden, features, by_rows, threads);
                enlarge({plan.shared, plan.own});
            }
#endif
#if defined(HAS_PAIRED_PRODUCTS)
            if constexpr (PAIRED<W>)
                if (features >= 0) enlarge(PairedWalk<typename W::Input>::room(batch, hidden, features, by_rows, threads));
#endif
#if defined(HAS_STRIPS)
            if constexpr (STRIPS<W>)
                if (StripWalk::serves(batch, hidden, features, by_rows, threads)) enlarge(StripWalk::room(batch, steps, hidden, by_rows, threads));
#endif
            if constexpr (WALKS_ALONE<W>)
                if (is_one_sequence(batch, hidden, features, by_rows, threads) && OneSequence<W>::serves(hidden))
                    enlarge(OneSequence<W>::room(hidden, features, threads));
            return room;
        }
    });
}

// Memory of a team for all layers of a call, which threads need not reach at the same time: features are those of the first
// and of the others.
inline Room room_of(int64_t kept, int64_t batch, int64_t steps, int64_t hidden, int64_t first, int64_t others, bool by_rows,
                    int64_t threads) {
    const Room a = room_of(kept, batch, steps, hidden, first, by_rows, threads);
    const Room b = room_of(kept, batch, steps, hidden, others, by_rows, threads);
    return {std::max(a.shared, b.shared), std::max(a.own, b.own)};
}

// Bytes for a team that may become smaller than asked for: its rows are then more a thread.
inline int64_t room_bytes(int64_t kept, int64_t batch, int64_t steps, int64_t hidden, int64_t first, int64_t others,
                          bool by_rows, int64_t threads) {
    int64_t most = 0;
    for (int64_t members = 1; members <= threads; ++members)
        most = std::max(most, room_of(kept, batch, steps, hidden, first, others, by_rows, members).of(members));
    return most;
}

// Whether the projection goes through Forward's gates_input; `whole` where no sequence ends early or begins anew.
inline bool needs_gates_input(int64_t kept, int64_t batch, int64_t hidden, int64_t features, bool by_rows, int64_t threads,
                              bool whole) {
    return with_way<bool>(kept, [=](auto way) {
        if constexpr (WALKS_ALONE<decltype(way)>)
            if (whole && is_one_sequence(batch, hidden, features, by_rows, threads) && OneSequence<decltype(way)>::serves(hidden))
                return false;
#if defined(HAS_PAIRED_PRODUCTS)
        if (PAIRED<decltype(way)> && whole && hidden > 0) return false;
#endif
#if defined(HAS_STRIPS)
        if (STRIPS<decltype(way)> && whole && StripWalk::serves(batch, hidden, features, by_rows, threads)) return false;
#endif
#if defined(HAS_BYTE_TILES)
        if (std::is_same_v<typename decltype(way)::Recurrent, ByteTiles<1>> && BytePlan::serves(batch, by_rows, threads)) return false;
#endif
        return !decltype(way)::Recurrent::TILED && !projects_in_step(batch, features, by_rows, threads);
    });
}

// In each thread of a team; `memory` is that of the team, `room` what it was asked for.
inline void walk(const Forward* a, int64_t kept, const Lengths& lengths, Barrier& barrier, char* memory, const Room& room,
                 int thread, int threads) {
    char* const own = memory + room.shared + thread * room.own;
    with_way<void>(kept, [&](auto way) {
        using W = decltype(way);
#if defined(HAS_BYTE_TILES)
        if constexpr (std::is_same_v<typename W::Recurrent, ByteTiles<1>>)
            if (BytePlan::serves(a->batch, a->by_rows, threads)) return ByteWalk(a, lengths, barrier, memory, own, thread, threads).run();
#endif
#if defined(HAS_TILES)
        if constexpr (W::Recurrent::TILED) {
            if constexpr (W::Recurrent::PARTS == 1)
                if (a->gates) return TileWalk<typename W::Recurrent, true>(a, lengths, barrier, memory, own, thread, threads).run();
            TileWalk<typename W::Recurrent>(a, lengths, barrier, memory, own, thread, threads).run();
        } else
#endif
        {
#if defined(HAS_PAIRED_PRODUCTS)
            if constexpr (PAIRED<W>) {
                using Walk = PairedWalk<typename W::Input>;
                if (Walk::serves(a, threads)) return Walk(a, barrier, own, thread, threads).run();
            }
#endif
#if defined(HAS_PAIRS)
            if constexpr (std::is_same_v<typename W::Recurrent, Pairs> && in_part(BF16_TRAINED))
                if (a->gates) return PairWalk(a, lengths, barrier, memory, own, thread, threads).run();
#endif
#if defined(HAS_STRIPS)
            if constexpr (STRIPS<W>)
                if (StripWalk::serves(a, threads)) return StripWalk(a, barrier, own, thread, threads).run();
#endif
            if constexpr (WALKS_ALONE<W>)
                if (is_one_whole_sequence(a, threads) && OneSequence<W>::serves(a->hidden))
                    return OneSequence<W>(a, barrier, own, thread, threads).run();
#if defined(HAS_SUMS)
            if constexpr (SUMS<W>)
                if (by_sums(a, threads)) return vector_walk<BySums>(a, lengths, barrier, own, thread, threads);
#endif
            vector_walk<W>(a, lengths, barrier, own, thread, threads);
        }
    });
}

}  // namespace
