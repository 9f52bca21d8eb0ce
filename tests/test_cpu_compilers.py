"""The CPU kernel by other compilers than GCC, and what is said where one cannot build it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cpu_builds import QUICK, built_for

from kernels import LSTM
from kernels.cpu import build

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


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_the_c_interface_is_c_plus_plus_too(tmp_path: Path) -> None:
    """The example of the exported library, as C++, compiles without a warning against names that C has."""
    folder = build.SOURCE.parent / "serve"
    words = ["g++", "-x", "c++", "-std=c++11", "-Wall", "-Wextra", "-Werror", "-c", folder / "example.c"]
    subprocess.run([*words, "-o", tmp_path / "example.o"], check=True)
    names = subprocess.run(["nm", tmp_path / "example.o"], capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert " U seq2seq_lstm_create\n" in names
