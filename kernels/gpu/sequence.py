"""The whole recurrence in one launch: a program walks through time with a few sequences, the weights on chip.

Nothing passes between programs, so there is no barrier among them and no launch per step. That asks for recurrent
weights which fit into one multiprocessor's registers: small hidden sizes, where a step is otherwise all overhead.
The kernels themselves are in `sequence_kernels.py`; here is what they fit, how they are cut up and launched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from ..common.recurrence import Backward, Forward, Problem
from .launch import Launch
from .sequence_kernels import backward_kernel, forward_kernel

#: From 3.8 on Triton makes the backward product of 16 units a warp by wgmma on 9.0, which reads the weights from shared
#: memory in each step and at 128 units spills; 8 units a warp stay as they were. Compiled, not measured.
WIDE_PRODUCTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


@dataclass(frozen=True)
class SequenceConfig:
    """Division of a recurrence among programs.

    Attributes:
        block_batch: sequences per program.
        num_warps: each holds the weights of its own share of the hidden units.
        num_stages: of Triton's pipeliner, which has nothing to do here.
    """

    block_batch: int
    num_warps: int
    num_stages: int = 1


def refuses(problem: Problem, *, backward: bool) -> str | None:  # noqa: PLR0911 - a reason each
    """Say why this kernel cannot serve; None if it can."""
    name = str(problem.dtype).removeprefix("torch.")
    hidden = problem.hidden_size
    if problem.dtype not in {torch.float16, torch.bfloat16, torch.float32}:
        return f"sequence takes float32, float16 and bfloat16, not {name}"
    if problem.resets:
        return "sequence has no resets in the middle of the steps"
    capability = problem.capability or 90
    if capability < 80:
        return f"sequence needs compute capability 8.0 or later, this is {capability / 10}"
    largest = _largest(problem, backward=backward)
    if hidden > largest:
        size = 4 * hidden**2 * problem.dtype.itemsize
        exact = ", in two parts each," if problem.dtype == torch.float32 and not problem.tf32 else ""
        return (
            f"hidden_size {hidden} needs {size // 1024} KB of registers for the recurrent weights{exact} besides the "
            f"working values; a multiprocessor has 256 KB, which carry hidden_size {largest} in {name} "
            f"{'backward' if backward else 'forward'} on compute capability {capability / 10}"
        )
    aligned_from = 32 if problem.dtype == torch.float32 and not problem.tf32 else 64
    if hidden > aligned_from and hidden % 8:
        return f"hidden_size {hidden} is above {aligned_from} and no multiple of 8: scattered loads need more registers"
    # With the batch first in memory the rows of a tile lie all steps apart.
    if 32 * problem.steps * problem.directions * 4 * hidden >= 2**31:
        return (
            f"{problem.steps} steps of hidden_size {hidden} in {problem.directions} directions: offsets within 32 "
            "sequences pass 2**31, and the kernel has 32 bits for them"
        )
    staged, limit = 4 * _padded(hidden) ** 2 * problem.dtype.itemsize // 1024, _shared_kb(capability)
    if staged + 8 > limit:
        return (
            f"hidden_size {hidden} needs {staged + 8} KB of shared memory to lay out the recurrent weights; a block "
            f"on compute capability {capability / 10} has {limit} KB"
        )
    return None


def configs(problem: Problem, *, backward: bool) -> list[SequenceConfig]:
    """Candidates, best guess first: none spills registers on compute capability 8.0, 9.0 or 10.0."""
    found = [SequenceConfig(block, warps) for block, warps in _tiles(problem, backward=backward)]
    multiprocessors = problem.multiprocessors or 132

    def guess(config: SequenceConfig) -> int:
        programs = math.ceil(problem.batch / config.block_batch) * problem.directions
        # A step costs a fixed time, about as much as 16 sequences' arithmetic.
        return math.ceil(programs / multiprocessors) * (16 + config.block_batch)

    return sorted(found, key=guess)


def _largest(problem: Problem, *, backward: bool) -> int:
    """Largest hidden size whose weights stay in registers: found by compiling."""
    if problem.dtype != torch.float32:
        # Before 9.0, without stmatrix, moving gradients around takes a few registers more than there are.
        return 64 if backward and (problem.capability in range(80, 90) or _by_wgmma(problem)) else 128
    return 32 if backward and not problem.tf32 else 64


def _by_wgmma(problem: Problem) -> bool:
    """Return whether the backward product of 16 units a warp would leave the registers."""
    return WIDE_PRODUCTS and problem.dtype != torch.float32 and (problem.capability or 90) == 90


def _shared_kb(capability: int) -> int:
    """Shared memory that a block may take (CUDA C++ Programming Guide, technical specifications)."""
    if capability in {80, 87}:
        return 163
    return 99 if capability in {86, 89} or capability >= 120 else 227


def _tiles(problem: Problem, *, backward: bool) -> list[tuple[int, int]]:
    """Every (block_batch, num_warps) that compiles without a spill, by preference among equal block_batch.

    A warp has 16 hidden units, or 8; then its weights and working values are halved.
    """
    padded = _padded(problem.hidden_size)
    warps = padded // 16
    if padded == 128:
        # 16 warps have 128 registers per thread: enough for inference, and where stmatrix saves some.
        few = backward or problem.saves or problem.capability in range(80, 90)
        return [(8, warps)] if few else [(8, warps), (8, 2 * warps)]
    if problem.hidden_size % 8:
        return [(8, 2 * warps)]
    if problem.dtype == torch.float32 and (backward or not problem.tf32):
        return [(8, 2 * warps)]
    if problem.dtype == torch.float32:
        return [(8, 2 * warps), (16, 2 * warps)]
    if backward:
        return [(8, warps), (8, 2 * warps), (16, 2 * warps)][_by_wgmma(problem) :]
    return [(8, 2 * warps), (8, warps), (16, 2 * warps), (32, 2 * warps)]


def forward(args: Forward, config: SequenceConfig | None = None) -> None:
    """Run a forward recurrence; `config` None takes the first of `configs`."""
    problem = args.problem
    config = config or configs(problem, backward=False)[0]
    steps, batch, directions, _ = args.gates_input.shape
    grid = triton.cdiv(batch, config.block_batch) * directions
    strides = [
        stride
        for tensor in (args.gates_input, args.output, args.gates, args.cells)
        for stride in ((0, 0, 0) if tensor is None else tensor.stride()[:3])
    ]
    grain = math.gcd(16, problem.hidden_size, *strides)
    forward_kernel[(grid,)](
        args.gates_input, args.weight_hh, args.h0, args.c0, args.lengths,
        args.output, args.h_n, args.c_n, args.gates, args.cells,
        steps, batch, problem.hidden_size // grain, *(stride // grain for stride in strides),
        **_constants(problem, config, grain), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def backward(args: Backward, config: SequenceConfig | None = None) -> None:
    """Run a backward recurrence; `config` None takes the first of `configs`."""
    problem = args.problem
    config = config or configs(problem, backward=True)[0]
    steps, batch, directions, _ = args.gates.shape
    grid = triton.cdiv(batch, config.block_batch) * directions
    tensors = (args.gates, args.cells, args.grad_output, args.grad_gates)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    grain = math.gcd(16, problem.hidden_size, *strides)
    backward_kernel[(grid,)](
        args.weight_hh, args.c0, args.lengths, args.gates, args.cells, args.grad_output, args.grad_h_n, args.grad_c_n,
        args.grad_gates, args.grad_h0, args.grad_c0,
        steps, batch, problem.hidden_size // grain, *(stride // grain for stride in strides),
        **_constants(problem, config, grain), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def launches(problem: Problem, config: SequenceConfig, *, backward: bool) -> list[Launch]:
    """Launches of `forward` or `backward`, with initial states and gradients of the final ones given."""
    element = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[problem.dtype]
    kernel = backward_kernel if backward else forward_kernel
    constants = _constants(problem, config, math.gcd(16, problem.hidden_size))
    if not problem.masked:
        constants["p_lengths"] = None
    if not backward and not problem.saves:
        constants |= {"p_gates": None, "p_cells": None}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif not name.startswith("p_"):
            signature[name] = "i32"
        elif name == "p_lengths":
            signature[name] = "*i32"
        else:
            signature[name] = "*fp32" if name in _FLOAT32 else element
    grid = triton.cdiv(problem.batch, config.block_batch) * problem.directions
    return [Launch(kernel, signature, constants, grid, config.num_warps, config.num_stages, cooperative=False)]


#: Cell states and their gradients, whatever the type of the gates.
_FLOAT32 = {"p_c0", "p_c_n", "p_cells", "p_grad_c_n", "p_grad_c0"}


def _constants(problem: Problem, config: SequenceConfig, grain: int) -> dict[str, Any]:
    single = problem.dtype == torch.float32
    return {
        "BLOCK_B": config.block_batch,
        "UNITS": _padded(problem.hidden_size),
        "WARPS": config.num_warps,
        "GRAIN": grain,
        # Three TF32 products of the factors' upper and lower halves carry about float32's own precision. The plain
        # float32 product has no tensor cores and would need every weight in several threads.
        "PRECISION": "tf32" if problem.tf32 else "tf32x3",
        "PRECISE": single and not problem.tf32,
        "NATIVE": problem.device == "cuda",
    }


def _padded(hidden_size: int) -> int:
    size = 16
    while size < hidden_size:
        size *= 2
    return size
