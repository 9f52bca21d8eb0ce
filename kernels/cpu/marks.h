// Marks by which a change of the values of weights is noticed.

#pragma once

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

}  // namespace
