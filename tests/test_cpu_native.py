"""Limits of the CPU kernel's native code: it never ends the process, reaches past memory, or spins away a core."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from cpu_builds import FLAGS
from planted_kernels import KernelPrograms

from kernels.common.recurrence import Backward, Forward, loop_backward, loop_forward
from kernels.cpu import fused
from kernels.cpu.build import library
from kernels.cpu.native_arguments import ForwardArgs
from kernels.cpu.packing import pack
from kernels.tools import sanitize

ROOT = Path(__file__).parents[1]

#: A module of `layers` with its library loaded, and `limited`, which leaves the process so many more bytes of memory.
START = """
import os, resource, sys, threading
import torch
from kernels import LSTM
from kernels.cpu import teams
torch.set_num_threads(1)
def limited(more):
    lines = open("/proc/self/status").read().splitlines()
    size = int(next(line for line in lines if line.startswith("VmSize")).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (size + more,) * 2)
def module(layers=1, hidden=512, features=1):
    lstm = LSTM(features, hidden, layers)
    with torch.no_grad():
        lstm(torch.zeros(4, 1, features))
    return lstm
"""


def said(code: str, **environment: str) -> str:
    """Standard output of a process that is started anew in an environment; it has to end with 0."""
    paths = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", START + code], env=paths, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_too_little_memory_is_an_exception(programs: KernelPrograms, tmp_path: Path) -> None:
    """A call whose inner layers find no memory raises, says how much was missing for what, and the next call runs."""
    out = programs.said(
        START
        + """
lstm = module(layers=3)
x = torch.zeros(8000, 8, 1)  # 131 MB of output, and twice that between the layers
h, c = torch.ones(2, 3, 8, 512).unbind()
limited(200 * 2**20)
with torch.no_grad():
    try:
        lstm(x, (h, c))
    except MemoryError as error:
        print(error)
    print(bool((h == 1).all() and (c == 1).all()), lstm(x[:100])[0].isfinite().all().item())
""",
        tmp_path,
    )
    # Where whole sequences are projected by the walk itself (strips of AVX2), none of it is the projection's 8 MB.
    size = 262176768 if "avx2" in FLAGS and "avx512f" not in FLAGS else 270565376
    assert out == (
        f"the CPU kernel cannot allocate {size} bytes for the states and the output of inner layers\nTrue True\n"
    )


@pytest.mark.parametrize("features", [1, 64], ids=["projected in each step", "projected before the steps"])
def test_inference_reserves_no_memory_for_all_steps(features: int, programs: KernelPrograms, tmp_path: Path) -> None:
    """One layer of 8000 steps needs its output of 131 MB and little more, though its projection has four times that."""
    assert programs.said(START + f"""
lstm = module(features={features})
x = torch.zeros(8000, 8, {features})
limited(170 * 2**20)
with torch.no_grad():
    print(lstm(x)[0].shape[0])
""", tmp_path) == "8000\n"  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_threads_that_cannot_start_are_an_exception(training: bool, programs: KernelPrograms, tmp_path: Path) -> None:
    """OpenMP would end the process; a call with fewer threads runs."""
    out = programs.said(
        START
        + f"""
import ctypes
libc = ctypes.CDLL(None)
lstm = module(hidden=256)
attributes = ctypes.create_string_buffer(64)
libc.pthread_attr_init(attributes)
libc.pthread_attr_setstacksize(attributes, ctypes.c_size_t(1 << 46))  # more than there are addresses for
libc.pthread_setattr_default_np(attributes)
teams.cores = lambda: 2
torch.set_num_threads(2)
x = torch.zeros(50, 1, 1)
torch.set_grad_enabled({training})
try:
    lstm(x)
except RuntimeError as error:
    print(str(error)[:60])
torch.set_num_threads(1)
print(lstm(x)[0].isfinite().all().item())
""",
        tmp_path,
    )
    assert out == "the CPU kernel failed: cannot start 2 threads (Resource temp\nTrue\n"


def test_small_stacks_are_enough() -> None:
    """Threads with the least stack that there may be compute forward and backward."""
    assert (
        said(
            """
teams.WORTH_A_THREAD = teams.WORTH_A_MEETING = 1
teams.cores = lambda: 2
torch.get_num_threads = lambda: 2
lstm = module(hidden=70)
lstm(torch.randn(9, 3, 1))[0].sum().backward()
print(lstm.weight_hh_l0.grad.isfinite().all().item())
""",
            OMP_STACKSIZE="16k",
        )
        == "True\n"
    )


def test_a_team_is_no_larger_than_the_affinity_mask(programs: KernelPrograms, tmp_path: Path) -> None:
    """Two threads on one core would wait for each other; OpenMP's own binding of the calling thread does not count."""
    code = "print(teams.cores(), {}len(os.sched_getaffinity(0)))\n"
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert programs.said(START + one + code.format(""), tmp_path) == "1 1\n"
    # As many as there are, although the thread is bound to one of them.
    many = len(os.sched_getaffinity(0))
    bound = "torch.set_num_threads(2); torch.ones(500, 500) @ torch.ones(500, 500)\n"
    assert said(bound + "print(teams.cores())", OMP_PROC_BIND="true") == f"{many}\n"


def test_threads_without_a_core_do_not_spin_for_it(programs: KernelPrograms, tmp_path: Path) -> None:
    """With four threads on one core, as under a container's quota, a call takes little more of it than with one."""
    out = programs.said(
        START
        + """
import time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
lstm, x, least = module(), torch.zeros(50, 1, 1), {}
for threads in (1, 4, 1, 4):
    torch.set_num_threads(threads)
    teams.cores = lambda: threads
    for _ in range(10):
        start = time.process_time()
        with torch.no_grad():
            lstm(x)
        least[threads] = min(time.process_time() - start, least.get(threads, 9.0))
print(least[4] / least[1])
""",
        tmp_path,
    )
    assert float(out) < 2


#: Strides in numbers: a step does not fit into 32 bits, and three steps not by far.
STEP, ROW = 2**31 + 64, 2**30 + 64
#: What a recurrence reads and writes of all steps, each so many times as wide as the hidden state.
WIDTHS = {"input": 4, "output": 1, "gates": 4, "cells": 1, "grad": 1, "grad_gates": 4}
#: MAP_NORESERVE of Linux, which `mmap` does not name.
NORESERVE = 0x4000


def strided(memory: torch.Tensor, *shape: int, at: int) -> torch.Tensor:
    """A tensor of (steps, batch, width) whose steps and rows are gigabytes apart in reserved memory."""
    return memory.as_strided(shape, (STEP, ROW, *(1,) * (len(shape) - 2)), at)


@pytest.fixture
def memory() -> torch.Tensor:
    """Addresses for 32 GiB of numbers, of which only what is touched is there."""
    bytes_ = 4 * 4 * 2**31
    try:
        reserved = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"no address space for {bytes_} bytes ({error})")
    return torch.frombuffer(reserved, dtype=torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_offsets_have_64_bits(memory: torch.Tensor, threads: int) -> None:
    """Tensors that reach far beyond 2**31 numbers give what small ones with the same values give."""
    steps, batch, hidden = 3, 2, 20
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    weight, h0, c0 = normal(1, 4 * hidden, hidden), normal(1, batch, hidden), normal(1, batch, hidden)
    small = {name: normal(steps, batch, 1, width * hidden) for name, width in WIDTHS.items()}
    large = {
        name: strided(memory, *value.shape, at=4096 * index).copy_(value)
        for index, (name, value) in enumerate(small.items())
    }
    found = []
    with mock.patch.object(fused, "team", return_value=(threads, False)):
        for run, run_back, of in ((loop_forward, loop_backward, small), (fused.forward, fused.backward, large)):
            last = [torch.empty(1, batch, hidden) for _ in range(4)]
            run(
                Forward(
                    of["input"], weight, h0, c0, None, of["output"], *last[:2], of["gates"], of["cells"], tf32=False
                )
            )
            run_back(Backward(weight, c0, None, of["gates"], of["cells"], of["grad"], None, None, of["grad_gates"],
                              *last[2:], tf32=False))  # fmt: skip
            found.append([*last, *(value.clone() for value in of.values())])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_input_is_read_with_64_bits(memory: torch.Tensor, batch_first: bool) -> None:
    """So is an input that the kernel projects itself."""
    steps, batch, features, hidden = 3, 2, 5, 20
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(features, hidden, bias=False, dtype=torch.float32)
    x = torch.randn(steps, batch, features, dtype=torch.float32)
    far = strided(memory, steps, batch, features, at=0).copy_(x)
    step, row = (ROW, STEP) if batch_first else (STEP, ROW)
    if batch_first:
        far = memory.as_strided(x.shape, (step, row, 1), 0).copy_(x)
    packed = [pack(weight.detach(), "forward").values for weight in lstm.parameters()]
    output, gates = torch.empty(steps, batch, hidden), torch.empty(steps, batch, 4 * hidden)
    h, c, scratch = torch.empty(batch, hidden), torch.empty(batch, hidden), torch.empty(2, batch, hidden)
    library(kept=0).lstm_forward(ctypes.byref(ForwardArgs(
        batch, steps, hidden, 0, 1, True, gates.data_ptr(), 8 * hidden, 4 * hidden, steps,
        far.data_ptr(), step, row, features, packed[0].data_ptr(), None, None, packed[1].data_ptr(), None, None,
        None, None, None, output.data_ptr(), 2 * hidden, hidden, h.data_ptr(), c.data_ptr(),
        None, 0, 0, None, 0, 0, scratch.data_ptr(),
    )), 0)  # fmt: skip
    torch.testing.assert_close(output, lstm(x)[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("failing", [None, ("addresses and undefined behaviour", sanitize.HEAD)])
def test_the_command_runs_every_check_on_every_program(
    failing: tuple[str, str] | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each program that was built is run; one that fails is named, with what it said, and the exit code is 1."""
    monkeypatch.setattr(sanitize, "build", lambda name, _, main_file: (name, main_file))
    monkeypatch.setattr(sanitize, "run", lambda built: (built != failing, f"of {built[1]}"))
    assert sanitize.main([]) == (failing is not None)
    assert capsys.readouterr().out.splitlines() == [
        f"{subject}, {name}: {'FAILED' if (name, source) == failing else 'nothing found'} (of {source})"
        for subject, source in sanitize.PROGRAMS.items()
        for name in sanitize.CHECKS
    ]


@pytest.mark.slow
def test_the_sanitizer_finds_nothing_in_a_python_process() -> None:
    """Every path of the kernel stays inside its tensors, whatever the default type; a last write past one is seen."""
    program = [sys.executable, str(ROOT / "tests" / "cpu_paths.py"), "overflow"]
    done = subprocess.run(program, env=sanitize.environment(), capture_output=True, text=True, check=False, timeout=600)
    # What is found ends the process.
    assert done.stdout == "every path is as torch's\n", done.stderr[:2000]
    assert "AddressSanitizer" in done.stderr
    assert "pack_backward" in done.stderr
    assert done.returncode != 0
