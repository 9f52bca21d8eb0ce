"""Estimate of a recurrence's time on a GPU on which nothing was measured, from a few published figures.

It serves only to pick a kernel before `kernels.tools.tune` was run, and `kernels.dispatch` says so
whenever it has. No number from here is ever reported as a result.
"""

from __future__ import annotations

import math

import torch

from .common.recurrence import Problem

#: Bytes a second between L2 and all multiprocessors, and at most to one of them; H200, as other people's
#: microbenchmarks of Hopper report them.
L2_RATE = 5e12
L2_RATE_ONE = 1.1e11
#: Shared memory that a program can fill with weights, bytes, by compute capability; what is left holds h and tiles.
ON_CHIP_BYTES = {80: 140_000, 86: 80_000, 89: 80_000, 90: 200_000, 100: 200_000}
#: FLOPs per second, a multiply-add counted as two; half of what data sheets promise, since tiles of a recurrence are
#: thin.
RATE = {torch.float16: 4e14, torch.bfloat16: 4e14, torch.float32: 2.5e13}
RATE_TF32 = 2e14
#: Seconds a step that do not depend on sizes: the chain of product and activations; from the start of one small kernel
#: in a CUDA graph to the start of the next.
CHAIN_S = 1.0e-6
LAUNCH_S = 2.5e-6
#: A backward step over a forward one: it multiplies by the same weights, and moves four gates and two states where
#: forward moves one.
BACKWARD = 1.4


def estimate_s(problem: Problem, implementation: str, *, backward: bool) -> float:
    """Seconds that a kernel might take for all steps; infinite for one without an estimate, which is measured first."""
    if implementation == "persistent":
        return problem.steps * _persistent_s(problem, backward=backward)
    step_s = {"cell": _cell_s, "sequence": _sequence_s}.get(implementation)
    return problem.steps * step_s(problem) * (BACKWARD if backward else 1.0) if step_s else math.inf


def _weight_bytes(problem: Problem) -> int:
    """Bytes of one direction's recurrent weights."""
    return 4 * problem.hidden_size**2 * problem.dtype.itemsize


def _on_chip(problem: Problem) -> int:
    return ON_CHIP_BYTES.get(problem.capability, min(ON_CHIP_BYTES.values()))


def _arithmetic_s(problem: Problem, share: float = 1.0) -> float:
    """One step's product on a share of the GPU."""
    rate = RATE_TF32 if problem.tf32 and problem.dtype == torch.float32 else RATE.get(problem.dtype, 1e13)
    return problem.directions * problem.batch * 8 * problem.hidden_size**2 / (rate * share)


def _sequence_s(problem: Problem) -> float:
    """A program keeps 16 rows of the batch for all steps, and has to see all weights at every step."""
    programs = problem.directions * math.ceil(problem.batch / 16)
    multiprocessors = max(problem.multiprocessors, 1)
    waves = math.ceil(programs / multiprocessors)
    busy = min(programs, multiprocessors)
    weights = _weight_bytes(problem)
    streamed = 0.0 if weights <= _on_chip(problem) else weights / min(L2_RATE_ONE, L2_RATE / busy)
    return waves * (CHAIN_S + streamed) + _arithmetic_s(problem, busy / multiprocessors)


def _persistent_s(problem: Problem, *, backward: bool) -> float:
    """Return what the kernel's own model gives for the configuration that it would launch first."""
    # Needs Triton, without which this is never called: `kernels.dispatch` estimates only kernels that serve.
    from .gpu import persistent_configs  # noqa: PLC0415

    first = persistent_configs.configs(problem, backward=backward)[0]
    return persistent_configs.step_us(problem, first, backward=backward) * 1e-6


def _cell_s(problem: Problem) -> float:
    """Two launches per step, and all weights from L2."""
    return 2 * LAUNCH_S + max(problem.directions * _weight_bytes(problem) / L2_RATE, _arithmetic_s(problem))
