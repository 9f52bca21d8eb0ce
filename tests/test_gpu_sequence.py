"""The kernel that walks through time by itself: right at odd sizes, inside its bounds, and on chip as it promises."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import changed_module
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from recurrences import (
    DEVICE,
    GRADIENTS,
    OUTPUTS,
    Sizes,
    assert_close,
    errors_backward,
    errors_forward,
    interpreted,
    recurrences,
)
from torch import Tensor

from kernels.common.recurrence import Problem, loop_forward
from kernels.gpu import sequence, sequence_kernels
from kernels.gpu.fast_math import cell, tanh

SMALL = st.sampled_from([1, 3, 16, 17, 40])
ROOT = Path(__file__).parents[1]
#: float32 to full precision, to TF32's, and float16, in directions and lengths of all kinds.
UNEVEN = Sizes(11, 4, 19, 2, lengths=(4, 1, 3, 0, 4, 2, 2, 1, 2, 0, 3))


@given(sizes=recurrences(hidden=SMALL), save=st.booleans())
def test_forward_is_right(sizes: Sizes, save: bool) -> None:
    """Outputs, states and what is kept agree with float64, whatever the sizes, lengths, states and memory order."""
    assert_close(errors_forward(sizes, sequence, save=save), sizes.dtype)


@given(sizes=recurrences(hidden=SMALL), final=st.booleans())
def test_backward_is_right(sizes: Sizes, final: bool) -> None:
    """Gradients agree with float64, with and without gradients of the final states."""
    if sizes.hidden == 40 and sizes.dtype == torch.float32:
        sizes = dataclasses.replace(sizes, hidden=24)
    assert_close(errors_backward(sizes, sequence, final=final), sizes.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("hidden", [16, 40])
def test_every_configuration_is_right(dtype: torch.dtype, hidden: int) -> None:
    """Tile sizes and warps change the speed alone."""
    sizes = dataclasses.replace(UNEVEN, hidden=hidden, dtype=dtype)
    problem = sizes.forward().problem
    for config in sequence.configs(problem, backward=False):
        assert_close(errors_forward(sizes, sequence, config=config), dtype)
    if sequence.refuses(problem, backward=True) is None:
        for config in sequence.configs(problem, backward=True):
            assert_close(errors_backward(sizes, sequence, config=config), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_largest_size_is_right(dtype: torch.dtype) -> None:
    """Nothing is special about a size that fills its tile to the brim."""
    sizes = Sizes(3, 2, 128 if dtype == torch.float16 else 64, dtype=dtype)
    assert_close(errors_forward(sizes, sequence), dtype)
    assert_close(
        errors_backward(dataclasses.replace(sizes, hidden=128 if dtype == torch.float16 else 32), sequence), dtype
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", [16, 32, 40, 64, 100, 128])
def test_every_configuration_is_right_on_a_gpu(dtype: torch.dtype, hidden: int) -> None:
    """The compiled kernels, each of them, over many steps and several tiles; bfloat16 runs nowhere else."""
    sizes = Sizes(37, 50, hidden, 2, dtype, lengths=tuple((17 * row) % 51 for row in range(37)))
    problem = sizes.forward().problem
    for backward, errors in ((False, errors_forward), (True, errors_backward)):
        if sequence.refuses(problem, backward=backward) is None:
            for config in sequence.configs(problem, backward=backward):
                assert_close(errors(sizes, sequence, config=config), dtype)


def _roomy(args: Any) -> tuple[Any, list[Tensor]]:
    """The same arguments in memory with slack behind every batch and every tensor, and all that memory."""
    memories, fields = [], {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if not isinstance(value, Tensor):
            continue
        if value.dim() == 4:
            shape = (value.size(0) + 1, value.size(1) + 64, *value.shape[2:])
            memory = torch.full(shape, 77.0, dtype=value.dtype, device=value.device)
            view = memory[: value.size(0), : value.size(1)]
        else:
            memory = torch.full((value.numel() + 8192,), 77, dtype=value.dtype, device=value.device)
            view = memory[: value.numel()].view(value.shape)
        view.copy_(value)
        fields[field.name] = view
        memories.append(memory)
    return dataclasses.replace(args, **fields), memories


def _stays_inside() -> bool:
    """Return whether a pass forward and one back write nothing but their outputs."""
    sizes = Sizes(3, 2, 5, 2)
    forward = sizes.forward()
    right = sizes.forward()
    loop_forward(right)
    backward = sizes.backward(right)
    for args, run, names in ((forward, sequence.forward, OUTPUTS), (backward, sequence.backward, GRADIENTS)):
        roomy, memories = _roomy(args)
        run(roomy)
        slack = sum(int((memory == 77).sum()) for memory in memories)
        if slack != sum(memory.numel() for memory in memories) - sum(
            getattr(args, field.name).numel()
            for field in dataclasses.fields(args)
            if isinstance(getattr(args, field.name), Tensor)
        ):
            return False
        if not all(getattr(roomy, name).isfinite().all() for name in names):
            return False
    return True


def test_writes_stay_inside() -> None:
    """Rows behind the batch and memory behind a tensor keep what they hold."""
    assert _stays_inside()


@pytest.mark.parametrize("lengths", [(3, 9, 1), (-2, 4, 2), (7, 7, 7)])
def test_lengths_outside_count_as_the_nearest(lengths: tuple[int, ...]) -> None:
    """Lengths that lay on the GPU were looked at by nobody: wrong ones give what right ones give, and write as much."""
    sizes = Sizes(3, 4, 5, 2, lengths=(3, 4, 1))
    found = []
    for values in (lengths, [min(max(length, 0), 4) for length in lengths]):
        args = dataclasses.replace(sizes.forward(), lengths=torch.tensor(values, dtype=torch.int32, device=DEVICE))
        args.gates_input.nan_to_num_()
        back = dataclasses.replace(sizes.backward(args), grad_output=torch.ones_like(args.output))
        (args, kept), (back, kept_back) = _roomy(args), _roomy(back)
        sequence.forward(args)
        sequence.backward(dataclasses.replace(back, gates=args.gates, cells=args.cells))
        found.append([memory.nan_to_num() for memory in (*kept, *kept_back) if memory.is_floating_point()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


#: Text of the kernel, and what a slip of the hand would make of it.
DEFECTS = {
    "gate order": ("i, g = tl.split(even)", "g, i = tl.split(even)"),
    "gate order kept": ("tl.join(tl.join(i, g), tl.join(f, o))", "tl.join(tl.join(i, f), tl.join(g, o))"),
    "weights of padded units": (
        "(o_from < hidden)[None, None, :], other=0.0",
        "(o_from < hidden)[None, None, :], other=1.0",
    ),
    "stale c": ("        b_c = c_new\n", ""),
    "h not held": ("h_new = tl.where(inside, h_new, b_h)", "pass"),
    "c not held": ("c_new = tl.where(inside, c_new, b_c)", "pass"),
    "output past the length": ("b_out = tl.where(inside, h_new, 0.0)", "pass"),
    "gates past the length": ("valid = valid & (t + move < b_length)[None, None, :]", "pass"),
    "no fill": (
        "        while t < steps:\n            tl.store(p_output",
        "        while t < longest:\n            tl.store(p_output",
    ),
    "backward: no fill": (
        "        while t < steps:\n            tl.store(p_grad_gates",
        "        while t < longest:\n            tl.store(p_grad_gates",
    ),
    "cells filled with the last": ("b_c = tl.where(direction == 1, b_first, b_c)", "pass"),
    "direction": (
        "    t = direction * (longest - 1)\n    move = (1 - 2 * direction)",
        "    t = direction * 0\n    move = (direction * 0 + 1)",
    ),
    "backward: gates past the length": (
        "(t + move) * s_gates_t + b_gates, mask=gates_valid, other=0.0",
        "(t + move) * s_gates_t + b_gates, mask=gates_valid, other=0.5",
    ),
    "backward: stale c": ("        b_c = b_before\n", ""),
    "backward: stale dc": ("        b_dc = b_dc_before\n", ""),
    "backward: dh not held": ("b_dh_before = tl.where(inside, b_dh_before, b_dh)", "pass"),
    "backward: dc not held": ("b_dc_before = tl.where(inside, b_dc_before, b_dc)", "pass"),
    "backward: no initial cells": ("(done + 1 == longest), other", "(done < 0), other"),
    "backward: direction": (
        "    t = (1 - direction) * (longest - 1)\n    move = (2 * direction - 1)",
        "    t = longest - 1\n    move = (direction * 0 - 1)",
    ),
}  # fmt: skip


def _plant(monkeypatch: pytest.MonkeyPatch, folder: Path, old: str, new: str, count: int = 1) -> None:
    """Let the host functions launch kernels with a defect, from a file: Triton reads a kernel's source there."""
    source = Path(sequence_kernels.__file__).read_text()
    assert source.count(old) == count, f"{old!r} occurs {source.count(old)} times"
    path = folder / "defective_kernels.py"
    path.write_text(source.replace(old, new))
    module = changed_module.load(path, "kernels.gpu")
    for name in ("forward_kernel", "backward_kernel"):
        monkeypatch.setattr(sequence, name, getattr(module, name))


@pytest.mark.parametrize("name", DEFECTS)
def test_a_planted_defect_is_caught(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of these tests notices a kernel with a slip in it."""
    _plant(monkeypatch, tmp_path, *DEFECTS[name])
    # The second tile has no sequence that fills all steps.
    sizes = Sizes(9, 4, 5, 2, lengths=(4, 1, 3, 0, 4, 2, 2, 1, 2))
    with pytest.raises(AssertionError, match="error"):
        assert_close(errors_backward(sizes, sequence) | errors_forward(sizes, sequence), sizes.dtype)


def test_a_missing_batch_mask_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the batch would be written over."""
    old = "row_valid = first_row + o_row < batch"
    _plant(monkeypatch, tmp_path, old, "row_valid = first_row + o_row >= 0", count=2)
    assert not _stays_inside()


@triton.jit
def _cells(p_in, p_out, SIZE: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr):  # noqa: N803 - as kernels
    o = tl.arange(0, SIZE)
    x = tl.load(p_in + o)
    zero = tl.zeros((SIZE,), tl.float32)
    i, f, g, o_gate, c, h = cell(x, x, x, x, zero, PRECISE, NATIVE)
    tl.store(p_out + o, i)
    tl.store(p_out + SIZE + o, f)
    tl.store(p_out + 2 * SIZE + o, g)
    tl.store(p_out + 3 * SIZE + o, o_gate)
    tl.store(p_out + 4 * SIZE + o, c)
    tl.store(p_out + 5 * SIZE + o, h)
    tl.store(p_out + 6 * SIZE + o, tanh(x, PRECISE, NATIVE))


def _run_cells(x: Tensor, *, precise: bool) -> Tensor:
    out = torch.full((7, x.numel()), float("nan"), device=DEVICE)
    _cells[(1,)](x, out, SIZE=x.numel(), PRECISE=precise, NATIVE=not interpreted())
    return out


@pytest.mark.parametrize("precise", [False, True])
def test_the_cell_is_right_everywhere(precise: bool) -> None:
    """Gates, c and h from far below to far above, saturated ends included."""
    x = torch.cat([torch.linspace(-20, 20, 1016), torch.tensor([-300, -100, -30, -1e-7, 1e-7, 30, 100, 300])]).to(
        DEVICE
    )
    out = _run_cells(x, precise=precise).double()
    wide = x.double()
    sigmoid, bent = wide.sigmoid(), wide.tanh()
    c = sigmoid * bent
    truth = torch.stack([sigmoid, sigmoid, bent, sigmoid, c, sigmoid * c.tanh(), bent])
    assert (out - truth).abs().max() < 1e-6
    if precise:
        small = (wide.abs() < 0.3) & (wide != 0)
        assert ((out - truth)[:, small] / truth[:, small]).abs().max() < 2e-6


def test_a_value_that_is_no_number_comes_through() -> None:
    """A broken input makes a broken output, not a saturated gate."""
    assert _run_cells(torch.full((16,), float("nan"), device=DEVICE), precise=True).isnan().all()


@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    hidden=st.integers(1, 600),
    batch=st.integers(1, 5000),
    tf32=st.booleans(),
    backward=st.booleans(),
    capability=st.sampled_from([0, 80, 90, 100]),
)
def test_it_refuses_or_has_configurations(
    dtype: torch.dtype, hidden: int, batch: int, tf32: bool, backward: bool, capability: int
) -> None:
    """Either there is a reason why it cannot serve or something to run; every launch fits its kernel."""
    problem = Problem("cuda" if capability else "cpu", dtype, batch, 7, hidden, 2, tf32=tf32, capability=capability)
    reason = sequence.refuses(problem, backward=backward)
    if reason is not None:
        assert dtype == torch.float64 or f"hidden_size {hidden} " in reason
        assert dtype == torch.float64 or hidden > 32
        return
    configs = sequence.configs(problem, backward=backward)
    assert configs
    assert len(set(configs)) == len(configs)


def test_offsets_that_pass_32_bits_are_refused() -> None:
    """Rows of a tile lie all steps apart where the batch comes first; what that makes of 32-bit offsets is refused."""
    fits = Problem("cuda", torch.float16, 8, 100_000, 128, capability=90, multiprocessors=132)
    assert sequence.refuses(fits, backward=False) is None
    assert "131072 steps" in str(sequence.refuses(dataclasses.replace(fits, steps=131_072), backward=False))


@pytest.mark.parametrize("wide", [False, True])
def test_products_that_would_leave_the_registers_are_not_taken(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass for which Triton turns 16 units a warp into wgmma has 8 units a warp, and at most 64 in all."""
    monkeypatch.setattr(sequence, "WIDE_PRODUCTS", wide)
    small, large = (Problem("cuda", torch.float16, 16, 50, hidden, capability=90, saves=True) for hidden in (64, 128))
    warps = {config.num_warps for config in sequence.configs(small, backward=True)}
    assert warps == ({8} if wide else {4, 8})
    assert ("carry hidden_size 64" in (sequence.refuses(large, backward=True) or "")) == wide
    assert sequence.refuses(large, backward=False) is None
    older = dataclasses.replace(small, capability=80)
    assert {config.num_warps for config in sequence.configs(older, backward=True)} == {4, 8}


def test_small_batches_are_spread_and_large_ones_are_not() -> None:
    """The first guess takes small tiles while multiprocessors idle, and larger ones when there is a queue."""
    small = Problem("cuda", torch.float16, 64, 7, 64, capability=90, multiprocessors=132)
    large = dataclasses.replace(small, batch=132 * 32)
    assert sequence.configs(small, backward=False)[0].block_batch == 8
    assert sequence.configs(large, backward=False)[0].block_batch == 32


CAPABILITIES = [80, 90, 100]
#: Type, whether products round to TF32, the size with least registers to spare, for every capability, and others, each
#: with one: those that fill a smaller tile, and those whose code differs in masks and alignment alone, which no
#: capability treats in its own way. So every capability has tiles of several sizes.
SIZES = [
    ("float16", False, 128, {16: 90, 63: 80, 40: 90, 64: 100, 104: 100}), ("bfloat16", False, 128, {}),
    ("float32", False, 64, {31: 80, 40: 90, 15: 100, 32: 100}),
    ("float32", True, 64, {16: 80, 63: 90}),
]  # fmt: skip
#: Capability, type, whether products round to TF32, and hidden sizes of what is compiled.
COMPILED = [
    (capability, dtype, tf32, (largest, *(hidden for hidden, own in others.items() if own == capability)))
    for dtype, tf32, largest, others in SIZES
    for capability in CAPABILITIES
]
#: Compiles configurations, and prints what each takes: at every size the first, which runs where nothing was tuned,
#: and the others on one capability each, or on the only one of the size.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu import sequence
from kernels.common.recurrence import Problem
tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
cases = [(*key, hidden) for *key, sizes in json.loads(sys.argv[1]) for hidden in sizes]
for capability, name, tf32, hidden in cases:
    capabilities = sorted({case[0] for case in cases if case[1:] == (name, tf32, hidden)})
    for backward in (False, True):
        problem = Problem("cuda", getattr(torch, name), 16, 10, hidden, 2, True, True, tf32, capability, 132)
        if sequence.refuses(problem, backward=backward):
            continue
        first, *others = sequence.configs(problem, backward=backward)
        for config in [first, *others[capabilities.index(capability) :: len(capabilities)]]:
            (launch,) = sequence.launches(problem, config, backward=backward)
            names = launch.kernel.arg_names
            hints = {
                (index,): [["tt.divisibility", 16]]
                for index, name in enumerate(names)
                if launch.signature[name].startswith("*")
            }
            constants = {(names.index(name),): value for name, value in launch.constants.items()}
            compiled = triton.compile(
                ASTSource(launch.kernel, launch.signature, constants, hints), target=GPUTarget("cuda", capability, 32),
                options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
            )
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"])
                file.flush()
                usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
            found = re.search(r"REG:(\\d+) STACK:(\\d+)", usage.stdout)
            loop = compiled.asm["ttgir"].split("scf.while")[1].split("scf.yield")[0]
            print(json.dumps({
                "key": [capability, name, tf32], "case": f"{hidden} {'backward' if backward else 'forward'} {config}",
                "registers": int(found[1]), "stack": int(found[2]), "shared": compiled.metadata.shared,
                "reloads": len(re.findall(r"local_load.*opIdx = 0", loop)),
                "products": len(re.findall(r"tt.dot ", loop)),
            }))
"""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What each configuration takes: compiled in one process, since Triton and torch take seconds to start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(COMPILED)],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1800,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype", "tf32", "sizes"), COMPILED)
def test_the_weights_stay_in_registers(
    compiled: list[dict[str, Any]], capability: int, dtype: str, tf32: bool, sizes: tuple[int, ...]
) -> None:
    """No configuration spills, none asks for more shared memory than there is, none reads weights inside the loop."""
    rows = [row for row in compiled if row["key"] == [capability, dtype, tf32]]
    assert {int(row["case"].split()[0]) for row in rows} == set(sizes)
    limit = 166912 if capability == 80 else 232448
    wrong = [
        row for row in rows if row["stack"] or row["shared"] > limit or row["reloads"] or not row["products"]
    ]  # fmt: skip
    assert not wrong, wrong
