// Runs the head over many odd sizes, each buffer exactly as large as it must be, for AddressSanitizer and ThreadSanitizer to
// watch. `python -m kernels sanitize` builds and runs it beside sanitize.cpp.

#include "head.cpp"

#include <cstdio>
#include <memory>
#include <random>

#if defined(HAS_PRODUCTS)
namespace {

std::mt19937 random_bits(7);

std::unique_ptr<float[]> filled(int64_t count) {
    std::unique_ptr<float[]> values(new float[count]);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) values[i] = normal(random_bits);
    return values;
}

// Whether each row's largest output is that of float64, and no output is unwritten.
bool run(int64_t rows, int64_t outputs, int64_t depth, int64_t exact, int64_t threads) {
    const auto weight = filled(outputs * depth), h = filled(rows * depth), bias = filled(outputs);
    const std::unique_ptr<uint8_t[]> packed(new uint8_t[head_bytes(outputs, depth)]);
    const auto scale = filled(outputs), rest = filled(outputs), kept = filled(outputs);
    const auto output = filled(rows * outputs);
    std::fill(output.get(), output.get() + rows * outputs, NAN);
    head_pack(weight.get(), packed.get(), scale.get(), rest.get(), kept.get(), outputs, depth);
    const HeadCall call = {weight.get(), random_bits() % 2 ? bias.get() : nullptr, packed.get(), scale.get(), rest.get(), kept.get(),
                           h.get(), output.get(), rows, outputs, depth, exact, threads};
    if (head_run(&call) < rows) return false;
    for (int64_t row = 0; row < rows; ++row) {
        double largest = -INFINITY, found = -INFINITY;
        for (int64_t i = 0; i < outputs; ++i) {
            double truth = call.bias ? bias[i] : 0.0;
            for (int64_t k = 0; k < depth; ++k) truth += static_cast<double>(weight[i * depth + k]) * h[row * depth + k];
            if (!std::isfinite(output[row * outputs + i])) return false;
            largest = std::max(largest, truth);
            found = std::max<double>(found, output[row * outputs + i]);
        }
        if (std::fabs(largest - found) > 1e-5 * (1.0 + depth)) return false;
    }
    return true;
}

// Races depend on who shares what, for which one thread is of no use. ThreadSanitizer sees reads of full vectors alone.
#if defined(FOR_RACES)
const int64_t OUTPUTS[] = {64, 128, 33}, DEPTHS[] = {7, 37}, ROW_COUNTS[] = {2, 5, 11}, THREADS[] = {2, 3};
#else
const int64_t OUTPUTS[] = {1, 7, 16, 33, 100}, DEPTHS[] = {1, 2, 7, 16, 37, 130}, ROW_COUNTS[] = {1, 2, 5, 11};
const int64_t THREADS[] = {1, 2, 3};
#endif

}  // namespace

int main() {
    int runs = 0;
    for (int64_t outputs : OUTPUTS)
        for (int64_t depth : DEPTHS)
            for (int64_t rows : ROW_COUNTS)
                for (int64_t threads : THREADS) {
                    if (!run(rows, outputs, depth, 1 + random_bits() % 12, threads)) {
                        std::printf("rows %ld outputs %ld depth %ld threads %ld: not the largest output of float64\n", (long)rows,
                                    (long)outputs, (long)depth, (long)threads);
                        return 1;
                    }
                    ++runs;
                }
    std::printf("%d runs, every largest output right\n", runs);
    return 0;
}
#else
int main() { std::printf("no runs: %s\n", head_hindrance()); }
#endif
