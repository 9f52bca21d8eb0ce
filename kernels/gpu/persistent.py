"""LSTM kernels in which many programs share a sequence: each holds the weights of a few hidden units for all steps.

Once a step the programs of a batch tile exchange h (forward) or the gates' gradients (backward) through the
second-level cache. `PersistentConfig.sync` says how they know that it has arrived: `barrier` counts arrivals, `poll`
reads until nothing is missing, `launch` holds no weights and makes every step a launch of its own, for sizes that do
not fit on chip. No sum is made by atomics, so two runs of one configuration give the same bits.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.recurrence import Backward, Forward, Problem
from . import graph_cache as graphs
from .grid_exchange import ABSENT
from .launch import Launch
from .persistent_backward import backward_kernel
from .persistent_configs import DTYPES, FEWER, PersistentConfig, configs, programs, refuses
from .persistent_forward import forward_kernel

#: Integers of a counter's own cache line, as the kernels step over them.
COUNTER_STRIDE = 32

#: Addresses of a thread that ptxas puts aside now and then, with registers to spare, two with Triton 3.7 and three with
#: 3.8; read from the first-level cache once a step.
STACK_BYTES = 24

#: Part of CUDA's message for a cooperative launch of more blocks than can run at once, and for one of any size where
#: the device has none (CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, which some virtual GPUs lack).
NO_ROOM, NOT_SUPPORTED = "too many blocks in cooperative launch", "Triton Error [CUDA]: operation not supported"

__all__ = ["PersistentConfig", "backward", "configs", "forward", "launches", "refuses", "withdraw"]

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def forward(args: Forward, config: PersistentConfig | None = None) -> None:
    """Run a forward recurrence."""
    problem = args.problem
    config = config or configs(problem, backward=False)[0]
    bits = BITS[problem.dtype]

    def arguments() -> tuple[list[Tensor | None], list[int]]:
        exchange = args.output.view(bits)
        if problem.masked:
            # Past a length the output is zero and h is held, so h needs rows of its own.
            exchange = torch.empty(exchange.shape, dtype=bits, device=exchange.device)
        if config.sync == "poll":
            exchange.fill_(ABSENT.value)
        tensors = [
            args.gates_input, args.weight_hh, None if args.h0 is None else args.h0.view(bits), args.c0, args.lengths,
            args.output if problem.masked else None, exchange, args.h_n, args.c_n, args.gates, args.cells,
            _counters(problem, config, args.output),
        ]  # fmt: skip
        return tensors, _strides(args.gates_input, args.output, exchange, args.gates, args.cells)

    _run(forward_kernel, args, config, arguments, problem.steps)


def backward(args: Backward, config: PersistentConfig | None = None) -> None:
    """Run a backward recurrence."""
    problem = args.problem
    config = config or configs(problem, backward=True)[0]

    def arguments() -> tuple[list[Tensor | None], list[int]]:
        grad_gates = args.grad_gates.view(BITS[problem.dtype])
        if config.sync == "poll":
            grad_gates.fill_(ABSENT.value)
        tensors = [
            args.weight_hh, args.c0, args.lengths, args.gates, args.cells, args.grad_output, args.grad_h_n,
            args.grad_c_n, grad_gates, args.grad_h0, args.grad_c0,
            # Only where the turns are launches of their own is anything held between them.
            torch.empty_like(args.grad_c0) if config.sync == "launch" or alone(problem, config) else args.grad_c0,
            _counters(problem, config, args.grad_gates),
        ]  # fmt: skip
        return tensors, _strides(args.gates, args.cells, args.grad_output, grad_gates)

    _run(backward_kernel, args, config, arguments, problem.steps + 1)


def withdraw(error: RuntimeError) -> bool:
    """Take back the configurations that wait within a launch, if an error says that their grid cannot run here.

    Nothing of such a launch has run, so the call can be made again with what `configs` offers then.

    Returns:
        Whether that is the error's reason.
    """
    reason = str(error)
    why = {
        NO_ROOM: f"this process cannot use all multiprocessors that torch reports ({reason}), as under NVIDIA's "
        "Multi-Process Service",
        NOT_SUPPORTED: f"this GPU starts no grid whose programs must run at the same time ({reason})",
    }
    found = next((text for part, text in why.items() if part in reason), None)
    if found is None:
        return False
    if not FEWER:
        FEWER.append(reason)
        message = f"{found}: from now on the persistent kernel makes every step a launch of its own"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return True


def launches(problem: Problem, config: PersistentConfig, *, backward: bool) -> list[Launch]:
    """Launches of `forward` or `backward` for a problem with initial states and a gradient of each output."""
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
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    absent = {name: None for name, kind in types.items() if kind == "constexpr"}
    return [
        Launch(
            kernel, signature, constants | absent, programs(problem, config), config.num_warps, config.num_stages,
            config.sync != "launch",
        )
    ]  # fmt: skip


def _run(
    kernel: Any,
    args: Forward | Backward,
    config: PersistentConfig,
    arguments: Callable[[], tuple[list[Tensor | None], list[int]]],
    turns: int,
) -> None:
    """Launch a kernel for all turns at once, or for one at a time where no program waits inside of it.

    Scratch memory is made by `arguments`, inside of what a graph captures, so that a graph has its own.
    """
    problem = args.problem
    in_turns = alone(problem, config)

    def launch() -> None:
        tensors, strides = arguments()
        constants = _constants(problem, config, wide=_wide(problem, config, strides))
        options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        ends = range(1, turns + 1)
        if config.sync != "launch":
            # Cooperative: a grid that cannot run all at once fails here instead of waiting forever.
            options["launch_cooperative_grid"] = True
            # The interpreter runs programs one after another, and the first would wait for the others forever.
            ends = ends if in_turns else range(turns, turns + 1)
        first = 0
        for end in ends:
            kernel[programs(problem, config),](
                *tensors, problem.batch, problem.steps, first, end, *strides, **constants, **options
            )
            first = end

    if config.sync != "launch":
        launch()
        return
    given = [getattr(args, field.name) for field in dataclasses.fields(args)]
    tensors = [value for value in given if value is None or isinstance(value, Tensor)]
    strides = tuple(value.stride() for value in tensors if value is not None)
    graphs.run(launch, (kernel.__name__, problem, config, strides), tensors)


def alone(problem: Problem, config: PersistentConfig) -> bool:
    """Return whether programs that would wait for each other run one after another: then each turn is a launch."""
    return _interpreted() and -(-problem.hidden_size // config.block_h) > 1


def _strides(*tensors: Tensor | None) -> list[int]:
    """Strides over steps, rows and directions of each; nothing is stored where there is no tensor."""
    return [stride for tensor in tensors for stride in ((0, 0, 0) if tensor is None else tensor.stride()[:3])]


def _wide(problem: Problem, config: PersistentConfig, strides: list[int]) -> bool:
    """Return whether rows times a stride passes 2**31."""
    return (problem.batch + config.block_b) * max(strides[1::3]) >= 2**31


def _constants(problem: Problem, config: PersistentConfig, *, wide: bool = False) -> dict[str, Any]:
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
        "PRECISE": problem.dtype == torch.float32 and not problem.tf32,
        "NATIVE": problem.device == "cuda",
    }


def _counters(problem: Problem, config: PersistentConfig, like: Tensor) -> Tensor | None:
    """A zero for each group of programs that wait for each other, each in a cache line of its own."""
    if config.sync != "barrier":
        return None
    groups = problem.directions * -(-problem.batch // config.block_b)
    return torch.zeros(groups * COUNTER_STRIDE, dtype=torch.int32, device=like.device)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
