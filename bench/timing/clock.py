"""One clock a device, and the timed block: what one sample is made of.

On a CPU every call is timed alone with the monotonic clock. On CUDA a block of calls is queued and waited for once,
between two events (throughput), and then calls are timed one by one, each waited for (latency: what a user waits).

What reads and what waits is bound when this module is imported, before any variant: a variant that replaces
`time.perf_counter_ns` or `torch.cuda.synchronize` changes nothing here.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable

import torch

from bench.records.block import Block

_now_ns = time.perf_counter_ns
_synchronize = torch.cuda.synchronize
_Event = torch.cuda.Event


def now_s() -> float:
    """Seconds on the clock that times; only differences mean anything."""
    return _now_ns() * 1e-9


def synchronize(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        _synchronize()


def time_once(call: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, waited for."""
    synchronize(device)
    start = _now_ns()
    call()
    synchronize(device)
    return (_now_ns() - start) * 1e-9


def time_block(call: Callable[[], object], calls: int, device: str) -> Block:
    """Time `calls` calls.

    Python's garbage collector is off during the block, so that one variant does not pay for another's garbage.
    """
    synchronize(device)
    collecting = gc.isenabled()
    gc.disable()
    try:
        if device == "cuda":
            wall_s, device_s = _queued(call, calls)
            singles = tuple(time_once(call, device) for _ in range(calls))
            return Block(singles, calls, wall_s, device_s)
        clock = _now_ns
        marks = [clock()]
        for _ in range(calls):
            call()
            marks.append(clock())
    finally:
        if collecting:
            gc.enable()
    return Block(tuple((end - start) * 1e-9 for start, end in itertools.pairwise(marks)))


def _queued(call: Callable[[], object], calls: int) -> tuple[float, float]:
    """Wall and device seconds of calls queued without waiting in between."""
    before, after = _Event(enable_timing=True), _Event(enable_timing=True)
    start = _now_ns()
    before.record()
    for _ in range(calls):
        call()
    after.record()
    _synchronize()
    wall_s = (_now_ns() - start) * 1e-9
    return wall_s, before.elapsed_time(after) * 1e-3
