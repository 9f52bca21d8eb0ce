"""Limits of this machine, measured by a worker: matrix products per precision, bytes moved per second.

A ceiling is a best case, so of every probe the shortest time counts, and all probes take turns several times: a
neighbour that steals a second must not lower one of them. Bandwidth is measured over working sets from the innermost
cache out to memory, since a small model never leaves the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from bench.analysis.roofline import BY_SUMS
from bench.timing.clock import time_once
from kernels import refusals

#: Types of the products, and whether CUDA may round fp32 inputs to TF32.
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: How much faster a product in fp32 may be where a processor adds beside its multiplications: x1 w1 + x2 w2 is
#: (x1 + w2) (x2 + w1) less two products that many sums share (Winograd 1968), so one pair multiplied and two pairs
#: summed take four multiplications and, at the same time, four additions, in place of six multiplications.
SUMS_GAIN = 1.5
SWEEPS = 2
#: Seconds that each probe is repeated for in a sweep, at least once.
SLICE_S = 0.02
#: Square products grow from the first size to at most the last while a call is shorter than `LONG_S`: some CPUs have
#: no fast product of a type, and a large one would take minutes.
SMALLEST_PRODUCT, LARGEST_PRODUCT, LONG_S, HELD_UP_S = 128, 8192, 0.008, 0.050
SMALLEST_SET, LARGEST_SET = 32 * 1024, 256 * 1024**2
#: The largest working set is this multiple of the last cache, within `MOST_SET` and an eighth of the free memory.
BEYOND_CACHE, MOST_SET = 4, 1024**3
#: Bytes that a reading probe goes through in one call, over and over where the working set is smaller: long against
#: the time that calling takes.
REREAD = {"cpu": 32 * 1024**2, "cuda": 1024**3}
#: Calls that are queued before waiting, on CUDA.
QUEUED = 10
#: Batch and hidden size of steps that programs take together: DeepBench's and FlashRNN's, whose weights fit on the
#: multiprocessors of a large GPU.
SHARED_SIZES = ((16, 512), (16, 768), (16, 1024), (64, 1024))
#: Steps of a timed launch, which take far longer than launching, and how often it is timed; the shortest counts.
STEPS, STEP_REPEATS = 1000, 5


def measure(device: str) -> dict[str, Any]:
    """The ceilings of a device at this process's number of threads; about 5 s on a quiet CPU.

    On a CPU one thread is measured too: on a busy machine several threads wait for each other, and can be slower than
    one.

    Returns:
        `flops_per_s`: the fastest matrix product by precision, and what fp32 by sums may reach. `bytes_per_s`: the
        fastest of reading, copying and updating in place by working set in bytes, a byte that is read and written
        counted twice. `threads`, and `one_thread` with the same two rates where they are more than one.
    """
    threads = torch.get_num_threads()
    values = torch.ones(_largest_set(device) // 4, device=device)
    counts = (1,) if device == "cuda" or threads == 1 else (1, threads)
    found = {count: _Rates() for count in counts}
    try:
        for _ in range(SWEEPS):
            for count, rates in found.items():
                torch.set_num_threads(count)
                rates.sweep(values, device)
    finally:
        torch.set_num_threads(threads)
    one, together = found[counts[0]], found[counts[-1]]
    # What one thread can do, several can.
    together.take(one)
    section: dict[str, Any] = {"threads": threads, **dataclasses.asdict(together)}
    return section if one is together else section | {"one_thread": dataclasses.asdict(one)}


def steps(device: str = "cuda", sizes: Sequence[tuple[int, int]] = SHARED_SIZES, count: int = STEPS) -> dict[str, Any]:
    """Time how fast a GPU's programs take steps together, in float16: `kernels.gpu.step_limit`, every part.

    Returns:
        `step_s`: seconds of a step by part and size. `without`: reasons why a size has none.
    """
    try:
        from kernels.gpu import step_limit  # noqa: PLC0415 - where Triton is missing that is a reason
    except ImportError as error:
        return {"step_s": {}, "without": [f"Triton does not load here: {error}"]}
    step_s, without = dict[str, float](), list[str]()
    for batch, hidden in sizes:
        problem = step_limit.limit_problem(batch, hidden, torch.float16, device)
        config = step_limit.limit_config(problem)
        if config is None:
            without.append(f"B{batch} H{hidden}: the weights do not fit on this GPU's multiprocessors together")
            continue
        # It waits as the persistent kernel does: what was found to hang there is not tried here.
        if (reason := refusals.reason("persistent", config, backward=False)) is not None:
            without.append(f"B{batch} H{hidden}: the persistent kernel is not to run here: {reason}")
            continue
        # The sum of four such matrices has eigenvalues up to about 1, so h neither grows nor vanishes at once.
        weight = (torch.randn(4 * hidden, hidden) / (2 * math.sqrt(hidden))).to(device, torch.float16)
        start = torch.randn(batch, hidden).to(device, torch.float16)
        for part in step_limit.PARTS:

            def call(part: str = part, weight: Any = weight, start: Any = start, config: Any = config) -> None:
                step_limit.run(part, weight, start, count, config)

            call()
            shortest_s = min(time_once(call, device) for _ in range(STEP_REPEATS))
            step_s[f"{part} B{batch} H{hidden}"] = shortest_s / count
    return {"step_s": step_s, "without": without}


@dataclass
class _Rates:
    """The best seen so far: FLOPs per second by precision, bytes per second by working set."""

    flops_per_s: dict[str, float] = field(default_factory=dict)
    bytes_per_s: dict[str, float] = field(default_factory=dict)

    def sweep(self, values: Tensor, device: str) -> None:
        """Try every probe again, the bandwidth's on parts of `values`."""
        for name in ("fp32", "tf32", "bf16", "fp16") if device == "cuda" else ("fp32", "bf16", "fp16"):
            _raise(self.flops_per_s, name, _fastest_product(name, device))
        if device == "cpu" and adds_beside():
            self.flops_per_s[BY_SUMS] = SUMS_GAIN * self.flops_per_s["fp32"]
        for size in _sizes_up_to(values.nbytes):
            _raise(self.bytes_per_s, str(size), _fastest_move(values[: size // 4], device))

    def take(self, other: _Rates) -> None:
        """The better of both."""
        for mine, theirs in ((self.flops_per_s, other.flops_per_s), (self.bytes_per_s, other.bytes_per_s)):
            for key, rate in theirs.items():
                _raise(mine, key, rate)


@functools.cache
def adds_beside(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this processor has pipes for additions alone, as AMD's with AVX-512 do."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return "AuthenticAMD" in text and "avx512f" in text


def _raise(rates: dict[str, float], key: str, rate: float) -> None:
    rates[key] = max(rates.get(key, 0.0), rate)


def _fastest_product(name: str, device: str) -> float:
    """FLOPs per second of the best square product of a precision."""
    best, size = 0.0, SMALLEST_PRODUCT
    while size <= LARGEST_PRODUCT:
        # Random: a GPU draws less power on equal numbers, and clocks higher than any real product lets it.
        left, right = (torch.randn(size, size, device=device).to(TYPES[name]) for _ in range(2))
        out = torch.empty_like(left)
        ways: list[Callable[[], object]] = [functools.partial(torch.mm, left, right, out=out)]
        if name == "fp32" and device == "cpu" and (packed := _packed(right)) is not None:
            ways.append(functools.partial(_times_packed, left, packed))
        with _products(name, device):
            call_s = min(_shortest_s(way, device) for way in ways)
        best = max(best, 2 * size**3 / call_s)
        # Told from the best rate so far: a small product that was held up says nothing about a larger one.
        if 2 * size**3 / best > LONG_S or call_s > HELD_UP_S:
            break
        size *= 2
    return best


def _packed(right: Tensor) -> Tensor | None:
    """A matrix laid out for oneDNN; None where torch has no oneDNN.

    torch.mm takes the BLAS it was built with, and MKL leaves AVX-512 unused on processors of other makers: 107 GFLOP/s
    where oneDNN reached 252, and ONNX Runtime 250, on one core of an AMD EPYC.
    """
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(right)  # noqa: SLF001 - no public name
    except (AttributeError, RuntimeError):
        return None
    return packed


def _times_packed(left: Tensor, packed: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], "")  # noqa: SLF001
    return product


def _fastest_move(values: Tensor, device: str) -> float:
    """Bytes per second of the best way through these values."""
    half = values.numel() // 2
    threads = torch.get_num_threads()
    # A part a thread, each read again and again in one call: calling takes longer than a small cache is read in.
    part = values.numel() // threads
    again = max(1, REREAD[device] // values.nbytes)
    parts = values[: part * threads].view(threads, 1, part).expand(threads, again, part)
    ways = (
        (parts.numel() * 4, lambda: parts.sum(-1)),
        (half * 8, lambda: values[half : 2 * half].copy_(values[:half])),
        (values.nbytes * 2, values.neg_),
    )
    return max(moved / _shortest_s(call, device) for moved, call in ways)


def _shortest_s(call: Callable[[], object], device: str) -> float:
    """Shortest time of a call within `SLICE_S`, after one that warms up, seconds."""
    queued = QUEUED if device == "cuda" else 1

    def block() -> None:
        for _ in range(queued):
            call()

    call()
    best, end = math.inf, time.perf_counter() + SLICE_S
    while True:
        best = min(best, time_once(block, device) / queued)
        if time.perf_counter() > end:
            return best


@contextlib.contextmanager
def _products(name: str, device: str) -> Iterator[None]:
    """Return whether fp32 products may use TF32, on CUDA."""
    if device != "cuda":
        yield
        return
    setting: Any = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _sizes_up_to(largest: int) -> list[int]:
    """Working sets in bytes, each four times the one before, and the largest."""
    sizes = []
    size = SMALLEST_SET
    while size < largest:
        sizes.append(size)
        size *= 4
    return [*sizes, largest]


def _largest_set(device: str) -> int:
    """Bytes far beyond the device's last cache, as far as it has memory."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    else:
        free, cache = psutil.virtual_memory().available, _last_cache_bytes()
    wanted = min(max(LARGEST_SET, BEYOND_CACHE * cache), MOST_SET, free // 8)
    return max(SMALLEST_SET, wanted) // 64 * 64


def _last_cache_bytes() -> int:
    """Size of the largest cache that Linux reports; 0 elsewhere."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        if text.endswith("K") and text[:-1].isdigit():
            found.append(int(text[:-1]) * 1024)
    return max(found)
