// Memory, streams and facts of the simulated GPU, and what a graph of it keeps.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace simulated {
using at::Tensor;

const c10::Device GPU(c10::DeviceType::CUDA, 0);
thread_local int64_t stream = 0;
std::atomic<int64_t> streams{1};

// Memory.
std::atomic<int64_t> live{0}, peak{0}, most{int64_t(8) << 30};

// What a graph replays, the pool of the memory that it is given, and blocks of each pool: address and bytes, in turn.
using Tape = std::vector<std::function<void()>>;
Tape* tape = nullptr;
int64_t pool = 0;
std::map<int64_t, std::vector<int64_t>> blocks;

void hold(const void* at, int64_t bytes) {
    if (tape) blocks[pool].insert(blocks[pool].end(), {reinterpret_cast<int64_t>(at), bytes});
}

// Freed memory by its size, which goes to the next that asks for so much: a loop gets the same addresses in each turn.
std::mutex cache_lock;
std::map<size_t, std::vector<void*>> cache;

struct Block {
    void* own;
    size_t bytes;
};

void take(int64_t bytes) {
    const int64_t now = live += bytes;
    if (now > most) {
        live -= bytes;
        TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Tried to allocate ", bytes, " bytes.");
    }
    int64_t before = peak;
    while (now > before && !peak.compare_exchange_weak(before, now)) {
    }
}

void give_back(void* context) {
    auto* block = static_cast<Block*>(context);
    live -= int64_t(block->bytes);
    const std::lock_guard<std::mutex> locked(cache_lock);
    cache[block->bytes].push_back(block->own);
    delete block;
}

void* memory_of(size_t bytes) {
    const std::lock_guard<std::mutex> locked(cache_lock);
    auto& freed = cache[bytes];
    if (!freed.empty()) {
        void* last = freed.back();
        freed.pop_back();
        return last;
    }
    void* own = nullptr;
    if (posix_memalign(&own, 512, bytes)) throw std::bad_alloc();
    return own;
}

struct Memory final : c10::Allocator {
    c10::DataPtr allocate(size_t bytes) override {
        take(int64_t(bytes));
        if (!bytes) return {nullptr, GPU};
        void* own = memory_of(bytes);
        std::memset(own, 0xFF, bytes);  // NaN: what nobody wrote must not look right
        hold(own, int64_t(bytes));
        return {own, new Block{own, bytes}, give_back, GPU};
    }
    c10::DeleterFnPtr raw_deleter() const override { return give_back; }
    void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
} memory;

// Streams and events: everything has ended by the time that a call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return GPU.type(); }
    c10::Device exchangeDevice(c10::Device) const override { return GPU; }
    c10::Device getDevice() const override { return GPU; }
    void setDevice(c10::Device) const override {}
    void uncheckedSetDevice(c10::Device) const noexcept override {}
    c10::DeviceIndex deviceCount() const noexcept override { return 1; }
    static c10::Stream of(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, GPU, id); }
    c10::Stream getStream(c10::Device) const override { return of(stream); }
    c10::Stream getDefaultStream(c10::Device) const override { return of(0); }
    c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return of(streams++); }
    c10::Stream getNewStream(c10::Device, int) const override { return of(streams++); }
    c10::Stream exchangeStream(c10::Stream next) const override { return of(std::exchange(stream, next.id())); }
    void* getStreamNativeHandle(const c10::Stream one) const override { return reinterpret_cast<void*>(one.id()); }
    void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
    bool queryStream(const c10::Stream&) const override { return true; }
    void synchronizeStream(const c10::Stream&) const override {}
    void synchronizeEvent(void*) const override {}
    void synchronizeDevice(const c10::DeviceIndex) const override {}
    void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
    void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
    void init() const override {}
    bool hasCUDA() const override { return true; }
    bool hasCUDART() const override { return true; }
    bool hasCuDNN() const override { return true; }
    bool compiledWithCuDNN() const override { return true; }
    bool supportsBFloat16RNNWithCuDNN() const override { return true; }
    long versionCuDNN() const override { return 91000; }
    long versionRuntimeCuDNN() const override { return 91000; }
    bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
    bool isAvailable() const override { return true; }
    bool isBuilt() const override { return true; }
    std::string showConfig() const override { return "a simulated GPU"; }
    at::DeviceIndex current_device() const override { return 0; }
    at::DeviceIndex getCurrentDevice() const override { return 0; }
    at::DeviceIndex deviceCount() const override { return 1; }
    int getNumGPUs() const override { return 1; }
    at::Device getDeviceFromPtr(void*) const override { return GPU; }
    at::Allocator* getCUDADeviceAllocator() const override { return &memory; }
    at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
    const at::Generator& getDefaultGenerator(at::DeviceIndex) const override {
        return at::detail::getDefaultCPUGenerator();
    }
    at::Generator getNewGenerator(at::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
} hooks;
}  // namespace simulated
