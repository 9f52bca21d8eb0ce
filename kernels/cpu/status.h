// What keeps C++ exceptions inside the library: an exported function returns a status, and says in words what failed.
// Everything that can fail comes before a team of threads starts, so nothing is ever thrown in one.

#pragma once

#include <cstdint>
#include <cstdio>
#include <exception>
#include <new>
#include <vector>

namespace {

// As kernels/cpu/build.py has them.
enum Status : int64_t { DONE = 0, CHANGED = 1, NO_MEMORY = -1, FAILED = -2 };

thread_local char said[256];

struct Shortage : std::bad_alloc {
    const char* purpose;
    int64_t bytes;
    Shortage(const char* purpose, int64_t bytes) : purpose(purpose), bytes(bytes) {}
};

// Calls what returns a status; instead of an exception there is the status of a failure.
template <typename F>
int64_t guarded(F call) noexcept {
    try {
        return call();
    } catch (const Shortage& shortage) {
        std::snprintf(said, sizeof said, "the CPU kernel cannot allocate %lld bytes for %s",
                      static_cast<long long>(shortage.bytes), shortage.purpose);
        return NO_MEMORY;
    } catch (const std::bad_alloc&) {
        std::snprintf(said, sizeof said, "the CPU kernel cannot allocate memory for its threads");
        return NO_MEMORY;
    } catch (const std::exception& error) {
        std::snprintf(said, sizeof said, "the CPU kernel failed: %s", error.what());
    } catch (...) {
        std::snprintf(said, sizeof said, "the CPU kernel failed for an unknown reason");
    }
    return FAILED;
}

// Memory for one call, that begins at a cache line.
template <typename T>
class Memory {
    T* values = nullptr;

public:
    Memory(int64_t count, const char* purpose) {
        const int64_t bytes = count > INT64_MAX / 64 ? INT64_MAX : count * static_cast<int64_t>(sizeof(T));
        if (bytes) values = static_cast<T*>(::operator new(bytes, std::align_val_t(64), std::nothrow));
        if (bytes && !values) throw Shortage(purpose, bytes);
    }
    ~Memory() { ::operator delete(values, std::align_val_t(64)); }
    Memory(const Memory&) = delete;
    T* data() const { return values; }
    T& operator[](int64_t i) const { return values[i]; }
};

inline int64_t rounded(int64_t count) { return (count + 15) / 16 * 16; }  // to what begins at a cache line

}  // namespace
