"""A GEMM of torch and one pointwise kernel per time step: the way that serves every shape.

The kernels do what is left of a step after its product: gates, cell state, hidden state, and their derivatives; both
directions of a layer take their step in the same launch. All launches of a sequence are replayed as one CUDA graph
where the same memory comes back (`kernels.gpu.graph_cache`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.recurrence import Backward, Forward, Problem
from . import graph_cache as graphs
from .cell_kernels import backward_kernel, forward_kernel
from .launch import Launch
from .product_settings import product_settings

#: Triton's names of the types that are served.
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class CellConfig:
    """A tile of one program: `block_batch` sequences by `block_hidden` units, powers of two."""

    block_batch: int
    block_hidden: int
    num_warps: int


def refuses(problem: Problem, *, backward: bool) -> str | None:
    """Reason why this cannot serve a problem; None when it can."""
    del backward
    if problem.dtype not in TYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        return f"cell kernels compute in {names}, not in {str(problem.dtype).removeprefix('torch.')}"
    if problem.device != "cuda" and isinstance(forward_kernel, triton.JITFunction):
        return f"cell kernels run on CUDA, not on {problem.device}; TRITON_INTERPRET=1 runs them slowly without a GPU"
    if min(problem.batch, problem.steps, problem.hidden_size) < 1:
        sizes = f"batch {problem.batch}, steps {problem.steps}, hidden size {problem.hidden_size}"
        return f"cell kernels need at least one sequence, step and unit, not {sizes}"
    return None


def configs(problem: Problem, *, backward: bool) -> list[CellConfig]:
    """Tiles to choose from, best guess first: the largest that still gives every multiprocessor a program."""
    del backward
    return list(_configs(problem.batch, problem.hidden_size, problem.directions, problem.multiprocessors))


def forward(args: Forward, config: CellConfig | None = None) -> None:
    """Run a forward recurrence: at each step one product and one launch, none of them copies or clears.

    `h_n` and `c_n` hold the running states.

    Raises:
        ValueError: for a problem that `refuses` names.
    """
    problem = args.problem
    chosen = _chosen(problem, config, backward=False)
    _run(lambda: _forward_steps(args, chosen), args, problem.steps, ("cell", "forward", chosen))


def backward(args: Backward, config: CellConfig | None = None) -> None:
    """Run a backward recurrence: at each step one launch and one product; `grad_h0`, `grad_c0` hold what flows back.

    Raises:
        ValueError: for a problem that `refuses` names.
    """
    problem = args.problem
    chosen = _chosen(problem, config, backward=True)
    _run(lambda: _backward_steps(args, chosen), args, problem.steps, ("cell", "backward", chosen))


def launches(problem: Problem, config: CellConfig, *, backward: bool) -> list[Launch]:
    """The kernels of a sequence, each once: those of a middle step, and of the first step where it differs."""
    kernel = backward_kernel if backward else forward_kernel
    ends: tuple[dict[str, Any], ...]
    if backward:
        compact = problem.directions > 1 or problem.resets
        absent = {"p_carry": not problem.masked, "p_compact": not compact, "p_c0": True}
        ends = ({"FIRST": False}, {"FIRST": True})
    else:
        # A middle step reads the h before it only where it has to hold it.
        absent = {"p_hidden": not problem.masked, "p_gates": not problem.saves, "p_cells": not problem.saves}
        ends = ({}, {"p_recurrent": None, "p_hidden": None, "p_c": None})
    absent |= {"p_lengths": not problem.masked, "p_resets": not problem.resets}
    types = dict.fromkeys(("p_c", "p_c_new", "p_cells", "p_c0", "p_dc", "p_dc_new"), "*fp32")
    types |= {"p_lengths": "*i32", "p_resets": "*u8"}
    grid = _programs(problem.batch, problem.hidden_size, problem.directions, config)
    found = []
    for end in ends:
        constants = {name: None for name, gone in absent.items() if gone} | _tile(problem.hidden_size, config) | end
        signature = {
            name: "constexpr"
            if name in constants
            else types.get(name, f"*{TYPES[problem.dtype]}" if name.startswith("p_") else "i32")
            for name in kernel.arg_names
        }
        found.append(Launch(kernel, signature, constants, grid, config.num_warps, 1, cooperative=False))
    return found


@functools.lru_cache(maxsize=1024)
def _configs(batch: int, hidden: int, directions: int, multiprocessors: int) -> tuple[CellConfig, ...]:
    found: dict[CellConfig, int] = {}
    for size in (1024, 512, 256, 128, 64):
        columns = min(size, triton.next_power_of_2(hidden))
        rows = min(size // columns, triton.next_power_of_2(batch))
        # Four elements a thread: vectors of 8 or 16 bytes, and a dozen of them on their way at once.
        config = CellConfig(rows, columns, max(1, rows * columns // 128))
        found[config] = _programs(batch, hidden, directions, config)
    ordered = list(found)
    best = next((config for config in ordered if found[config] >= multiprocessors), ordered[-1])
    return best, *(config for config in ordered if config != best)


def _forward_steps(args: Forward, config: CellConfig) -> None:
    steps, batch, directions, four_hidden = args.gates_input.shape
    recurrent = args.gates_input.new_empty(directions, batch, four_hidden)
    weight, resets = args.weight_hh.transpose(1, 2), _bytes(args.resets)
    h, c = args.h0, args.c0
    for step in range(steps):
        if h is not None:
            _product(h, weight, recurrent)
        _forward_launch(
            config, step, args.gates_input, None if h is None else recurrent, h, c, args.lengths, resets, args.output,
            args.h_n, args.c_n, args.gates, args.cells,
        )  # fmt: skip
        h, c = args.h_n, args.c_n


def _forward_launch(
    config: CellConfig,
    step: int,
    gates_input: Tensor,
    recurrent: Tensor | None,
    h: Tensor | None,
    c: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    output: Tensor,
    h_new: Tensor | None,
    c_new: Tensor,
    gates: Tensor | None,
    cells: Tensor | None,
) -> None:
    steps, batch, directions, four_hidden = gates_input.shape
    hidden = four_hidden // 4
    forward_kernel[(_programs(batch, hidden, directions, config),)](
        gates_input, recurrent, h if lengths is not None else None, c, lengths, resets,
        output, h_new, c_new, gates, cells, step, steps, batch,
        *gates_input.stride()[:3], *output.stride()[:3],
        *(gates_input if gates is None else gates).stride()[:3], *(output if cells is None else cells).stride()[:3],
        **_tile(hidden, config), num_warps=config.num_warps, num_stages=1,
    )  # fmt: skip


def _backward_steps(args: Backward, config: CellConfig) -> None:
    steps, batch, directions, four_hidden = args.gates.shape
    hidden = four_hidden // 4
    resets = _bytes(args.resets)
    # Both directions are at different steps of grad_gates, which no single product could read. And where a row started
    # from zeros, the product must read zeros instead.
    apart = directions > 1 or resets is not None
    compact = args.gates.new_empty(directions, batch, four_hidden) if apart else None
    grid = (_programs(batch, hidden, directions, config),)
    dh, dc = args.grad_h_n, args.grad_c_n
    for step in range(steps - 1, -1, -1):
        backward_kernel[grid](
            args.gates, args.cells, args.c0 if step == 0 else None, args.lengths, resets, args.grad_output,
            dh, dc,
            args.grad_gates, compact, None if args.lengths is None else args.grad_h0, args.grad_c0,
            step, steps, batch,
            *args.gates.stride()[:3], *args.cells.stride()[:3],
            *args.grad_output.stride()[:3], *args.grad_gates.stride()[:3],
            FIRST=step == 0, **_tile(hidden, config), num_warps=config.num_warps, num_stages=1,
        )  # fmt: skip
        grad = args.grad_gates[step].transpose(0, 1) if compact is None else compact
        _product(grad, args.weight_hh, args.grad_h0, add=args.lengths is not None)
        dh, dc = args.grad_h0, args.grad_c0


def _bytes(resets: Tensor | None) -> Tensor | None:
    """The mask as Triton reads it: a bool of torch is a byte, one of Triton is a bit."""
    return None if resets is None else resets.view(torch.uint8)


def _product(left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Multiply for each direction into `out`, or add to it; in place, which autocast does not change."""
    if left.size(0) == 1:
        if add:
            out[0].addmm_(left[0], right[0])
        else:
            torch.mm(left[0], right[0], out=out[0])
    elif add:
        out.baddbmm_(left, right)
    else:
        torch.bmm(left, right, out=out)


def _run(launch: Callable[[], None], args: Forward | Backward, steps: int, key: tuple[Hashable, ...]) -> None:
    """Launch a sequence where its tensors are, in the precision asked for, as a graph where that is worth it."""

    def launch_all() -> None:
        with torch.no_grad(), _precision(args.weight_hh, tf32=args.tf32):
            launch()

    with _on(args.weight_hh):
        if args.weight_hh.is_cuda and 2 * steps > graphs.FEW:
            tensors = [getattr(args, field.name) for field in dataclasses.fields(args) if field.name != "tf32"]
            graphs.run(launch_all, (*key, args.tf32, *product_settings(args.weight_hh.dtype)), tensors)
        else:
            launch_all()


@contextlib.contextmanager
def _precision(weight: Tensor, *, tf32: bool) -> Iterator[None]:
    """Allow or forbid TF32 in torch's float32 products inside the block; a setting of the whole process."""
    setting: Any = torch.backends.cuda.matmul
    wanted, previous = "tf32" if tf32 else "ieee", setting.fp32_precision
    if weight.dtype != torch.float32 or not weight.is_cuda or previous == wanted:
        yield
        return
    setting.fp32_precision = wanted
    try:
        yield
    finally:
        setting.fp32_precision = previous


def _on(value: Tensor) -> contextlib.AbstractContextManager[object]:
    """A tensor's device as the current one: Triton launches there."""
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()


def _chosen(problem: Problem, config: CellConfig | None, *, backward: bool) -> CellConfig:
    reason = refuses(problem, backward=backward)
    if reason is not None:
        raise ValueError(reason)
    return configs(problem, backward=backward)[0] if config is None else config


def _tile(hidden: int, config: CellConfig) -> dict[str, int]:
    return {"HIDDEN": hidden, "BLOCK_B": config.block_batch, "BLOCK_H": config.block_hidden}


def _programs(batch: int, hidden: int, directions: int, config: CellConfig) -> int:
    return directions * -(-batch // config.block_batch) * -(-hidden // config.block_hidden)
