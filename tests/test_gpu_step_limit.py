"""A recurrence of nothing but meeting, exchange and product: its values in the interpreter, its compiled code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from recurrences import DEVICE, interpreted

from bench.worker import ceilings
from kernels.gpu import step_limit
from kernels.gpu.persistent_configs import PersistentConfig

ROOT = Path(__file__).parents[1]
STEPS = 3
#: Without a split and with one; one tile and several of each kind.
CONFIGS = (
    PersistentConfig(8, 8, 64, 1, 4, "barrier", 4),
    PersistentConfig(16, 16, 16, 2, 1, "barrier", 4),
)

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not interpreted(), reason="needs a GPU or Triton's interpreter")


def after(part: str, weight: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The same steps in float64."""
    weight, h = weight.double(), h.double()
    for _ in range(STEPS):
        if part == "product":
            h = h @ weight.view(4, h.size(1), -1).sum(0).t()
        elif part == "exchange":
            h = 0.5 * h + 0.5 * h.mean(1, keepdim=True)
    return h


@pytest.mark.parametrize("part", step_limit.PARTS)
@pytest.mark.parametrize("config", CONFIGS, ids=["split", "whole"])
def test_each_part_computes_what_it_says(part, config):
    """Each element of h depends on all of its row: a step that reads too early, or other rows, is another result."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4 * 40, 40, generator=generator).to(DEVICE) / 12
    start = torch.randn(19, 40, generator=generator).to(DEVICE)
    found = step_limit.run(part, weight, start, STEPS, config)
    torch.testing.assert_close(found.double(), after(part, weight, start), rtol=1e-5, atol=1e-5)


def test_a_worker_times_every_part_at_every_size():
    """Seconds of a step by part and size; a size whose weights fit nowhere is named with its reason."""
    found = ceilings.steps(DEVICE, sizes=((1, 8), (16, 16384)), count=2)
    assert set(found["step_s"]) == {f"{part} B1 H8" for part in step_limit.PARTS}
    assert all(value > 0 for value in found["step_s"].values())
    assert found["without"] == ["B16 H16384: the weights do not fit on this GPU's multiprocessors together"]


@pytest.mark.slow
def test_it_compiles_for_gpus_without_one():
    """For each size that a run measures and two architectures it fits on chip, spills nothing and uses tensor cores."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, run.stderr
    built = [json.loads(line) for line in run.stdout.splitlines()]
    assert {(one["capability"], one["part"]) for one in built} == {
        (capability, part) for capability in (80, 90) for part in step_limit.PARTS
    }
    for one in built:
        assert one["stack"] <= one["permitted"], one
        assert one["shared"] <= one["limit"], one
        assert (one["products"] > 0) == (one["part"] == "product"), one
        assert (one["loads"] > 0) == (one["part"] != "barrier"), one


COMPILE = """
import json, os, re, subprocess, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.worker.ceilings import SHARED_SIZES
from kernels.common.recurrence import Problem
from kernels.gpu import step_limit
from kernels.gpu.persistent import STACK_BYTES
from kernels.gpu.persistent_configs import SHARED_BYTES

TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
for capability, multiprocessors in ((80, 108), (90, 132)):
    for batch, hidden in SHARED_SIZES[:1] + SHARED_SIZES[-2:] if capability == 90 else SHARED_SIZES[:1]:
        problem = Problem("cuda", torch.float16, batch, 2, hidden, capability=capability,
                          multiprocessors=multiprocessors)
        config = step_limit.limit_config(problem)
        for part in step_limit.PARTS:
            launch = step_limit.limit_launch(part, problem, config)
            attributes = {
                (index,): [["tt.divisibility", 16]] for index, name in enumerate(launch.kernel.arg_names)
                if launch.signature[name].startswith("*") or name.startswith("stride")
            }
            source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                                   options={"num_warps": launch.num_warps, "num_stages": launch.num_stages})
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                usage = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True,
                                       check=True).stdout
            ptx = built.asm["ptx"]
            print(json.dumps(dict(
                capability=capability, batch=batch, hidden=hidden, part=part, config=str(config), grid=launch.grid,
                stack=int(re.search(r"STACK:(\\d+)", usage)[1]), permitted=STACK_BYTES, shared=built.metadata.shared,
                registers=int(re.search(r"REG:(\\d+)", usage)[1]), limit=SHARED_BYTES[capability],
                products=ptx.count("mma.sync") + ptx.count("wgmma.mma_async"), loads=ptx.count("ld.global.cg"),
            )))
"""
