"""A recurrence of nothing but what no grid can be without: how many steps per second this GPU can take at best.

Programs share a hidden state as those of `persistent.py` do, with the same weights on chip, the same exchange and the
same product, but without gates, input and results. What is left out part by part shows what a step's time goes to:
`barrier`, all programs meet; `exchange`, each also writes its part of h and reads all of it through the second-level
cache; `product`, it also multiplies what it read by its weights. No kernel that exchanges h in this way is faster.

It is for measuring. No GPU has run it yet; it was compiled ahead of time, and its values are those of the interpreter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.recurrence import Problem, on_device
from .grid_exchange import arrive, column, held_weights, load_rows, product, wait
from .launch import Launch
from .persistent import BITS, COUNTER_STRIDE, alone
from .persistent_configs import DTYPES, PersistentConfig, configs, programs

PARTS = ("barrier", "exchange", "product")


@triton.jit(do_not_specialize=["first", "end"])
def step_kernel(
    p_weight, p_state, p_last, p_counters, batch, first, end, stride_t,
    H: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SPLIT: tl.constexpr, PART: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Steps from `first` to before `end` of one hidden tile of one batch tile.

    `p_state` has h before each step and after the last, (steps + 1, batch, H), as integers of h's width; what is before
    the first is given. After `exchange` h is half of itself and half of its row's mean; after `product` it is the sum
    of what the four gates' weights give; after `barrier` it is what it was. `p_last` gets h after the last step.
    """
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    BITS: tl.constexpr = p_state.dtype.element_ty
    group = tl.program_id(0) // TILES
    o_h = (tl.program_id(0) % TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_b = group * BLOCK_B + tl.arange(0, BLOCK_B)
    in_b = o_b < batch
    inside = in_b[:, None] & (o_h < H)[None, :]
    o_own = o_b[:, None] * H + o_h[None, :]
    if PART == "product":
        o_row = tl.arange(0, 4 * BLOCK_H)
        o_unit = (tl.program_id(0) % TILES) * BLOCK_H + o_row % BLOCK_H
        p_rows_weight = column(p_weight + ((o_row // BLOCK_H) * H + o_unit).to(tl.int64) * H, SPLIT)
        weights = held_weights(p_rows_weight, column(o_unit < H, SPLIT), 1, K=H, BLOCK_K=BLOCK_K, SPLIT=SPLIT)
    if first > 0:
        b_h = tl.load(p_last + o_own, mask=inside, other=0.0)
    else:
        b_h = tl.load(p_state + o_own, mask=inside, other=0).to(DTYPE, bitcast=True)

    position = first
    while position < end:
        wait(p_counters + group * 32, position * TILES)
        if PART != "barrier":
            p_step = p_state + position.to(tl.int64) * stride_t
            p_rows, in_rows = column(p_step + o_b * H, SPLIT), column(in_b, SPLIT)
            if PART == "product":
                b_sum = product(
                    weights, p_rows, in_rows, False, M=4 * BLOCK_H, N=BLOCK_B, K=H, BLOCK_K=BLOCK_K, GROUP=GROUP,
                    SPLIT=SPLIT, POLL=False, DTYPE=DTYPE, PRECISION=PRECISION, NATIVE=NATIVE,
                )  # fmt: skip
                b_h = tl.sum(tl.reshape(b_sum, [BLOCK_B, 4, BLOCK_H]), 1).to(DTYPE)
            else:
                # One sum over the row at the end: each goes through shared memory and a barrier of the block.
                if SPLIT == 1:
                    b_all = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
                else:
                    b_all = tl.zeros([SPLIT, BLOCK_B, BLOCK_K // SPLIT], tl.float32)
                for chunk in tl.static_range(0, (H + BLOCK_K - 1) // BLOCK_K):
                    chunks = load_rows(p_rows, in_rows, chunk, 1, H, BLOCK_K, SPLIT, False)
                    b_all += chunks[0].to(DTYPE, bitcast=True).to(tl.float32)
                b_row = tl.sum(b_all, 1) if SPLIT == 1 else tl.sum(tl.sum(b_all, 2), 0)
                b_h = (0.5 * b_h.to(tl.float32) + (0.5 / H) * b_row[:, None]).to(DTYPE)
            tl.store(p_step + stride_t + o_own, b_h.to(BITS, bitcast=True), mask=inside)
        arrive(p_counters + group * 32)
        position += 1
    tl.store(p_last + o_own, b_h, mask=inside)


def limit_problem(batch: int, hidden: int, dtype: torch.dtype, device: torch.device | str) -> Problem:
    """The recurrence whose programs, tiles and weights are taken: two steps, since one has nothing to wait for."""
    where = torch.device(device)
    return on_device(Problem(where.type, dtype, batch, 2, hidden), where)


def limit_config(problem: Problem) -> PersistentConfig | None:
    """The first configuration with a barrier; None where the weights do not fit on this GPU."""
    return next((one for one in configs(problem, backward=False) if one.sync == "barrier"), None)


def run(part: str, weight: Tensor, start: Tensor, steps: int, config: PersistentConfig) -> Tensor:
    """Take `steps` steps.

    Args:
        part: of `PARTS`.
        weight: (4H, H) contiguous.
        start: h before the first step, (batch, H) contiguous, of the same type and device.
        steps: number of steps.
        config: with a barrier; all its programs must fit on the GPU at once.

    Returns:
        h after the last, (batch, H).
    """
    batch, hidden = start.shape
    problem = limit_problem(batch, hidden, start.dtype, start.device)
    state = torch.empty(steps + 1, batch, hidden, dtype=start.dtype, device=start.device)
    state[0] = start
    last = torch.empty_like(start)
    groups = -(-batch // config.block_b)
    counters = torch.zeros(groups * COUNTER_STRIDE, dtype=torch.int32, device=start.device)
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": 1, "launch_cooperative_grid": True}
    # The interpreter runs programs one after another: there each step is a launch.
    ends = range(1, steps + 1) if alone(problem, config) else (steps,)
    first = 0
    for end in ends:
        step_kernel[(programs(problem, config),)](
            weight, state.view(BITS[start.dtype]), last, counters, batch, first, end, batch * hidden,
            **_constants(problem, config, part), **options,
        )  # fmt: skip
        first = end
    return last


def limit_launch(part: str, problem: Problem, config: PersistentConfig) -> Launch:
    """Launch of `run`, for the ahead-of-time compiler."""
    dtype, bits = f"*{DTYPES[problem.dtype]}", f"*i{torch.iinfo(BITS[problem.dtype]).bits}"
    constants = _constants(problem, config, part)
    types = {"p_weight": dtype, "p_state": bits, "p_last": dtype, "p_counters": "*i32"}
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in step_kernel.arg_names}
    return Launch(step_kernel, signature, constants, programs(problem, config), config.num_warps, 1, cooperative=True)


def _constants(problem: Problem, config: PersistentConfig, part: str) -> dict[str, Any]:
    kept = ("block_b", "block_h", "block_k", "group", "split")
    return {name.upper(): value for name, value in dataclasses.asdict(config).items() if name in kept} | {
        "H": problem.hidden_size,
        "PART": part,
        "PRECISION": "tf32" if problem.tf32 else "ieee",
        "NATIVE": problem.device == "cuda",
    }
