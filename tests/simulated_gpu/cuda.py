"""`torch.cuda` of the simulated GPU: what torch's CPU build lacks, put in place as torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch

from . import LIBRARY, TRITON

#: An A100 with 1 GB, so that what is measured over all of its memory stays short.
NAME, CAPABILITY, MEMORY, CUDNN = "NVIDIA A100 (simulated)", (8, 0), 1 << 30, 91000
PROPERTIES = types.SimpleNamespace(
    name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=MEMORY, multi_processor_count=108, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=166912, shared_memory_per_multiprocessor=167936,
    L2_cache_size=4 << 20, is_integrated=0, is_multi_gpu_board=0, gcnArchName="",
    uuid="00000000-0000-0000-0000-000000000000",
)  # fmt: skip
_NOTE = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_noted: dict[int, Callable[[], object]] = {}
_numbers = itertools.count(1)


@_NOTE
def _replay_noted(number: int) -> None:
    _noted[number]()


def _loaded() -> Any:
    found = ctypes.PyDLL(os.environ[LIBRARY])
    for name in ("live", "peak", "stream"):
        getattr(found, f"simulated_{name}").restype = ctypes.c_int64
    for name in ("limit", "use", "begin"):
        getattr(found, f"simulated_{name}").argtypes = [ctypes.c_int64]
    found.simulated_blocks.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64))]
    found.simulated_blocks.restype = ctypes.c_int64
    found.simulated_captures.restype = ctypes.c_bool
    found.simulated_end.restype = ctypes.c_void_p
    found.simulated_replay.argtypes = [ctypes.c_void_p]
    found.simulated_replay.restype = ctypes.c_char_p
    found.simulated_drop.argtypes = [ctypes.c_void_p]
    found.simulated_note.argtypes = [_NOTE, ctypes.c_int64]
    return found


native: Any = None


def install() -> None:
    """Make torch see the simulated GPU; torch calls this at the end of its import."""
    global native  # noqa: PLW0603 - one device a process
    if native is not None or LIBRARY not in os.environ:
        return
    native = _loaded()
    native.simulated_install()
    native.simulated_limit(MEMORY)
    for place, names in _replacements().items():
        for name, value in names.items():
            setattr(place, name, value)
    torch.serialization.register_package(5, lambda _: None, _deserialized)
    torch.autograd.profiler.profile = _Profile  # type: ignore[misc]
    loaded = sys.modules.get("torch.backends.cudnn.rnn")
    if isinstance(loaded, types.ModuleType) and hasattr(loaded, "get_cudnn_mode"):
        loaded.get_cudnn_mode.__globals__["_cudnn"] = _CUDNN
    if os.environ[TRITON] == "1":
        with contextlib.suppress(ImportError):
            _interpret_triton()


_CUDNN = types.SimpleNamespace(RNNMode=types.SimpleNamespace(rnn_relu=0, rnn_tanh=1, lstm=2, gru=3))


def _gives(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _asks(name: str) -> Callable[..., Any]:
    return lambda *_, **__: getattr(native, f"simulated_{name}")()


def _replacements() -> dict[Any, dict[str, Any]]:
    """Replacements by module or class, each by its name there."""
    cuda = torch.cuda
    memory = {
        "max_memory_allocated": _asks("peak"), "memory_allocated": _asks("live"),
        "max_memory_reserved": _asks("peak"), "memory_reserved": _asks("live"),
        "reset_peak_memory_stats": _asks("reset_peak"), "empty_cache": _gives(None), "memory_snapshot": _blocks,
        "mem_get_info": lambda *_: (MEMORY - native.simulated_live(), MEMORY),
        "get_allocator_backend": _gives("native"),
    }  # fmt: skip
    # The CPU's generator is this device's too.
    random = {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "manual_seed": _gives(None), "manual_seed_all": _gives(None),
    }  # fmt: skip
    graphs = {"CUDAGraph": Graph, "graph_pool_handle": _pool, "graph": Capture}
    streams = {"Stream": Stream, "Event": Event}
    device = {
        "is_available": _gives(True), "is_initialized": _gives(True), "init": _gives(None), "_lazy_init": _gives(None),
        "_is_compiled": _gives(True), "_is_in_bad_fork": _gives(False), "_initialized": True,
        "device_count": _gives(1), "current_device": _gives(0), "set_device": _gives(None),
        "get_device_properties": _gives(PROPERTIES), "get_device_name": _gives(NAME),
        "get_device_capability": _gives(CAPABILITY), "get_arch_list": _gives(["sm_80"]),
        "is_bf16_supported": _gives(True), "synchronize": lambda *_: _forbid("synchronize"),
        "current_stream": lambda *_: _stream(native.simulated_stream()), "default_stream": lambda *_: _stream(0),
        "stream": Use, "StreamContext": Use, "device": _Device, "device_of": _Device,
        "_exchange_device": _gives(0), "_maybe_exchange_device": _gives(0),
        "is_current_stream_capturing": _asks("captures"),
    }  # fmt: skip
    inner = {
        "_cudnn": _CUDNN, "_cuda_getDeviceCount": _gives(1), "_cuda_getDevice": _gives(0),
        "_cuda_getCurrentRawStream": _asks("stream"), "_cuda_isCurrentStreamCapturing": _asks("captures"),
        "_cuda_exchangeDevice": _gives(0), "_cuda_maybeExchangeDevice": _gives(0),
    }  # fmt: skip
    cudnn = {
        "is_available": _gives(True),
        "version": _gives(CUDNN),
        "is_acceptable": lambda tensor: torch.backends.cudnn.enabled and tensor.is_cuda and tensor.is_floating_point(),
    }
    return {
        cuda: memory | random | graphs | streams | device, cuda.memory: memory, cuda.random: random,
        cuda.graphs: graphs, cuda.streams: streams, torch._C: inner, torch.backends.cudnn: cudnn,
        torch.backends.cuda: {"is_built": _gives(True)}, torch.version: {"cuda": "13.0"},
        torch.UntypedStorage: {"clone": _cloned, "__deepcopy__": _deep_copied},
    }  # fmt: skip


def _forbid(what: str) -> None:
    if native.simulated_captures():
        msg = f"CUDA error: operation not permitted when stream is capturing: {what}"
        raise RuntimeError(msg)


class Stream(torch.Stream):
    """A stream: a number, since everything has ended by the time that a call returns."""

    def __new__(cls, device: object = None, priority: int = 0, **known: Any) -> Self:
        """Make a new stream, or the one that `known` names."""
        del device
        return super().__new__(cls, **known) if known else super().__new__(cls, device="cuda", priority=priority)

    @property
    def cuda_stream(self) -> int:
        """The stream's handle."""
        return int(self.stream_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, torch.Stream) and self.stream_id == other.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)

    def wait_stream(self, stream: torch.Stream) -> None:
        """Do nothing."""

    def wait_event(self, event: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Refuse to, in a capture."""
        _forbid("Stream.synchronize")

    def query(self) -> bool:
        """Say that all has ended."""
        return True

    def record_event(self, event: Any = None) -> Any:
        """Record an event, by default a new one."""
        event = event or Event()
        event.record(self)
        return event


def _stream(number: int) -> Stream:
    return Stream(stream_id=number, device_index=0, device_type=1)


class Event:
    """An event: the time at which it was recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        del blocking, interprocess
        self.timed, self.recorded_ns = enable_timing, 0

    def record(self, stream: Any = None) -> None:
        """Note the time."""
        del stream
        self.recorded_ns = time.perf_counter_ns()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds until another event."""
        if not (self.timed and end.timed and self.recorded_ns and end.recorded_ns):
            msg = "Both events must be created with argument 'enable_timing=True' and recorded"
            raise ValueError(msg)
        return (end.recorded_ns - self.recorded_ns) / 1e6

    def query(self) -> bool:
        """Say that it has come."""
        return True

    def synchronize(self) -> None:
        """Refuse to, in a capture."""
        _forbid("Event.synchronize")

    def wait(self, stream: Any = None) -> None:
        """Do nothing."""


class Use:
    """`with torch.cuda.stream(...)`."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.before = stream, 0

    def __enter__(self) -> None:
        self.before = native.simulated_stream()
        if self.stream is not None:
            native.simulated_use(self.stream.stream_id)

    def __exit__(self, *_: object) -> None:
        native.simulated_use(self.before)


class _Device(contextlib.nullcontext[None]):
    """`with torch.cuda.device(...)`: there is one."""


def _blocks(pool: tuple[int, int], include_traces: bool = True) -> list[dict[str, int]]:
    del include_traces
    found = ctypes.POINTER(ctypes.c_int64)()
    count = native.simulated_blocks(pool[1], ctypes.byref(found))
    return [{"address": found[2 * one], "total_size": found[2 * one + 1]} for one in range(count)]


def _pool() -> tuple[int, int]:
    return 0, next(_numbers)


class Graph:
    """A CUDA graph: the operations and launches of a capture, which a replay makes again over the same memory."""

    def __init__(self, keep_graph: bool = False) -> None:
        del keep_graph
        self.tape: int | None = None
        self.memory = (0, 0)

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        """Begin to note."""
        del capture_error_mode
        if native.simulated_stream() == 0 or native.simulated_captures():
            msg = "CUDA graphs must be captured on a non-default stream, one at a time"
            raise RuntimeError(msg)
        self.memory = pool or _pool()
        native.simulated_begin(self.memory[1])

    def capture_end(self) -> None:
        """End it."""
        self.tape = native.simulated_end()

    def replay(self) -> None:
        """Make all of it again."""
        if self.tape is None:
            msg = "Called CUDAGraph::replay without a preceding successful capture."
            raise RuntimeError(msg)
        if failed := native.simulated_replay(self.tape):
            raise RuntimeError(failed.decode())

    def pool(self) -> tuple[int, int]:
        """The pool of its memory."""
        return self.memory

    def reset(self) -> None:
        """Forget it."""
        if self.tape is not None:
            native.simulated_drop(self.tape)
        self.tape = None

    def __del__(self) -> None:
        self.reset()


class Capture:
    """`with torch.cuda.graph(...)`."""

    def __init__(self, cuda_graph: Graph, pool: Any = None, stream: Any = None, **_: object) -> None:
        self.graph, self.pool, self.use = cuda_graph, pool, Use(stream or Stream())

    def __enter__(self) -> None:
        _forbid("synchronize")
        self.use.__enter__()
        self.graph.capture_begin(self.pool)

    def __exit__(self, *raised: object) -> None:
        self.graph.capture_end()
        self.use.__exit__(*raised)


_clone, _deep_copy = torch.UntypedStorage.clone, torch.UntypedStorage.__deepcopy__


def _cloned(storage: Any) -> Any:
    if storage.device.type != "cuda":
        return _clone(storage)
    return torch.empty(0, dtype=torch.uint8, device="cuda").set_(storage).clone().untyped_storage()


def _deep_copied(storage: Any, memo: dict[Any, Any]) -> Any:
    if storage.device.type != "cuda":
        return _deep_copy(storage, memo)
    copied = memo.setdefault("torch", {})
    if storage._cdata not in copied:
        copied[storage._cdata] = storage.clone()
    return copied[storage._cdata]


def _deserialized(storage: Any, location: str) -> Any:
    if not location.startswith("cuda"):
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage).to("cuda").untyped_storage()


class _Profile(torch.autograd.profiler.profile):
    """The profiler, in whose trace each operator on the GPU has launched a kernel."""

    def __init__(self, *arguments: Any, use_device: str | None = None, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._on_gpu = use_device == "cuda"

    def export_chrome_trace(self, path: str) -> None:
        super().export_chrome_trace(path)
        if self._on_gpu:
            trace = json.loads(Path(path).read_text(encoding="utf-8"))
            ran = [one for one in trace["traceEvents"] if one.get("cat") == "cpu_op"]
            names = [one | {"cat": "kernel", "name": f"simulated_{one['name'].removeprefix('aten::')}"} for one in ran]
            trace["traceEvents"] += names
            Path(path).write_text(json.dumps(trace), encoding="utf-8")


def _interpret_triton() -> None:
    """Run Triton's kernels in its interpreter, on the path that they take on a GPU."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton
    import triton.language
    from concurrent_programs import concurrent
    from triton.runtime import interpreter

    triton.knobs.runtime.interpret = True
    triton.runtime.driver.set_active(types.SimpleNamespace(get_current_target=_gives(("cuda", 80, 32))))
    # The project's own code asks the environment, and takes another path in the interpreter.
    del os.environ["TRITON_INTERPRET"]
    type(interpreter.interpreter_builder).create_inline_asm = _assembly
    together = concurrent(0)
    together.__enter__()
    executor = interpreter.GridExecutor
    launch = executor.__call__

    def noted(self: Any, *arguments: Any, **named: Any) -> None:
        if not native.simulated_captures():
            launch(self, *arguments, **named)
            return
        number = next(_numbers)
        _noted[number] = lambda: launch(self, *arguments, **named)
        native.simulated_note(_replay_noted, number)

    executor.__call__ = noted  # type: ignore[method-assign]
    _noted[0] = together.__exit__  # type: ignore[assignment] - a generator that is collected would undo it


def _assembly(self: Any, assembly: str, constraints: str, values: Any, kind: Any, pure: bool, pack: int) -> Any:
    """Compute the instructions that the kernels use."""
    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    del self, constraints, kind, pure, pack
    data = values[0].data
    if assembly.startswith("ex2.approx"):
        data = np.exp2(data).astype(np.float32)
    elif assembly.startswith("rcp.approx"):
        data = (1 / data).astype(np.float32)
    elif not assembly.startswith("mov.b32"):
        raise NotImplementedError(assembly)
    found = TensorHandle(data, values[0].dtype)
    return types.SimpleNamespace(get_result=lambda _: found)
