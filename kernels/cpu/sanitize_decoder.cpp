// Runs the decoder forward and back over many odd sizes, each buffer exactly as large as it must be, for AddressSanitizer and
// ThreadSanitizer to watch. `python -m kernels sanitize` builds and runs it beside sanitize.cpp.

#include "decoder.cpp"
#include "weights.h"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

std::mt19937 random_bits(11);

using Numbers = std::vector<float>;
using Exact = std::vector<double>;

Numbers filled(int64_t count) {
    Numbers values(count);
    std::uniform_real_distribution<float> some(-0.4f, 0.4f);
    for (float& value : values) value = some(random_bits);
    return values;
}

int64_t one_of(int64_t most) { return 1 + static_cast<int64_t>(random_bits() % most); }
bool maybe() { return random_bits() % 2; }

// What a decoder is given, by its place in a list of all numbers; from LAYERS on four of each layer.
enum Given { X, MEMORY, KEYS, VECTOR, H0, C0, FED0, QUERY, QUERY_BIAS, COMBINE, COMBINE_BIAS, LAYERS };

struct Problem {
    FedCall sizes = {};
    bool asks = maybe(), additive = maybe(), masked = maybe(), ends = maybe(), biased = maybe(), drops = false;
    std::vector<Numbers> given;
    std::vector<uint8_t> mask;
    std::vector<int32_t> lengths;
    Numbers dropped;  // of each layer but the last
    Numbers grad_decoded, grad_h, grad_c, grad_fed;  // of the results

    explicit Problem(int64_t threads) {
        FedCall& a = sizes;
        a.batch = one_of(9), a.steps = one_of(4), a.inputs = one_of(20), a.hidden = one_of(40), a.layers = one_of(2);
        a.feeds_context = maybe(), a.memory_steps = random_bits() % 10, a.memory_size = one_of(70);
        a.key_size = asks ? one_of(90) : a.hidden;
        a.fed_size = a.feeds_context ? a.memory_size : a.hidden;
        a.parts = std::min(threads, a.batch), a.scale = 0.7;
        const int64_t states = a.layers * a.batch * a.hidden, all = a.batch * a.memory_steps;
        const auto bias = [this](int64_t count) { return biased ? filled(count) : Numbers(count); };
        given = {filled(a.batch * a.steps * a.inputs), filled(all * a.memory_size), filled(all * a.key_size), filled(a.key_size),
                 filled(states), filled(states), filled(a.batch * a.fed_size), filled(a.key_size * a.hidden), bias(a.key_size),
                 filled(a.hidden * a.joint()), bias(a.hidden)};
        for (int64_t layer = 0; layer < a.layers; ++layer)
            for (Numbers& numbers : std::vector<Numbers>{filled(4 * a.hidden * (layer ? a.hidden : a.width())),
                                                         filled(4 * a.hidden * a.hidden), bias(4 * a.hidden), bias(4 * a.hidden)})
                given.push_back(numbers);
        mask.resize(all);
        for (uint8_t& counts : mask) counts = random_bits() % 3 > 0;
        lengths.resize(a.batch);
        // Also none, and more than there are.
        for (int32_t& length : lengths) length = ends ? static_cast<int32_t>(random_bits() % (a.steps + 2)) : a.steps;
        dropped = filled((a.layers - 1) * a.batch * a.steps * a.hidden);
        drops = a.layers > 1 && maybe();
        grad_decoded = filled(a.batch * a.steps * a.hidden), grad_h = filled(states), grad_c = filled(states);
        grad_fed = filled(a.batch * a.fed_size);
    }
    std::vector<Exact> exact() const {
        std::vector<Exact> found;
        for (const Numbers& numbers : given) found.emplace_back(numbers.begin(), numbers.end());
        return found;
    }
};

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

double linear_of(const Exact& weight, const Exact& bias, int64_t row, const Exact& x) {
    double sum = bias[row];
    for (size_t k = 0; k < x.size(); ++k) sum += weight[row * x.size() + k] * x[k];
    return sum;
}

struct Results {
    Exact decoded, h, c, fed;
};

// What float64 decodes: NaN where a row has nothing to look at.
Results decode(const Problem& problem, const std::vector<Exact>& given) {
    const FedCall& a = problem.sizes;
    Results found = {Exact(a.batch * a.steps * a.hidden), Exact(given[H0].size()), Exact(given[C0].size()),
                     Exact(given[FED0].size())};
    for (int64_t b = 0; b < a.batch; ++b) {
        std::vector<Exact> h, c;
        for (int64_t layer = 0; layer < a.layers; ++layer) {
            const int64_t at = (layer * a.batch + b) * a.hidden;
            h.emplace_back(&given[H0][at], &given[H0][at] + a.hidden);
            c.emplace_back(&given[C0][at], &given[C0][at] + a.hidden);
        }
        Exact fed(&given[FED0][b * a.fed_size], &given[FED0][b * a.fed_size] + a.fed_size);
        for (int64_t t = 0; t < std::min<int64_t>(problem.lengths[b], a.steps); ++t) {
            const double* const x = &given[X][(b * a.steps + t) * a.inputs];
            Exact in(x, x + a.inputs);
            in.insert(in.end(), fed.begin(), fed.end());
            for (int64_t layer = 0; layer < a.layers; ++layer) {
                const Exact* const w = &given[LAYERS + 4 * layer];
                Exact next(a.hidden);
                for (int64_t unit = 0; unit < a.hidden; ++unit) {
                    double sums[4];
                    for (int64_t gate = 0; gate < 4; ++gate)
                        sums[gate] = linear_of(w[0], w[2], gate * a.hidden + unit, in) +
                                     linear_of(w[1], w[3], gate * a.hidden + unit, h[layer]);
                    c[layer][unit] = sigmoid_of(sums[1]) * c[layer][unit] + sigmoid_of(sums[0]) * std::tanh(sums[2]);
                    next[unit] = sigmoid_of(sums[3]) * std::tanh(c[layer][unit]);
                }
                in = h[layer] = next;
                for (int64_t unit = 0; problem.drops && layer + 1 < a.layers && unit < a.hidden; ++unit)
                    in[unit] *= problem.dropped[((layer * a.batch + b) * a.steps + t) * a.hidden + unit];
            }
            Exact joint(a.memory_size, 0.0);
            double total = 0;
            for (int64_t s = 0; s < a.memory_steps; ++s) {
                if (problem.masked && !problem.mask[b * a.memory_steps + s]) continue;
                double score = 0;
                for (int64_t k = 0; k < a.key_size; ++k) {
                    const double key = given[KEYS][(b * a.memory_steps + s) * a.key_size + k];
                    const double asked = problem.asks ? linear_of(given[QUERY], given[QUERY_BIAS], k, in) : in[k];
                    score += problem.additive ? given[VECTOR][k] * std::tanh(asked + key) : asked * key;
                }
                const double weight = std::exp(a.scale * score);
                total += weight;
                for (int64_t k = 0; k < a.memory_size; ++k)
                    joint[k] += weight * given[MEMORY][(b * a.memory_steps + s) * a.memory_size + k];
            }
            for (double& value : joint) value /= total;
            fed = joint;
            joint.insert(joint.end(), in.begin(), in.end());
            double* const decoded = &found.decoded[(b * a.steps + t) * a.hidden];
            for (int64_t unit = 0; unit < a.hidden; ++unit)
                decoded[unit] = std::tanh(linear_of(given[COMBINE], given[COMBINE_BIAS], unit, joint));
            if (!a.feeds_context) fed.assign(decoded, decoded + a.hidden);
        }
        for (int64_t layer = 0; layer < a.layers; ++layer) {
            std::copy(h[layer].begin(), h[layer].end(), &found.h[(layer * a.batch + b) * a.hidden]);
            std::copy(c[layer].begin(), c[layer].end(), &found.c[(layer * a.batch + b) * a.hidden]);
        }
        std::copy(fed.begin(), fed.end(), &found.fed[b * a.fed_size]);
    }
    return found;
}

double times(const Exact& values, const Numbers& grads) {
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i) sum += values[i] * grads[i];
    return sum;
}

// What the gradients are of.
double loss(const Problem& problem, const std::vector<Exact>& given) {
    const Results found = decode(problem, given);
    return times(found.decoded, problem.grad_decoded) + times(found.h, problem.grad_h) + times(found.c, problem.grad_c) +
           times(found.fed, problem.grad_fed);
}

bool same(const Exact& truth, const Numbers& found) {
    double worst = 0;
    for (size_t i = 0; i < truth.size(); ++i) {
        const bool alike = std::isnan(truth[i]) ? std::isnan(found[i]) : std::isfinite(found[i]);
        worst = std::max(worst, !alike ? 1e9 : std::isnan(truth[i]) ? 0.0 : std::fabs(found[i] - truth[i]));
    }
    if (worst > 1e-5) std::printf("off by %g\n", worst);
    return worst <= 1e-5;
}

// Whether the gradients say how the loss changes in a direction; where it is no number they need not.
bool slopes(const Problem& problem, const std::vector<Numbers>& grads) {
    std::vector<Exact> ahead = problem.exact(), behind = ahead;
    double found = 0, size = 0;
    constexpr double STEP = 1e-5;
    for (size_t i = 0; i < grads.size(); ++i) {
        const Numbers direction = filled(static_cast<int64_t>(grads[i].size()));
        for (size_t k = 0; k < direction.size(); ++k) {
            ahead[i][k] += STEP * direction[k];
            behind[i][k] -= STEP * direction[k];
            found += double(direction[k]) * grads[i][k];
            size += std::fabs(double(direction[k]) * grads[i][k]);
        }
    }
    const double truth = (loss(problem, ahead) - loss(problem, behind)) / (2 * STEP);
    if (std::isnan(truth)) return true;
    const bool near = std::fabs(found - truth) <= 1e-6 + 2e-6 * size;
    if (!near) std::printf("a slope of %g in place of %g, of %g\n", found, truth, size);
    return near;
}

bool run(int64_t threads) {
    const Problem problem(threads);
    FedCall a = problem.sizes;
    std::vector<Numbers> parts;
    std::vector<FedLayer> weights;
    const auto packed = [&parts](int64_t count) { return parts.emplace_back(count).data(); };
    const auto bias = [&problem](int64_t place) { return problem.biased ? problem.given[place].data() : nullptr; };
    for (int64_t layer = 0; layer < a.layers; ++layer) {
        using M = FloatWeights;
        const int64_t features = layer ? a.hidden : a.width(), place = LAYERS + 4 * layer;
        float* const ih = packed(M::size(a.hidden, features) / 4);
        float* const hh = packed(M::size(a.hidden, a.hidden) / 4);
        pack(static_cast<M*>(nullptr), problem.given[place].data(), ih, nullptr, a.hidden, features);
        pack(static_cast<M*>(nullptr), problem.given[place + 1].data(), hh, nullptr, a.hidden, a.hidden);
        weights.push_back({ih, hh, bias(place + 2), bias(place + 3)});
    }
    float* const query = packed(linear_size(a.key_size, a.hidden));
    float* const combine = packed(linear_size(a.hidden, a.joint()));
    pack_linear_rows(problem.given[QUERY].data(), query, a.key_size, a.hidden);
    pack_linear_rows(problem.given[COMBINE].data(), combine, a.hidden, a.joint());
    const auto result = [](const Numbers& like) { return Numbers(like.size(), NAN); };
    Numbers h_n = result(problem.grad_h), c_n = result(problem.grad_c), fed_n = result(problem.grad_fed);
    Numbers decoded = result(problem.grad_decoded);
    a.weights = weights.data(), a.x = problem.given[X].data();
    a.memory = problem.given[MEMORY].data(), a.keys = problem.given[KEYS].data();
    a.mask = problem.masked ? problem.mask.data() : nullptr;
    a.lengths = problem.ends ? problem.lengths.data() : nullptr;
    if (problem.asks) a.query = query, a.query_bias = bias(QUERY_BIAS);
    if (problem.additive) a.vector = problem.given[VECTOR].data();
    a.combine = combine, a.combine_bias = bias(COMBINE_BIAS);
    a.dropped = problem.drops ? problem.dropped.data() : nullptr;
    a.h0 = problem.given[H0].data(), a.c0 = problem.given[C0].data(), a.fed0 = problem.given[FED0].data();
    a.h_n = h_n.data(), a.c_n = c_n.data(), a.fed_n = fed_n.data(), a.decoded = decoded.data();
    const Results truth = decode(problem, problem.exact());
    const auto right = [&] {
        return decoder_run(&a) == DONE && same(truth.decoded, decoded) && same(truth.h, h_n) && same(truth.c, c_n) &&
               same(truth.fed, fed_n);
    };
    if (!right()) return false;
    Numbers kept(decoder_kept(&a), NAN);
    a.kept = kept.data();
    std::fill(decoded.begin(), decoded.end(), NAN);
    if (!right()) return false;

    std::vector<Numbers> grads;
    for (const Numbers& numbers : problem.given) grads.push_back(result(numbers));
    const auto grad = [&grads](int64_t place) { return grads[place].data(); };
    std::vector<FedLayerBack> layers;
    for (int64_t place = LAYERS; place < LAYERS + 4 * a.layers; place += 4)
        layers.push_back({problem.given[place].data(), problem.given[place + 1].data(), grad(place), grad(place + 1),
                          grad(place + 2), grad(place + 3)});
    const bool asks = problem.asks, additive = problem.additive;
    a.query = asks ? problem.given[QUERY].data() : nullptr, a.combine = problem.given[COMBINE].data();
    const FedBack back = {
        &a, layers.data(), problem.grad_decoded.data(), problem.grad_h.data(), problem.grad_c.data(), problem.grad_fed.data(),
        grad(X), grad(H0), grad(C0), grad(FED0), grad(MEMORY), grad(KEYS), asks ? grad(QUERY) : nullptr,
        asks ? grad(QUERY_BIAS) : nullptr, additive ? grad(VECTOR) : nullptr, grad(COMBINE), grad(COMBINE_BIAS), threads};
    if (decoder_back(&back) != DONE) return false;
    // What does not exist changes nothing.
    for (int64_t place : {VECTOR, QUERY, QUERY_BIAS})
        if (!(place == VECTOR ? additive : asks)) std::fill(grads[place].begin(), grads[place].end(), 0.0f);
    return slopes(problem, grads);
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
