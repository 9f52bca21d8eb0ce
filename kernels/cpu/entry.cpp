// The shortest way from a call in Python to the kernel. One call looks at tensors and parameters where torch keeps them,
// allocates the results, lets other threads of Python run, and calls lstm_layers.
//
// It takes the call, or returns None and has done nothing: whatever is not as plain as it expects goes the long way, where
// Python decides and reports errors. Of Python it uses functions of the stable ABI alone, declared here, so that no headers
// of Python have to be installed.

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

struct _object;
struct _typeobject;
using PyObject = _object;
using Function = PyObject* (*)(PyObject* self, PyObject* const* arguments, intptr_t count);

extern "C" {
struct PyMethodDef {
    const char* name;
    Function function;
    int flags;
    const char* text;
};
extern _typeobject PyTuple_Type;
extern PyObject *PyExc_MemoryError, *PyExc_RuntimeError;
extern PyObject _Py_NoneStruct;
void Py_IncRef(PyObject*);
void Py_DecRef(PyObject*);
void PyErr_Clear();
void PyErr_SetString(PyObject*, const char*);
PyObject* PyObject_Type(PyObject*);
PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
PyObject* PyObject_CallFunction(PyObject*, const char* format, ...);
int PyObject_IsTrue(PyObject*);
PyObject* PyUnicode_InternFromString(const char*);
PyObject* PyBool_FromLong(long);
long long PyLong_AsLongLong(PyObject*);
void* PyLong_AsVoidPtr(PyObject*);
int PyDict_Next(PyObject*, intptr_t* position, PyObject** key, PyObject** value);
PyObject* PyTuple_New(intptr_t);
intptr_t PyTuple_Size(PyObject*);
PyObject* PyTuple_GetItem(PyObject*, intptr_t);         // borrowed
int PyTuple_SetItem(PyObject*, intptr_t, PyObject*);    // takes the reference
PyObject* PyCapsule_New(void*, const char* name, void (*destructor)(PyObject*));
void* PyCapsule_GetPointer(PyObject*, const char* name);
PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
void* PyEval_SaveThread();
void PyEval_RestoreThread(void*);
}

// Of libtorch_python.
PyObject* THPVariable_Wrap(const at::TensorBase&);

// Of ATen/autocast_mode.h, which takes all of ATen to compile.
namespace at::autocast {
c10::ScalarType get_autocast_dtype(c10::DeviceType);
}

namespace {

constexpr int FASTCALL = 0x0080;
constexpr const char* NAME = "kernels.cpu.entry";
constexpr int64_t NO_MEMORY = -1;
constexpr int64_t SAMPLES = 1, WHOLE = 2;  // looks at the weights, as lstm_layers knows them
constexpr int64_t HALF_RESULTS = 8;        // as lstm_layers knows it; 1, 2 and 4 are x, h0 and c0

// What a module's calls share, as Python hands it over.
struct Numbers {
    int64_t layers;                // address of `Layers`
    int64_t features, hidden, directions, states;
    int64_t work;                  // multiplications of a step of a sequence
    int64_t worth;                 // work from which a team may have more than one thread
    int64_t least_long;            // rows a thread from which all weights are looked at
    int64_t cast;                  // whether calls are those under autocast to bf16, else without autocast
    int64_t sums_from;             // rows from which on the second of the choices holds
    const int64_t* forgotten;      // times that packed weights were dropped
    int64_t (*run)(const int64_t* call);
    const char* (*failure)();
};

struct Parameter {
    PyObject* object;
    c10::TensorImpl* impl;
    const void* at;
    uint32_t version;
    std::vector<int64_t> sizes;
};

struct Module {
    Numbers own;
    int64_t forgotten;
    std::vector<Parameter> parameters;
    PyObject *held, *choices;
};

// What all modules share: torch.Tensor, torch.autograd.forward_ad, and the function that chooses a team.
PyObject *tensor_type, *forward_ad, *choose_team, *cdata_name, *level_name;

PyObject* none() {
    Py_IncRef(&_Py_NoneStruct);
    return &_Py_NoneStruct;
}

PyObject* tuple_of(PyObject* first, PyObject* second) {
    PyObject* const pair = PyTuple_New(2);
    PyTuple_SetItem(pair, 0, first);
    PyTuple_SetItem(pair, 1, second);
    return pair;
}

bool is_exactly(PyObject* object, const void* type) {
    PyObject* const found = PyObject_Type(object);
    Py_DecRef(found);
    return found == type;
}

// Where torch keeps a tensor, by the address that Python calls `_cdata`.
c10::TensorImpl* impl_of(PyObject* tensor) {
    PyObject* const number = PyObject_GetAttr(tensor, cdata_name);
    if (!number) {
        PyErr_Clear();
        return nullptr;
    }
    void* const found = PyLong_AsVoidPtr(number);
    Py_DecRef(number);
    return static_cast<c10::TensorImpl*>(found);
}

// Whether nobody else has to see what happens: no tracer, mode or transform; gradients only where the caller sees to them, and
// autocast to bf16 just where the caller casts.
bool unwatched(bool gradients = false, bool cast = false) {
    if (c10::GradMode::is_enabled() != gradients || at::impl::PythonTorchFunctionTLS::stack_len()) return false;
    const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
    if (keys.included_.raw_repr() & ~c10::default_included_set.raw_repr()) return false;
    if (keys.excluded_.has(c10::DispatchKey::AutocastCPU) == cast) return false;
    if (cast && at::autocast::get_autocast_dtype(c10::kCPU) != c10::kBFloat16) return false;
    PyObject* const level = PyObject_GetAttr(forward_ad, level_name);
    const bool forward_mode = !level || PyLong_AsLongLong(level) >= 0;
    if (level) Py_DecRef(level);
    else PyErr_Clear();
    return !forward_mode;
}

// A tensor, if it is a plain one in this machine's memory that holds its values in the order of its indices.
c10::TensorImpl* plain(c10::TensorImpl* found, c10::ScalarType type) {
    static const uint64_t known = c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                                    c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU}).raw_repr();
    if (!found || found->key_set().raw_repr() & ~known || !found->is_cpu() || found->layout() != c10::kStrided) return nullptr;
    return found->dtype() == c10::scalarTypeToTypeMeta(type) && found->is_contiguous() ? found : nullptr;
}

// The same of Python's, if it is a torch.Tensor and nothing derived from it.
c10::TensorImpl* plain(PyObject* object, c10::ScalarType type) {
    return is_exactly(object, tensor_type) ? plain(impl_of(object), type) : nullptr;
}

// Input and state of a call, in `batch_first` order or the other; x is null where they are not as plain as they have to be.
struct Inputs {
    c10::TensorImpl* x = nullptr;
    c10::TensorImpl *h0 = nullptr, *c0 = nullptr;
    int64_t batch = 0, steps = 0;
};

bool is_state(const c10::TensorImpl* found, const Module& module, int64_t batch) {
    const auto sizes = found->sizes();
    return sizes.size() == 3 && sizes[0] == module.own.states && sizes[1] == batch && sizes[2] == module.own.hidden;
}

// With `halves` each of them may be bf16 as well as float32.
Inputs inputs_of(const Module& module, PyObject* input, PyObject* hx, bool batch_first, bool halves = false) {
    Inputs found;
    const auto given = [=](PyObject* object) {
        c10::TensorImpl* const floats = plain(object, c10::kFloat);
        return floats || !halves ? floats : plain(object, c10::kBFloat16);
    };
    c10::TensorImpl* const x = given(input);
    if (!x || x->dim() != 3 || x->size(2) != module.own.features || !x->numel()) return {};
    found.batch = x->size(batch_first ? 0 : 1);
    found.steps = x->size(batch_first ? 1 : 0);
    if (hx != &_Py_NoneStruct) {
        if (!is_exactly(hx, &PyTuple_Type) || PyTuple_Size(hx) != 2) return {};
        found.h0 = given(PyTuple_GetItem(hx, 0));
        found.c0 = given(PyTuple_GetItem(hx, 1));
        if (!found.h0 || !found.c0 || !is_state(found.h0, module, found.batch) || !is_state(found.c0, module, found.batch)) return {};
    }
    found.x = x;
    return found;
}

// Whether the parameters are those that were packed, and as far as torch counts unchanged; lstm_layers looks at the values.
bool stands(const Module& module, PyObject* parameters) {
    if (*module.own.forgotten != module.forgotten) return false;
    intptr_t position = 0;
    PyObject *name, *value;
    for (const Parameter& kept : module.parameters) {
        if (!PyDict_Next(parameters, &position, &name, &value) || value != kept.object) return false;
        const c10::TensorImpl* const found = impl_of(value);  // torch.utils.swap_tensors may have put another one in
        if (found != kept.impl || found->data() != kept.at || found->version_counter().current_version() != kept.version ||
            found->sizes() != c10::IntArrayRef(kept.sizes) || !found->is_contiguous() || found->dtype() != caffe2::TypeMeta::Make<float>())
            return false;
    }
    return !PyDict_Next(parameters, &position, &name, &value);
}

// A call of lstm_layers: DONE, CHANGED, or a failure. Other threads of Python run meanwhile.
int64_t run(const Module& module, int64_t batch, int64_t steps, bool batch_first, const void* x, const void* h0, const void* c0,
            const void* resets, void* output, void* h_n, void* c_n, int64_t halves) {
    int64_t threads = 1, by_rows = 1;
    const int64_t work = batch * steps * module.own.work;
    if (work >= module.own.worth) {
        PyObject* const team = PyObject_CallFunction(choose_team, "LLL", static_cast<long long>(work),
                                                     static_cast<long long>(batch), static_cast<long long>(module.own.hidden));
        if (!team) return INT64_MIN;
        threads = PyLong_AsLongLong(PyTuple_GetItem(team, 0));
        by_rows = PyObject_IsTrue(PyTuple_GetItem(team, 1));
        Py_DecRef(team);
    }
    const int64_t look = batch * steps >= module.own.least_long * threads ? WHOLE : SAMPLES;
    const auto at = [](const void* address) { return reinterpret_cast<int64_t>(address); };
    const int64_t call[16] = {module.own.layers, batch, steps, batch_first, threads, by_rows, look, at(x), at(h0), at(c0),
                              0, at(resets), at(output), at(h_n), at(c_n), halves};
    void* const state = PyEval_SaveThread();
    const int64_t status = module.own.run(call);
    PyEval_RestoreThread(state);
    return status;
}

// After a status that is not DONE: None, or null with Python's error set.
PyObject* not_done(const Module& module, int64_t status) {
    if (status == INT64_MIN) return nullptr;
    if (status > 0) return none();
    PyErr_SetString(status == NO_MEMORY ? PyExc_MemoryError : PyExc_RuntimeError, module.own.failure());
    return nullptr;
}

void* written(const at::TensorBase& value) { return value.unsafeGetTensorImpl()->mutable_data(); }

// What a batch of so many rows runs.
PyObject* choices_for(const Module& module, int64_t batch) {
    PyObject* const found = PyTuple_GetItem(module.choices, batch >= module.own.sums_from);
    Py_IncRef(found);
    return found;
}

const Module& module_of(PyObject* self) { return *static_cast<const Module*>(PyCapsule_GetPointer(self, NAME)); }

// arguments: the module's parameters, x (three dimensions), the state or None, and whether the batch comes first. With `cast`
// x and the state may be bf16, and the results are.
// Returns ((output, (h_n, c_n)), choices).
PyObject* at_once(PyObject* self, PyObject* const* arguments, intptr_t count) try {
    const Module& module = module_of(self);
    const bool cast = module.own.cast;
    if (count != 4 || !unwatched(false, cast)) return none();
    const bool batch_first = PyObject_IsTrue(arguments[3]) == 1;
    const auto [x, h0, c0, batch, steps] = inputs_of(module, arguments[1], arguments[2], batch_first, cast);
    if (!x || !stands(module, arguments[0])) return none();
    const int64_t states[] = {module.own.states, batch, module.own.hidden};
    const int64_t sizes[] = {x->size(0), x->size(1), module.own.directions * module.own.hidden};
    const c10::ScalarType type = cast ? c10::kBFloat16 : c10::kFloat;
    const at::TensorBase output = at::detail::empty_cpu(sizes, type), h_n = at::detail::empty_cpu(states, type),
                         c_n = at::detail::empty_cpu(states, type);
    const auto values = [](const c10::TensorImpl* of) { return of ? of->data() : nullptr; };
    int64_t halves = cast ? HALF_RESULTS : 0, half = 1;
    for (const c10::TensorImpl* const given : {x, h0, c0}) {
        if (given && given->dtype() == caffe2::TypeMeta::Make<c10::BFloat16>()) halves |= half;
        half *= 2;
    }
    const int64_t status = run(module, batch, steps, batch_first, values(x), values(h0), values(c0), nullptr, written(output),
                               written(h_n), written(c_n), halves);
    if (status) return not_done(module, status);
    return tuple_of(tuple_of(THPVariable_Wrap(output), tuple_of(THPVariable_Wrap(h_n), THPVariable_Wrap(c_n))),
                    choices_for(module, batch));
} catch (const std::exception&) {
    return none();
}

// arguments: the module's parameters, x (two dimensions), h and c, which are overwritten, and resets or None.
// Returns (output, choices).
PyObject* step(PyObject* self, PyObject* const* arguments, intptr_t count) try {
    const Module& module = module_of(self);
    if (count != 5 || module.own.directions != 1 || module.own.cast || !unwatched()) return none();
    c10::TensorImpl *const x = plain(arguments[1], c10::kFloat), *const h = plain(arguments[2], c10::kFloat),
                    *const c = plain(arguments[3], c10::kFloat);
    if (!x || !h || !c || x->dim() != 2 || x->size(1) != module.own.features || !x->numel()) return none();
    const int64_t batch = x->size(0);
    if (!is_state(h, module, batch) || !is_state(c, module, batch)) return none();
    if ((h->is_inference() || c->is_inference()) && !c10::InferenceMode::is_enabled()) return none();
    const c10::TensorImpl* resets = nullptr;
    if (arguments[4] != &_Py_NoneStruct) {
        resets = plain(arguments[4], c10::kBool);
        if (!resets || resets->dim() != 1 || resets->size(0) != batch) return none();
    }
    float *const h_at = static_cast<float*>(h->mutable_data()), *const c_at = static_cast<float*>(c->mutable_data());
    if (std::abs(h_at - c_at) < h->numel() || !stands(module, arguments[0])) return none();
    const int64_t sizes[] = {batch, module.own.hidden};
    const at::TensorBase output = at::detail::empty_cpu(sizes, c10::kFloat);
    const int64_t status = run(module, batch, 1, true, x->data(), h_at, c_at,
                               resets ? resets->data() : nullptr, written(output), h_at, c_at, 0);
    if (status) return not_done(module, status);
    h->bump_version();
    c->bump_version();
    return tuple_of(THPVariable_Wrap(output), choices_for(module, batch));
} catch (const std::exception&) {
    return none();
}

// The arguments of at_once. Returns whether a call with gradients, of a parameter, x or the state, is as plain as an earlier
// one; the parameters' values do not count. It does nothing else: what follows is a node of autograd, which is Python's.
PyObject* trains(PyObject* self, PyObject* const* arguments, intptr_t count) try {
    const Module& module = module_of(self);
    if (count != 4 || !unwatched(true, module.own.cast)) return none();
    const Inputs found = inputs_of(module, arguments[1], arguments[2], PyObject_IsTrue(arguments[3]) == 1);
    if (!found.x) return none();
    bool gradients = found.x->requires_grad() || (found.h0 && (found.h0->requires_grad() || found.c0->requires_grad()));
    intptr_t position = 0;
    PyObject *name, *value;
    for (const Parameter& kept : module.parameters) {
        if (!PyDict_Next(arguments[0], &position, &name, &value) || value != kept.object) return none();
        const c10::TensorImpl* const parameter = plain(impl_of(value), c10::kFloat);
        if (!parameter || parameter->sizes() != c10::IntArrayRef(kept.sizes)) return none();
        gradients = gradients || parameter->requires_grad();
    }
    if (!gradients || PyDict_Next(arguments[0], &position, &name, &value)) return none();
    return PyBool_FromLong(1);
} catch (const std::exception&) {
    return none();
}

PyMethodDef at_once_method = {"at_once", at_once, FASTCALL, nullptr};
PyMethodDef step_method = {"step", step, FASTCALL, nullptr};
PyMethodDef trains_method = {"trains", trains, FASTCALL, nullptr};

void release(PyObject* capsule) {
    Module* const module = static_cast<Module*>(PyCapsule_GetPointer(capsule, NAME));
    Py_DecRef(module->held);
    Py_DecRef(module->choices);
    delete module;
}

}  // namespace

extern "C" {

void set_up(PyObject* tensor, PyObject* forward, PyObject* team) {
    for (PyObject* const kept : {tensor, forward, team}) Py_IncRef(kept);
    tensor_type = tensor;
    forward_ad = forward;
    choose_team = team;
    cdata_name = PyUnicode_InternFromString("_cdata");
    level_name = PyUnicode_InternFromString("_current_level");
}

// The functions at_once, step and trains of a module.
//
// parameters: a tuple of tuples, the module's parameters in its order: the tensor and its version when it was packed.
// held: what keeps alive all that the numbers point to, and the parameters. choices: what at_once and
// step return with their results, a pair: for fewer rows than `sums_from`, and for others.
PyObject* bind(const Numbers* numbers, PyObject* parameters, PyObject* held, PyObject* choices) {
    Module* const module = new Module{*numbers, *numbers->forgotten, {}, held, choices};
    Py_IncRef(held);
    Py_IncRef(choices);
    PyObject* const self = PyCapsule_New(module, NAME, release);
    for (intptr_t i = 0; i < PyTuple_Size(parameters); ++i) {
        PyObject* const entry = PyTuple_GetItem(parameters, i);
        PyObject* const object = PyTuple_GetItem(entry, 0);
        c10::TensorImpl* const impl = impl_of(object);
        module->parameters.push_back({object, impl, PyLong_AsVoidPtr(PyTuple_GetItem(entry, 1)),
                                      static_cast<uint32_t>(PyLong_AsLongLong(PyTuple_GetItem(entry, 2))), impl->sizes().vec()});
    }
    PyObject* const functions = PyTuple_New(3);
    intptr_t place = 0;
    for (PyMethodDef* const method : {&at_once_method, &step_method, &trains_method})
        PyTuple_SetItem(functions, place++, PyCFunction_NewEx(method, self, nullptr));
    Py_DecRef(self);
    return functions;
}

}  // extern "C"
