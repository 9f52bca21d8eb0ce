// A GPU that is simulated in the host's memory: tensors say that they are on cuda:0, and torch's own kernels for CPUs
// compute them. It keeps what a GPU is strict about: tensors of two devices in one operation, a limit of memory,
// memory that is not zeroed, and what a CUDA graph cannot capture. It says nothing about time.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/native/RNN.h>
#include <ATen/native/TensorFactories.h>
#include <torch/library.h>

#include <unordered_set>

#include "memory.h"

namespace simulated {
using c10::IValue;

// Tensors of both devices over the same bytes.
Tensor over(c10::Storage bytes, const Tensor& like, c10::DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(bytes), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return made;
}

Tensor on_host(const Tensor& tensor) {
    const auto& bytes = tensor.storage();
    c10::DataPtr same(
        bytes.mutable_data(), new c10::Storage(bytes), [](void* kept) { delete static_cast<c10::Storage*>(kept); },
        c10::Device(c10::kCPU));
    return over(
        c10::Storage(
            c10::Storage::use_byte_size_t(), bytes.nbytes(), std::move(same), c10::GetAllocator(c10::kCPU), true),
        tensor, c10::DispatchKey::CPU);
}

Tensor on_gpu(const Tensor& tensor) {
    const size_t bytes = tensor.storage().nbytes();
    auto own = memory.allocate(bytes);
    if (bytes) std::memcpy(own.mutable_get(), tensor.storage().data(), bytes);
    return over(
        c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(own), &memory, true), tensor,
        c10::DispatchKey::CUDA);
}

bool is_gpu(const Tensor& tensor) { return tensor.defined() && tensor.device() == GPU; }

void forbid(bool waits, const std::string& what) {
    TORCH_CHECK(!(tape && waits), "CUDA error: operation not permitted when stream is capturing: ", what);
}

// Operations that hand a number or a size to the host, which therefore waits.
const std::unordered_set<std::string> WAITING{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2", "aten::unique_dim",
};
// Operations that take indices from the host.
const std::unordered_set<std::string> OF_BOTH{"aten::index", "aten::index_put_", "aten::_index_put_impl_"};

struct Arguments {
    std::vector<std::pair<Tensor, Tensor>> both;  // on the GPU and on the host
    bool foreign = false, made_here = false;

    Tensor operator()(const Tensor& tensor) {
        if (!is_gpu(tensor)) {
            foreign |= tensor.defined() && tensor.dim() > 0;
            return tensor;
        }
        made_here = true;
        for (auto& [gpu, host] : both)
            if (gpu.is_same(tensor)) return host;
        return both.emplace_back(tensor, on_host(tensor)).second;
    }
    void move(IValue& value) {
        if (value.isTensor()) {
            value = (*this)(value.toTensor());
        } else if (value.isTensorList()) {
            std::vector<Tensor> moved;
            for (const Tensor& one : value.toTensorVector()) moved.push_back((*this)(one));
            value = IValue(moved);
        } else if (value.isOptionalTensorList()) {
            c10::List<std::optional<Tensor>> moved;
            for (const auto& one : value.toOptionalTensorVector())
                moved.push_back(one ? std::optional<Tensor>((*this)(*one)) : std::nullopt);
            value = moved;
        } else if (value.isDevice() && value.toDevice().is_cuda()) {
            value = c10::Device(c10::kCPU);
            made_here = true;
        }
    }
    // What an operator did to sizes and storage of its outputs.
    void follow() {
        for (auto& [gpu, host] : both) {
            auto* seen = gpu.unsafeGetTensorImpl();
            const bool moved = host.storage().data() != gpu.storage().data();
            if (moved) seen->set_storage_keep_dtype(on_gpu(host).storage());
            if (moved || host.sizes() != gpu.sizes() || host.strides() != gpu.strides())
                seen->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
        }
    }
};

void by_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    const auto& schema = op.schema();
    const size_t taken = schema.arguments().size(), given = schema.returns().size();
    Arguments arguments;
    for (size_t i = stack->size() - taken; i < stack->size(); i++) arguments.move((*stack)[i]);
    TORCH_CHECK(
        !arguments.foreign || arguments.both.empty() || OF_BOTH.count(schema.name()),
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (", schema.name(),
        ")");
    forbid(WAITING.count(schema.name()), schema.name());
    const torch::jit::Stack asked(stack->end() - taken, stack->end());
    op.callBoxed(stack);
    arguments.follow();
    std::vector<std::pair<std::pair<size_t, size_t>, Tensor>> fresh;  // return, place in a list; as the host has it
    auto back = [&](const Tensor& tensor, size_t output, size_t place) {
        if (!tensor.defined()) return tensor;
        for (auto& [gpu, host] : arguments.both) {
            if (host.is_same(tensor)) return gpu;
            if (host.storage().nbytes() && host.storage().data() == tensor.storage().data())
                return over(gpu.storage(), tensor, c10::DispatchKey::CUDA);
        }
        if (!arguments.made_here) return tensor;
        const Tensor made = on_gpu(tensor);
        if (tape) fresh.push_back({{output, place}, on_host(made)});
        return made;
    };
    for (size_t output = 0; output < given; output++) {
        IValue& value = (*stack)[stack->size() - given + output];
        if (value.isTensor()) {
            value = back(value.toTensor(), output, 0);
        } else if (value.isTensorList()) {
            std::vector<Tensor> moved;
            for (const Tensor& one : value.toTensorVector()) moved.push_back(back(one, output, moved.size()));
            value = IValue(moved);
        }
    }
    if (!tape) return;
    tape->push_back([op, asked, fresh, given]() {
        torch::jit::Stack again(asked);
        op.callBoxed(&again);
        for (const auto& [where, kept] : fresh) {
            const IValue& value = again[again.size() - given + where.first];
            kept.copy_(value.isTensor() ? value.toTensor() : value.toTensorVector()[where.second]);
        }
    });
}

Tensor& copy_(Tensor& to, const Tensor& from, bool) {
    forbid(!is_gpu(to) || (!is_gpu(from) && from.dim() > 0), "a copy from or to pageable memory");
    const Tensor target = is_gpu(to) ? on_host(to) : to, source = is_gpu(from) ? on_host(from) : from;
    target.copy_(source);
    if (tape) tape->push_back([target, source]() { target.copy_(source); });
    return to;
}

// Tensors without their values.
using Format = std::optional<at::MemoryFormat>;
using Dtype = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Where = std::optional<at::Device>;
using Pinned = std::optional<bool>;
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(at::IntArrayRef size, Dtype dtype, Layout, Where, Pinned, Format format) {
    return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, Dtype dtype, Layout, Where, Pinned) {
    return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}
const Tensor& resize_(const Tensor& tensor, at::IntArrayRef size, Format) {
    const int64_t bytes = (tensor.storage_offset() + c10::multiply_integers(size)) * int64_t(tensor.element_size());
    auto* storage = tensor.storage().unsafeGetStorageImpl();
    if (bytes > int64_t(storage->nbytes())) {
        auto larger = memory.allocate(bytes);
        if (storage->nbytes()) std::memcpy(larger.mutable_get(), storage->data(), storage->nbytes());
        storage->set_data_ptr_noswap(std::move(larger));
        storage->set_nbytes(bytes);
    }
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    return tensor;
}
Tensor& set_(Tensor& tensor, at::Storage storage, int64_t offset, at::IntArrayRef size, at::IntArrayRef stride) {
    auto* seen = tensor.unsafeGetTensorImpl();
    seen->set_storage_keep_dtype(std::move(storage));
    if (stride.empty()) {
        seen->set_sizes_contiguous(size);
        seen->set_storage_offset(offset);
    } else {
        seen->set_sizes_and_strides(size, stride, offset);
    }
    return tensor;
}
Tensor& set_to_storage(Tensor& tensor, at::Storage storage) {
    const int64_t size = int64_t(storage.nbytes() / tensor.element_size());
    return set_(tensor, std::move(storage), 0, {size}, {1});
}
Tensor& set_to_tensor(Tensor& tensor, const Tensor& other) {
    return set_(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}
void record_stream(Tensor&, c10::Stream) {}
bool is_pinned(const Tensor&, Where) { return false; }

// The fused cell of torch's own loop on a GPU, which has no kernel for CPUs.
using Maybe = std::optional<Tensor>;
std::tuple<Tensor, Tensor, Tensor> cell(
    const Tensor& of_x, const Tensor& of_h, const Tensor& c, const Maybe& bias_x, const Maybe& bias_h) {
    auto sums = of_x + of_h;
    if (bias_x && bias_x->defined()) sums = sums + *bias_x + *bias_h;
    const auto part = sums.chunk(4, 1);
    const auto i = part[0].sigmoid(), f = part[1].sigmoid(), g = part[2].tanh(), o = part[3].sigmoid();
    const auto next = f * c + i * g;
    return {o * next.tanh(), next, at::cat({i, f, g, o}, 1)};
}
std::tuple<Tensor, Tensor, Tensor> cell_back(
    const Maybe& of_h, const Maybe& of_c, const Tensor& c, const Tensor& next, const Tensor& gates, bool biased) {
    const auto part = gates.chunk(4, 1);
    const auto i = part[0], f = part[1], g = part[2], o = part[3], t = next.tanh();
    const auto h = of_h && of_h->defined() ? *of_h : at::zeros_like(next);
    auto back = h * o * (1 - t * t);
    if (of_c && of_c->defined()) back = back + *of_c;
    const auto sums =
        at::cat({back * g * i * (1 - i), back * c * f * (1 - f), back * i * (1 - g * g), h * t * o * (1 - o)}, 1);
    return {sums, back * f, biased ? sums.sum(0) : Tensor()};
}

// cuDNN's LSTM is torch's own loop here.
template <typename... Rest>
void lstm(Tensor& output, Tensor& h, Tensor& c, const Rest&... rest) {
    struct Without {
        bool before = at::globalContext().userEnabledCuDNN();
        Without() { at::globalContext().setUserEnabledCuDNN(false); }
        ~Without() { at::globalContext().setUserEnabledCuDNN(before); }
    } without;
    std::tie(output, h, c) = at::lstm(rest...);
}
void cudnn_lstm(
    Tensor& output, Tensor& h, Tensor& c, const Tensor& x, at::TensorList state, at::TensorList weights, bool biased,
    int64_t layers, double dropout, bool training, bool both_ways, bool batch_first) {
    lstm(output, h, c, x, state, weights, biased, layers, dropout, training, both_ways, batch_first);
}
void cudnn_packed_lstm(
    Tensor& output, Tensor& h, Tensor& c, const Tensor& x, const Tensor& sizes, at::TensorList state,
    at::TensorList weights, bool biased, int64_t layers, double dropout, bool training, bool both_ways) {
    lstm(output, h, c, x, sizes, state, weights, biased, layers, dropout, training, both_ways);
}
Tensor flatten_weights(
    at::TensorList weights, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, bool) {
    std::vector<Tensor> flat;
    for (const Tensor& one : weights) flat.push_back(one.reshape({-1}));
    const auto buffer = at::cat(flat);
    int64_t begin = 0;
    for (const Tensor& one : weights) {
        const auto part = buffer.narrow(0, begin, one.numel()).view(one.sizes());
        one.set_(part.storage(), part.storage_offset(), part.sizes(), part.strides());
        begin += one.numel();
    }
    return buffer;
}
}  // namespace simulated

TORCH_LIBRARY_IMPL(_, CUDA, all) { all.fallback(torch::CppFunction::makeFromBoxedFunction<&simulated::by_host>()); }
TORCH_LIBRARY_IMPL(aten, CUDA, some) {
    some.impl("copy_", TORCH_FN(simulated::copy_));
    some.impl("empty.memory_format", TORCH_FN(simulated::empty));
    some.impl("empty_strided", TORCH_FN(simulated::empty_strided));
    some.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
    some.impl("view", TORCH_FN(at::native::view));
    some.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
    some.impl("resize_", TORCH_FN(simulated::resize_));
    some.impl("set_.source_Storage_storage_offset", TORCH_FN(simulated::set_));
    some.impl("set_.source_Storage", TORCH_FN(simulated::set_to_storage));
    some.impl("set_.source_Tensor", TORCH_FN(simulated::set_to_tensor));
    some.impl("record_stream", TORCH_FN(simulated::record_stream));
    some.impl("is_pinned", TORCH_FN(simulated::is_pinned));
    some.impl("_thnn_fused_lstm_cell", TORCH_FN(simulated::cell));
    some.impl("_thnn_fused_lstm_cell_backward_impl", TORCH_FN(simulated::cell_back));
    some.impl("_cudnn_rnn_flatten_weight", TORCH_FN(simulated::flatten_weights));
    // Composite operators that would look for a kernel of a GPU by themselves.
    some.impl("sum", torch::CppFunction::makeFromBoxedFunction<&simulated::by_host>());
}

extern "C" {
void simulated_install() {
    c10::SetAllocator(c10::DeviceType::CUDA, &simulated::memory, 10);
    at::native::lstm_cudnn_stub.set_cuda_dispatch_ptr(&simulated::cudnn_lstm);
    at::native::lstm_packed_cudnn_stub.set_cuda_dispatch_ptr(&simulated::cudnn_packed_lstm);
    // torch made its hooks when it was loaded, before this: they become ours by their table of functions.
    const auto& made = at::detail::getCUDAHooks();
    std::memcpy(const_cast<at::CUDAHooksInterface*>(&made), &simulated::hooks, sizeof(void*));
}
int64_t simulated_live() { return simulated::live; }
int64_t simulated_peak() { return simulated::peak; }
void simulated_reset_peak() { simulated::peak = simulated::live.load(); }
void simulated_limit(int64_t bytes) { simulated::most = bytes; }
int64_t simulated_stream() { return simulated::stream; }
void simulated_use(int64_t stream) { simulated::stream = stream; }
bool simulated_captures() { return simulated::tape != nullptr; }
void simulated_begin(int64_t pool) {
    simulated::pool = pool;
    simulated::tape = new simulated::Tape;
}
int64_t simulated_blocks(int64_t pool, const int64_t** at) {
    *at = simulated::blocks[pool].data();
    return int64_t(simulated::blocks[pool].size() / 2);
}
void* simulated_end() { return std::exchange(simulated::tape, nullptr); }
void simulated_note(void (*call)(int64_t), int64_t number) {
    simulated::tape->push_back([call, number]() { call(number); });
}
const char* simulated_replay(void* tape) {
    static std::string failed;
    try {
        at::AutoDispatchBelowADInplaceOrView below;
        for (const auto& step : *static_cast<simulated::Tape*>(tape)) step();
        return nullptr;
    } catch (const std::exception& error) {
        failed = error.what();
        return failed.c_str();
    }
}
void simulated_drop(void* tape) { delete static_cast<simulated::Tape*>(tape); }
}
