// How weights that are kept so are multiplied here and their order in which the kernel reads them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "byte_tiles.h"
#include "matrices.h"
#include "paired_bytes.h"
#include "status.h"
#include "strips.h"
#include "summed.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__)
#define WIDENED_BY "avx512-fma"
#elif defined(__AVX2__)
#define WIDENED_BY "avx2-fma"
#elif defined(__ARM_NEON)
#define WIDENED_BY "neon"
#else
#define WIDENED_BY "generic"
#endif

// How the two matrices of a direction are multiplied; both are packed alike.
template <typename I, typename R>
struct Way {
    using Input = I;
    using Recurrent = R;
};

#if defined(HAS_TILES)
// What hinders the use of tiles in this process, or an empty text: they are used only once they have been permitted and
// their products were compared with plain ones.
const char* no_tiles();
#else
inline const char* no_tiles() { return "this processor has no AMX tiles for bf16, or the compiler does not know them"; }
#endif

#if defined(HAS_BYTE_TILES)
// The same of tiles of integers.
const char* no_byte_tiles();
#endif

// Whether weights are kept as bytes with a scale per row. W8A8 has the input in as few bits as the state.
inline bool in_bytes(int64_t kept) { return kept == INT8 || kept == W8A8; }

// Calls `use`, which returns an R, with the way that serves weights kept so on this processor.
template <typename R, typename F>
R with_way(int64_t kept, F use) {
    if constexpr (in_part(BF16) || in_part(BF16_TRAINED)) {
#if defined(HAS_TILES)
        if ((kept == BF16 || kept == BF16_TRAINED) && !*no_tiles()) return use(Way<Tiles<1>, Tiles<1>>());
#endif
#if defined(HAS_PAIRS)
        if (kept == BF16 || kept == BF16_TRAINED) return use(Way<Pairs, Pairs>());
#else
        if (kept == BF16) return use(Way<Widened<uint16_t>, Widened<uint16_t>>());
#endif
    }
#if defined(HAS_TILES)
    if constexpr (in_part(SPLIT))
        if (kept == SPLIT && !*no_tiles()) return use(Way<Tiles<2>, Tiles<2>>());
#endif
    if constexpr (in_part(INT8)) {
#if defined(HAS_BYTE_TILES)
        if (kept == INT8 && !*no_byte_tiles()) return use(Way<ByteTiles<2>, ByteTiles<1>>());
#endif
#if defined(HAS_BYTES)
        // The input's values may lie far apart; 8 bits of h with a scale per row err less than 8 bits of weights.
        if (kept == INT8) return use(Way<Bytes<2>, StateInBytes>());
#elif defined(HAS_PAIRED_BYTES)
        if (kept == INT8) return use(Way<PairedBytes<16>, StateInBytes>());
#else
        if (kept == INT8) return use(Way<Widened<int8_t>, Widened<int8_t>>());
#endif
    }
#if defined(HAS_BYTES) || defined(HAS_PAIRED_BYTES)
    if constexpr (in_part(W8A8))
        if (kept == W8A8) return use(Way<StateInBytes, StateInBytes>());
#endif
    if constexpr (in_part(FP32))
        if (WHOLE || kept == FP32) return use(Way<FloatWeights, FloatWeights>());
    throw std::invalid_argument("weights kept so are multiplied by another part of the kernel");
}

// Whether a layer whose weights are kept so trains by tiles.
inline bool trains_by_tiles(int64_t kept) { return kept == BF16_TRAINED && !*no_tiles(); }
// Whether it trains by pairs.
inline bool trains_by_pairs(int64_t kept) { return kept == BF16_TRAINED && *no_tiles(); }

// Why weights cannot be kept so in this process, or an empty text.
inline const char* hinders(int64_t kept) {
#if !defined(HAS_PAIRS)
    if (kept == BF16_TRAINED) return "this processor has no products of bf16 (AVX512-BF16), or the compiler does not know them";
#endif
#if !defined(HAS_BYTES) && !defined(HAS_PAIRED_BYTES)
    if (kept == W8A8) return "this processor has no products of bytes (AVX2, with AVX-512 its BW), or the compiler does not know them";
#endif
    return kept == SPLIT ? no_tiles() : "";
}

// The instructions that multiply weights kept so, in walks forward of so many units and rows a thread.
inline const char* instructions_for(int64_t kept, int64_t hidden, int64_t rows) {
    if (kept == FP32 && rows >= sums_from_rows(hidden)) return "avx512-sums";
    if ((kept == BF16_TRAINED || kept == W8A8) && *hinders(kept)) return WIDENED_BY;
    if (kept == BF16_TRAINED) kept = BF16;
#if defined(HAS_TILES)
    if (kept == BF16 && !*no_tiles()) return "amx-bf16";
    if (kept == SPLIT && !*no_tiles()) return "amx-bf16-split";
#endif
#if defined(HAS_TILES)
    static const std::string without = std::string("avx512-bf16 (") + no_tiles() + ")";
    if (kept == BF16) return without.c_str();
#elif defined(HAS_PAIRS)
    if (kept == BF16) return "avx512-bf16";
#endif
#if defined(HAS_BYTE_TILES)
    if (kept == W8A8) return "avx512-vnni";
    if (kept == INT8 && !*no_byte_tiles()) return "amx-int8";
    static const std::string bytes_without = std::string("avx512-vnni (") + no_byte_tiles() + ")";
    if (kept == INT8) return bytes_without.c_str();
#elif defined(HAS_BYTES)
    if (in_bytes(kept)) return LANES == 16 ? "avx512-vnni" : "avx-vnni";
#elif defined(HAS_PAIRED_BYTES)
    if (in_bytes(kept)) return LANES == 16 ? "avx512-int8" : "avx2-int8";
#endif
    (void)kept;
    return WIDENED_BY;
}

// How a row of weights is rounded to int8: by its largest value, which becomes 127.
struct Rounding {
    float scale, largest = 0.0f;
    Rounding(const float* row, int64_t depth) {
        float spoilt = 0.0f;  // int8 has no NaN and no infinity, so the scale is NaN then
        for (int64_t k = 0; k < depth; ++k) {
            largest = std::fabs(row[k]) > largest ? std::fabs(row[k]) : largest;
            spoilt += 0.0f * row[k];
        }
        scale = largest / 127.0f + spoilt;
    }
    int8_t operator()(float x) const {
        return static_cast<int8_t>(largest > 0.0f && scale == scale ? std::lrintf(x / largest * 127.0f) : 0);
    }
};

inline void kept_as(float* to, float x) { *to = x; }
inline void kept_as(uint16_t* to, float x) { *to = to_bfloat16(x); }

// weight (4H, depth) to [block][k][gate][lane], zeros past H.
template <typename W>
void pack(Widened<W>*, const float* weight, void* packed, float* scale, int64_t hidden, int64_t depth) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<W, float>) return pack_rows(weight, static_cast<float*>(packed), hidden, depth);
#endif
    for (int64_t unit = 0; unit < (hidden + LANES - 1) / LANES * LANES; ++unit)
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t row = gate * hidden + unit;
            W* to = static_cast<W*>(packed) + (unit / LANES * depth * 4 + gate) * LANES + unit % LANES;
            const float* from = weight + row * depth;
            if constexpr (std::is_same_v<W, int8_t>) {
                const Rounding by(from, unit < hidden ? depth : 0);
                if (unit < hidden) scale[row] = by.scale;
                for (int64_t k = 0; k < depth; ++k) to[k * 4 * LANES] = unit < hidden ? by(from[k]) : int8_t{0};
            } else {
                for (int64_t k = 0; k < depth; ++k) kept_as(to + k * 4 * LANES, unit < hidden ? from[k] : 0.0f);
            }
        }
}

template <typename M>
std::enable_if_t<std::is_base_of_v<Int8Order, M>> pack(M*, const float* weight, void* packed, float* scale, int64_t hidden,
                                                       int64_t depth) {
    if (depth > M::DEEPEST)
        throw std::length_error("weights in int8 have at most " + std::to_string(M::DEEPEST) + " columns, these have " +
                                std::to_string(depth) + "; use weight_storage='fp32' or 'bf16'");
    int8_t* const to = static_cast<int8_t*>(packed);
    std::memset(to, 0, M::size(hidden, depth));
    for (int64_t unit = 0; unit < hidden; ++unit)
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t row = gate * hidden + unit;
            const Rounding by(weight + row * depth, depth);
            scale[row] = by.scale;
            int32_t sum = 0;
            for (int64_t k = 0; k < depth; ++k) {
                const int8_t q = by(weight[row * depth + k]);
                to[M::place(depth, unit, gate, k)] = q;
                sum += q;
            }
            const int32_t start = static_cast<int32_t>(M::START * sum);
            std::memcpy(to + M::place_of_start(depth, unit, gate), &start, sizeof start);
        }
}

#if defined(HAS_PAIRS)
inline void pack(Pairs*, const float* weight, void* packed, float*, int64_t hidden, int64_t depth) {
    pack_pairs(weight, static_cast<uint16_t*>(packed), hidden, depth);
}
#endif

#if defined(HAS_TILES)
template <int PARTS>
void pack(Tiles<PARTS>*, const float* weight, void* packed, float*, int64_t hidden, int64_t depth) {
    if constexpr (PARTS == 1) return pack_tiles(weight, static_cast<char*>(packed), hidden, depth);
    uint16_t* const to = static_cast<uint16_t*>(packed);
    std::memset(to, 0, Tiles<PARTS>::size(hidden, depth));
    for (int64_t unit = 0; unit < hidden; ++unit)
        for (int gate = 0; gate < 4; ++gate)
            for (int64_t k = 0; k < depth; ++k) {
                const float x = weight[(gate * hidden + unit) * depth + k];
                const uint16_t high = to_bfloat16(x);
                to[Tiles<PARTS>::place(depth, unit, gate, k, 0)] = high;
                if (PARTS == 2 && std::isfinite(from_bfloat16(high)))
                    to[Tiles<PARTS>::place(depth, unit, gate, k, PARTS - 1)] = to_bfloat16(x - from_bfloat16(high));
            }
}

// Compares products by tiles with plain ones of the same numbers, in sizes of each kind: a processor, an emulator or a
// hypervisor that multiplies otherwise is not used.
template <int PARTS>
bool tiles_are_right() {
    uint32_t bits = 1;
    const auto next = [&bits] { return static_cast<float>(static_cast<int32_t>(bits = bits * 1664525u + 1013904223u) >> 20) / 2048.0f + 1e-4f; };
    const auto high = [](float x) { return from_bfloat16(to_bfloat16(x)); };
    const auto low = [high](float x) { return PARTS == 1 ? 0.0f : high(x - high(x)); };
    using M = Tiles<PARTS>;
    bool right = true;
    for (int rows : {1, 16, 32})
        for (int64_t depth : {1, 31, 70}) {
            const int64_t hidden = 19, count = M::groups(depth), low_bytes = 2 * count * TILE;
            std::vector<float> weight(4 * hidden * depth), x(rows * depth), sums(2 * 4 * 256, 0.5f);
            for (float& value : weight) value = next();
            for (float& value : x) value = next();
            Memory<char> packed(M::size(hidden, depth), "a check of tiles"), a(PARTS * low_bytes, "a check of tiles");
            pack(static_cast<M*>(nullptr), weight.data(), packed.data(), nullptr, hidden, depth);
            std::memset(a.data(), 0, PARTS * low_bytes);
            for (int r = 0; r < rows; ++r)
                M::put_row(x.data() + r * depth, depth, a.data() + r / TILE_ROWS * count * TILE + r % TILE_ROWS * TILE_BYTES, low_bytes);
            const int64_t block = depth % 2;
            const char* const w = packed.data() + block * count * 2 * M::PAIR;
            configure_tiles(rows < TILE_ROWS ? rows : TILE_ROWS);
            const float* const begins = sums.data();
            load_tile<0>(begins, TILE_BYTES);
            load_tile<1>(begins, TILE_BYTES);
            load_tile<2>(begins, TILE_BYTES);
            load_tile<3>(begins, TILE_BYTES);
            if (rows <= TILE_ROWS) M::add_one(a.data(), low_bytes, w, count, [] {});
            else M::template add_two<true>(a.data(), a.data() + count * TILE, low_bytes, w + count * M::PAIR, count, [] {});
            store_tile<0>(sums.data(), TILE_BYTES);
            store_tile<1>(sums.data() + 256, TILE_BYTES);
            store_tile<2>(sums.data() + 512, TILE_BYTES);
            store_tile<3>(sums.data() + 768, TILE_BYTES);
            for (int r = 0; r < rows; ++r)
                for (int tile = rows <= TILE_ROWS ? 0 : r / TILE_ROWS * 2, end = rows <= TILE_ROWS ? 4 : tile + 2; tile < end; ++tile)
                    for (int64_t unit = block * 16; unit < hidden && unit < block * 16 + 16; ++unit) {
                        const int gate = rows <= TILE_ROWS ? tile : 2 + tile % 2;
                        double sum = 0.5;
                        for (int64_t k = 0; k < depth; ++k) {
                            const float v = x[r * depth + k], u = weight[(gate * hidden + unit) * depth + k];
                            sum += double(high(v)) * high(u) + double(high(v)) * low(u) + double(low(v)) * high(u);
                        }
                        right = right && std::fabs(sums[tile * 256 + r % TILE_ROWS * 16 + unit % 16] - sum) < (PARTS == 1 ? 1e-4 : 2e-5);
                    }
        }
    release_tiles();
    return right;
}

const char* no_tiles() {
    static const char* const found = !tiles_permitted()                                     ? "the system permits no AMX tiles"
                                     : !tiles_are_right<1>() || !tiles_are_right<2>() ? "AMX tiles failed their check"
                                                                                      : "";
    return found;
}
#endif

#if defined(HAS_BYTE_TILES)
// Compares sums of integers by tiles with those of vectors, which must be the same.
template <int PARTS>
bool byte_tiles_are_right() {
    uint32_t bits = 1;
    const auto next = [&bits] { return static_cast<float>(static_cast<int32_t>(bits = bits * 1664525u + 1013904223u) >> 20) / 2048.0f; };
    using M = ByteTiles<PARTS>;
    bool right = true;
    for (int64_t depth : {1, 63, 130}) {
        constexpr int rows = TILE_ROWS, few = M::LEAST - 1;
        const int64_t hidden = 19;
        std::vector<float> weight(4 * hidden * depth), x(rows * depth), scale(4 * hidden);
        for (float& value : weight) value = next();
        for (float& value : x) value = next();
        Memory<char> packed(M::size(hidden, depth), "a check of tiles"), room(rows * M::row_bytes(depth), "a check of tiles");
        pack(static_cast<M*>(nullptr), weight.data(), packed.data(), scale.data(), hidden, depth);
        const M matrix(packed.data(), scale.data(), hidden, depth);
        typename M::Row from[rows];
        for (int r = 0; r < rows; ++r) from[r] = matrix.prepare(x.data() + r * depth, room.data() + r * M::row_bytes(depth));
        M::begin(rows);
        for (int64_t block = 0; block < 2; ++block) {
            vec together[rows][4] = {}, apart[rows][4] = {};
            matrix.add(rows, together, from, block);
            for (int r = 0; r < rows; r += few) {
                vec own[rows][4] = {};
                typename M::Row some[rows];
                const int count = rows - r < few ? rows - r : few;
                for (int i = 0; i < count; ++i) some[i] = from[r + i];
                matrix.add(count, own, some, block);
                std::memcpy(apart[r], own, count * sizeof own[0]);
            }
            right = right && std::memcmp(together, apart, sizeof apart) == 0;
        }
        M::end(rows);
    }
    return right;
}

// Compares sums of rows of two bytes by tiles with plain ones, which must be the same.
inline bool byte_products_are_right() {
    uint32_t bits = 1;
    const auto next = [&bits] { return static_cast<int>((bits = bits * 1664525u + 1013904223u) >> 24); };
    bool right = true;
    for (int64_t rows : {5, 16})
        for (int64_t depth : {1, 63, 130}) {
            const int64_t hidden = 19;
            std::vector<float> weight(4 * hidden * depth), scale(4 * hidden);
            for (float& value : weight) value = static_cast<float>(next() - 128);
            for (int64_t row = 0; row < 4 * hidden; ++row) weight[row * depth] = 127.0f;  // so weights are kept as they are
            for (float& value : weight) value = std::max(value, -127.0f);
            Memory<char> packed(ByteTiles<1>::size(hidden, depth), "a check of tiles");
            pack(static_cast<ByteTiles<1>*>(nullptr), weight.data(), packed.data(), scale.data(), hidden, depth);
            const ByteRows in(rows, depth, true);
            Memory<char> a(in.tile_bytes(), "a check of tiles");
            std::memset(a.data(), 0, in.tile_bytes());
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t k = 0; k < depth; ++k)
                    for (int64_t low : {int64_t{0}, in.low()}) a[in.row(r) + low + ByteRows::at(k)] = static_cast<char>(next());
            const bool from_zero = !in.together();
            const int64_t block = depth % 2;
            std::vector<int32_t> sums(4 * BYTE_SUMS);
            configure_tiles(in.configured());
            ByteProducts::add(a.data(), in, packed.data(), block, depth, from_zero, sums.data(), [] {});
            for (int64_t r = 0; r < rows; ++r)
                for (int gate = 0; gate < 4; ++gate)
                    for (int64_t unit = block * 16; unit < std::min<int64_t>(hidden, block * 16 + 16); ++unit)
                        for (int part = 0; part < 2; ++part) {
                            int32_t sum = 0;
                            for (int64_t k = 0; k < depth; ++k) {
                                const int byte = static_cast<uint8_t>(a[in.row(r) + part * in.low() + ByteRows::at(k)]);
                                sum += (byte - (part && from_zero ? 0 : 128)) * static_cast<int>(weight[(gate * hidden + unit) * depth + k]);
                            }
                            right = right && sums[gate * BYTE_SUMS + part * in.part() + r * 16 + unit % 16] == sum;
                        }
        }
    release_tiles();
    return right;
}

const char* no_byte_tiles() {
    static const char* const found =
        !tiles_permitted()                                                                        ? "the system permits no AMX tiles"
        : !byte_tiles_are_right<1>() || !byte_tiles_are_right<2>() || !byte_products_are_right() ? "AMX tiles failed their check"
                                                                                                  : "";
    return found;
}
#endif

inline void packed_forward(const float* weight, void* packed, float* scale, int64_t hidden, int64_t depth, int64_t kept) {
    with_way<void>(kept, [=](auto way) {
        pack(static_cast<typename decltype(way)::Recurrent*>(nullptr), weight, packed, scale, hidden, depth);
        summarize<typename decltype(way)::Recurrent>(weight, packed, hidden, depth);
    });
}

// Bytes of weights (4H, depth) in the order of a backward pass.
inline int64_t backward_bytes(int64_t hidden, int64_t depth, int64_t kept) {
    const int64_t blocks = (depth + LANES - 1) / LANES;
    if (trains_by_tiles(kept)) return blocks * ((hidden + 15) / 16) * 4 * 16 * LANES * 2;
    return blocks * LANES * 4 * hidden * (kept == FP32 ? 4 : 2);
}

// weight (4H, depth) to [block][n][lane] with n over 4H, zeros past the depth; in bf16 two n side by side, or tiles.
inline void packed_backward(const float* weight, void* packed, int64_t hidden, int64_t depth, int64_t kept) {
#if defined(HAS_TILES)
    if (trains_by_tiles(kept)) return pack_tiles_back(weight, static_cast<char*>(packed), hidden, depth);
#endif
#if defined(HAS_PAIRS)
    if (kept == BF16_TRAINED) return pack_pairs_back(weight, static_cast<uint16_t*>(packed), hidden, depth);
#endif
    if (kept != FP32) throw std::invalid_argument("weights kept so have no gradients");
    pack_back_rows(weight, static_cast<float*>(packed), 4 * hidden, depth);
}

}  // namespace
