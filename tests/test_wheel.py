"""The kernels as an installation brings them: under a name of their own, whole, from any folder, beside a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")

import torch
from torch import nn

ROOT = Path(__file__).parent.parent

USE = """
import torch
from torch import nn
from seq2seq_kernels import LSTM, replace_lstm

torch.manual_seed(0)
model, x = nn.Sequential(nn.LSTM(3, 8, 2)), torch.randn(5, 2, 3)
expected = model(x)[0]
gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
print(replace_lstm(model))
found = model(x)[0]
torch.testing.assert_close(found, expected)
torch.testing.assert_close(torch.autograd.grad(found.sum(), list(model.parameters())), gradients)
print(type(model[0]).__module__, model[0].choices[0].implementation, model[0].choices[0].refused.get("cpu-fused", ""))
"""
BESIDE = """
import torch
import kernels.ops
import seq2seq_kernels.ops
from kernels import LSTM as ours
from seq2seq_kernels import LSTM as installed

assert ours is not installed
with torch.device("cpu"):  # which makes both go through their operators
    x = torch.randn(4, 2, 3)
    for module in (ours(3, 4), installed(3, 4)):
        module(x)[0].sum().backward()
print("both")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder that holds what the wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, program: list[str], folder: Path, *paths: Path, **environment: str) -> str:
    """Return what a program prints that runs in another folder and sees the installation."""
    seen = os.pathsep.join(map(str, (site, *paths)))
    done = subprocess.run(
        [sys.executable, *program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": seen} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_holds_the_kernels_and_nothing_else(site):
    """One package, whose name is no other's, with the sources that are compiled later."""
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"seq2seq_kernels"}
    for pattern in ("*.py", "*.cpp", "*.h"):
        files = {path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob(pattern)}
        assert files
        assert files <= {path.relative_to(site / "seq2seq_kernels") for path in site.rglob(pattern)}


def test_it_asks_for_torch_and_triton_alone(site):
    """Whoever installs a kernel gets no benchmark suite."""
    (metadata,) = site.glob("*.dist-info/METADATA")
    wanted = [line.split()[1] for line in metadata.read_text(encoding="utf-8").splitlines() if "Requires-Dist" in line]
    assert sorted(name.split("<")[0].split(">")[0] for name in wanted) == ["torch", "triton"]


def test_it_works_from_any_folder(site, tmp_path):
    """The drop-in computes what torch.nn.LSTM does, by the kernel that was compiled from what was installed."""
    lines = run(site, ["-c", USE], tmp_path).splitlines()
    assert lines[0].endswith("now seq2seq_kernels.LSTM")
    assert lines[1].split()[:2] == ["seq2seq_kernels.lstm", "cpu-fused"]


def test_without_a_compiler_it_says_what_is_missing(site, tmp_path):
    """It is imported and runs torch's own LSTM, and says what to install."""
    found = run(site, ["-c", USE], tmp_path, CXX=str(tmp_path / "none"), SEQ2SEQ_KERNEL_CACHE=str(tmp_path))
    assert "seq2seq_kernels.lstm vendor" in found
    assert "install a C++ compiler" in found


def test_it_meets_a_checkout_in_one_process(site, tmp_path):
    """Operators are named after the package that brings them."""
    assert run(site, ["-c", BESIDE], tmp_path, ROOT).strip() == "both"


TOOLS = ["check", "tune", "compile", "limits", "sanitize", "export-c"]
#: Each of them in one process, since each imports torch.
HELP = """
import runpy, sys
for tool in sys.argv[1:]:
    sys.argv = ["seq2seq_kernels", tool, "--help"]
    try:
        runpy.run_module("seq2seq_kernels", run_name="__main__")
    except SystemExit as end:
        assert not end.code, tool
    else:
        raise AssertionError(tool)
"""


def test_its_commands_start(site, tmp_path):
    """Each under the name that it was started by."""
    said = run(site, ["-c", HELP, *TOOLS], tmp_path)
    assert [said.count(f"usage: python -m seq2seq_kernels {tool}") for tool in TOOLS] == [1] * len(TOOLS)


def test_it_exports_what_its_checkout_does(site, tmp_path):
    """The folder of a C library has all of its files, with which it can be built."""
    torch.save(nn.LSTM(3, 4).state_dict(), tmp_path / "weights.pt")
    run(site, ["-m", "seq2seq_kernels", "export-c", "weights.pt", "--out", "installed"], tmp_path)
    run(ROOT, ["-m", "kernels", "export-c", "weights.pt", "--out", "checkout"], tmp_path)
    files = {path.relative_to(tmp_path / "checkout") for path in (tmp_path / "checkout").rglob("*.*")}
    assert {Path(name) for name in ("weights.bin", "example.c", "example.py", "kernel/walk.h")} <= files
    for path in (*files, Path("Makefile")):
        assert (tmp_path / "installed" / path).read_bytes() == (tmp_path / "checkout" / path).read_bytes()
