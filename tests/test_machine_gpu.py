"""The GPU's state by NVML: what makes timings doubtful is told from what is a GPU's ordinary state."""

from __future__ import annotations

import ctypes
import os
import subprocess
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
    monkeypatch.delenv(gpu.FAMILY, raising=False)
    monkeypatch.setattr(gpu, "_first_uuid", lambda: None)
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


@pytest.fixture
def worker():
    """A process that this one started, and one that that one started."""
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'input()']).pid, flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        yield child.pid, int(child.stdout.readline())
        child.communicate("\n\n")


def test_a_benchmarks_own_processes_are_no_others(nvml, monkeypatch, worker):
    """Two checkouts that are compared, or variants that are trained in turns, have a process each on the GPU."""
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(*worker)
    assert gpu.read().others == 0
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(*worker, 1)
    assert gpu.read().others == 1
    # A worker asks, whose number is not that of its siblings' parent.
    nvml.nvmlDeviceGetComputeRunningProcesses = processes(os.getpid(), worker[1], 1)
    monkeypatch.setenv(gpu.FAMILY, str(worker[0]))
    assert gpu.read().others == 2
    monkeypatch.setenv(gpu.FAMILY, str(os.getpid()))
    assert gpu.read().others == 1


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


def cuda(monkeypatch, fails=""):
    """A CUDA whose first device has a UUID of its own; `fails` names a function that gives an error."""

    def uuid(found, device):
        assert device.value == 7
        found[:] = range(16)
        return 0

    def get(device, number):
        assert number == 0
        device._obj.value = 7
        return 0

    functions = {"cuInit": lambda _: 0, "cuDeviceGet": get, "cuDeviceGetUuid": uuid}
    library = types.SimpleNamespace(**functions | ({fails: lambda *_: 100} if fails else {}))
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": library}.__getitem__)


def test_cuda_says_which_gpu_is_its_first(monkeypatch):
    """By its UUID, as NVML writes it; where CUDA gives an error, nothing is claimed."""
    cuda(monkeypatch)
    assert gpu._first_uuid() == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
    for name in ("cuInit", "cuDeviceGet", "cuDeviceGetUuid"):
        cuda(monkeypatch, fails=name)
        assert gpu._first_uuid() is None


@pytest.mark.parametrize(("visible", "handle"), [("", "GPU-own"), ("1", "GPU-own"), ("MIG-6b", "MIG-6b")])
def test_the_gpu_that_cuda_counts_first_is_asked(nvml, monkeypatch, visible, handle):
    """CUDA counts the fastest first, and NVML in the order of the bus: number 0 may be the one of the screen."""
    asked = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(gpu, "_first_uuid", lambda: "GPU-own")
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
