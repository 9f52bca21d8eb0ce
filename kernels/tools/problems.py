"""Recurrences to compare kernels with: random problems, outputs filled with NaN beforehand, truth in float64.

The tests, the check on a GPU and the tuner share them, so that a configuration is judged alike wherever it is judged.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..common.recurrence import Backward, Forward, Problem, loop_backward, loop_forward, resets_of, state_dtype
from ..gpu import graph_cache

#: Where kernels run: on the GPU if there is one, else on CPU tensors in Triton's interpreter.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Largest error, by relative norm, of outputs and of gradients against float64 on the same (rounded) inputs.
OUTPUT_ERROR = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
GRADIENT_ERROR = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
OUTPUTS = ("output", "h_n", "c_n", "gates", "cells")
GRADIENTS = ("grad_gates", "grad_h0", "grad_c0")


@dataclass(frozen=True)
class Sizes:
    """A recurrence to be filled with random numbers.

    Attributes:
        lengths: valid steps of each sequence, from 0 to `steps`; None when all fill all steps.
        state: whether h0 and c0 are given.
        batch_first: order in memory of the gates and the output.
        resets: whether rows begin anew, at about one step in three.
    """

    batch: int
    steps: int
    hidden: int
    directions: int = 1
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    state: bool = True
    batch_first: bool = False
    seed: int = 0
    resets: bool = False

    def problem(self, *, save: bool = True, tf32: bool = False) -> Problem:
        """Facts that kernels are chosen by, without any tensor."""
        masked = self.lengths is not None
        problem = Problem(
            DEVICE, self.dtype, self.batch, self.steps, self.hidden, self.directions, save, masked, tf32,
            resets=self.resets,
        )  # fmt: skip
        if DEVICE != "cuda":
            return problem
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return dataclasses.replace(
            problem,
            capability=10 * properties.major + properties.minor,
            multiprocessors=properties.multi_processor_count,
        )

    def forward(self, *, save: bool = True, tf32: bool = False) -> Forward:
        """The problem on `DEVICE`, every output full of NaN, what stands past the lengths NaN as well."""
        generator = torch.Generator().manual_seed(self.seed)
        wide = state_dtype(self.dtype)

        def normal(*shape: int, dtype: torch.dtype = self.dtype, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)

        state = (self.directions, self.batch, self.hidden)
        gates_input = self._memory(normal(self.steps, self.batch, self.directions, 4 * self.hidden))
        lengths = None
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
            gates_input[torch.arange(self.steps, device=DEVICE)[:, None] >= lengths] = float("nan")
        resets = None
        if self.resets:
            begins = torch.rand(self.steps, self.batch, generator=torch.Generator().manual_seed(self.seed)) < 0.3  # noqa: PLR2004
            resets = resets_of(begins.to(DEVICE), lengths, self.directions)
        return Forward(
            gates_input=gates_input,
            weight_hh=normal(self.directions, 4 * self.hidden, self.hidden, scale=self.hidden**-0.5),
            h0=normal(*state, scale=0.5) if self.state else None,
            c0=normal(*state, dtype=wide) if self.state else None,
            lengths=lengths,
            output=self._memory(_nan(self.dtype, self.steps, self.batch, self.directions, self.hidden)),
            h_n=_nan(self.dtype, *state),
            c_n=_nan(wide, *state),
            gates=_nan(self.dtype, self.steps, self.batch, self.directions, 4 * self.hidden) if save else None,
            cells=_nan(wide, self.steps, self.batch, self.directions, self.hidden) if save else None,
            tf32=tf32,
            resets=resets,
        )

    def backward(self, forward: Forward, *, final: bool = True) -> Backward:
        """Random gradients for a forward pass that has run, NaN past the lengths; those of h_n and c_n on request."""
        if forward.gates is None or forward.cells is None:
            msg = "a backward pass needs gates and cells: build the forward pass with save=True"
            raise ValueError(msg)
        generator = torch.Generator().manual_seed(self.seed + 1)
        wide = state_dtype(self.dtype)
        state = (self.directions, self.batch, self.hidden)
        shape = (self.steps, self.batch, self.directions, self.hidden)
        grad_output = self._memory(torch.randn(shape, generator=generator).to(self.dtype).to(DEVICE))
        if forward.lengths is not None:
            grad_output[torch.arange(self.steps, device=DEVICE)[:, None] >= forward.lengths] = float("nan")
        return Backward(
            weight_hh=forward.weight_hh,
            c0=forward.c0,
            lengths=forward.lengths,
            gates=forward.gates,
            cells=forward.cells,
            grad_output=grad_output,
            grad_h_n=torch.randn(state, generator=generator).to(self.dtype).to(DEVICE) if final else None,
            grad_c_n=torch.randn(state, generator=generator).to(wide).to(DEVICE) if final else None,
            grad_gates=self._memory(_nan(self.dtype, self.steps, self.batch, self.directions, 4 * self.hidden)),
            grad_h0=_nan(self.dtype, *state),
            grad_c0=_nan(wide, *state),
            tf32=forward.tf32,
            resets=forward.resets,
        )

    def _memory(self, value: Tensor) -> Tensor:
        """Return the values in memory with the batch first, if asked for."""
        return value.transpose(0, 1).contiguous().transpose(0, 1) if self.batch_first else value


def _nan(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def _wide(args: Any) -> Any:
    """A copy of the arguments in float64, outputs included."""
    return dataclasses.replace(
        args,
        **{
            field.name: value.to(torch.float64)
            for field in dataclasses.fields(args)
            if isinstance(value := getattr(args, field.name), Tensor) and value.is_floating_point()
        },
    )


def limit(name: str, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Largest error allowed of an output or gradient; TF32 keeps as many bits as float16 does."""
    errors = GRADIENT_ERROR if name in GRADIENTS else OUTPUT_ERROR
    return errors[torch.float16 if tf32 and dtype == torch.float32 else dtype]


def errors_forward(
    sizes: Sizes, kernel: ModuleType | Any, *, save: bool = True, tf32: bool = False, **options: Any
) -> dict[str, float]:
    """Run `kernel.forward` on a problem; error of each output by name. Gates count only within the lengths."""
    args = sizes.forward(save=save, tf32=tf32)
    truth = _wide(sizes.forward(save=save))
    loop_forward(truth)
    kernel.forward(args, **options)
    return {
        name: _error(getattr(args, name), getattr(truth, name), args.lengths, name)
        for name in OUTPUTS[: 5 if save else 3]
    }


def errors_backward(
    sizes: Sizes, kernel: ModuleType | Any, *, final: bool = True, tf32: bool = False, **options: Any
) -> dict[str, float]:
    """Run `kernel.backward` after a right forward pass; error of each gradient by name."""
    forward = sizes.forward(tf32=tf32)
    loop_forward(forward)
    args = sizes.backward(forward, final=final)
    truth = _wide(args)
    loop_backward(truth)
    kernel.backward(args, **options)
    return {name: _error(getattr(args, name), getattr(truth, name), args.lengths, name) for name in GRADIENTS}


def _error(value: Tensor, truth: Tensor, lengths: Tensor | None, name: str) -> float:
    """Norm of the difference over the norm of truth; infinite where a value is not finite.

    Truth counts as at least 0.1 an element, a third of what it usually is: one number may come out as nearly zero by
    chance, and an error over that says nothing.
    """
    if name == "gates" and lengths is not None:
        inside = (torch.arange(value.size(0), device=value.device)[:, None] < lengths)[:, :, None, None]
        if not value.isfinite().all():
            return float("inf")
        value, truth = torch.where(inside, value, 0.0), torch.where(inside, truth, 0.0)
    difference = (value.double() - truth.double()).norm().item()
    if difference != difference:  # noqa: PLR0124 - only NaN differs from itself
        return float("inf")
    return float(difference / max(truth.norm().item(), 0.1 * max(truth.numel(), 1) ** 0.5))


@contextlib.contextmanager
def configured(asked: Callable[[Problem, str, bool], Any]) -> Iterator[None]:
    """Have `kernels.dispatch` take other configurations than its own.

    Args:
        asked: gives the configuration for a problem, an implementation and whether it is the backward pass; None for
            that of `kernels.dispatch`.
    """
    chosen = dispatch.choose_config

    def choose(problem: Problem, implementation: str, *, backward: bool) -> Any:
        config = asked(problem, implementation, backward)
        return chosen(problem, implementation, backward=backward) if config is None else config

    dispatch.choose_config = choose
    # Their keys do not name the configuration.
    graph_cache.clear()
    try:
        yield
    finally:
        dispatch.choose_config = chosen
        graph_cache.clear()
