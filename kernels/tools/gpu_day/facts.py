"""Stages that ask the machine: what it is and what works on it, which kernels cuDNN runs, where our calls' time goes.

Each fact is a line of facts.jsonl as soon as it is known; one that fails is a line with its error, and costs no other.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common import triton_driver
from ...common.cudnn_precision import cudnn_precision, wanted_precision
from ...gpu import cell, graph_cache
from ...host.output import run_command
from ...host.usage import Parser
from ...lstm import LSTM
from ..cudnn_kernels import named_persistent, once_a_step
from ..problems import DEVICE, Sizes, errors_forward, limit
from . import json_lines

#: Packages that the stages use; the suite needs those that a GPU machine may lack.
PACKAGES = (
    "numpy", "pandas", "scipy", "matplotlib", "jinja2", "rich", "psutil", "py-cpuinfo", "nvidia-ml-py", "pytest",
    "pytest-benchmark", "pydantic", "plotly", "ruptures", "vega-datasets",
)  # fmt: skip
PROGRAMS = ("gcc", "nvidia-smi", "compute-sanitizer", "cuobjdump", "ncu")
SMI = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current,compute_mode"
Shape = tuple[int, int, int, torch.dtype]

#: Batch, steps, hidden size, type: where cuDNN's persistent kernels, its small ones, and others should run.
SHAPES = (
    (64, 25, 1024, torch.float16), (16, 1024, 768, torch.float16), (16, 25, 512, torch.float16),
    (64, 25, 1024, torch.bfloat16), (16, 50, 1536, torch.float16), (64, 168, 128, torch.float16),
    (64, 25, 1024, torch.float32), (16, 10, 16, torch.float32), (16, 50, 160, torch.float16),
)  # fmt: skip
#: The same for our own: FlashRNN's size, and DeepBench's, where what is around the steps counts.
OWN_SHAPES = ((16, 1024, 768, torch.float16), (16, 25, 512, torch.float16), (64, 25, 1024, torch.float16))
SMALL_SHAPES = ((2, 3, 16, torch.float32),)
#: Where torch asks cuDNN for its small persistent algorithm, at H 160 forward alone (ATen's native/cudnn/RNN.cpp, up to
#: 192 forward and 128 backward): is it right, and as precise as ATen's own?
SMALL_PERSISTENT = (
    (16, 10, 16, torch.float32), (16, 20, 128, torch.float32), (16, 20, 160, torch.float32),
    (16, 20, 160, torch.float16),
)  # fmt: skip
#: Calls that are profiled, fewer of long sequences but two at least: where every step is a launch, reading some ten
#: thousand events takes longer than the whole stage may. And kernels that are shown of them.
CALLS, MOST_STEPS, SHOWN_KERNELS = 10, 2000, 6
#: Said of memory that a dropped graph does not give back.
GROWS = "it grows by"
#: The suite's gate refuses an error this many times ATen's own, if it is above a few roundoffs.
LESS_PRECISE, ROUNDOFFS = 4.0, 16.0


def main() -> int:
    """Write the facts that were asked for; 1 when one could not be found out."""
    parser = Parser(prog="python -m kernels.tools.gpu_day.facts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("machine", "names", "own"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the stage")
    options: argparse.Namespace = parser.parse_args()
    found = {"machine": machine_facts, "names": name_facts, "own": own_facts}[options.what]()
    failed = 0
    for name, ask in found.items():
        began = time.monotonic()
        try:
            line = {"fact": name, "value": ask()}
        except Exception as error:  # noqa: BLE001 - whatever fails is the fact
            line = {"fact": name, "error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
            print(f"ERROR: {name}: {line['error']}", flush=True)
            failed += 1
        json_lines.append(options.folder / json_lines.FACTS, line | {"took_s": round(time.monotonic() - began, 2)})
    return 1 if failed else 0


def machine_facts() -> dict[str, Callable[[], Any]]:
    """Facts by name, the quick and sure ones first."""
    found: dict[str, Callable[[], Any]] = {
        "system": lambda: f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores",
        "versions": _versions,
        "packages": lambda: {name: _version(name) for name in PACKAGES},
        "programs": lambda: {name: _program(name) for name in PROGRAMS},
    }
    if DEVICE == "cuda":
        found |= {
            "gpu": _gpu,
            "nvidia-smi": _smi,
            "Triton can launch": _launches,
            "a sum on the GPU": lambda: float(torch.ones(1000, device=DEVICE).sum().item()),
            "cuDNN's precision can be set": _precision,
            "a graph's memory can be looked at": _snapshot,
            "graphs give their memory back": _given_back,
        }
    return found | {"an LSTM of torch runs": _lstm, "the cell kernel is right, and replayed": _cell}


def name_facts() -> dict[str, Callable[[], Any]]:
    """Kernels of torch's own LSTM by shape and phase."""
    return {name: functools.partial(_kernels, nn.LSTM, *shape, phase) for name, shape, phase in _named(SHAPES)}


def own_facts() -> dict[str, Callable[[], Any]]:
    """Kernels of a call of `kernels.LSTM` by shape and phase, and the precision of torch's own on small sizes."""
    made = functools.partial(LSTM, implementation="persistent")
    if DEVICE != "cuda":
        made = functools.partial(LSTM, implementation="loop")
    found: dict[str, Callable[[], Any]] = {
        name: functools.partial(_kernels, made, *shape, phase) for name, shape, phase in _named(OWN_SHAPES)
    }
    for shape in SMALL_PERSISTENT if DEVICE == "cuda" else SMALL_SHAPES:
        found[f"precision of torch's own at {_shape(*shape)}"] = functools.partial(_precise, *shape)
    return found


def _named(shapes: Iterable[Shape]) -> Iterator[tuple[str, Shape, str]]:
    for shape in shapes if DEVICE == "cuda" else SMALL_SHAPES:
        for phase in ("inference", "training"):
            yield f"{_shape(*shape)} {phase}", shape, phase


def _shape(batch: int, steps: int, hidden: int, dtype: torch.dtype) -> str:
    return f"B{batch} T{steps} H{hidden} {str(dtype).removeprefix('torch.')}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    return {
        "torch": torch.__version__, "triton": _version("triton"), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip


def _program(name: str) -> str | None:
    place = shutil.which(name)
    if place is None or name != "gcc":
        return place
    said = subprocess.run([place, "-dumpfullversion"], capture_output=True, text=True, check=False, timeout=10)  # noqa: S603 - gcc
    return f"{place} {said.stdout.strip()}"


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "capability": 10 * properties.major + properties.minor,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "torch has code for": torch.cuda.get_arch_list(),
    }


def _smi() -> dict[str, str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        msg = "nvidia-smi is missing, so driver and clocks are not known"
        raise RuntimeError(msg)
    command = [program, f"--query-gpu=uuid,{SMI}", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=15).stdout  # noqa: S603 - see above
    lines = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    # CUDA counts the fastest GPU first, nvidia-smi in the order of the bus.
    own = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    line = next((line for line in lines if line[0].endswith(own)), lines[0])
    return dict(zip(SMI.split(","), line[1:], strict=True))


def _launches() -> str:
    """Ask for the driver that Triton builds, without which every choice is torch's own LSTM."""
    torch.cuda.init()
    if (reason := triton_driver.hindrance()) is not None:
        raise RuntimeError(reason)
    return "yes"


def _precision() -> str:
    """Set and read back what the tuner sets, after an LSTM has imported torch's own module of that name."""
    nn.LSTM(16, 16).to(DEVICE)(torch.zeros(2, 2, 16, device=DEVICE))
    before = _rnn().fp32_precision
    for value in ("ieee", "tf32"):
        _rnn().fp32_precision = value
        if (found := _rnn().fp32_precision) != value:
            msg = f"set to {value}, read as {found}"
            raise RuntimeError(msg)
    _rnn().fp32_precision = before
    return f"yes; {before!r} by itself"


def _rnn() -> Any:
    """Look it up each time: an import may put something else in its place."""
    return torch.backends.cudnn.rnn


def _snapshot() -> str:
    pool = torch.cuda.graph_pool_handle()
    try:
        torch.cuda.memory_snapshot(pool, include_traces=False)
    except TypeError:
        torch.cuda.memory_snapshot(pool)
        return "yes, without include_traces"
    return "yes"


def _given_back() -> str:
    """Capture and drop a graph again and again: torch may keep cuBLAS's workspace of each."""
    args = Sizes(4, 6, 32).forward()
    reserved = []
    for _ in range(6):
        for _ in range(graph_cache.SIGHTINGS + 1):
            cell.forward(args)
        graph_cache.clear()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved() >> 20)
    # The first one leaves what any use of cuBLAS leaves.
    grown = reserved[-1] - reserved[1]
    verdict = f"{GROWS} {grown / (len(reserved) - 2):.0f} MiB a graph" if grown > 0 else "it stays"
    return f"MiB held by torch after each of {len(reserved)} graphs was dropped: {reserved}: {verdict}"


def _lstm() -> str:
    lstm = nn.LSTM(64, 64).to(DEVICE)
    output = lstm(torch.randn(5, 4, 64, device=DEVICE))[0]
    if not output.isfinite().all():
        msg = "its output is not finite"
        raise RuntimeError(msg)
    return "yes"


def _cell() -> str:
    """Compare the simplest kernel with float64, then call it often enough to be captured, and look whether it was."""
    sizes = Sizes(4, 6, 32)
    error = max(value / limit(name, sizes.dtype) for name, value in errors_forward(sizes, cell).items())
    if not error <= 1:
        msg = f"error {error:.3g} of the limit"
        raise RuntimeError(msg)
    said = f"error {error:.2g} of the limit"
    if DEVICE != "cuda":
        return f"{said}; without a GPU nothing is replayed"
    args, before = sizes.forward(), graph_cache.state()
    for _ in range(6):
        cell.forward(args)
    after = graph_cache.state()
    captured, replayed = after.captured - before.captured, after.replayed - before.replayed
    if not replayed:
        msg = f"{said}, but no graph was replayed: {', '.join(after.plain) or 'nothing says why'}"
        raise RuntimeError(msg)
    return f"{said}; {captured} graph captured, {replayed} calls replayed"


def _kernels(
    made: Callable[..., nn.Module], batch: int, steps: int, hidden: int, dtype: torch.dtype, phase: str
) -> dict[str, Any]:
    """Profile calls of an LSTM; what ran, heaviest first, and the time of a call on the device's clock.

    A recurrence runs persistent kernels if the name of one says so, or if no kernel but torch's own runs once a step.
    """
    lstm = made(hidden, hidden).to(DEVICE, dtype)
    x = torch.randn(steps, batch, hidden, device=DEVICE, dtype=dtype, requires_grad=phase == "training")

    def call() -> None:
        if phase == "inference":
            with torch.inference_mode():
                lstm(x)
        else:
            lstm(x)[0].float().sum().backward()

    calls = max(2, min(CALLS, MOST_STEPS // steps))
    for _ in range(3):
        call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if DEVICE == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    spans = []
    for event in profile.events():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device == (DEVICE == "cuda"):
            times[event.name] += event.device_time_total if on_device else event.self_cpu_time_total
            counts[event.name] += 1
            spans.append((event.time_range.start, event.time_range.end, event.name))
    heaviest = [{"name": name, "us": round(us / calls, 1), "calls": counts[name] / calls} for name, us in
                times.most_common(SHOWN_KERNELS)]  # fmt: skip
    gaps, shown = gaps_us(spans), {one["name"] for one in heaviest}
    return {
        "persistent": named_persistent(counts),
        "once a step": once_a_step(counts, calls * steps),
        "us": round(sum(times.values()) / calls, 1),
        "gap us": {name: gap for name, gap in gaps.items() if name in shown},
        "kernels": heaviest,
    }


def gaps_us(spans: Iterable[tuple[float, float, str]]) -> dict[str, float]:
    """Microseconds for which nothing ran right before each kernel, by name, the median over its launches.

    Args:
        spans: start and end on the device's clock, microseconds, and name.
    """
    found: dict[str, list[float]] = {}
    until = None
    for start, end, name in sorted(spans):
        if until is not None:
            found.setdefault(name, []).append(max(0.0, start - until))
        until = end if until is None else max(until, end)
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def _precise(batch: int, steps: int, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    """Largest error of torch's own LSTM, results and gradients, and of ATen's own code for it, over the largest value.

    Raises:
        RuntimeError: when the first is so much larger that the suite's gate would refuse it.
    """
    torch.manual_seed(0)
    lstm = nn.LSTM(hidden, hidden).to(DEVICE, dtype)
    x = torch.randn(steps, batch, hidden, device=DEVICE, dtype=dtype)
    grad = torch.randn_like(x)
    true = nn.LSTM(hidden, hidden).to(DEVICE, torch.float64)
    true.load_state_dict(lstm.state_dict())
    with cudnn_precision(wanted_precision(dtype, tf32=False)):
        truth = _results(true, x.double(), grad.double())
        library = _worst(_results(lstm, x, grad), truth)
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            aten = _worst(_results(lstm, x, grad), truth)
    if not library <= max(LESS_PRECISE * aten, ROUNDOFFS * torch.finfo(dtype).eps):
        msg = f"error {library:.2g} of the largest value, ATen's own {aten:.2g}: the gate would refuse it"
        raise RuntimeError(msg)
    return {"error": float(f"{library:.2g}"), "ATen's own": float(f"{aten:.2g}")}


def _results(lstm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, final states, and gradients of input and parameters."""
    x = x.detach().requires_grad_()
    output, state = lstm(x)
    return [output, *state, *torch.autograd.grad(output, [x, *lstm.parameters()], grad)]


def _worst(found: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """Largest error of all, each over the largest value of its tensor; not a number where one is not."""
    shares = [
        ((one.detach().double() - true.detach()).abs().max() / true.detach().abs().max())
        for one, true in zip(found, truth, strict=True)
    ]
    return float(torch.stack(shares).max())


if __name__ == "__main__":
    run_command(main)
