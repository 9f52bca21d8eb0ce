// Runs the decoder over many odd sizes, each buffer exactly as large as it must be, for AddressSanitizer and ThreadSanitizer
// to watch. `python -m kernels sanitize` builds and runs it beside sanitize.cpp.

#include "decoder.cpp"
#include "weights.h"

#include <cstdio>
#include <random>

namespace {

std::mt19937 random_bits(11);

using Numbers = std::vector<float>;

Numbers filled(int64_t count) {
    Numbers values(count);
    std::uniform_real_distribution<float> some(-0.4f, 0.4f);
    for (float& value : values) value = some(random_bits);
    return values;
}

int64_t one_of(int64_t most) { return 1 + static_cast<int64_t>(random_bits() % most); }

struct Linear {
    Numbers weight, bias, packed;
    int64_t outputs, depth;
    Linear(int64_t outputs, int64_t depth, bool biased)
        : weight(filled(outputs * depth)), bias(biased ? filled(outputs) : Numbers(outputs)), packed(linear_size(outputs, depth)),
          outputs(outputs), depth(depth) {
        pack_linear_rows(weight.data(), packed.data(), outputs, depth);
    }
    double operator()(int64_t row, const std::vector<double>& x) const {
        double sum = bias[row];
        for (int64_t k = 0; k < depth; ++k) sum += static_cast<double>(weight[row * depth + k]) * x[k];
        return sum;
    }
};

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

// Whether what is decoded is that of float64: NaN where a row has nothing to look at.
bool run(int64_t threads) {
    const int64_t batch = one_of(9), steps = one_of(4), inputs = one_of(20), hidden = one_of(40), layers = one_of(2);
    const bool additive = random_bits() % 2, masked = random_bits() % 2, ends = random_bits() % 2;
    const bool context_fed = random_bits() % 2, biased = random_bits() % 2;
    const int64_t memory_steps = random_bits() % 10, memory_size = one_of(70), key_size = additive ? one_of(40) : hidden;
    const int64_t fed_size = context_fed ? memory_size : hidden;
    std::vector<Numbers> parts;
    std::vector<FedLayer> weights;
    std::vector<Linear> gates;
    for (int64_t layer = 0, features = inputs + fed_size; layer < layers; ++layer, features = hidden) {
        const Linear ih(4 * hidden, features, biased), hh(4 * hidden, hidden, biased);
        using M = Widened<float>;
        parts.emplace_back(M::size(hidden, features) / 4);
        pack(static_cast<M*>(nullptr), ih.weight.data(), parts.back().data(), nullptr, hidden, features);
        parts.emplace_back(M::size(hidden, hidden) / 4);
        pack(static_cast<M*>(nullptr), hh.weight.data(), parts.back().data(), nullptr, hidden, hidden);
        gates.push_back(ih);
        gates.push_back(hh);
    }
    for (int64_t layer = 0; layer < layers; ++layer)
        weights.push_back({parts[2 * layer].data(), parts[2 * layer + 1].data(), biased ? gates[2 * layer].bias.data() : nullptr,
                           biased ? gates[2 * layer + 1].bias.data() : nullptr});
    const Linear query(key_size, hidden, biased), combine(hidden, memory_size + hidden, biased);
    const Numbers x = filled(batch * steps * inputs), memory = filled(batch * memory_steps * memory_size);
    const Numbers keys = filled(batch * memory_steps * key_size), vector = filled(key_size);
    const Numbers h0 = filled(layers * batch * hidden), c0 = filled(layers * batch * hidden), fed0 = filled(batch * fed_size);
    std::vector<uint8_t> mask(batch * memory_steps);
    for (uint8_t& counts : mask) counts = random_bits() % 3 > 0;
    std::vector<int64_t> lengths(batch);
    // Also none, and more than there are.
    for (int64_t& length : lengths) length = ends ? static_cast<int64_t>(random_bits() % (steps + 2)) : steps;
    Numbers h_n(h0.size(), NAN), c_n(c0.size(), NAN), fed_n(fed0.size(), NAN), decoded(batch * steps * hidden, NAN);
    const FedCall call = {
        batch, steps, inputs, fed_size, hidden, layers, memory_steps, memory_size, key_size, context_fed, threads,
        weights.data(), x.data(), memory.data(), keys.data(), masked ? mask.data() : nullptr,
        additive ? query.packed.data() : nullptr, additive && biased ? query.bias.data() : nullptr,
        additive ? vector.data() : nullptr, 0.7,
        combine.packed.data(), biased ? combine.bias.data() : nullptr, ends ? lengths.data() : nullptr,
        h0.data(), c0.data(), fed0.data(), h_n.data(), c_n.data(), fed_n.data(), decoded.data()};
    if (decoder_run(&call) != DONE) return false;

    double worst = 0;
    const auto differs = [&worst](float found, double truth) {
        const bool alike = std::isnan(truth) ? std::isnan(found) : std::isfinite(found);
        worst = std::max(worst, !alike ? 1e9 : std::isnan(truth) ? 0.0 : std::fabs(found - truth));
    };
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<std::vector<double>> h, c;
        for (int64_t layer = 0; layer < layers; ++layer) {
            const int64_t at = (layer * batch + b) * hidden;
            h.emplace_back(h0.begin() + at, h0.begin() + at + hidden);
            c.emplace_back(c0.begin() + at, c0.begin() + at + hidden);
        }
        std::vector<double> fed(fed0.begin() + b * fed_size, fed0.begin() + (b + 1) * fed_size);
        for (int64_t t = 0; t < std::min(lengths[b], steps); ++t) {
            std::vector<double> in(x.begin() + (b * steps + t) * inputs, x.begin() + (b * steps + t + 1) * inputs);
            in.insert(in.end(), fed.begin(), fed.end());
            for (int64_t layer = 0; layer < layers; ++layer) {
                std::vector<double> next(hidden);
                for (int64_t unit = 0; unit < hidden; ++unit) {
                    double sums[4];
                    for (int64_t gate = 0; gate < 4; ++gate)
                        sums[gate] = gates[2 * layer](gate * hidden + unit, in) +
                                     gates[2 * layer + 1](gate * hidden + unit, h[layer]);
                    c[layer][unit] = sigmoid_of(sums[1]) * c[layer][unit] + sigmoid_of(sums[0]) * std::tanh(sums[2]);
                    next[unit] = sigmoid_of(sums[3]) * std::tanh(c[layer][unit]);
                }
                in = h[layer] = next;
            }
            std::vector<double> joint(memory_size, 0.0);
            double total = 0;
            for (int64_t s = 0; s < memory_steps; ++s) {
                if (masked && !mask[b * memory_steps + s]) continue;
                double score = 0;
                for (int64_t k = 0; k < key_size; ++k) {
                    const double key = keys[(b * memory_steps + s) * key_size + k];
                    score += additive ? vector[k] * std::tanh(query(k, in) + key) : in[k] * key;
                }
                const double weight = std::exp(0.7 * score);
                total += weight;
                for (int64_t k = 0; k < memory_size; ++k) joint[k] += weight * memory[(b * memory_steps + s) * memory_size + k];
            }
            for (double& found : joint) found /= total;
            fed = joint;
            joint.insert(joint.end(), in.begin(), in.end());
            std::vector<double> combined(hidden);
            for (int64_t unit = 0; unit < hidden; ++unit) {
                combined[unit] = std::tanh(combine(unit, joint));
                differs(decoded[(b * steps + t) * hidden + unit], combined[unit]);
            }
            if (!context_fed) fed = combined;
        }
        for (int64_t layer = 0; layer < layers; ++layer)
            for (int64_t unit = 0; unit < hidden; ++unit) {
                differs(h_n[(layer * batch + b) * hidden + unit], h[layer][unit]);
                differs(c_n[(layer * batch + b) * hidden + unit], c[layer][unit]);
            }
        for (int64_t k = 0; k < fed_size; ++k) differs(fed_n[b * fed_size + k], fed[k]);
    }
    if (worst > 1e-5) std::printf("off by %g\n", worst);
    return worst <= 1e-5;
}

}  // namespace

int main() {
    int runs = 0;
    for (; runs < 150; ++runs)
        if (!run(1 + runs % 3)) {
            std::printf("run %d: not what float64 decodes\n", runs);
            return 1;
        }
    std::printf("%d runs, all as float64 decodes\n", runs);
    return 0;
}
