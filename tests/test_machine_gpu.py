"""The GPU's state by NVML: what makes timings doubtful is told from what is a GPU's ordinary state."""

from __future__ import annotations

import os
import sys
import types

import pytest

from bench.machine import gpu
from bench.machine.interference import judge, read


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def nvml(monkeypatch):
    """A pynvml whose answers a test can set; no other process and no reason at first."""
    library = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: f"GPU {index}",
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 0,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [types.SimpleNamespace(pid=os.getpid())],
        nvmlDeviceGetClockInfo=lambda *_: 1980,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu.nvml.cache_clear()
    yield library
    gpu.nvml.cache_clear()


def processes(*pids):
    """Answers of NVML when these compute."""
    return lambda _: [types.SimpleNamespace(pid=pid) for pid in pids]


def test_without_nvml_nothing_is_known(monkeypatch):
    """The absent library costs the feature, and claims neither a clock nor quiet."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    gpu.nvml.cache_clear()
    assert gpu.read() == gpu.NOTHING
    gpu.nvml.cache_clear()


def test_a_driver_that_does_not_start_is_no_error(nvml):
    """A machine with the library and without a GPU knows nothing either."""

    def fail():
        raise NVMLError

    nvml.nvmlInit = fail
    assert gpu.read() == gpu.NOTHING


@pytest.mark.usefixtures("nvml")
def test_a_quiet_gpu_is_not_slowed():
    """Alone and unhindered, it tells its clock."""
    assert gpu.read() == gpu.State(1980, "", slowed=False, others=0)
    assert judge(read(), read(), "cuda").gpu_clock_mhz == 1980


@pytest.mark.parametrize(
    ("bits", "words", "slowed"),
    [
        (0x1, "idle", False),
        (0x4, "power cap", False),
        (0x8, "hardware slowdown", True),
        (0x20, "thermal, software", True),
        (0x44, "power cap and thermal, hardware", True),
        (0x80, "power brake", True),
    ],
)
def test_what_holds_the_clock_back_is_told(nvml, bits, words, slowed):
    """Heat and brakes make a round doubtful; its power cap is a busy GPU's ordinary state."""
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: bits
    found = gpu.read()
    assert (found.throttled, found.slowed) == (words, slowed)
    assert ("the GPU was slowed" in judge(read(), read(), "cuda").why) is slowed


def test_others_on_the_gpu_disturb(nvml):
    """This process is no other; in a container, where its number is unknown, one of them is this one."""
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(os.getpid(), 1)
    assert gpu.read().others == 1
    assert "1 other processes on the GPU" in judge(read(), read(), "cuda").why
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(1, 2, 3)
    assert gpu.read().others == 2
    nvml.nvmlDeviceGetComputeRunningProcesses = processes()
    assert gpu.read().others == 0


def test_a_cpu_run_does_not_ask_the_gpu(nvml):
    """Activity of the GPU is no disturbance of a CPU's round."""
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(1, 2, 3)
    assert judge(read(), read(), "cpu").gpu_others == 0


def test_an_answer_that_a_driver_does_not_give_is_left_out(nvml):
    """One missing answer costs that answer alone."""

    def fail(*_):
        raise NVMLError

    nvml.nvmlDeviceGetClockInfo = fail
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 0x40
    assert gpu.read() == gpu.State(None, "thermal, hardware", slowed=True, others=0)


@pytest.mark.parametrize(("visible", "handle"), [("2,3", "GPU 2"), ("GPU-8f6a", "GPU-8f6a"), ("", "GPU 0")])
def test_the_visible_gpu_is_asked(nvml, monkeypatch, visible, handle):
    """CUDA_VISIBLE_DEVICES may name another one than the first, by number or by UUID."""
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml.nvmlDeviceGetClockInfo = lambda device, _: asked.append(device)
    gpu.read()
    assert asked == [handle]


@pytest.mark.parametrize("error", [AttributeError("no such function"), OSError("no library"), ValueError("garbled")])
def test_whatever_the_library_raises_costs_its_answer_alone(nvml, error):
    """Versions of it lack functions, and drivers garble what they say."""

    def fail(*_):
        raise error

    nvml.nvmlDeviceGetClockInfo = fail
    nvml.nvmlDeviceGetComputeRunningProcesses = fail
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 0x40
    assert gpu.read() == gpu.State(None, "thermal, hardware", slowed=True, others=0)
    gpu.nvml.cache_clear()
    nvml.nvmlInit = fail
    assert gpu.read() == gpu.NOTHING
