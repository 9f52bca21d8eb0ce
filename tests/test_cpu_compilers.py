"""The CPU kernel by other compilers than GCC, and what is said where one cannot build it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cpu_builds import QUICK, built_for

from kernels import LSTM
from kernels.cpu import build

ROOT = Path(__file__).parents[1]
#: What linkers say who do not find the OpenMP library or its functions: GNU's, and two of Apple's.
MISSING = {
    "GNU": "/usr/bin/ld: cannot find -lgomp: No such file or directory\ncollect2: error: ld returned 1 exit status",
    "Apple": "ld: library 'gomp' not found\nclang: error: linker command failed with exit code 1",
    "Apple, symbols": 'Undefined symbols for architecture arm64: "_GOMP_parallel"\nclang: error: linker command failed',
}


@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 17])
def test_teams_by_clang_are_torch_s(threads: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads know who they are: they are those of torch's OpenMP library, whatever library the compiler brings."""
    monkeypatch.setenv("CXX", "clang++")
    torch.manual_seed(0)
    lstm, truth = LSTM(8, 64, implementation="cpu-fused"), torch.nn.LSTM(8, 64)
    truth.load_state_dict(lstm.state_dict())
    x = torch.randn(9, batch, 8)
    with built_for(f"{QUICK} -DBY_CLANG", threads), torch.no_grad():
        for _ in range(5):
            torch.testing.assert_close(lstm(x)[0], truth(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("linker", MISSING)
def test_a_linker_without_openmp_says_what_to_install(
    linker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No compiler is asked for OpenMP itself, which Apple's refuses; where the library is missing, one line says so."""
    script = tmp_path / "c++"
    asked = 'case "$*" in *-fopenmp*) echo "clang: error: unsupported option -fopenmp" >&2; exit 1;; esac'
    script.write_text(f"#!/bin/sh\n{asked}\nprintf '%s\\n' '{MISSING[linker]}' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError) as raised:
        build.compiled(build.command("lstm.cpp"))
    said = str(raised.value)
    assert said.startswith(f"{script} could not compile lstm.cpp: ")
    assert said.endswith(build.NO_LIBGOMP)
    assert "\n" not in said


def test_without_torch_s_own_openmp_the_compiler_s_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a distribution built torch with the system's libgomp."""
    monkeypatch.setattr(build.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert build.command("lstm.cpp")[-1] == "-lgomp"


#: LLVM's OpenMP library, which torch for macOS brings.
LIBOMP = next(
    iter(sorted([*Path("/usr/lib").glob("llvm-*/lib/libomp.so.5"), *Path("/usr/lib").glob("*/libomp.so.5")])), None
)
needs_libomp = pytest.mark.skipif(LIBOMP is None, reason="LLVM's OpenMP library is not here (Debian: libomp5)")

#: Teams without torch: each has the threads that it asked for, they know who they are, and all are there at a time.
_TEAMS = """
#include "team.h"
int main() {
    for (int wanted = 1; wanted <= 4; ++wanted)
        for (int turn = 0; turn < 100; ++turn) {
            std::atomic<int> seen{0}, wrong{0};
            Barrier barrier(wanted);
            team(wanted, [&](int thread, int threads) {
                barrier.wait(thread, threads);
                seen += 1 << thread;
                if (threads != wanted) ++wrong;
            });
            if (seen != (1 << wanted) - 1 || wrong) return wanted;
        }
    return usable_cores() < 1;
}
"""
#: The kernel in a process whose torch takes its threads from that library too, in both passes.
_BESIDE_TORCH = """
import ctypes
import torch
from unittest import mock
from kernels import LSTM
from kernels.cpu import teams
class Symbol(ctypes.Structure):
    _fields_ = [("file", ctypes.c_char_p), *((name, ctypes.c_void_p) for name in ("base", "name", "at"))]
everywhere, symbol = ctypes.CDLL(None), Symbol()
everywhere.dladdr(ctypes.cast(everywhere.GOMP_parallel, ctypes.c_void_p), ctypes.byref(symbol))
print(symbol.file.decode())
torch.manual_seed(0)
truth, lstm = torch.nn.LSTM(8, 64), LSTM(8, 64, implementation="cpu-fused")
lstm.load_state_dict(truth.state_dict())
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    with mock.patch.multiple(teams, cores=lambda: threads, WORTH_A_THREAD=1, WORTH_A_MEETING=1):
        for x in (torch.randn(9, batch, 8) for batch in (1, 17) for _ in range(3)):
            output, expected = lstm(x)[0], truth(x)[0]
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
            found = (torch.autograd.grad(one[0].square().sum(), list(m.parameters())) for m, one in
                     ((lstm, lstm(x)), (truth, truth(x))))
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
"""


@needs_libomp
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_llvm_s_openmp_has_teams_by_the_same_names(tmp_path: Path) -> None:
    """`team.h` links to it in place of libgomp, as it does on macOS."""
    (tmp_path / "teams.cpp").write_text(_TEAMS)
    words = ["g++", "-std=c++17", "-pthread", "-I", build.SOURCE.parent, tmp_path / "teams.cpp", LIBOMP]
    subprocess.run([*words, f"-Wl,-rpath,{LIBOMP.parent}", "-o", tmp_path / "teams"], check=True)
    assert subprocess.run([tmp_path / "teams"], check=False, timeout=60).returncode == 0


@needs_libomp
def test_the_kernel_is_right_where_torch_has_llvm_s_openmp() -> None:
    """One pool of threads serves both, as on macOS; here it takes the place of the libgomp that torch brings."""
    environment = os.environ | {"LD_PRELOAD": str(LIBOMP), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", _BESIDE_TORCH]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, f"{LIBOMP}\n"), done.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_c_interface_is_c_plus_plus_too(tmp_path: Path) -> None:
    """The example of the exported library, as C++, compiles without a warning against names that C has."""
    folder = build.SOURCE.parent / "serve"
    words = ["g++", "-x", "c++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-c", folder / "example.c"]
    subprocess.run([*words, "-o", tmp_path / "example.o"], check=True)
    names = subprocess.run(["nm", tmp_path / "example.o"], capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert " U seq2seq_lstm_create\n" in names
