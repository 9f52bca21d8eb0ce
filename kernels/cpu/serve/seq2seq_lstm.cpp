// The C interface of seq2seq_lstm.h over the kernel's walk through time, in one thread.

#include "seq2seq_lstm.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernel/walk.h"
#include "kernel/weights.h"

namespace {

// Numbers of gates_input at most: so many steps are projected at a time, at least one.
constexpr int64_t PROJECTED_AT_ONCE = 1 << 16;

// The head of weights.bin, which float32 numbers follow: of each layer weight_ih (4H, input), weight_hh (4H, H), bias_ih and
// bias_hh (4H,); then the linear head's weight (outputs, H) and bias (outputs,), if there is one.
struct Header {
    char magic[8];
    int64_t layers, input, hidden, kept, outputs;
};

struct Layer {
    int64_t features;
    std::unique_ptr<Memory<char>> packed_ih, packed;
    std::vector<float> bias_ih, bias_hh, scale_ih, scale, h, c;
};

std::vector<float> floats(std::FILE* file, int64_t count) {
    std::vector<float> values(count);
    if (std::fread(values.data(), sizeof(float), count, file) != static_cast<size_t>(count))
        throw std::runtime_error("it ends before its last weight: export it again");
    return values;
}

struct Closed {
    void operator()(std::FILE* file) const { std::fclose(file); }
};

}  // namespace

struct seq2seq_lstm {
    Header header{};
    int64_t batch, at_once = 1;
    std::vector<Layer> layers;
    std::vector<float> gates_input, scratch, between[2], head_bias;
    std::unique_ptr<Memory<float>> head;
    Room sizes{};
    std::unique_ptr<Memory<char>> room;
    Lengths lengths{nullptr, 0};
    Barrier barrier{1};

    seq2seq_lstm(const char* path, int64_t batch) : batch(batch) {
        if (batch < 1) throw std::runtime_error("batch is " + std::to_string(batch) + ", expected at least 1");
        const std::unique_ptr<std::FILE, Closed> opened(std::fopen(path, "rb"));
        std::FILE* const file = opened.get();
        if (!file) throw std::runtime_error("it cannot be opened");
        if (std::fread(&header, sizeof header, 1, file) != 1 || std::memcmp(header.magic, "S2SLSTM1", 8) != 0)
            throw std::runtime_error("it is no weights.bin of an exported LSTM");
        const int64_t largest = int64_t{1} << 24;
        for (int64_t size : {header.layers, header.input, header.hidden})
            if (size < 1 || size > largest) throw std::runtime_error("its sizes are damaged: export it again");
        if (header.outputs < 0 || header.outputs > largest)
            throw std::runtime_error("its sizes are damaged: export it again");
        if (header.kept != FP32 && header.kept != BF16 && !in_bytes(header.kept))
            throw std::runtime_error("its precision is damaged: export it again");
        if (const char* reason = hinders(header.kept); *reason)
            throw std::runtime_error(std::string(reason) + ": export it with another precision");
        const int64_t hidden = header.hidden, size = batch * hidden;
        for (int64_t layer = 0; layer < header.layers; ++layer) {
            Layer& own = layers.emplace_back();
            own.features = layer ? hidden : header.input;
            packed(file, own.packed_ih, own.scale_ih, own.features);
            packed(file, own.packed, own.scale, hidden);
            own.bias_ih = floats(file, 4 * hidden);
            own.bias_hh = floats(file, 4 * hidden);
            own.h.assign(size, 0.0f);
            own.c.assign(size, 0.0f);
        }
        if (header.outputs) {
            const std::vector<float> weight = floats(file, header.outputs * hidden);
            head_bias = floats(file, header.outputs);
            pack_head(weight);
        }
        if (std::fgetc(file) != EOF) throw std::runtime_error("it goes on after its last weight: export it again");
        at_once = std::max<int64_t>(1, PROJECTED_AT_ONCE / (4 * size));
        gates_input.resize(4 * at_once * size);
        scratch.resize(2 * size);
        for (std::vector<float>& output : between) output.resize(at_once * size);
        sizes = room_of(header.kept, batch, at_once, hidden, header.input, hidden, true, 1);
        room = std::make_unique<Memory<char>>(sizes.of(1), "converted rows");
    }

    void packed(std::FILE* file, std::unique_ptr<Memory<char>>& to, std::vector<float>& scale, int64_t depth) const {
        const std::vector<float> weight = floats(file, 4 * header.hidden * depth);
        to = std::make_unique<Memory<char>>(forward_bytes(header.hidden, depth, header.kept), "weights");
        scale.resize(in_bytes(header.kept) ? 4 * header.hidden : 0);
        packed_forward(weight.data(), to->data(), scale.data(), header.hidden, depth, header.kept);
    }

    int64_t head_blocks() const { return (header.outputs + 4 * LANES - 1) / (4 * LANES); }

    // [block of 4 vectors of outputs][k][4 vectors]
    void pack_head(const std::vector<float>& weight) {
        const int64_t hidden = header.hidden, count = head_blocks() * hidden * 4 * LANES;
        head = std::make_unique<Memory<float>>(count, "weights");
        std::fill(head->data(), head->data() + count, 0.0f);
        for (int64_t output = 0; output < header.outputs; ++output)
            for (int64_t k = 0; k < hidden; ++k)
                (*head)[(output / (4 * LANES) * hidden + k) * 4 * LANES + output % (4 * LANES)] = weight[output * hidden + k];
    }

    // h (rows, H), rows apart by `apart`, to y (rows, outputs), rows apart by `y_apart`.
    void project_head(const float* h, int64_t apart, int64_t rows, float* y, int64_t y_apart) const {
        const int64_t hidden = header.hidden;
        for (int64_t block = 0; block < head_blocks(); ++block)
            for (int64_t row = 0; row < rows; row += ROWS) {
                const int count = static_cast<int>(std::min<int64_t>(rows - row, ROWS));
                const float* from[ROWS];
                for (int r = 0; r < count; ++r) from[r] = h + (row + r) * apart;
                vec sums[ROWS][4] = {};
                product<4>(count, sums, from, hidden, head->data() + block * hidden * 4 * LANES, 4 * LANES, LANES);
                for (int r = 0; r < count; ++r)
                    for (int v = 0; v < 4; ++v) {
                        const int64_t at = (block * 4 + v) * LANES;
                        if (at >= header.outputs) continue;
                        const int n = static_cast<int>(std::min<int64_t>(header.outputs - at, LANES));
                        store(y + (row + r) * y_apart + at, sums[r][v] + load(head_bias.data() + at, n), n);
                    }
            }
    }

    // Up to at_once steps of x, whose rows are `x_row` apart, to y, whose rows are `y_row` apart.
    void part(int64_t steps, const float* x, int64_t x_row, float* y, int64_t y_row) {
        const int64_t hidden = header.hidden;
        for (int64_t layer = 0; layer < header.layers; ++layer) {
            Layer& own = layers[layer];
            const bool last = layer + 1 == header.layers && !header.outputs;
            float* const to = last ? y : between[layer % 2].data();
            const int64_t to_row = last ? y_row : steps * hidden;
            const Forward call = {
                batch, steps, hidden, 0, 1, 1,
                gates_input.data(), 4 * hidden, steps * 4 * hidden, steps,
                x, own.features, x_row, own.features,
                own.packed_ih->data(), own.bias_ih.data(), own.bias_hh.data(), own.packed->data(),
                in_bytes(header.kept) ? own.scale_ih.data() : nullptr, in_bytes(header.kept) ? own.scale.data() : nullptr,
                own.h.data(), own.c.data(), nullptr,
                to, hidden, to_row, own.h.data(), own.c.data(), nullptr, 0, 0, nullptr, 0, 0, scratch.data()};
            walk(&call, header.kept, lengths, barrier, room->data(), sizes, 0, 1);
            x = to;
            x_row = to_row;
        }
        for (int64_t b = 0; header.outputs && b < batch; ++b)
            project_head(x + b * x_row, hidden, steps, y + b * y_row, header.outputs);
    }
};

extern "C" {

seq2seq_lstm* seq2seq_lstm_create(const char* weights, int64_t batch, char* message, size_t message_size) {
    const char* const path = weights ? weights : "";
    try {
        return new seq2seq_lstm(path, batch);
    } catch (const Shortage& shortage) {
        if (message) std::snprintf(message, message_size, "%s: no memory for %s", path, shortage.purpose);
    } catch (const std::bad_alloc&) {
        if (message) std::snprintf(message, message_size, "%s: no memory", path);
    } catch (const std::exception& error) {
        if (message) std::snprintf(message, message_size, "%s: %s", path, error.what());
    }
    return nullptr;
}

int64_t seq2seq_lstm_input_size(const seq2seq_lstm* lstm) { return lstm->header.input; }

int64_t seq2seq_lstm_output_size(const seq2seq_lstm* lstm) {
    return lstm->header.outputs ? lstm->header.outputs : lstm->header.hidden;
}

const char* seq2seq_lstm_instructions(const seq2seq_lstm* lstm) {
    return instructions_for(lstm->header.kept, lstm->header.hidden, lstm->batch);
}

void seq2seq_lstm_reset(seq2seq_lstm* lstm) {
    for (Layer& layer : lstm->layers) {
        std::fill(layer.h.begin(), layer.h.end(), 0.0f);
        std::fill(layer.c.begin(), layer.c.end(), 0.0f);
    }
}

void seq2seq_lstm_step(seq2seq_lstm* lstm, const float* x, float* y) {
    lstm->part(1, x, lstm->header.input, y, seq2seq_lstm_output_size(lstm));
}

void seq2seq_lstm_run(seq2seq_lstm* lstm, int64_t steps, const float* x, float* y) {
    const int64_t input = lstm->header.input, output = seq2seq_lstm_output_size(lstm);
    for (int64_t start = 0; start < steps; start += lstm->at_once)
        lstm->part(std::min(lstm->at_once, steps - start), x + start * input, steps * input, y + start * output,
                   steps * output);
}

void seq2seq_lstm_destroy(seq2seq_lstm* lstm) { delete lstm; }

}  // extern "C"
