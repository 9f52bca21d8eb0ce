"""The ahead-of-time compiler: what it finds, what it holds against architectures, and the table in the README."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kernels.common.recurrence import Problem
from kernels.tools import compile as aot
from kernels.tools.compile import Compiled, faults, specialise

ROOT = Path(__file__).parent.parent
FINE = Compiled(
    90, "persistent", "forward_kernel", 0, "forward", "float16", 16, 1024, 1, False, "tile 8", 128, 4, 168, 0, 70_000,
    "wgmma", (),
)  # fmt: skip


def test_what_fits_has_no_fault():
    assert faults(FINE, cooperative=True) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shared_bytes": 232_449}, "232449 bytes of shared memory, sm_90 has 232448 a block"),
        ({"arch": 80, "shared_bytes": 170_000}, "170000 bytes of shared memory, sm_80 has 166912 a block"),
        ({"arch": 89, "shared_bytes": 101_377}, "101377 bytes of shared memory, sm_89 has 101376 a block"),
        ({"registers": 200, "num_warps": 16}, "200 registers in 512 threads, sm_90 has 65536 a block"),
        ({"stack_bytes": 8}, "8 bytes of stack per thread"),
        ({"grid": 400}, "400 programs must run at the same time, 396 can on sm_90"),
        ({"grid": 133, "shared_bytes": 200_000}, "133 programs must run at the same time, 132 can on sm_90"),
        ({"grid": 133, "shared_bytes": 116_000}, "133 programs must run at the same time, 132 can on sm_90"),
        (
            {"arch": 120, "grid": 2041, "registers": 32, "shared_bytes": 1000},
            "2041 programs must run at the same time, 2040 can on sm_120",
        ),
    ],
)
def test_fault_is_found(change, expected):
    """Each limit of an architecture, crossed by a little, is one fault that states both numbers."""
    (fault,) = faults(dataclasses.replace(FINE, **change), cooperative=True)
    assert fault.startswith(expected)


def test_stack_that_a_module_permits_is_none():
    spilled = dataclasses.replace(FINE, stack_bytes=8, registers=72)
    assert faults(spilled, cooperative=False, stack_bytes=8) == ()
    assert faults(spilled, cooperative=False, stack_bytes=7) != ()
    # With most registers in use it is a spill.
    assert faults(dataclasses.replace(spilled, registers=168), cooperative=False, stack_bytes=8) != ()


def test_programs_that_need_not_meet_may_be_many():
    assert faults(dataclasses.replace(FINE, grid=10_000), cooperative=False) == ()


def launch(**types: str) -> SimpleNamespace:
    """A launch of a kernel with these arguments; those in capitals are constants."""
    params = [
        SimpleNamespace(name=name, do_not_specialize=name == "first", do_not_specialize_on_alignment=False)
        for name in types
    ]
    constants = {name: 1 for name in types if name.isupper()}
    return SimpleNamespace(kernel=SimpleNamespace(params=params), signature=types, constants=constants)


@pytest.mark.parametrize(
    ("hidden", "stride", "stride_gates"), [(64, True, True), (40, False, True), (17, False, False)]
)
def test_alignment_is_that_of_a_real_launch(hidden, stride, stride_gates):
    """Pointers are aligned; strides as the hidden size says; what Triton does not specialise has no attribute."""
    arguments = {"p_x": "*fp16", "stride_output_t": "i32", "stride_gates_t": "i32", "first": "i32", "H": "constexpr"}
    problem = Problem("cuda", torch.float16, 16, 100, hidden)
    _, constants, attributes = specialise(launch(**arguments), problem)
    aligned = {position for (position,) in attributes}
    assert aligned == {0} | ({1} if stride else set()) | ({2} if stride_gates else set())
    assert constants == {"H": 1}


def test_one_becomes_a_constant():
    """Triton compiles an argument of 1 into the kernel; so does what is compiled here."""
    signature, constants, _ = specialise(launch(batch="i32"), Problem("cuda", torch.float16, 1, 100, 64))
    assert (signature, constants) == ({"batch": "constexpr"}, {"batch": 1})


@pytest.mark.parametrize(
    ("ptx", "expected"),
    [
        ("wgmma.mma_async.sync.aligned.m64n8k16 mma.sync.aligned.m16n8k16", "wgmma mma"),
        ("wgmma.mma_async.sync.aligned.m64n8k16", "wgmma"),
        ("\tmma.sync.aligned.m16n8k8", "mma"),
        ("tcgen05.mma.cta_group::1", "tcgen05"),
        ("fma.rn.f32", "none"),
    ],
)
def test_instructions_of_products_are_told_apart(ptx, expected):
    assert aot._products(ptx) == expected


def test_table_is_written_between_its_marks(tmp_path):
    """Writing twice changes nothing but the table, and a file without the marks is refused."""
    path = tmp_path / "README.md"
    path.write_text("before\n" + "\n".join(aot.MARKS) + "\nafter\n", encoding="utf-8")
    pytest.importorskip("triton")
    aot.write("| old |", path)
    aot.write("| new |", path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{aot.MARKS[0]}\nCompiled by Triton ")
    assert text.endswith(f"\n\n| new |\n{aot.MARKS[1]}\nafter\n")
    path.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the table"):
        aot.write("| new |", path)


def compiled_table(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the compiler in a process where kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels", "compile", "--table", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


SPECIALISED = """
from kernels.gpu import persistent_backward, persistent_forward, sequence_kernels, cell_kernels as step

for module in (persistent_backward, persistent_forward, sequence_kernels, step):
    for kernel in (getattr(module, name, None) for name in ("forward_kernel", "backward_kernel")):
        for parameter in kernel.params if kernel else ():
            changes = parameter.name in {"steps", "step", "first", "end"}
            # A batch of a multiple of 16 spares the persistent kernels a spill, and has configurations of its own.
            changes |= parameter.name == "batch" and "persistent" not in module.__name__
            # Strides of the others are multiples of the hidden size as they are, which change little.
            if changes or (module is sequence_kernels and parameter.name.startswith("s_")):
                print(module.__name__, parameter.name, bool(parameter.do_not_specialize))
"""


def test_new_batches_and_lengths_compile_nothing():
    """No kernel is compiled anew where the steps become a multiple of 16, or cease to be; few where a batch does."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SPECIALISED], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    found = [line.split() for line in run.stdout.splitlines()]
    assert len({module for module, *_ in found}) == 4
    assert [line for line in found if line[2] != "True"] == []


@pytest.mark.slow
def test_quick_form_compiles_without_fault():
    """Every kernel's first configurations fit on an H200, spill nothing, and are what the notebook's table says."""
    pytest.importorskip("triton")
    run = compiled_table("--quick")
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line for line in run.stdout.splitlines() if line.startswith("| sm_")]
    assert {row.split(" | ")[1] for row in rows} == {"cell", "sequence", "persistent"}
    page = aot.PAGE.read_text(encoding="utf-8")
    if f"Compiled by Triton {aot._version()} " in page:
        kept = [line for line in page.splitlines() if line.startswith("| sm_")]
        assert kept == rows, "run: python -m kernels compile --quick --write"
    else:
        # Another compiler uses other registers; what is compiled stays the same.
        assert len(re.findall(r"^\| sm_", page, flags=re.MULTILINE)) == len(rows)
