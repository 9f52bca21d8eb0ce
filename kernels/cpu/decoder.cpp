// A decoder with attention that is fed what it found: all steps of a batch in one call, in float32, and back for gradients.
//
// A step's input is [x; fed]. The LSTM makes h of it, h asks the memory (scores, softmax, weighted mean: the context), and
// tanh(W [context; h] + b) is what the step decoded. The next step is fed that, or the context. Each step needs the one
// before, so no product spans the steps; what a call saves is a dozen operators a step and what they write and read. Rows
// of a batch need nothing of each other: threads share them out and never meet, but before the gradients of the weights.

#include <cstdint>
#include <memory>
#include <vector>

#include "fed_back.h"
#include "fed_steps.h"
#include "status.h"
#include "team.h"

namespace {

// Run each part of the rows. All memory is taken before a team starts; one that becomes smaller than asked for shares the
// same parts out.
template <typename P, typename F>
void run_parts(const FedCall* a, F make) {
    std::vector<std::unique_ptr<P>> parts;
    for (int64_t part = 0; part < a->parts; ++part) parts.push_back(make(part));
    team(a->parts, [&parts](int thread, int members) {
        for (size_t part = thread; part < parts.size(); part += members) parts[part]->run();
    });
}

}  // namespace

extern "C" {

const char* decoder_failure() { return said; }

// Numbers that the steps of a call keep for a walk back.
int64_t decoder_kept(const FedCall* a) { return FedRecord::numbers(a, true); }

int64_t decoder_run(const FedCall* a) {
    return guarded([=]() -> int64_t {
        const FedOrder order(a);
        const Memory<float> own(a->kept ? 0 : FedRecord::numbers(a, false), "a decoder's steps");
        const FedRecord record(a, a->kept ? a->kept : own.data(), a->kept);
        run_parts<FedRows>(a, [&](int64_t part) { return std::make_unique<FedRows>(a, order, record, order.part(part)); });
        return DONE;
    });
}

int64_t decoder_back(const FedBack* back) {
    return guarded([=]() -> int64_t {
        const FedCall* const a = back->call;
        const FedOrder order(a);
        const FedRecord record(a, a->kept, true);
        const FedGradients own(back);
        const FedWeights weights(back, order, record, own);
        const Memory<char> room(weights.room() * back->weight_threads, "the gradients of the weights");
        run_parts<FedRowsBack>(
            a, [&](int64_t part) { return std::make_unique<FedRowsBack>(back, order, record, own, order.part(part)); });
        team(back->weight_threads, [&](int thread, int threads) {
            weights.run(room.data() + thread * weights.room(), thread, threads);
        });
        weights.copy_biases();
        return DONE;
    });
}

}  // extern "C"
