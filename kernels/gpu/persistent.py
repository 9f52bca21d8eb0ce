"""LSTM kernels in which many programs share a sequence: each holds the weights of a few hidden units on chip for all steps.

Once a step the programs of a batch tile exchange h (forward) or the gates' gradients (backward) through the second-level
cache. `Config.sync` says how they know that it has arrived: `barrier` counts arrivals, `poll` reads until nothing is
missing, `launch` holds no weights and makes every step a launch of its own, which serves sizes that do not fit on chip.
No sum is made by atomics, so two runs of one configuration give the same bits.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.gpu import graphs
from kernels.gpu.exchange import ABSENT
from kernels.gpu.launch import Launch
from kernels.gpu.persistent_backward import backward_kernel
from kernels.gpu.persistent_forward import forward_kernel
from kernels.recurrence import Backward, Forward, Problem

#: What a problem on a CPU is planned for, so that tests choose what an H200 would: multiprocessors and capability.
H200 = (132, 90)
#: Shared memory of one block, bytes, by compute capability; 8.6 and 8.9 have the least.
SHARED_BYTES = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
LEAST_SHARED_BYTES = 101376
#: How many configurations a tuner is offered.
MOST_CONFIGS = 12
#: Integers of a counter's own cache line, as the kernels step over them.
COUNTER_STRIDE = 32
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Config:
    """How a problem is cut and launched.

    Attributes:
        block_b, block_h: batch rows and hidden units (all four gates) of a program.
        block_k: of the sum over h (or over the gates' gradients), at a time.
        group: blocks of it that are loaded at a time.
        split: parts of `block_k` that different warps sum over, the weights in their registers; 1: all warps sum over
            everything, the weights in shared memory.
        sync: `barrier`, `poll` or `launch`.
        num_warps, num_stages: options of Triton's compiler; stages count for `launch`.
    """

    block_b: int
    block_h: int
    block_k: int
    group: int
    split: int
    sync: str
    num_warps: int
    num_stages: int = 1


def refuses(problem: Problem, *, backward: bool) -> str | None:
    """Why no configuration serves, or None."""
    del backward
    if problem.dtype not in DTYPES:
        return f"persistent kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if problem.device == "cuda" and problem.capability < 80:
        return f"persistent kernels need compute capability 8.0 or newer, this GPU has {problem.capability / 10}"
    return None


def configs(problem: Problem, *, backward: bool) -> list[Config]:
    """Configurations that fit, best guess first, at most `MOST_CONFIGS`, the last of which needs no co-residency.

    `poll` is estimated to be faster and offered, but never comes first: nothing has shown yet on a GPU that it is right.
    """
    streamed = sorted(_streamed(problem, backward=backward), key=lambda config: _step_us(problem, config, backward))
    # A single step has nobody to wait for, and no use for weights that stay.
    if problem.steps <= 1:
        return streamed[:MOST_CONFIGS]
    held = sorted(_held(problem, backward=backward), key=lambda config: _step_us(problem, config, backward))
    barrier = [config for config in held if config.sync == "barrier"]
    poll = [config for config in held if config.sync == "poll"]
    half = (MOST_CONFIGS - 2) // 2
    found = sorted(barrier[:half] + streamed[:2], key=lambda config: _step_us(problem, config, backward))
    return found[:1] + poll[:half] + found[1:]


def forward(args: Forward, config: Config | None = None) -> None:
    """Run a forward recurrence."""
    problem = args.problem
    config = config or configs(problem, backward=False)[0]
    bits = BITS[problem.dtype]
    # Past a length the output is zero and h is held, so h needs rows of its own.
    exchange = torch.empty_like(args.output, memory_format=torch.contiguous_format) if problem.masked else args.output
    exchange = exchange.view(bits)
    if config.sync == "poll":
        exchange.fill_(ABSENT.value)
    arguments = (
        args.gates_input, args.weight_hh, None if args.h0 is None else args.h0.view(bits), args.c0, args.lengths,
        args.output if problem.masked else None, exchange, args.h_n, args.c_n, args.gates, args.cells,
        _counters(problem, config, args.output),
    )  # fmt: skip
    strides = [
        *args.gates_input.stride()[:3], *args.output.stride()[:3], *exchange.stride()[:3],
        *(args.gates.stride()[:3] if args.gates is not None else (0, 0, 0)),
        *(args.cells.stride()[:3] if args.cells is not None else (0, 0, 0)),
    ]  # fmt: skip
    _run(forward_kernel, problem, config, arguments, strides, problem.steps)


def backward(args: Backward, config: Config | None = None) -> None:
    """Run a backward recurrence."""
    problem = args.problem
    config = config or configs(problem, backward=True)[0]
    bits = BITS[problem.dtype]
    grad_gates = args.grad_gates.view(bits)
    if config.sync == "poll":
        grad_gates.fill_(ABSENT.value)
    arguments = (
        args.weight_hh, args.c0, args.lengths, args.gates, args.cells, args.grad_output, args.grad_h_n, args.grad_c_n,
        grad_gates, args.grad_h0, args.grad_c0, torch.empty_like(args.grad_c0),
        _counters(problem, config, args.grad_gates),
    )  # fmt: skip
    strides = [
        *args.gates.stride()[:3], *args.cells.stride()[:3], *args.grad_output.stride()[:3], *grad_gates.stride()[:3],
    ]  # fmt: skip
    _run(backward_kernel, problem, config, arguments, strides, problem.steps + 1)


def launches(problem: Problem, config: Config, *, backward: bool) -> list[Launch]:
    """What `forward` or `backward` launches for a problem with initial states and a gradient of each output."""
    dtype, bits = f"*{DTYPES[problem.dtype]}", f"*i{torch.iinfo(BITS[problem.dtype]).bits}"
    lengths = "*i32" if problem.masked else "constexpr"
    if backward:
        kernel = backward_kernel
        types = {
            "p_weight": dtype, "p_c0": "*fp32", "p_lengths": lengths, "p_gates": dtype, "p_cells": "*fp32",
            "p_grad_output": dtype, "p_grad_h_n": dtype, "p_grad_c_n": "*fp32", "p_grad_gates": bits,
            "p_grad_h0": dtype, "p_grad_c0": "*fp32", "p_held": "*fp32", "p_counters": "*i32",
        }  # fmt: skip
    else:
        kernel = forward_kernel
        types = {
            "p_input": dtype, "p_weight": dtype, "p_h0": bits, "p_c0": "*fp32", "p_lengths": lengths,
            "p_output": dtype if problem.masked else "constexpr", "p_exchange": bits, "p_h_n": dtype, "p_c_n": "*fp32",
            "p_gates": dtype if problem.saves else "constexpr", "p_cells": "*fp32" if problem.saves else "constexpr",
            "p_counters": "*i32",
        }  # fmt: skip
    constants = _constants(problem, config)
    signature = {
        name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names
    }
    absent = {name: None for name, kind in types.items() if kind == "constexpr"}
    return [
        Launch(
            kernel, signature, constants | absent, _programs(problem, config), config.num_warps, config.num_stages,
            config.sync != "launch",
        )
    ]  # fmt: skip


def _run(
    kernel: Any, problem: Problem, config: Config, arguments: tuple[Tensor | None, ...], strides: list[int], turns: int
) -> None:
    """Launch a kernel for all turns at once, or for one at a time where nobody waits inside of it."""
    constants = _constants(problem, config)
    grid = (_programs(problem, config),)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    alone = _interpreted() and -(-problem.hidden_size // config.block_h) > 1

    def launch(first: int, end: int, **more: Any) -> None:
        kernel[grid](*arguments, problem.batch, problem.steps, first, end, *strides, **constants, **options, **more)

    def all_turns() -> None:
        for turn in range(turns):
            launch(turn, turn + 1)

    if config.sync == "launch":
        graphs.run(all_turns, (kernel.__name__, problem, config, *strides), arguments)
    elif alone:
        # The interpreter runs programs one after another, and the first would wait for the others forever.
        all_turns()
    else:
        # Cooperative: a grid that cannot run all at once fails here instead of waiting forever.
        launch(0, turns, launch_cooperative_grid=True)


def _constants(problem: Problem, config: Config, *, wide: bool = False) -> dict[str, Any]:
    return {
        "H": problem.hidden_size,
        "DIRECTIONS": problem.directions,
        "BLOCK_B": config.block_b,
        "BLOCK_H": config.block_h,
        "BLOCK_K": config.block_k,
        "GROUP": config.group,
        "SPLIT": config.split,
        "SYNC": config.sync,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "STAGES": config.num_stages,
        "WIDE": wide,
    }


def _programs(problem: Problem, config: Config) -> int:
    return problem.directions * -(-problem.batch // config.block_b) * -(-problem.hidden_size // config.block_h)


def _counters(problem: Problem, config: Config, like: Tensor) -> Tensor | None:
    """A zero for each group of programs that wait for each other, each in a cache line of its own."""
    if config.sync != "barrier":
        return None
    groups = problem.directions * -(-problem.batch // config.block_b)
    return torch.zeros(groups * COUNTER_STRIDE, dtype=torch.int32, device=like.device)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _held(problem: Problem, *, backward: bool) -> list[Config]:
    """All configurations that keep the weights on chip."""
    multiprocessors = problem.multiprocessors or H200[0]
    found = []
    for block_h, block_b, num_warps in itertools.product((8, 16, 32, 64), (8, 16, 32, 64), (4, 8, 16)):
        if block_h > 8 and block_h >= 2 * problem.hidden_size or block_b > 8 and block_b >= 2 * problem.batch:
            continue
        for split in (1, num_warps):
            block_k, chunks = _blocks(problem, split, backward=backward)
            for group in {chunks, -(-chunks // 2), 1}:
                config = Config(block_b, block_h, block_k, group, split, "barrier", num_warps)
                if _programs(problem, config) <= multiprocessors and _fits(problem, config, backward=backward):
                    found += [config, Config(block_b, block_h, block_k, group, split, "poll", num_warps)]
    return found


def _streamed(problem: Problem, *, backward: bool) -> list[Config]:
    """Configurations that read the weights anew at every step; these need no room for them and any number of programs."""
    size = problem.dtype.itemsize
    rows = triton.next_power_of_2(min(max(problem.batch, 16), 128))
    units = 16 if problem.batch >= 16 else 8
    return [
        Config(min(rows, 64), units * (2 if backward else 1), 256 // size, 1, 1, "launch", 4, 4),
        Config(min(rows, 64), units, 128 // size, 1, 1, "launch", 4, 4),
        Config(rows, 32, 128 // size, 1, 1, "launch", 8, 3),
    ]


def _blocks(problem: Problem, split: int, *, backward: bool) -> tuple[int, int]:
    """Size and number of the blocks of the sum: as large as possible with the least padding."""
    length = problem.hidden_size * (4 if backward else 1)
    sizes = [size for size in (1024, 512, 256, 128, 64, 32, 16) if size >= 16 * split]
    block_k = min(sizes, key=lambda size: (-(-length // size) * size, -size))
    return block_k, -(-length // block_k)


def _fits(problem: Problem, config: Config, *, backward: bool) -> bool:
    """Whether the weights and what comes beside them fit into registers and shared memory, by estimate."""
    return True


def _step_us(problem: Problem, config: Config, backward: bool) -> float:
    """Estimate of a step's time: good for an order of candidates, nothing else."""
    return 0.0
