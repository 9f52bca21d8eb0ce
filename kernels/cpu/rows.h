// Which rows of a batch a thread takes, in which order: where sequences differ in length the longest come first, so that
// what has ended is a tail that no product needs to see.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// A batch's rows by length, and the places within the lengths; both empty where every row has all steps.
class Lengths {
    const int32_t* lengths;

public:
    std::vector<int32_t> longest_first;

    Lengths(const int32_t* given, int64_t batch) : lengths(given) {
        if (!given) return;
        longest_first.resize(batch);
        for (int64_t b = 0; b < batch; ++b) longest_first[b] = static_cast<int32_t>(b);
        std::stable_sort(longest_first.begin(), longest_first.end(),
                         [given](int32_t a, int32_t b) { return given[a] > given[b]; });
    }

    // Places b * steps + t, or t * batch + b where the steps come first in memory.
    std::vector<int64_t> places(int64_t batch, int64_t steps, bool rows_first) const {
        std::vector<int64_t> found;
        if (!lengths) return found;
        found.reserve(batch * steps);
        for (int64_t k = 0; k < batch * steps; ++k) {
            const int64_t b = rows_first ? k / steps : k % batch, t = rows_first ? k % steps : k / batch;
            if (t < lengths[b]) found.push_back(k);
        }
        return found;
    }

    bool ended(int64_t b, int64_t t) const { return lengths && t >= lengths[b]; }
};

// The rows of one thread, in its order: all, or dealt out so that each thread gets long and short ones.
class Rows {
    const Lengths* lengths;
    int64_t first, stride;
    int64_t running;  // rows before this one have not ended at the latest step that was asked about

public:
    int64_t count;

    Rows(const Lengths& all, int64_t batch, bool shared_out, int thread, int threads)
        : lengths(&all), first(0), stride(1), count(batch) {
        if (shared_out && all.longest_first.empty()) {
            first = batch * thread / threads;
            count = batch * (thread + 1) / threads - first;
        } else if (shared_out) {
            first = thread;
            stride = threads;
            count = (batch - thread + threads - 1) / threads;
        }
        running = count;
    }

    int64_t operator[](int64_t i) const {
        const int64_t at = first + i * stride;
        return lengths->longest_first.empty() ? at : lengths->longest_first[at];
    }

    // How many of them have a step t: the first ones.
    int64_t at_step(int64_t t) {
        while (running > 0 && lengths->ended((*this)[running - 1], t)) --running;
        while (running < count && !lengths->ended((*this)[running], t)) ++running;
        return running;
    }
};

}  // namespace
