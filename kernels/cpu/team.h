// A team of threads, where its members meet, and what each takes.

#pragma once

#include <atomic>
#include <cstdint>
#include <sched.h>
#include <vector>

#if defined(PLAIN_THREADS)  // where there is no OpenMP, and for ThreadSanitizer, which does not know OpenMP's barriers
#include <thread>
#else
#include <omp.h>
#endif

namespace {

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

}  // namespace
