"""Chooses the kernel that runs a recurrence, and says why the others do not.

`auto` takes what `python -m kernels tune` measured to be fastest on this GPU, cuDNN included; where nothing was
measured, it estimates and says so. A kernel that is named runs or is refused with the reason; nothing falls back
silently.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from . import measurements as table
from . import refusals
from .common import triton_driver
from .common.recurrence import (
    Backward,
    Forward,
    Problem,
    gpu_facts,
    loop_backward,
    loop_forward,
    problem_on,
)
from .cpu import fused
from .estimate import estimate_s

#: Modules that bring a kernel: `forward(args, config)` and `backward(args, config)`, `refuses`, `configs`, `launches`.
MODULES = {name: f"{__package__}.gpu.{name}" for name in ("cell", "sequence", "persistent")}
#: The kernel for CPUs, compiled when it is first used.
CPU = "cpu-fused"
#: torch's own LSTM with sizes rounded up for cuDNN: `kernels.padded_vendor`.
PADDED = "vendor-padded"
#: What may be asked for. `triton` is the fastest of the modules above; `loop` is torch operations, step by step; and
#: `vendor` is torch's own LSTM (cuDNN, oneDNN or ATen), which is not a recurrence: only `kernels.LSTM` can run it.
IMPLEMENTATIONS = ("auto", "triton", *MODULES, CPU, "loop", PADDED, "vendor")
#: What is torch's own LSTM.
VENDORS = (PADDED, "vendor")
PADDED_HAS_NO_LENGTHS = "vendor-padded takes no lengths, since cuDNN's persistent algorithm takes no packed sequences"
VENDOR_HAS_NO_RESETS = "torch's own LSTM has no resets: no row of it can begin anew in the middle of the steps"
#: First words of the reason of a choice that is not based on a measurement.
BY_ESTIMATE = "by estimate"
#: Answers that are kept: a lookup runs at every call, and batches of real data come in many lengths.
CACHED = 4096
_GENERATION = [0]


@dataclass(frozen=True)
class Choice:
    """Choice of what will run.

    Attributes:
        implementation: a name of `IMPLEMENTATIONS` other than `auto` and `triton`.
        reason: why, in a sentence.
        refused: by name, why an implementation cannot serve; left out of the text, since it is long.
        config: the configuration that a kernel for GPUs takes for the forward pass; None elsewhere.
        instructions: what multiplies in `cpu-fused`: `avx512-fma`, `avx512-sums`, `avx512-vnni`, `avx2-int8` and so on
            (`kernels.cpu.fused.instructions`); else empty.
        detour: why calls without gradients reach `cpu-fused` through Python instead of by its native entry, which short
            ones feel; empty where there is an entry, and for what never takes it.
    """

    implementation: str
    reason: str
    refused: Mapping[str, str] = dataclasses.field(repr=False)
    instructions: str = ""
    config: Any = None
    detour: str = ""


def choose(problem: Problem, implementation: str = "auto", *, compiling: bool = False) -> Choice:
    """Choose what runs a problem's forward pass (and, if it saves, can serve its backward pass).

    Args:
        problem: the recurrence; `saves` says whether a backward pass will follow.
        implementation: a name of `IMPLEMENTATIONS`.
        compiling: whether torch.compile or torch.export is tracing, which cannot see into torch's own LSTM.

    Raises:
        ValueError: for an unknown name, and for one that cannot serve this problem; the message says what can.
    """
    return _choose(problem, implementation, compiling, False, *_surroundings(problem))


def choose_config(problem: Problem, implementation: str, *, backward: bool) -> Any:
    """The configuration that was fastest at the nearest measured shape and fits here, else the kernel's own first.

    Args:
        problem: one that the implementation does not refuse.
        implementation: `cell`, `sequence` or `persistent`.
        backward: for which pass.
    """
    return _choose_config(problem, implementation, backward, _surroundings(problem)[0])


def forward(args: Forward, implementation: str) -> None:
    """Run a forward recurrence by a resolved name or `auto`, which is never `vendor` here.

    Raises:
        ValueError: as `choose`, and for `vendor`.
    """
    problem = args.problem
    name = _kernel_for(problem, implementation, backward=False)
    if name == "loop":
        loop_forward(args)
        return
    if name == CPU:
        fused.forward(args)
        return
    with _device_of(args.gates_input):
        _launch(args, name, backward=False)


def backward(args: Backward, implementation: str) -> None:
    """Run a backward recurrence; what is saved is the same for all, so another kernel may have run forward.

    Raises:
        ValueError: as `forward`.
    """
    problem = args.problem
    name = _kernel_for(problem, implementation, backward=True)
    if name == "loop":
        loop_backward(args)
        return
    if name == CPU:
        fused.backward(args)
        return
    with _device_of(args.gates):
        _launch(args, name, backward=True)


def _launch(args: Forward | Backward, name: str, *, backward: bool) -> None:
    module = _module(name)
    run = module.backward if backward else module.forward
    config = choose_config(args.problem, name, backward=backward)
    try:
        run(args, config)
    except RuntimeError as error:
        withdraw = getattr(module, "withdraw", None)
        if withdraw is None or not withdraw(error):
            raise
        # Choices made so far may name a configuration that does not fit here.
        forget()
        run(args, choose_config(args.problem, name, backward=backward))


def forget() -> None:
    """Drop all cached choices, after a table was written or a module was exchanged."""
    for function in (_choose, _choose_config, problem_on, gpu_facts, table.load, refusals.load):
        function.cache_clear()
    _GENERATION[0] += 1


def generation() -> int:
    """Number of calls of `forget`: choices made before the last one may be outdated."""
    return _GENERATION[0]


def _kernel_for(problem: Problem, implementation: str, *, backward: bool) -> str:
    if implementation in VENDORS:
        msg = (
            f"{implementation!r} is torch's own LSTM, not a recurrence; run it by "
            f"kernels.LSTM(implementation={implementation!r}) or torch.nn.LSTM, or ask here for 'auto'"
        )
        raise ValueError(msg)
    if problem.batch == 0 or problem.steps == 0:
        # Nothing to launch; the loop hands the initial state on.
        return "loop"
    return _choose(problem, implementation, True, backward, *_surroundings(problem)).implementation


@functools.lru_cache(maxsize=CACHED)
def _choose(
    problem: Problem, implementation: str, no_vendor: bool, backward: bool, device: str, interpreted: bool
) -> Choice:
    if implementation not in IMPLEMENTATIONS:
        msg = f"unknown implementation {implementation!r}; known are {', '.join(IMPLEMENTATIONS)}"
        raise ValueError(msg)
    refused = _refusals(problem, backward=backward, interpreted=interpreted)
    if problem.resets:
        refused |= dict.fromkeys(VENDORS, VENDOR_HAS_NO_RESETS)
    if no_vendor:
        why = "torch's own LSTM cannot be traced, and is not a recurrence: only a module can call it"
        refused |= dict.fromkeys(VENDORS, why)
    elif problem.masked:
        refused[PADDED] = PADDED_HAS_NO_LENGTHS
    # Refuse now what cannot serve the backward pass to come, rather than in the middle of it.
    later = _refusals(problem, backward=True, interpreted=interpreted) if problem.saves and not backward else {}
    if implementation == "triton":
        refused |= dict.fromkeys(VENDORS, "only Triton kernels were asked for")
        if missing := next((found for found in (refused, later) if found.keys() >= MODULES.keys()), None):
            msg = "no Triton kernel serves: " + "; ".join(f"{name}: {missing[name]}" for name in MODULES)
            raise ValueError(msg)
        if problem.device != "cuda":
            name = next(name for name in MODULES if name not in refused)
            return Choice(name, "the first that serves in Triton's interpreter", MappingProxyType(refused))
    if implementation in {"auto", "triton"}:
        name, reason = _auto(problem, refused, later, backward=backward, device=device)
        name, reason = _in_float32(problem, name, reason, refused, operator=no_vendor)
        config = _config(problem, name, backward, device)
        return Choice(name, reason, MappingProxyType(refused), _instructions(name, problem), config)
    refused = later | refused
    if implementation in refused:
        instead = [name for name in IMPLEMENTATIONS if name not in refused and name not in {"triton", "loop", PADDED}]
        msg = (
            f"implementation {implementation!r} cannot serve: {refused[implementation]}; "
            f"use {' or '.join(map(repr, instead))}"
        )
        raise ValueError(msg if problem.storage == "fp32" else f"{msg}, with weight_storage='fp32'")
    config = _config(problem, implementation, backward, device)
    multiplies = _instructions(implementation, problem)
    return Choice(implementation, "asked for", MappingProxyType(refused), multiplies, config)


def _in_float32(
    problem: Problem, name: str, reason: str, refused: Mapping[str, str], *, operator: bool
) -> tuple[str, str]:
    """The CPU kernel where an operator has only the loop left for a smaller type than float32; else the choice made."""
    if name != "loop" or not (operator and fused.converts(problem)):
        return name, reason
    return CPU, f"{refused[CPU]}: computed in float32, on operands converted to it"


def _config(problem: Problem, implementation: str, backward: bool, device: str) -> Any:
    on_gpu = implementation in MODULES and problem.device == "cuda"
    return _choose_config(problem, implementation, backward, device) if on_gpu else None


def _instructions(implementation: str, problem: Problem) -> str:
    if implementation != CPU:
        return ""
    return fused.instructions(fused.storage_for(problem), problem.hidden_size, problem.batch)


def _refusals(problem: Problem, *, backward: bool, interpreted: bool) -> dict[str, str]:
    """Reasons why kernels cannot serve, by kernel."""
    refused = {}
    hindered = triton_driver.hindrance() if problem.device == "cuda" else None
    for name in MODULES:
        reason = None
        if problem.device != "cuda" and not (problem.device == "cpu" and interpreted):
            reason = f"a Triton kernel needs an NVIDIA GPU, the tensors are on {problem.device!r}"
        elif problem.dtype == torch.float64:
            reason = "float64 is not for Triton kernels here: they keep the cell state in float32"
        elif hindered is not None:
            reason = hindered
        else:
            try:
                reason = _module(name).refuses(problem, backward=backward) or _found_wrong(
                    problem, name, backward=backward
                )
            except ImportError as error:
                missing = (error.name or "").split(".")[0] == "triton"
                reason = "Triton is not installed (pip install triton)" if missing else f"it cannot be loaded: {error}"
        if reason is not None:
            refused[name] = reason
    reason = fused.refuses(problem)
    if reason is not None:
        refused[CPU] = reason
    return refused


def _found_wrong(problem: Problem, implementation: str, *, backward: bool) -> str | None:
    """Reason why no configuration of a kernel is left to run; None if one is."""
    listed = refusals.load(table.folder() / refusals.NAME)
    if not any((one.implementation, one.backward) == (implementation, backward) for one in listed):
        return None
    configs = _module(implementation).configs(problem, backward=backward)
    if refusals.allowed(implementation, configs, backward=backward):
        return None
    reason = refusals.reason(implementation, configs[0], backward=backward)
    return f"a check found it wrong on this machine ({table.folder() / refusals.NAME}): {reason}"


def _auto(
    problem: Problem, refused: Mapping[str, str], later: Mapping[str, str], *, backward: bool, device: str
) -> tuple[str, str]:
    """The fastest that serves, and why it is taken for that; `later` is what refuses the backward pass to come."""
    serving = [name for name in MODULES if name not in refused]
    after = [name for name in MODULES if name not in later]
    vendor = "vendor" not in refused
    why = None
    serves = CPU not in refused and (backward or CPU not in later)
    if serves:
        return CPU, f"the fused kernel serves {'autocast to bfloat16' if problem.autocast else 'float32'} on a CPU"
    if problem.device == "cpu":
        why = (refused if CPU in refused else later)[CPU]
    elif problem.device != "cuda":
        why = f"Triton's kernels are for GPUs, and the tensors are on {problem.device!r}"
    elif not serving:
        why = "no Triton kernel serves this problem"
    elif vendor and not after:
        why = "no Triton kernel serves this problem's backward pass"
    if why is not None:
        return ("vendor", f"{why}: torch's own LSTM") if vendor else ("loop", f"{why}: torch operations step by step")
    measured = table.load(device)
    best = None if measured is None else _fastest(measured, problem, serving, backward=backward)
    if measured is None or best is None:
        estimates = {name: estimate_s(problem, name, backward=backward) for name in serving}
        what = "" if measured is None else f" near this shape in {table.dtype_name(problem)}"
        name = min(estimates, key=lambda name: estimates[name])
        return name, f"{BY_ESTIMATE}: nothing was measured{what} on {device}"
    entry, name = best
    ours, vendors = _totals(measured, problem, entry, name, after)
    where = f"on {device} at {entry.shape}, {entry.phase}"
    own = {one: time_s for one, time_s in vendors.items() if time_s is not None}
    if not own:
        return name, f"measured {where}: {name} {_us(entry.kernels[name].time_s)}"
    # Refused ones are named all the same, since they may be what is beaten.
    best_vendor = min(own, key=lambda one: (one in refused, own[one]))
    how = " on padded sizes" if best_vendor == PADDED else ""
    both = f"{name} {_us(ours)}, torch's own LSTM{how} {_us(own[best_vendor])} with their products"
    if own[best_vendor] < ours and best_vendor not in refused:
        return best_vendor, f"measured {where}: {both}"
    note = "; torch's own cannot be called here" if own[best_vendor] < ours else ""
    return name, f"measured {where}: {both}{note}"


def _fastest(
    measured: table.MeasuredTable, problem: Problem, serving: list[str], *, backward: bool
) -> tuple[table.MeasuredShape, str] | None:
    """The nearest measured shape where one of those that serve was right, and the fastest of them there."""
    for entry in measured.near(problem, backward=backward):
        names = [name for name in serving if name in entry.kernels]
        if names:
            return entry, min(names, key=lambda name: entry.kernels[name].time_s)
    return None


def _totals(
    measured: table.MeasuredTable, problem: Problem, entry: table.MeasuredShape, name: str, after: list[str]
) -> tuple[float, dict[str, float | None]]:
    """Time of the phase with its products, ours and torch's own; of both phases before a backward pass."""
    ours, vendors = entry.kernels[name].whole_s(entry.around_s), dict(zip(VENDORS, entry.vendors_s, strict=True))
    if entry.phase != "forward" or not any(vendors.values()):
        return ours, vendors
    later = _fastest(measured, problem, after, backward=True)
    if later is None or not any(later[0].vendors_s):
        return ours, vendors
    both = {
        one: None if first is None or second is None else first + second
        for (one, first), second in zip(vendors.items(), later[0].vendors_s, strict=True)
    }
    return ours + later[0].kernels[later[1]].whole_s(later[0].around_s), both


@functools.lru_cache(maxsize=CACHED)
def _choose_config(problem: Problem, implementation: str, backward: bool, device: str) -> Any:
    offered = _module(implementation).configs(problem, backward=backward)
    candidates = refusals.allowed(implementation, offered, backward=backward)
    measured = table.load(device)
    for entry in () if measured is None else measured.near(problem, backward=backward):
        if implementation in entry.kernels:
            best = dict(entry.kernels[implementation].config)
            for config in candidates:
                if dataclasses.asdict(config) == best:
                    return config
    return candidates[0]


def _surroundings(problem: Problem) -> tuple[str, bool]:
    """Name of the problem's GPU, and whether Triton interprets: an answer depends on both, besides the sizes."""
    if problem.device == "cuda":
        return problem.gpu or f"a GPU of compute capability {problem.capability / 10}", False
    return "", os.environ.get("TRITON_INTERPRET") == "1"


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make a tensor's GPU the current one: Triton launches there, wherever the tensors are."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} us"


def _module(implementation: str) -> Any:
    return importlib.import_module(MODULES[implementation])
