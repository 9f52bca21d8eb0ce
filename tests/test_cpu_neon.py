"""The CPU kernel for AArch64, with NEON, by a cross compiler and QEMU: as right as on the machine that it is built on.

QEMU shows wrong results and crashes. It shows no times, and on an x86-64 it orders memory more strictly than ARM does.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import run_by
from foreign_library import CALLER, ForeignLibrary, SharedMemory
from hypothesis import given
from hypothesis import strategies as st
from test_cpu_serve import STREAMS, check_streams
from torch import Tensor

from kernels import LSTM
from kernels.common.recurrence import LayerOptions, resets_of
from kernels.cpu import build, fused, layer
from kernels.cpu.inference import Prepared
from kernels.cpu.packing import KEPT
from kernels.cpu.serve.export import export_c
from kernels.tools import sanitize

COMPILER, QEMU, ROOT = "aarch64-linux-gnu-g++", "qemu-aarch64", Path("/usr/aarch64-linux-gnu")
RUN = [QEMU, "-L", str(ROOT)]
#: What every core of AArch64 has, which is NEON; and one with SVE, by which GCC makes other loops than ours. Optimized
#: as for users: at -Og GCC fuses no multiplication with an addition.
OLDEST, SVE = "-march=armv8-a", "-march=armv8.4-a+bf16+i8mm+sve"

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(QEMU) and ROOT.is_dir()),
    reason="needs a cross compiler and QEMU: apt-get install g++-aarch64-linux-gnu qemu-user",
)

#: Largest difference of outputs. Weights in bf16 are rounded beforehand, and NEON multiplies them in float32.
ALLOWED = {"fp32": 2e-6, "bf16": 2e-6, "int8": 3e-2}


def _cross_compiled(source: str, target: str) -> Path:
    """A library of a source of the kernel's, from the cache where it lies there."""
    return build.compiled([COMPILER, *build.FLAGS, *target.split(), source, "-lgomp"])


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that calls functions of a library."""
    folder = tmp_path_factory.mktemp("caller")
    (folder / "caller.cpp").write_text(CALLER, encoding="utf-8")
    subprocess.run([COMPILER, folder / "caller.cpp", "-o", folder / "caller", "-ldl"], check=True)
    return folder / "caller"


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedMemory]:
    """Memory that this process and one of QEMU's share."""
    found = SharedMemory(tmp_path_factory.mktemp("memory") / "shared")
    yield found
    found.close()


@pytest.fixture(scope="module", params=[OLDEST, SVE], ids=["NEON", "SVE"])
def kernel(request: pytest.FixtureRequest, caller: Path, memory: SharedMemory) -> Iterator[ForeignLibrary]:
    """The kernel for a core of AArch64."""
    found = ForeignLibrary(RUN, caller, _cross_compiled("lstm.cpp", request.param), memory)
    yield found
    found.close()


def _close(found: Tensor, right: Tensor, allowed: float) -> None:
    """Compare by the norm of the difference; truth counts as at least 0.1 a number."""
    assert found.isfinite().all()
    found, right = found.detach(), right.detach()
    assert (found.double() - right).norm() <= allowed * max(float(right.norm()), 0.1 * right.numel() ** 0.5)


SIZES = {
    "batch": st.sampled_from([1, 2, 9]), "steps": st.integers(1, 7), "features": st.sampled_from([1, 7, 40]),
    "hidden": st.sampled_from([1, 4, 5, 17, 33]), "bidirectional": st.booleans(), "bias": st.booleans(),
    "state": st.booleans(), "masked": st.booleans(), "resets": st.booleans(), "threads": st.sampled_from([1, 3]),
    "seed": st.integers(0, 2**16),
}  # fmt: skip


class _Problem:
    """Layers with input, state, lengths and resets, and the truth in float64."""

    def __init__(self, sizes: dict[str, int], layers: int = 1) -> None:
        torch.manual_seed(sizes["seed"])
        batch, steps, hidden, features = (sizes[name] for name in ("batch", "steps", "hidden", "features"))
        self.directions = 1 + sizes["bidirectional"]
        options = {"bidirectional": bool(sizes["bidirectional"]), "bias": bool(sizes["bias"])}
        self.lstm = LSTM(features, hidden, layers, **options, implementation="loop")
        self.x = torch.randn(steps, batch, features)
        self.by = torch.randn(steps, batch, self.directions * hidden)
        state = (layers * self.directions, batch, hidden)
        self.state = [torch.randn(state) for _ in range(2)] if sizes["state"] else []
        self.lengths = torch.randint(0, steps + 1, (batch,), dtype=torch.int32) if sizes["masked"] else None
        self.resets = torch.rand(steps, batch) < 0.3 if sizes["resets"] else None

    def parameters(self) -> list[list[tuple[Tensor, ...]]]:
        """Copies of each layer's and direction's parameters."""
        flat = [value.detach().clone().requires_grad_() for value in self.lstm.parameters()]
        each = 4 if self.lstm.bias else 2
        own = [tuple(flat[i : i + each]) for i in range(0, len(flat), each)]
        return [own[i : i + self.directions] for i in range(0, len(own), self.directions)]

    def begun(self) -> Tensor | None:
        """Resets of each direction, as the kernel takes them."""
        return None if self.resets is None else resets_of(self.resets, self.lengths, self.directions)

    def truth(self, x: Tensor, state: list[Tensor], lstm: LSTM) -> tuple[Tensor, Tensor, Tensor]:
        """Output, h_n and c_n by the equations."""
        output, (h_n, c_n) = lstm(x, tuple(state) or None, lengths=self.lengths, resets=self.resets)
        return output, h_n, c_n

    def gradients(self, results: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        """Gradients of all leaves; each result has a part of its own in the loss."""
        output, h_n, c_n = results
        total = (output * self.by.to(output.dtype)).sum() + h_n.sin().sum() + c_n.square().sum()
        return torch.autograd.grad(total, leaves)


@given(sizes=st.fixed_dictionaries(SIZES))
def test_a_layer_and_its_gradients_are_those_of_float64(
    kernel: ForeignLibrary, memory: SharedMemory, sizes: dict[str, int]
) -> None:
    """Results and all gradients of both directions, with lengths, resets and states, alone and in a team."""
    problem = _Problem(sizes)
    options = LayerOptions(sizes["hidden"], problem.directions, False, "cpu-fused", torch.float32, tf32=False)
    # Masks are kept for the backward pass as bytes, which Python has in memory of its own.
    seen = mock.patch.object(layer, "_bytes_at", lambda held: memory.put(held) if held else 0)
    with run_by(lambda **_: kernel, sizes["threads"]), memory, seen:
        leaves = [value.clone().requires_grad_() for value in (problem.x, *problem.state)]
        (own,), begun = problem.parameters(), problem.begun()
        lengths, resets = (None if value is None else value.clone() for value in (problem.lengths, begun))
        h0, c0 = leaves[1:] or (None, None)
        found = fused.run(leaves[0], own, h0, c0, lengths, resets, options, gradients=True)
        grads = problem.gradients(found, [*leaves, *(value for direction in own for value in direction)])
    truth = copy.deepcopy(problem.lstm).double()
    exact = [value.double().requires_grad_() for value in (problem.x, *problem.state)]
    right = problem.truth(exact[0], exact[1:], truth)
    for value, expected in zip(found, right, strict=True):
        _close(value, expected, 1e-5)
    for value, expected in zip(grads, problem.gradients(right, [*exact, *truth.parameters()]), strict=True):
        _close(value, expected, 1e-4)


@pytest.mark.parametrize("storage", ALLOWED)
@given(sizes=st.fixed_dictionaries(SIZES), layers=st.integers(1, 3))
def test_all_layers_in_one_call_are_those_of_float64(
    kernel: ForeignLibrary, memory: SharedMemory, storage: str, sizes: dict[str, int], layers: int
) -> None:
    """Inference with weights in each precision that NEON has, layer after layer in one team."""
    problem = _Problem(sizes, layers)
    with torch.no_grad():
        for name, weight in problem.lstm.named_parameters():
            if storage == "bf16" and name.startswith("weight"):
                weight.copy_(weight.bfloat16())  # so that what is allowed is the kernel's alone
        with run_by(lambda **_: kernel, sizes["threads"]), memory:
            prepared = Prepared(problem.parameters(), sizes["features"], storage=storage)
            given_ = [value if value is None else value.clone() for value in (
                problem.x, *(problem.state or (None, None)), problem.lengths, problem.begun()
            )]  # fmt: skip
            found = prepared.run(*given_, batch_first=False)  # type: ignore[arg-type]
        assert found is not None
        truth = copy.deepcopy(problem.lstm).double()
        right = problem.truth(problem.x.double(), [value.double() for value in problem.state], truth)
    for value, expected in zip(found, right, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=ALLOWED[storage])


def test_instructions_are_named(kernel: ForeignLibrary, caller: Path, memory: SharedMemory) -> None:
    """What NEON multiplies, and what it refuses: training in bf16, w8a8, split, and the head in int8."""
    for name, (number, _) in KEPT.items():
        assert kernel.instructions(number, 64, 8) == b"neon"
        assert bool(kernel.hindrance(number)) == (name not in ALLOWED)
    head = ForeignLibrary(RUN, caller, _cross_compiled("head.cpp", OLDEST), memory)
    assert head.head_hindrance().startswith(b"the head in int8 needs a processor with AVX2")
    head.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LSTM exported as C and built by its Makefile."""
    torch.manual_seed(0)
    found = tmp_path_factory.mktemp("c") / "out"
    export_c(torch.nn.LSTM(3, 20, 2).state_dict(), found)
    # The cross compiler knows no processor at hand.
    tools = [f"CXX={COMPILER}", "CC=aarch64-linux-gnu-gcc", "NATIVE=-march=armv8-a", "MORE=-O1"]
    subprocess.run(["make", "-s", "-C", found, *tools], check=True)  # noqa: S607 - the user's
    return found


@pytest.fixture(scope="module")
def exported(folder: Path, caller: Path, memory: SharedMemory) -> Iterator[ForeignLibrary]:
    """The exported library."""
    found = ForeignLibrary(RUN, caller, folder / "libseq2seq_lstm.so", memory)
    yield found
    found.close()


@pytest.mark.parametrize("precision", ALLOWED)
@given(sizes=st.fixed_dictionaries(STREAMS))
def test_an_exported_library_is_torch_s(
    exported: ForeignLibrary, memory: SharedMemory, tmp_path_factory: pytest.TempPathFactory, precision: str,
    sizes: dict[str, int],
) -> None:  # fmt: skip
    """Steps and runs of several streams, with and without a head."""
    with memory:
        check_streams(exported, tmp_path_factory.mktemp("weights") / "out", precision, sizes)


def test_the_example_names_neon(folder: Path) -> None:
    """The C program streams by NEON."""
    done = subprocess.run(
        [*RUN, folder / "example", folder / "weights.bin"], input="0.5 " * 6, capture_output=True, text=True, check=True
    )
    assert done.stderr.startswith("2 steps by neon")
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (sanitize.DECODER, "150 runs, all as float64 decodes"),
        (sanitize.HEAD, "no runs: the head in int8 needs a processor with AVX2"),
    ],
)
def test_programs_that_compare_with_float64_end_well(program: str, said: str, tmp_path: Path) -> None:
    """The decoder is right in teams of up to three threads; the head says what it needs."""
    words = [*sanitize.FLAGS, "-O1", "-static", program, "-o", str(tmp_path / "program")]
    subprocess.run([COMPILER, *words], check=True, cwd=build.SOURCE.parent)
    done = subprocess.run([*RUN, tmp_path / "program"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said)
