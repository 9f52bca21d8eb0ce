// Weights in the order in which the kernel reads them, and marks by which a change of their values is noticed.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

// A mark of some of the values: weights that were changed behind torch's version counter (through .data) rarely keep it.
uint64_t mark_some(const float* values, int64_t count) {
    uint64_t found = 1469598103934665603ull;
    const int64_t step = count > 128 ? count / 128 : 1;
    for (int64_t i = 0; i < count; i += step) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        found = (found ^ bits) * 1099511628211ull;
    }
    return found;
}

// A mark of all values: each step is one to one, so a change of one value is always seen.
uint64_t mark_each(const float* values, int64_t count) {
    constexpr int STREAMS = 4;  // multiplications in flight
    uvec sums[STREAMS] = {};
    int64_t i = 0;
    for (; i + STREAMS * LANES <= count; i += STREAMS * LANES)
        for (int k = 0; k < STREAMS; ++k) sums[k] = (sums[k] ^ (uvec)load(values + i + k * LANES)) * 16777619u;
    uint64_t found = 1469598103934665603ull;
    for (int k = 0; k < STREAMS; ++k)
        for (int lane = 0; lane < LANES; ++lane) found = (found ^ sums[k][lane]) * 1099511628211ull;
    for (; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        found = (found ^ bits) * 1099511628211ull;
    }
    return found;
}

// weight (4H, depth) to [block][k][gate][lane], zeros past H; kept as 0: float32, 1: bfloat16, 2: int8 with `scale`.
inline void packed_forward(const float* weight, void* packed, float* scale, int64_t hidden, int64_t depth, int64_t kept) {
    const int64_t blocks = (hidden + LANES - 1) / LANES;
    for (int64_t block = 0; block < blocks; ++block)
        for (int gate = 0; gate < 4; ++gate)
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t unit = block * LANES + lane, row = gate * hidden + unit;
                const int64_t to = (block * depth * 4 + gate) * LANES + lane;
                const float* from = weight + row * depth;
                float largest = 0.0f, spoilt = 0.0f;  // int8 has no NaN and no infinity, so the scale is NaN then
                for (int64_t k = 0; kept == 2 && unit < hidden && k < depth; ++k) {
                    largest = std::fabs(from[k]) > largest ? std::fabs(from[k]) : largest;
                    spoilt += 0.0f * from[k];
                }
                if (kept == 2 && unit < hidden) scale[row] = largest / 127.0f + spoilt;
                for (int64_t k = 0; k < depth; ++k) {
                    const float value = unit < hidden ? from[k] : 0.0f;
                    const int64_t at = to + k * 4 * LANES;
                    if (kept == 0) static_cast<float*>(packed)[at] = value;
                    if (kept == 1) static_cast<uint16_t*>(packed)[at] = to_bfloat16(value);
                    if (kept == 2)
                        static_cast<int8_t*>(packed)[at] =
                            static_cast<int8_t>(largest > 0.0f ? std::lrintf(value / largest * 127.0f) : 0);
                }
            }
}

// weight_hh (4H, H) to [block][n][lane] with n over 4H, zeros past H.
inline void packed_backward(const float* weight, float* packed, int64_t hidden) {
    const int64_t blocks = (hidden + LANES - 1) / LANES;
    for (int64_t block = 0; block < blocks; ++block) {
        const int n_lanes = static_cast<int>(hidden - block * LANES < LANES ? hidden - block * LANES : LANES);
        for (int64_t n = 0; n < 4 * hidden; ++n)
            store(packed + (block * 4 * hidden + n) * LANES, load(weight + n * hidden + block * LANES, n_lanes));
    }
}

}  // namespace
