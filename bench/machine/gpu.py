"""The state of an NVIDIA GPU during a measurement, by NVML: its clock, what holds it back, who else computes on it.

Needs nvidia-ml-py (`pynvml`), which is optional: without it, or without a GPU, nothing is known and nothing is claimed.
"""

from __future__ import annotations

import ctypes
import functools
import os
import uuid
from dataclasses import dataclass
from typing import Any

import psutil

from bench.machine.facts import known

#: Environment variable with the number of the process that a benchmark's workers belong to: they are no others.
FAMILY = "SEQ2SEQ_BENCH_FAMILY"

#: NVML's reasons for a lower clock (nvml.h, nvmlClocksEventReasons*): name, bit, and whether it makes timings doubtful.
#: Idle clocks and limits that were set by hand are states of the machine, and a GPU at its power cap is a GPU at work.
_REASONS = (
    ("idle", 0x1, False),
    ("application clocks", 0x2, False),
    ("power cap", 0x4, False),
    ("hardware slowdown", 0x8, True),
    ("sync boost", 0x10, False),
    ("thermal, software", 0x20, True),
    ("thermal, hardware", 0x40, True),
    ("power brake", 0x80, True),
    ("display clocks", 0x100, False),
)


@dataclass(frozen=True)
class State:
    """Reading of NVML.

    Attributes:
        clock_mhz: clock of the multiprocessors; None where it is not known.
        throttled: what holds the clock back, in words.
        slowed: whether one of that makes timings doubtful.
        others: processes that compute there besides this benchmark's.
    """

    clock_mhz: float | None = None
    throttled: str = ""
    slowed: bool = False
    others: int = 0


NOTHING = State()


def read() -> State:
    """The state of the GPU that this process uses, the first visible one; `NOTHING` where NVML is not to be had."""
    found = nvml()
    if found is None:
        return NOTHING
    library, handle = found
    bits = _ask(library, "nvmlDeviceGetCurrentClocksThrottleReasons", 0, handle)
    held = [(name, doubtful) for name, bit, doubtful in _REASONS if bits & bit]
    running = _ask(library, "nvmlDeviceGetComputeRunningProcesses", [], handle)
    return State(
        clock_mhz=_ask(library, "nvmlDeviceGetClockInfo", None, handle, library.NVML_CLOCK_SM),
        throttled=" and ".join(name for name, _ in held),
        slowed=any(doubtful for _, doubtful in held),
        others=_others([process.pid for process in running]),
    )


def _others(pids: list[int]) -> int:
    """Number of processes that are not of this benchmark, whose variants may have processes of their own.

    In a container NVML has other numbers, but at least one of them is ours.
    """
    family = int(os.environ.get(FAMILY) or os.getpid())
    strangers = sum(not known(functools.partial(_descends, pid, family)) for pid in pids)
    return strangers if strangers < len(pids) else max(0, len(pids) - 1)


def _descends(pid: int, ancestor: int) -> bool:
    return pid == ancestor or any(parent.pid == ancestor for parent in psutil.Process(pid).parents())


def _ask(library: Any, name: str, default: Any, *arguments: Any) -> Any:
    """An answer of NVML, or the default where this GPU, driver or version of the library does not give it."""
    found = known(lambda: getattr(library, name)(*arguments))
    return default if found is None else found


@functools.cache
def nvml() -> tuple[Any, Any] | None:
    """NVML and the handle of the GPU that this process uses; None where they are not to be had."""
    return known(_started)


def _started() -> tuple[Any, Any]:
    import pynvml  # noqa: PLC0415 - optional

    pynvml.nvmlInit()
    return pynvml, _handle(pynvml)


def _handle(library: Any) -> Any:
    """The first device that CUDA shows to this process.

    CUDA is asked which one that is: unless CUDA_DEVICE_ORDER says otherwise it counts the fastest GPU first, and NVML
    counts them in the order of the bus. Where CUDA does not say, CUDA_VISIBLE_DEVICES names one by number or UUID.
    """
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    # CUDA tells of a slice only the GPU that it is part of.
    own = None if first.startswith("MIG-") else known(_first_uuid)
    if own is not None:
        return library.nvmlDeviceGetHandleByUUID(own)
    if first.isdecimal():
        return library.nvmlDeviceGetHandleByIndex(int(first))
    return library.nvmlDeviceGetHandleByUUID(first)


def _first_uuid() -> str | None:
    """UUID of the first GPU that CUDA shows to this process, as NVML writes it; makes no context there."""
    driver, device, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetUuid(found, device)
    return None if failed else f"GPU-{uuid.UUID(bytes=bytes(found))}"
