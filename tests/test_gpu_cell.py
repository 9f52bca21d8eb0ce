"""The step-by-step kernels against the loop in float64, and each defect that such a kernel tends to have, planted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import changed_module
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import (
    DEVICE,
    OUTPUT_ERROR,
    Sizes,
    assert_close,
    errors_backward,
    errors_forward,
    interpreted,
    recurrences,
)

from kernels.common.recurrence import Problem, loop_forward
from kernels.gpu import cell
from kernels.gpu import cell_kernels as step

ROOT = Path(__file__).parents[1]
#: Smaller than any size below in both dimensions, so that there are tiles in the middle and at both ends.
SMALL = cell.CellConfig(2, 4, 1)
RAGGED = Sizes(batch=3, steps=4, hidden=6, directions=2, lengths=(4, 0, 2), seed=3, resets=True)
HIDDEN = st.sampled_from([1, 5, 16, 33])


@settings(max_examples=25)
@given(sizes=recurrences(hidden=HIDDEN, resets=st.booleans()), save=st.booleans())
def test_a_forward_pass_is_the_loops(sizes, save):
    """Outputs agree with float64 for any sizes, lengths, states and memory order, whether or not anything is kept."""
    assert_close(errors_forward(sizes, cell, save=save), sizes.dtype)


@settings(max_examples=25)
@given(sizes=recurrences(hidden=HIDDEN, resets=st.booleans()), final=st.booleans())
def test_a_backward_pass_is_the_loops(sizes, final):
    """Gradients agree with float64, with and without gradients of the final states."""
    assert_close(errors_backward(sizes, cell, final=final), sizes.dtype)


@pytest.mark.parametrize("config", [SMALL, cell.CellConfig(4, 2, 1), cell.CellConfig(1, 8, 1)], ids=str)
def test_tiles_do_not_change_the_result(config):
    """Any tile gives the same numbers, bit for bit: nothing is summed across elements."""
    passes = [(RAGGED.forward(), chosen) for chosen in (None, config)]
    for args, chosen in passes:
        cell.forward(args, chosen)
    grads = [(RAGGED.backward(args), chosen) for args, chosen in passes]
    for args, chosen in grads:
        cell.backward(args, chosen)
    for (one, _), (other, _) in (passes, grads):
        for name in ("output", "h_n", "c_n", "gates", "cells", "grad_gates", "grad_h0", "grad_c0"):
            assert torch.equal(getattr(one, name, torch.zeros(1)), getattr(other, name, torch.zeros(1))), name


def _roomy(*shape: int, dtype: torch.dtype, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor with room behind each of its rows, and the memory that both lie in, filled with one value."""
    memory = torch.full((*shape[:-1], shape[-1] + 24), value, dtype=dtype, device=DEVICE)
    return memory[..., : shape[-1]], memory


def _outside_touched(kernel: ModuleType) -> bool:
    """Return whether a one-step forward pass reads NaN from outside of its input or writes outside of its outputs."""
    batch, hidden, shape = 3, 5, (1, 3, 1, 5)
    gates_input, _ = _roomy(1, batch, 1, 4 * hidden, dtype=torch.float32, value=float("nan"))
    gates_input.normal_()
    written = [_roomy(*shape, dtype=torch.float32, value=7.0) for _ in range(2)]
    gates = _roomy(1, batch, 1, 4 * hidden, dtype=torch.float32, value=7.0)
    # The states are contiguous, so their room is behind the last row alone.
    flat = [torch.full((batch * hidden + 24,), 7.0, device=DEVICE) for _ in range(2)]
    states = [value[: batch * hidden].view(1, batch, hidden) for value in flat]
    args = dataclasses.replace(
        Sizes(batch, 1, hidden, state=False).forward(),
        gates_input=gates_input, output=written[0][0], h_n=states[0], c_n=states[1], gates=gates[0],
        cells=written[1][0],
    )  # fmt: skip
    kernel.forward(args)
    truth = Sizes(batch, 1, hidden, state=False).forward()
    truth.gates_input.copy_(gates_input)
    loop_forward(truth)
    assert torch.allclose(args.output, truth.output, atol=1e-5)
    return not all(
        (value[..., size:] == 7.0).all()
        for value, size in (
            (written[0][1], hidden), (written[1][1], hidden), (gates[1], 4 * hidden),
            (flat[0], batch * hidden), (flat[1], batch * hidden),
        )
    )  # fmt: skip


def test_nothing_outside_of_the_outputs_is_written():
    """Rows with room behind them keep what stands there."""
    assert not _outside_touched(cell)


def mutant(folder: Path, module: ModuleType, old: str, new: str) -> ModuleType:
    """A module with one place of its source changed, loaded from a file, since Triton reads a kernel's source."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__name__}"
    path = folder / f"mutant_of_{module.__name__.replace('.', '_')}.py"
    path.write_text(source.replace(old, new))
    return changed_module.load(path, "kernels.gpu")


DEFECTS = {
    "gate order": ("forward", "i, f, g, o = _load_gates(p_tile", "f, i, g, o = _load_gates(p_tile"),
    "gate order kept": ("forward", "_store_gates(p_kept, i, f, g, o", "_store_gates(p_kept, i, f, o, g"),
    "h not held": ("forward", "tl.where(live, h_new, held), ", "h_new, "),
    "c not held": ("forward", "tl.where(live, c_new, c)\n", "c_new\n"),
    "output past a length": ("forward", "out, mask=inside", "h_new, mask=inside"),
    "looks past a length": ("forward", "_load_gates(p_tile, live,", "_load_gates(p_tile, inside,"),
    "same end for both directions": (
        "forward", "t = tl.where(direction == 0, step, steps - 1 - step).to(tl.int64)\n    o_state",
        "t = tl.where(direction == 0, step, step).to(tl.int64)\n    o_state",
    ),
    "h not reset": ("forward", "_load_gates(p_product, recurs,", "_load_gates(p_product, live,"),
    "c not reset": ("forward", "c_before = tl.where(recurs, c, 0.0)", "c_before = c"),
    "gradient to the h before a reset": ("backward", "tl.where(recurs, do, 0.0)\n", "do\n"),
    "gradient to the c before a reset": ("backward", "dc_new = tl.where(recurs, dc_new, 0.0)", "dc_new = dc_new"),
    "c before a reset, kept": ("backward", "before * s_cells_t, mask=recurs", "before * s_cells_t, mask=live"),
    "forget gate's derivative": ("backward", "df = dc_here * c_before * f *", "df = dc_here * c_before *"),
    "stale c": ("backward", "p_cell + before * s_cells_t", "p_cell + t * s_cells_t"),
    "dc not held": ("backward", "dc_new = tl.where(live, dc_new, dc)", "dc_new = tl.where(live, dc_new, 0.0)"),
    "dh not held": ("backward", "tl.where(live, 0.0, dh)", "tl.zeros_like(dh)"),
    "dh twice": ("backward", "tl.where(live, 0.0, dh)", "dh"),
    "gradient past a length": ("backward", "tl.load(p_from, mask=live", "tl.load(p_from, mask=inside"),
    "c0 forgotten": ("backward", "elif p_c0 is not None:", "elif p_c0 is None:"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_a_kernel_is_caught(defect, tmp_path, monkeypatch):
    """The comparison with the loop notices each of these."""
    which, old, new = DEFECTS[defect]
    broken = mutant(tmp_path, step, old, new)
    monkeypatch.setattr(cell, f"{which}_kernel", getattr(broken, f"{which}_kernel"))
    errors = (errors_forward if which == "forward" else errors_backward)(RAGGED, cell)
    with pytest.raises(AssertionError, match="error"):
        assert_close(errors, RAGGED.dtype)


def test_a_stale_cell_state_is_caught(tmp_path):
    """Taking c of the step before last is seen."""
    new = "h, c = args.h_n, args.c0 if step == 0 else args.c_n"
    broken = mutant(tmp_path, cell, "h, c = args.h_n, args.c_n", new)
    with pytest.raises(AssertionError, match="c_n"):
        assert_close(errors_forward(RAGGED, broken), RAGGED.dtype)


@pytest.mark.skipif(not interpreted(), reason="on a GPU writing out of bounds may spoil other tests")
def test_a_missing_tail_mask_is_caught(tmp_path, monkeypatch):
    """A tile wider than the hidden size that writes all of itself is seen."""
    broken = mutant(tmp_path, step, "(rows < batch) & (columns < HIDDEN)", "(rows < batch) & (columns < BLOCK_H)")
    monkeypatch.setattr(cell, "forward_kernel", broken.forward_kernel)
    assert _outside_touched(cell)


@pytest.mark.parametrize("state", [True, False])
def test_a_step_is_one_product_and_one_launch(state, monkeypatch):
    """Nothing else runs, for both directions together; the first step without a state needs no product either."""
    ran: list[str] = []
    kernel, product = cell.forward_kernel, cell._product

    class Counted:
        def __getitem__(self, grid):
            ran.append("launch")
            return kernel[grid]

    def counted(*arguments, **options):
        ran.append("product")
        product(*arguments, **options)

    monkeypatch.setattr(cell, "forward_kernel", Counted())
    monkeypatch.setattr(cell, "_product", counted)
    args = Sizes(2, 3, 4, directions=2, state=state).forward(save=False)
    cell.forward(args)
    assert ran == (["product"] if state else []) + ["launch", *["product", "launch"] * 2]


def _one_step(
    gates_input: torch.Tensor, recurrent: torch.Tensor | None, c: torch.Tensor, config: cell.CellConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step after its products, in one launch, without gradients.

    Args:
        gates_input: (batch, 4 * hidden_size), `x @ weight_ih.T + bias_ih + bias_hh`, gates in the order i, f, g, o;
            its last dimension contiguous.
        recurrent: the same shape and type, contiguous, `h @ weight_hh.T`; None for zeros.
        c: (batch, hidden_size), float32, contiguous.
        config: the tile; by default a guess from the shape.

    Returns:
        h, of the gates' type, and c, float32, each (batch, hidden_size).
    """
    batch, hidden = c.shape
    gates = gates_input[None, :, None]
    problem = Problem(c.device.type, gates_input.dtype, batch, 1, hidden)
    if c.is_cuda:
        count = torch.cuda.get_device_properties(c.device).multi_processor_count
        problem = dataclasses.replace(problem, multiprocessors=count)
    h, c_new = gates_input.new_empty(batch, hidden), torch.empty_like(c)
    with cell._on(c):
        cell._forward_launch(
            cell._chosen(problem, config, backward=False), 0, gates, recurrent, None, c, None, None,
            h[None, :, None], None, c_new, None, None,
        )  # fmt: skip
    return h, c_new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("recurrent", [True, False])
def test_one_step_is_the_reference_cells(dtype, recurrent):
    """A single launch computes h and c of the equations, reads a strided input and leaves its own alone."""
    generator = torch.Generator().manual_seed(5)
    wide, product = (torch.randn(3, 64, generator=generator).to(dtype).to(DEVICE) for _ in range(2))
    gates, c = wide[:, :28], torch.randn(3, 7, generator=generator).to(DEVICE)
    product, before = product[:, :28].contiguous(), c.clone()
    h, c_new = _one_step(gates, product if recurrent else None, c)
    i, f, g, o = (gates.double() + (product.double() if recurrent else 0.0)).chunk(4, dim=1)
    truth = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
    assert torch.equal(c, before)
    assert (h.dtype, c_new.dtype) == (dtype, torch.float32)
    assert torch.allclose(c_new.double(), truth, atol=1e-5)
    assert torch.allclose(h.double(), o.sigmoid() * truth.tanh(), atol=OUTPUT_ERROR[dtype])


@given(
    batch=st.integers(1, 1024), hidden=st.integers(1, 4096), directions=st.integers(1, 2), backward=st.booleans(),
    multiprocessors=st.sampled_from([0, 1, 132]),
)  # fmt: skip
def test_tiles_are_legal_and_the_first_fills_the_device(batch, hidden, directions, backward, multiprocessors):
    """Powers of two without repetition; the first gives each multiprocessor a program wherever any candidate does."""
    problem = Problem(
        "cuda", torch.float16, batch, 7, hidden, directions, capability=90, multiprocessors=multiprocessors
    )
    found = cell.configs(problem, backward=backward)
    assert len(set(found)) == len(found) > 0
    for size in itertools.chain.from_iterable(map(dataclasses.astuple, found)):
        assert size & (size - 1) == 0 < size
    programs = [cell.launches(problem, config, backward=backward)[0].grid for config in found]
    assert programs[0] >= min(multiprocessors, max(programs))
    # No program is without an element.
    assert all(
        config.block_batch < 2 * batch and config.block_hidden < 2 * hidden and config.num_warps <= 8
        for config in found
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "not in float64"),
        ({"dtype": torch.int32}, "not in int32"),
        ({"batch": 0}, "batch 0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_what_is_refused_says_why(change, reason):
    """A type or size that cannot be served is named, in both directions of time."""
    problem = dataclasses.replace(Problem("cuda", torch.float16, 2, 3, 4), **change)
    for backward in (False, True):
        assert reason in str(cell.refuses(problem, backward=backward))


def test_a_refused_problem_raises():
    """Nothing runs instead of what was asked for."""
    args = Sizes(2, 2, 2, dtype=torch.float64).forward()
    with pytest.raises(ValueError, match="not in float64"):
        cell.forward(args)


COMPILE = """
import itertools, json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels.gpu import cell
from kernels.common.recurrence import Problem

assert "not on cpu" in cell.refuses(Problem("cpu", torch.float32, 1, 1, 1), backward=False)
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
types = torch.float16, torch.bfloat16, torch.float32
all_kinds = (1, False, False), (2, True, False), (1, False, True)
generations = enumerate(json.loads(sys.argv[1]))
for (generation, capability), (number, dtype) in itertools.product(generations, enumerate(types)):
    # Every type in every kind on the generation in the middle; on the others each type in one kind, and so each kind.
    kinds = all_kinds if capability == 90 else [all_kinds[(generation + number) % 3]]
    for (directions, masked, resets), backward in itertools.product(kinds, (False, True)):
        problem = Problem("cuda", dtype, 64, 50, 1024, directions, True, masked, False, capability, 132, resets=resets)
        found = cell.configs(problem, backward=backward)[:2]
        # Both on the generation in the middle, one on the others: the first with one direction, the second with two.
        for config in found if capability == 90 else found[directions - 1 : directions]:
            for launch in cell.launches(problem, config, backward=backward):
                assert list(launch.signature) == launch.kernel.arg_names
                hints = {
                    (place,): [["tt.divisibility", 16]]
                    for place, (name, kind) in enumerate(launch.signature.items())
                    if kind != "constexpr" and name.startswith(("p_", "s_"))
                }
                built = triton.compile(
                    ASTSource(launch.kernel, launch.signature, launch.constants, hints),
                    target=GPUTarget("cuda", capability, 32),
                    options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
                )
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(built.asm["cubin"])
                    file.flush()
                    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
                registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage.stdout + usage.stderr).groups()
                print(json.dumps({
                    "capability": capability, "launch": str(launch), "stack": int(stack), "registers": int(registers),
                    "loads": bool(re.search(r"ld[.]global[.]v[24]", built.asm["ptx"])),
                    "stores": bool(re.search(r"st[.]global[.]v[24]", built.asm["ptx"])),
                }))
"""


CAPABILITIES = [80, 90, 100]


@pytest.fixture(scope="module")
def compiled():
    """What each launch takes: compiled in one process, since Triton and torch take seconds to start."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(CAPABILITIES)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_without_spilling(compiled, capability):
    """For three generations, in every type: no stack, registers for full occupancy at 8 warps, vectors in memory."""
    rows = [row for row in compiled if row["capability"] == capability]
    assert len(rows) == (72 if capability == 90 else 12)
    for row in rows:
        assert row["stack"] == 0, row
        assert row["registers"] <= 64, row
        assert row["loads"], row
        assert row["stores"], row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(cell.TYPES))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 2048), (64, 1024), (130, 257), (1024, 64)])
def test_real_sizes_on_a_gpu(dtype, directions, batch, hidden):
    """Compiled kernels agree with float64 at sizes that the interpreter is too slow for, with lengths."""
    lengths = tuple(index % 13 for index in range(batch))
    sizes = Sizes(batch, 12, hidden, directions=directions, dtype=dtype, lengths=lengths, batch_first=True)
    assert_close(errors_forward(sizes, cell), dtype)
    assert_close(errors_backward(sizes, cell), dtype)


@pytest.mark.gpu
def test_tf32_is_taken_where_allowed_and_nowhere_else():
    """Products round their factors to TF32 exactly when asked, whatever the process's setting, which is put back."""
    setting = torch.backends.cuda.matmul
    previous = setting.fp32_precision
    sizes = Sizes(64, 6, 1024)
    truth = Sizes(64, 6, 1024, dtype=torch.float64).forward()
    outputs = {}
    for outer, tf32 in itertools.product(("ieee", "tf32"), (False, True)):
        setting.fp32_precision = outer
        try:
            args = sizes.forward(tf32=tf32)
            cell.forward(args)
            assert setting.fp32_precision == outer
        finally:
            setting.fp32_precision = previous
        outputs[outer, tf32] = args.output
    loop_forward(truth)
    for (_, tf32), output in outputs.items():
        error = (output.double() - truth.output).norm() / truth.output.norm()
        assert (1e-5 < error < 5e-3) if tf32 else error < 1e-5
