// One LSTM layer's recurrence on a CPU, forward and backward, in float32: the whole time loop in one team of threads.
// Weights may be kept in bfloat16 or, a scale a row, in int8, where reading them is what takes the time.
//
// Vectors are the compiler's own (GCC and Clang), as wide as the target has them, so one source serves AVX2, AVX-512 and
// NEON. Weights come packed so that a block of hidden units reads one stream. Where the batch is large enough each
// thread walks through time with its own rows and nobody waits for anybody; else threads share out the hidden units and
// meet once a step.

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <sched.h>
#include <vector>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(PLAIN_THREADS)  // where there is no OpenMP, and for ThreadSanitizer, which does not know OpenMP's barriers
#include <thread>
#else
#include <omp.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int ROWS = 6;  // 6 rows x 4 vectors of sums, 4 of weights and 1 of h fill 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int ROWS = 3;
#else
constexpr int LANES = 4;
constexpr int ROWS = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

inline vec all(float x) { return x - vec{}; }  // x - 0 is x, which x + 0 is not for -0
inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec x) { *reinterpret_cast<loose*>(p) = x; }

// Weights as they are kept: float32, the upper half of a float32 (bfloat16), or int8 without its scale.
inline vec load_weights(const float* p) { return load(p); }
inline vec load_weights(const uint16_t* p) {
#if defined(__AVX512F__)
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#elif defined(__AVX2__)
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#else
    return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), uvec) << 16);
#endif
}
inline vec load_weights(const int8_t* p) {
    // GCC 12 converts vectors of bytes lane by lane, hence the processor's own instruction where there is one.
#if defined(__AVX512F__)
    const ivec wide = (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
    const ivec wide = (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
    const ivec wide = __builtin_convertvector(*reinterpret_cast<const bytes*>(p), ivec);
#endif
    return __builtin_convertvector(wide, vec);
}

// The first `n` lanes, zeros after them.
inline vec load(const float* p, int n) {
    if (n >= LANES) return load(p);
    vec x = {};
    std::memcpy(&x, p, 4 * n);
    return x;
}
inline void store(float* p, vec x, int n) {
    if (n >= LANES) return store(p, x);
    std::memcpy(p, &x, 4 * n);
}

inline vec absolute(vec x) { return (vec)((ivec)x & 0x7fffffff); }

// exp of what is not positive, to about one roundoff; below -87 it is 0 to float32's normal range.
inline vec exp_negative(vec x) {
    x = x < -87.0f ? all(-87.0f) : x;
    vec n = x * 1.44269504088896341f - 0.5f;          // round to nearest by truncation of what is negative
    ivec k = __builtin_convertvector(n, ivec);
    n = __builtin_convertvector(k, vec);
    vec r = x - n * 0.693359375f - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);                    // Cephes' expf
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((k + 127) << 23);
}

inline vec sigmoid(vec x) {
    vec e = exp_negative(-absolute(x));
    return (x >= 0.0f ? all(1.0f) : e) / (1.0f + e);
}

inline vec tanh_of(vec x) {
    vec s = x * x;
    // Taylor's series near zero, where the quotient below would cancel; its next term is under 1e-8 of the sum.
    vec series = x * (1.0f + s * (-1.0f / 3 + s * (2.0f / 15 + s * (-17.0f / 315 + s * (62.0f / 2835)))));
    vec e = exp_negative(-2.0f * absolute(x));
    vec large = (1.0f - e) / (1.0f + e);
    return absolute(x) < 0.25f ? series : (x >= 0.0f ? large : -large);
}

// Round to nearest, ties to even; a NaN stays one.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Threads of a team meet here. Each tells on a cache line of its own how often it has come, and looks at the lines of the
// others: a meeting costs one line's way from core to core, where a shared counter costs several one after the other.
// Spins for some microseconds, then lets others run, so that a busy neighbour costs a scheduler's slice at most once and
// never a stall of everybody.
class Barrier {
    struct alignas(64) Line {
        std::atomic<uint32_t> comings{0};
    };
    std::vector<Line> lines;

public:
    explicit Barrier(int64_t threads) : lines(threads > 1 ? threads : 0) {}
    void wait(int thread, int threads) {
        if (threads == 1) return;
        const uint32_t now = lines[thread].comings.load(std::memory_order_relaxed) + 1;
        lines[thread].comings.store(now, std::memory_order_release);
        for (int other = 0, spins = 0; other < threads; ++other)
            for (; static_cast<int32_t>(lines[other].comings.load(std::memory_order_acquire) - now) < 0; ++spins) {
                if (spins > 4000) sched_yield();
#if defined(__x86_64__) || defined(__i386__)
                else __builtin_ia32_pause();
#endif
            }
    }
};

// Call work(thread, threads) in each thread of a team.
template <typename F>
inline void team(int64_t wanted, F work) {
#if defined(PLAIN_THREADS)
    std::vector<std::thread> others;
    for (int64_t t = 1; t < wanted; ++t) others.emplace_back([=] { work(static_cast<int>(t), static_cast<int>(wanted)); });
    work(0, static_cast<int>(wanted));
    for (std::thread& other : others) other.join();
#else
    if (wanted == 1) return work(0, 1);
#pragma omp parallel num_threads(static_cast<int>(wanted))
    work(omp_get_thread_num(), omp_get_num_threads());
#endif
}

// Rows [first, last) of one thread, and blocks of LANES hidden units.
struct Share {
    int64_t row, rows_end, block, blocks_end;
};

inline Share share(int64_t batch, int64_t blocks, bool by_rows, int thread, int threads) {
    if (by_rows) return {batch * thread / threads, batch * (thread + 1) / threads, 0, blocks};
    return {0, batch, blocks * thread / threads, blocks * (thread + 1) / threads};
}

// sums[r][v] += rows of `a` (stride `stride`) times VECTORS columns; the weights of k stand at w + k * step + v * next.
template <int R, int VECTORS, typename W>
inline void product(vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const W* w, int64_t step,
                    int64_t next) {
    if constexpr (R == 1) {
        // One row has too few sums to hide the latency of an addition, so even and odd k are summed apart.
        vec odd[VECTORS] = {};
        int64_t k = 0;
        for (; k + 1 < depth; k += 2) {
            for (int v = 0; v < VECTORS; ++v) {
                sums[0][v] += all(a[k]) * load_weights(w + k * step + v * next);
                odd[v] += all(a[k + 1]) * load_weights(w + (k + 1) * step + v * next);
            }
        }
        for (; k < depth; ++k)
            for (int v = 0; v < VECTORS; ++v) sums[0][v] += all(a[k]) * load_weights(w + k * step + v * next);
        for (int v = 0; v < VECTORS; ++v) sums[0][v] += odd[v];
    } else {
        for (int64_t k = 0; k < depth; ++k) {
            vec weights[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weights[v] = load_weights(w + k * step + v * next);
            for (int r = 0; r < R; ++r) {
                vec x = all(a[r * stride + k]);
                for (int v = 0; v < VECTORS; ++v) sums[r][v] += x * weights[v];
            }
        }
    }
}

// The same for a number of rows that is known only now.
template <int VECTORS, typename W, int R = ROWS>
inline void product(int rows, vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const W* w,
                    int64_t step, int64_t next) {
    if (rows == R) return product<R, VECTORS, W>(sums, a, stride, depth, w, step, next);
    if constexpr (R > 1) product<VECTORS, W, R - 1>(rows, sums, a, stride, depth, w, step, next);
}

// Rows of the operands of transposed_product that are taken together: 32 KB of columns with vectors of 16.
constexpr int64_t CHUNK = 128;

// sums[r][v] += column r of `a` (rows of `stride`) times the rows of `columns`, which are VECTORS vectors wide.
template <int R, int VECTORS>
inline void outer(vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const float* columns) {
    for (int64_t k = 0; k < depth; ++k, a += stride, columns += VECTORS * LANES) {
        vec right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = load(columns + v * LANES);
        for (int r = 0; r < R; ++r) {
            const vec x = all(a[r]);
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += x * right[v];
        }
    }
}

template <int VECTORS, int R = ROWS>
inline void outer(int count, vec (&sums)[ROWS][4], const float* a, int64_t stride, int64_t depth, const float* columns) {
    if (count == R) return outer<R, VECTORS>(sums, a, stride, depth, columns);
    if constexpr (R > 1) outer<VECTORS, R - 1>(count, sums, a, stride, depth, columns);
}

}  // namespace

// Sizes and pointers as kernels/recurrence.py has them, strides in elements, one direction a call.
struct Forward {
    int64_t batch, steps, hidden, reverse, threads, by_rows;
    float* gates_input;        int64_t gi_step, gi_row;  // written first where x is given
    const float* x;            int64_t x_step, x_row, features;  // or null: the projection has been done
    const void* packed_ih;     // pack_forward of weight_ih
    const float* bias_ih;      // (4 * hidden,) or null, with x alone
    const float* bias_hh;
    const void* packed;        // pack_forward of weight_hh
    const float* scale_ih;     // (4 * hidden,) scales of int8 weights, else null
    const float* scale;
    const float* h0;           // (batch, hidden) or null
    const float* c0;           // (batch, hidden) or null
    const int32_t* lengths;    // (batch,) or null
    float* output;             int64_t out_step, out_row;
    float* h_n;                // (batch, hidden)
    float* c_n;                // (batch, hidden)
    float* gates;              int64_t gates_step, gates_row;  // null: not kept
    float* cells;              int64_t cells_step, cells_row;
    float* scratch;            // 2 * batch * hidden
};

// Weights as they lie in a parameter, and the marks of what was packed.
struct Source {
    const float* values;       int64_t count;
    uint64_t sampled, all;
};

struct Direction {
    const void* packed_ih;
    const void* packed;
    const float* bias_ih;      // or null, and so below
    const float* bias_hh;
    const float* scale_ih;
    const float* scale;
};

struct Layers {
    int64_t layers, directions, features, hidden, kept;
    const Source* sources;     // weight_ih and weight_hh of each direction of each layer
    const Direction* weights;  // of each direction of each layer
};

struct Backward {
    int64_t batch, steps, hidden, reverse, threads, by_rows;
    const float* packed;       // pack_backward
    const float* c0;
    const int32_t* lengths;
    const float* gates;        int64_t gates_step, gates_row;
    const float* cells;        int64_t cells_step, cells_row;
    const float* grad_output;  int64_t go_step, go_row;
    const float* grad_h_n;     // or null
    const float* grad_c_n;     // or null
    float* grad_gates;         int64_t gg_step, gg_row;
    float* grad_h0;            // (batch, hidden), also holds the running gradient of h
    float* grad_c0;            // the same of c
};

namespace {

// Whether the projection shares out rows, of which it has batch * steps.
inline bool projected_by_rows(const Forward* a, int threads) { return a->batch * a->steps >= 2 * ROWS * threads; }

// gates_input of a thread's share of rows or of hidden units: x times weight_ih and both biases.
template <typename W>
inline void project(const Forward* a, int thread, int threads) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES, count = a->batch * a->steps;
    const Share mine = share(count, blocks, projected_by_rows(a, threads), thread, threads);
    for (int64_t block = mine.block; block < mine.blocks_end; ++block) {
        const int64_t unit = block * LANES;
        const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
        vec plus[4], by[4];
        for (int gate = 0; gate < 4; ++gate) {
            const int64_t at = gate * hidden + unit;
            plus[gate] = a->bias_ih ? load(a->bias_ih + at, n) + load(a->bias_hh + at, n) : vec{};
            by[gate] = a->scale_ih ? load(a->scale_ih + at, n) : all(1.0f);
        }
        // Row b * steps + t, or t * batch + b where x has the steps first: neighbours in memory are neighbours here.
        const bool rows_first = a->x_row > a->x_step;
        for (int64_t row = mine.row; row < mine.rows_end; row += ROWS) {
            const int rows = static_cast<int>(mine.rows_end - row < ROWS ? mine.rows_end - row : ROWS);
            const int64_t inner = rows_first ? a->steps : a->batch;
            const int64_t stride = rows_first ? a->x_step : a->x_row;
            vec sums[ROWS][4] = {};
            product<4>(rows, sums, a->x + row * stride, stride, a->features,
                       static_cast<const W*>(a->packed_ih) + block * a->features * 4 * LANES, 4 * LANES, LANES);
            for (int r = 0; r < rows; ++r) {
                const int64_t b = rows_first ? (row + r) / inner : (row + r) % inner;
                const int64_t t = rows_first ? (row + r) % inner : (row + r) / inner;
                float* out = a->gates_input + t * a->gi_step + b * a->gi_row + unit;
                for (int gate = 0; gate < 4; ++gate) store(out + gate * hidden, sums[r][gate] * by[gate] + plus[gate], n);
            }
        }
    }
}

// One direction of a layer, in each thread of a team: `blocks` of hidden units or rows of the batch are shared out.
template <typename W>
void walk(const Forward* a, Barrier& barrier, int thread, int threads) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES;
    const Share mine = share(a->batch, blocks, a->by_rows, thread, threads);
    const int64_t first = mine.block * LANES;  // hidden units of this thread
    const int64_t last = mine.blocks_end * LANES < hidden ? mine.blocks_end * LANES : hidden;
    float* after = a->scratch;  // where this step's h goes
    float* spare = a->scratch + a->batch * hidden;
    const float* before = a->h0 ? a->h0 : spare;
    for (int64_t b = mine.row; b < mine.rows_end && first < last; ++b) {
        const int64_t at = b * hidden + first, bytes = 4 * (last - first);
        if (!a->h0) std::memset(spare + at, 0, bytes);
        if (!a->c0) std::memset(a->c_n + at, 0, bytes);
        else if (a->c0 != a->c_n) std::memcpy(a->c_n + at, a->c0 + at, bytes);
    }
    if (a->x) {
        project<W>(a, thread, threads);
        // Whoever shares out hidden units both times reads nothing but what it wrote.
        if (a->by_rows || projected_by_rows(a, threads)) barrier.wait(thread, threads);
    }
    for (int64_t s = 0; s < a->steps; ++s) {
        const int64_t t = a->reverse ? a->steps - 1 - s : s;
        for (int64_t i = mine.block; i < mine.blocks_end; ++i) {
            // Every other step goes the other way: what a cache too small for all weights still holds is wanted first.
            const int64_t block = s % 2 ? mine.blocks_end - 1 - (i - mine.block) : i;
            const int64_t unit = block * LANES;
            const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
            for (int64_t row = mine.row; row < mine.rows_end; row += ROWS) {
                const int rows = static_cast<int>(mine.rows_end - row < ROWS ? mine.rows_end - row : ROWS);
                vec sums[ROWS][4] = {};
                if (s || a->h0)
                    product<4>(rows, sums, before + row * hidden, hidden, hidden,
                               static_cast<const W*>(a->packed) + block * hidden * 4 * LANES, 4 * LANES, LANES);
                for (int gate = 0; a->scale && gate < 4; ++gate)
                    for (int r = 0; r < rows; ++r) sums[r][gate] *= load(a->scale + gate * hidden + unit, n);
                for (int r = 0; r < rows; ++r) {
                    const int64_t b = row + r;
                    float* c_at = a->c_n + b * hidden + unit;
                    float* h_at = after + b * hidden + unit;
                    float* out = a->output + t * a->out_step + b * a->out_row + unit;
                    float* kept = a->gates ? a->gates + t * a->gates_step + b * a->gates_row + unit : nullptr;
                    vec c = load(c_at, n);
                    if (a->lengths && t >= a->lengths[b]) {
                        store(h_at, load(before + b * hidden + unit, n), n);
                        store(out, vec{}, n);
                        for (int gate = 0; kept && gate < 4; ++gate) store(kept + gate * hidden, vec{}, n);
                    } else {
                        const float* in = a->gates_input + t * a->gi_step + b * a->gi_row + unit;
                        for (int gate = 0; gate < 4; ++gate) sums[r][gate] += load(in + gate * hidden, n);
                        const vec i = sigmoid(sums[r][0]), f = sigmoid(sums[r][1]);
                        const vec g = tanh_of(sums[r][2]), o = sigmoid(sums[r][3]);
                        c = f * c + i * g;
                        const vec h = o * tanh_of(c);
                        store(c_at, c, n);
                        store(h_at, h, n);
                        store(out, h, n);
                        if (kept) {
                            store(kept, i, n);
                            store(kept + hidden, f, n);
                            store(kept + 2 * hidden, g, n);
                            store(kept + 3 * hidden, o, n);
                        }
                    }
                    if (a->cells) store(a->cells + t * a->cells_step + b * a->cells_row + unit, c, n);
                }
            }
        }
        // One meeting a step is enough: nobody reads `before` any more once all have left it.
        if (!a->by_rows) barrier.wait(thread, threads);
        before = after;
        after = spare;
        spare = const_cast<float*>(before);
    }
    // h_n may be the memory of h0, which is read in the first step alone.
    for (int64_t b = mine.row; b < mine.rows_end; ++b)
        if (last > first) std::memcpy(a->h_n + b * hidden + first, before + b * hidden + first, 4 * (last - first));
}

void walk(const Forward* a, int64_t kept, Barrier& barrier, int thread, int threads) {
    if (kept == 0) walk<float>(a, barrier, thread, threads);
    if (kept == 1) walk<uint16_t>(a, barrier, thread, threads);
    if (kept == 2) walk<int8_t>(a, barrier, thread, threads);
}

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

// Weights up to this many are always looked at in full, which takes two microseconds.
constexpr int64_t SMALL = 1 << 16;

bool unchanged(const Source& source, bool whole) {
    if (whole || source.count <= SMALL) return mark_each(source.values, source.count) == source.all;
    return mark_some(source.values, source.count) == source.sampled;
}

inline int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }  // to what begins at a cache line

// Memory for one call, that begins at a cache line.
struct Workspace {
    float* values;
    explicit Workspace(int64_t count)
        : values(static_cast<float*>(::operator new(4 * count, std::align_val_t(64)))) {}
    ~Workspace() { ::operator delete(values, std::align_val_t(64)); }
    Workspace(const Workspace&) = delete;
};

}  // namespace

extern "C" {

int64_t lanes() { return LANES; }

// out (m, n) = left.T right for left (rows, m) and right (rows, n), all contiguous: the gradient of weights, summed over
// all steps. Rows go by the chunk, so that a chunk of `right` stays in the nearest cache for all of m.
void transposed_product(const float* left, const float* right, float* out, int64_t rows, int64_t m, int64_t n,
                        int64_t threads) {
    team(threads, [=](int thread, int members) {
        const int64_t groups = (m + ROWS - 1) / ROWS;
        const int64_t first = groups * thread / members, last = groups * (thread + 1) / members;
        alignas(64) float chunk[CHUNK * 4 * LANES];
        for (int64_t start = 0; start < rows; start += CHUNK) {
            const int64_t depth = rows - start < CHUNK ? rows - start : CHUNK;
            for (int64_t column = 0; column < n; column += 4 * LANES) {
                const int64_t width = n - column < 4 * LANES ? n - column : 4 * LANES;
                const int vectors = static_cast<int>((width + LANES - 1) / LANES);
                for (int64_t k = 0; k < depth; ++k) {
                    float* to = chunk + k * vectors * LANES;
                    std::memcpy(to, right + (start + k) * n + column, 4 * width);
                    std::memset(to + width, 0, 4 * (vectors * LANES - width));
                }
                for (int64_t group = first; group < last; ++group) {
                    const int64_t row = group * ROWS;
                    const int count = static_cast<int>(m - row < ROWS ? m - row : ROWS);
                    vec sums[ROWS][4] = {};
                    const float* a = left + start * m + row;
                    switch (vectors) {
                        case 1: outer<1>(count, sums, a, m, depth, chunk); break;
                        case 2: outer<2>(count, sums, a, m, depth, chunk); break;
                        case 3: outer<3>(count, sums, a, m, depth, chunk); break;
                        default: outer<4>(count, sums, a, m, depth, chunk);
                    }
                    for (int r = 0; r < count; ++r)
                        for (int v = 0; v < vectors; ++v) {
                            float* to = out + (row + r) * n + column + v * LANES;
                            const int lanes = static_cast<int>(width - v * LANES < LANES ? width - v * LANES : LANES);
                            store(to, start ? load(to, lanes) + sums[r][v] : sums[r][v], lanes);
                        }
                }
            }
        }
    });
}

uint64_t mark(const float* values, int64_t count) { return mark_some(values, count); }

uint64_t mark_all(const float* values, int64_t count) { return mark_each(values, count); }

// weight (4H, depth) to [block][k][gate][lane], zeros past H; kept as 0: float32, 1: bfloat16, 2: int8 with `scale`.
void pack_forward(const float* weight, void* packed, float* scale, int64_t hidden, int64_t depth, int64_t kept) {
    const int64_t blocks = (hidden + LANES - 1) / LANES;
    for (int64_t block = 0; block < blocks; ++block)
        for (int gate = 0; gate < 4; ++gate)
            for (int lane = 0; lane < LANES; ++lane) {
                const int64_t unit = block * LANES + lane, row = gate * hidden + unit;
                const int64_t to = (block * depth * 4 + gate) * LANES + lane;
                const float* from = weight + row * depth;
                float largest = 0.0f;
                for (int64_t k = 0; kept == 2 && unit < hidden && k < depth; ++k)
                    largest = std::fabs(from[k]) > largest ? std::fabs(from[k]) : largest;
                if (kept == 2 && unit < hidden) scale[row] = largest / 127.0f;
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
void pack_backward(const float* weight, float* packed, int64_t hidden) {
    const int64_t blocks = (hidden + LANES - 1) / LANES;
    for (int64_t block = 0; block < blocks; ++block) {
        const int n_lanes = static_cast<int>(hidden - block * LANES < LANES ? hidden - block * LANES : LANES);
        for (int64_t n = 0; n < 4 * hidden; ++n)
            store(packed + (block * 4 * hidden + n) * LANES, load(weight + n * hidden + block * LANES, n_lanes));
    }
}

void lstm_forward(const Forward* a, int64_t kept) {
    Barrier barrier(a->threads);
    team(a->threads, [=, &barrier](int thread, int threads) { walk(a, kept, barrier, thread, threads); });
}

// All layers of a module in one team of threads, nothing kept for gradients. h_n and c_n may be the memory of h0 and c0.
// Returns 0; or 1, and has done nothing, where weights no longer have the values that were packed. `look` says how that
// is found out: 0, not at all; 1, by samples of large weights; 2, by all values.
int64_t lstm_layers(const Layers* a, int64_t batch, int64_t steps, int64_t batch_first, int64_t threads,
                    int64_t by_rows, int64_t look, const float* x, const float* h0, const float* c0,
                    const int32_t* lengths, float* output, float* h_n, float* c_n) {
    for (int64_t i = 0; look && i < 2 * a->layers * a->directions; ++i)
        if (!unchanged(a->sources[i], look == 2)) return 1;
    const int64_t hidden = a->hidden, size = batch * hidden, width = a->directions * hidden;
    // gates_input, h of two steps, and two layers' outputs, one of which the next reads.
    const int64_t gates_size = rounded(4 * steps * size), states = rounded(size), outputs = rounded(steps * batch * width);
    Workspace memory(gates_size + 2 * states + (a->layers > 1 ? 2 * outputs : 0));
    float* between = memory.values + gates_size + 2 * states;
    Barrier barrier(threads);
    team(threads, [=, &barrier, &memory](int thread, int members) {
        const float* from = x;
        for (int64_t layer = 0; layer < a->layers; ++layer) {
            float* to = layer + 1 == a->layers ? output : between + layer % 2 * outputs;
            for (int64_t d = 0; d < a->directions; ++d) {
                const int64_t i = layer * a->directions + d, features = layer ? width : a->features;
                const Direction& own = a->weights[i];
                const auto step = [=](int64_t numbers) { return batch_first ? numbers : batch * numbers; };
                const auto row = [=](int64_t numbers) { return batch_first ? steps * numbers : numbers; };
                const Forward call = {
                    batch, steps, hidden, d, members, by_rows, memory.values, step(4 * hidden), row(4 * hidden),
                    from, step(features), row(features), features, own.packed_ih, own.bias_ih, own.bias_hh, own.packed,
                    own.scale_ih, own.scale, h0 ? h0 + i * size : nullptr, c0 ? c0 + i * size : nullptr, lengths,
                    to + d * hidden, step(width), row(width), h_n + i * size, c_n + i * size,
                    nullptr, 0, 0, nullptr, 0, 0, memory.values + gates_size};
                walk(&call, a->kept, barrier, thread, members);
                // Who shares out rows has met nobody since, and other rows may be projected next.
                if (by_rows) barrier.wait(thread, members);
            }
            from = to;
        }
    });
    return 0;
}

void lstm_backward(const Backward* a) {
    const int64_t hidden = a->hidden, blocks = (hidden + LANES - 1) / LANES, size = a->batch * hidden;
    if (a->grad_h_n) std::memcpy(a->grad_h0, a->grad_h_n, 4 * size); else std::memset(a->grad_h0, 0, 4 * size);
    if (a->grad_c_n) std::memcpy(a->grad_c0, a->grad_c_n, 4 * size); else std::memset(a->grad_c0, 0, 4 * size);
    Barrier barrier(a->threads);
    team(a->threads, [=, &barrier](int thread, int threads) {
        const Share mine = share(a->batch, blocks, a->by_rows, thread, threads);
        for (int64_t s = a->steps - 1; s >= 0; --s) {
            const int64_t t = a->reverse ? a->steps - 1 - s : s;
            const int64_t earlier = a->reverse ? t + 1 : t - 1;
            for (int64_t b = mine.row; b < mine.rows_end; ++b) {
                const bool outside = a->lengths && t >= a->lengths[b];
                for (int64_t block = mine.block; block < mine.blocks_end; ++block) {
                    const int64_t unit = block * LANES;
                    const int n = static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES);
                    float* grads = a->grad_gates + t * a->gg_step + b * a->gg_row + unit;
                    if (outside) {
                        for (int gate = 0; gate < 4; ++gate) store(grads + gate * hidden, vec{}, n);
                        continue;
                    }
                    const float* kept = a->gates + t * a->gates_step + b * a->gates_row + unit;
                    const vec i = load(kept, n), f = load(kept + hidden, n);
                    const vec g = load(kept + 2 * hidden, n), o = load(kept + 3 * hidden, n);
                    const vec tanh_c = tanh_of(load(a->cells + t * a->cells_step + b * a->cells_row + unit, n));
                    vec c_before = {};
                    if (s) c_before = load(a->cells + earlier * a->cells_step + b * a->cells_row + unit, n);
                    else if (a->c0) c_before = load(a->c0 + b * hidden + unit, n);
                    float* dh_at = a->grad_h0 + b * hidden + unit;
                    float* dc_at = a->grad_c0 + b * hidden + unit;
                    const vec dh = load(dh_at, n) + load(a->grad_output + t * a->go_step + b * a->go_row + unit, n);
                    const vec dc = load(dc_at, n) + dh * o * (1.0f - tanh_c * tanh_c);
                    store(grads, dc * g * i * (1.0f - i), n);
                    store(grads + hidden, dc * c_before * f * (1.0f - f), n);
                    store(grads + 2 * hidden, dc * i * (1.0f - g * g), n);
                    store(grads + 3 * hidden, dh * tanh_c * o * (1.0f - o), n);
                    store(dc_at, dc * f, n);
                }
            }
            if (!a->by_rows) barrier.wait(thread, threads);
            const float* grads = a->grad_gates + t * a->gg_step;
            for (int64_t block = mine.block; block < mine.blocks_end; block += 4) {
                const int vectors = static_cast<int>(mine.blocks_end - block < 4 ? mine.blocks_end - block : 4);
                const float* w = a->packed + block * 4 * hidden * LANES;
                for (int64_t row = mine.row; row < mine.rows_end; row += ROWS) {
                    const int rows = static_cast<int>(mine.rows_end - row < ROWS ? mine.rows_end - row : ROWS);
                    vec sums[ROWS][4] = {};
                    const float* from = grads + row * a->gg_row;
                    switch (vectors) {
                        case 1: product<1>(rows, sums, from, a->gg_row, 4 * hidden, w, LANES, 4 * hidden * LANES); break;
                        case 2: product<2>(rows, sums, from, a->gg_row, 4 * hidden, w, LANES, 4 * hidden * LANES); break;
                        case 3: product<3>(rows, sums, from, a->gg_row, 4 * hidden, w, LANES, 4 * hidden * LANES); break;
                        default: product<4>(rows, sums, from, a->gg_row, 4 * hidden, w, LANES, 4 * hidden * LANES);
                    }
                    for (int r = 0; r < rows; ++r) {
                        const int64_t b = row + r;
                        if (a->lengths && t >= a->lengths[b]) continue;  // held: the gradient passes through
                        for (int v = 0; v < vectors; ++v) {
                            const int64_t unit = (block + v) * LANES;
                            store(a->grad_h0 + b * hidden + unit, sums[r][v],
                                  static_cast<int>(hidden - unit < LANES ? hidden - unit : LANES));
                        }
                    }
                }
            }
        }
    });
}

}  // extern "C"
