// Runs the kernel over many odd sizes, each buffer exactly as large as it must be, for AddressSanitizer and
// ThreadSanitizer to watch. `python -m kernels sanitize` builds and runs it.

#define PROJECTED 600  // Few enough for several parts of the steps.
#define PAIR_ROWS 50
#define NEAREST 2000  // Some sizes project beside the steps, some between them,
#define FARTHEST 20000  // and some before them.
#include "lstm.cpp"

#include <cstdio>
#include <memory>
#include <random>

namespace {

std::mt19937 random_bits(7);

// Heap memory of its own for every array, so that one step past an end is seen.
struct Array {
    std::unique_ptr<float[]> values;
    explicit Array(int64_t count, bool filled = true) : values(new float[count]) {
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) values[i] = filled ? normal(random_bits) : NAN;
    }
    operator float*() { return values.get(); }
};

bool finite(const float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        if (!std::isfinite(values[i])) return false;
    return true;
}

// Makes each number two of bf16.
void halve(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t upper = to_bfloat16(values[i]), both = upper << 16 | upper;
        std::memcpy(values + i, &both, 4);
    }
}

// (directions, steps, batch), or nothing.
std::unique_ptr<uint8_t[]> some_resets(int64_t count) {
    if (random_bits() % 2) return nullptr;
    std::unique_ptr<uint8_t[]> found(new uint8_t[count]);
    for (int64_t i = 0; i < count; ++i) found[i] = random_bits() % 3 == 0;
    return found;
}

bool run(int64_t batch, int64_t steps, int64_t hidden, int64_t threads, bool by_rows, bool reverse, bool masked, int kept) {
    // Few features are projected in each step, many before all of them.
    const int64_t blocks = (hidden + LANES - 1) / LANES, size = batch * hidden, features = random_bits() % 2 ? random_bits() % 3 : hidden + 3;
    const int64_t part = 1 + random_bits() % steps;  // steps that are projected at a time, where no gates are kept
    Array weight(4 * hidden * hidden), weight_ih(4 * hidden * features), x(batch * steps * features), bias(4 * hidden);
    Array input(batch * steps * 4 * hidden), few(batch * part * 4 * hidden, false), h0(size), c0(size);
    const bool in_floats = kept != BF16_TRAINED;  // else two numbers of bf16, or a record, are counted as floats
    const auto results = [=](int64_t count) { return results_rounded(kept) ? (count + 1) / 2 : count; };
    const auto whole = [=](int64_t count) { return results_rounded(kept) ? count / 2 : count; };
    Array output(results(steps * size), false), h_n(results(size), false), c_n(results(size), false);
    Array gates(numbers_kept(batch, steps, hidden, kept) - (in_floats ? steps * size : 0), false);
    Array cells(in_floats ? steps * size : 0, false), scratch(2 * size, false);
    Array packed(std::max(packed_bytes(hidden, hidden, kept) / 4, blocks * LANES * hidden * 4), false), packed_ih(packed_bytes(hidden, features, kept) / 4, false);
    Array scale(4 * hidden, false), scale_ih(4 * hidden, false);
    std::unique_ptr<int32_t[]> lengths(new int32_t[batch]);
    for (int64_t b = 0; b < batch; ++b) lengths[b] = static_cast<int32_t>(random_bits() % (steps + 1));

    pack_forward(weight, packed, scale, hidden, hidden, kept);
    pack_forward(weight_ih, packed_ih, scale_ih, hidden, features, kept);
    const std::unique_ptr<uint8_t[]> resets = some_resets(steps * batch);
    const bool tiles = backward_by_tiles(kept);
    const bool projects = random_bits() % 2 || !in_floats, trains = kept == FP32 || kept == BF16_TRAINED, mode_x = random_bits() % 2;
    Forward f = {batch, steps, hidden, reverse, threads, by_rows,
                 projects ? (float*)few : (float*)input, 4 * size, 4 * hidden, projects ? part : steps,
                 x, mode_x ? features : batch * features, mode_x ? steps * features : features,
                 projects ? features : -1, packed_ih, bias, bias, packed,
                 in_bytes(kept) ? (float*)scale_ih : nullptr, in_bytes(kept) ? (float*)scale : nullptr, h0, c0,
                 masked ? lengths.get() : nullptr, output, size, hidden, h_n, c_n,
                 trains ? (float*)gates : nullptr, 4 * size, 4 * hidden, kept == FP32 ? (float*)cells : nullptr, size, hidden, scratch,
                 resets.get()};
    bool good = !lstm_forward(&f, kept);
    good = good && finite(output, whole(steps * size)) && finite(h_n, whole(size)) && finite(c_n, whole(size));
    if (!trains) return good;
    good = good && (!in_floats || finite(gates, 4 * steps * size));

    const int64_t numbers = (kept ? 2 : 4) * steps * size;  // two of bf16 are as large as one of float32
    Array grad_output(results(steps * size)), grad_gates(numbers, false), grad_h0(size, false), grad_c0(size, false);
    Array grad_h_n(size), grad_c_n(size);
    if (results_rounded(kept)) halve(grad_output, results(steps * size));
    Array grad_ih(4 * hidden * features, false), grad_hh(4 * hidden * hidden, false), grad_bias(4 * hidden, false);
    Array packed_back(packed_backward_bytes(hidden, hidden, kept) / 4, false), packed_ih_back(packed_backward_bytes(hidden, features, kept) / 4, false);
    Array grad_x(in_floats ? 0 : batch * steps * features, false);
    pack_backward(weight, packed_back, hidden, hidden, kept);
    pack_backward(weight_ih, packed_ih_back, hidden, features, kept);
    Backward b = {batch, steps, hidden, reverse, threads, by_rows, packed_back, c0, masked ? lengths.get() : nullptr,
                  gates, 4 * size, 4 * hidden, cells, size, hidden, grad_output, size, hidden, grad_h_n, grad_c_n,
                  tiles ? nullptr : (float*)grad_gates, 4 * size, 4 * hidden, grad_h0, grad_c0, x, batch * features, features, features,
                  output, size, hidden, steps % 2 ? (float*)h0 : nullptr, grad_ih, grad_hh, grad_bias, threads,
                  resets.get(), packed_ih_back, in_floats ? nullptr : (float*)grad_x, 0};
    good = good && !lstm_backward(&b, kept);
    good = good && finite(grad_ih, 4 * hidden * features) && finite(grad_hh, 4 * hidden * hidden) && finite(grad_bias, 4 * hidden);
    good = good && (tiles || finite(grad_gates, numbers)) && (in_floats || finite(grad_x, batch * steps * features));
    return good && finite(grad_h0, size) && finite(grad_c0, size);
}

// All layers in one call, then a step with the state in place, and a call after a weight was changed.
bool run_layers(int64_t batch, int64_t steps, int64_t hidden, int64_t threads, bool by_rows, bool masked, int kept) {
    const int64_t layers = 1 + random_bits() % 3, directions = 1 + random_bits() % 2;
    const int64_t features = random_bits() % 2 ? random_bits() % 2 : hidden + 2;
    const int64_t blocks = (hidden + LANES - 1) / LANES, count = layers * directions, width = directions * hidden;
    std::vector<Array> arrays;  // what the structures point into
    std::vector<Source> sources;
    std::vector<Direction> weights;
    for (int64_t i = 0; i < count; ++i) {
        float* packed[2];
        float* scale[2];
        for (int64_t depth : {i < directions ? features : width, hidden}) {
            const int which = sources.size() % 2;
            float* weight = arrays.emplace_back(4 * hidden * depth);
            packed[which] = arrays.emplace_back(packed_bytes(hidden, depth, kept) / 4, false);
            scale[which] = arrays.emplace_back(4 * hidden, false);
            pack_forward(weight, packed[which], scale[which], hidden, depth, kept);
            sources.push_back({weight, 4 * hidden * depth, mark(weight, 4 * hidden * depth),
                               mark_all(weight, 4 * hidden * depth)});
        }
        float* bias = arrays.emplace_back(4 * hidden);
        weights.push_back({packed[0], packed[1], bias, bias, in_bytes(kept) ? scale[0] : nullptr,
                           in_bytes(kept) ? scale[1] : nullptr});
    }
    const Layers all = {layers, directions, features, hidden, kept, sources.data(), weights.data()};
    std::unique_ptr<int32_t[]> lengths(new int32_t[batch]);
    for (int64_t b = 0; b < batch; ++b) lengths[b] = static_cast<int32_t>(random_bits() % (steps + 1));
    const int64_t size = count * batch * hidden;
    Array x(batch * steps * features), output(batch * steps * width, false), h(size, false), c(size, false);
    const std::unique_ptr<uint8_t[]> resets = some_resets(directions * steps * batch), anew = some_resets(directions * batch);
    const LayersCall call = {&all, batch, steps, static_cast<int64_t>(random_bits() % 2), threads, by_rows, 2, x, nullptr, nullptr,
                             masked ? lengths.get() : nullptr, resets.get(), output, h, c};
    bool good = !lstm_layers(&call);
    good = good && finite(output, batch * steps * width) && finite(h, size) && finite(c, size);
    // The same with some of it in bf16, two numbers of which are counted as one.
    const int64_t halves = random_bits() % 16, input = batch * steps * features;
    const auto counted = [=](int64_t count, int64_t which) { return halves & which ? (count + 1) / 2 : count; };
    Array given(counted(input, HALF_X)), h0(counted(size, HALF_H0)), c0(counted(size, HALF_C0));
    if (halves & HALF_X) halve(given, counted(input, HALF_X));
    if (halves & HALF_H0) halve(h0, counted(size, HALF_H0));
    if (halves & HALF_C0) halve(c0, counted(size, HALF_C0));
    const int64_t outputs = batch * steps * width;
    Array mixed(counted(outputs, HALF_RESULTS), false), h_n(counted(size, HALF_RESULTS), false), c_n(counted(size, HALF_RESULTS), false);
    const LayersCall cast = {&all, batch, steps, static_cast<int64_t>(random_bits() % 2), threads, by_rows, 1, given, h0, c0,
                             masked ? lengths.get() : nullptr, resets.get(), mixed, h_n, c_n, halves};
    good = good && !lstm_layers(&cast);
    // The last number of an odd count has no other beside it.
    const auto whole = [=](int64_t count) { return halves & HALF_RESULTS ? count / 2 : count; };
    good = good && finite(mixed, whole(outputs)) && finite(h_n, whole(size)) && finite(c_n, whole(size));
    Array one(batch * features), next(batch * width, false);
    LayersCall step = {&all, batch, 1, 1, threads, by_rows, 1, one, h, c, nullptr, anew.get(), next, h, c};
    good = good && !lstm_layers(&step);
    good = good && finite(next, batch * width) && finite(h, size) && finite(c, size);
    const_cast<float*>(sources.back().values)[random_bits() % sources.back().count] += 1.0f;
    step.look = 2;
    return good && lstm_layers(&step) == CHANGED;
}

// Accesses depend on every size; races on who shares what, for which one thread and most sizes are of no use. There must be full
// vectors among them: ThreadSanitizer does not see what a masked one reads. The last sizes are those where the left operand of
// a gradient is copied, where inputs are projected more than once, and where sums of integers get fewer levels.
const int64_t FULL_VECTORS = 64;
#if defined(FOR_RACES)
const int64_t HIDDEN[] = {3, 17, FULL_VECTORS}, BATCHES[] = {1, 2, 7, 13, 37}, THREADS[] = {2, 3};
const int64_t LARGER[][3] = {{130, 3, 3}, {9, 1, 70}, {130, 1, 66}};
#else
const int64_t HIDDEN[] = {1, 3, 8, 15, 17, 33, 65}, BATCHES[] = {0, 1, 2, 5, 7, 13, 37}, THREADS[] = {1, 2, 3};
const int64_t LARGER[][3] = {{130, 3, 3}, {9, 1, 70}, {130, 1, 66}, {521, 2, 2}};
#endif

}  // namespace

int main() {
    int runs = 0, failures = 0;
    std::vector<int> storages = {FP32, BF16, INT8};
    for (int kept : {SPLIT, BF16_TRAINED, W8A8})
        if (!*hinders(kept)) storages.push_back(kept);
    // Where the processor has tiles, few others of these walk in vectors: threads that share units, in full ones, must.
    const auto kept_in = [&](int64_t hidden, int mode) {
        return hidden == FULL_VECTORS && !(mode & 1) ? static_cast<int>(FP32) : storages[runs % storages.size()];
    };
    // A wrong result does not end the program: a sanitizer may see its cause only in a later run.
    const auto check = [&](int64_t hidden, int64_t batch, int64_t threads, int mode, int kept, int64_t steps, int64_t layers_steps) {
        ++runs;
        if (run(batch, steps, hidden, threads, mode & 1, mode & 2, mode & 4, kept) &&
            run_layers(batch, layers_steps, hidden, threads, mode & 1, mode & 4, kept)) return;
        ++failures;
        std::printf("hidden %ld batch %ld threads %ld mode %d: a result is not finite, or a change unseen\n",
                    (long)hidden, (long)batch, (long)threads, mode);
    };
    for (int64_t hidden : HIDDEN)
        for (int64_t batch : BATCHES)
            for (int64_t threads : THREADS)
                for (int mode = 0; mode < 8; ++mode) {
                    const int64_t steps = 1 + random_bits() % 6, layers_steps = 1 + random_bits() % 6;
                    check(hidden, batch, threads, mode, kept_in(hidden, mode), steps, layers_steps);
                }
    for (const auto& [hidden, batch, steps] : LARGER)
        for (int64_t threads : {1, 3})
            for (int mode = 0; mode < 8; mode += hidden > 500 ? 7 : 3)
                check(hidden, batch, threads, mode, hidden > 500 ? INT8 : storages[runs % storages.size()], steps, steps);
    if (failures) return 1;
    std::printf("%d runs, every result finite\n", runs);
    return 0;
}
