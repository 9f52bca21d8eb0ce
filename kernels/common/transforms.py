"""Support for torch.func and batched gradients: the kernels run as a loop over the slices that vmap brings.

No kernel has a batched form, and each slice is a whole problem of its own, so nothing is lost by the loop. torch has
two kinds of vmap: that of torch.func, which asks an autograd.Function for a rule, and an older one behind
`torch.autograd.grad(is_grads_batched=True)`, which asks for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .recurrence import NO_DOUBLE_BACKWARD


def transformed() -> bool:
    """Return whether a transform of torch.func sees the calls made here; false while compiling."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001


def looped(function: Callable[..., Any], info: Any, dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
    """Serve as the `vmap` rule of an autograd.Function: one call for each slice.

    Args:
        function: `apply` of that autograd.Function; returns tensors and None.
        info: as torch.autograd.Function.vmap is given it.
        dims: of each argument the batched dimension, or None.
        arguments: those of the function.

    Returns:
        Its results, stacked in dimension 0, and for each of them 0, or None where there is no tensor.

    Raises:
        ValueError: for no slices.
    """
    if not info.batch_size:
        msg = "kernels.LSTM cannot run under vmap over zero elements, which have no shapes"
        raise ValueError(msg)
    results = _each(function, info.batch_size, dims, arguments)
    return results, tuple(None if value is None else 0 for value in results)


def batched(gradients: Sequence[Tensor | None]) -> bool:
    """Return whether any of a backward pass's gradients is batched by the older vmap, which hides their memory."""
    return any(
        value is not None and torch._C._functorch.is_legacy_batchedtensor(value)  # noqa: SLF001
        for value in gradients
    )


def over_batched(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ...]:
    """Call a function once for each slice of the tensors that the older vmap batches.

    Args:
        function: takes plain tensors; returns tensors and None.
        arguments: its arguments, at least one of them a batched tensor.

    Returns:
        Its results, batched in the same way.
    """
    # The nesting level in force, which torch returns only when it changes.
    level = torch._C._vmapmode_increment_nesting() - 1  # noqa: SLF001
    torch._C._vmapmode_decrement_nesting()  # noqa: SLF001
    dims = [0 if isinstance(value, Tensor) and batched([value]) else None for value in arguments]
    plain = [
        value if dim is None else torch._remove_batch_dim(value, level, 0, 0)  # noqa: SLF001
        for value, dim in zip(arguments, dims, strict=True)
    ]
    size = next(value.size(0) for value, dim in zip(plain, dims, strict=True) if dim is not None)
    results = _each(function, size, dims, plain)
    return tuple(
        None if value is None else torch._add_batch_dim(value, 0, level)  # noqa: SLF001
        for value in results
    )


def gradients_of(
    function: Callable[..., Any], gradients: Sequence[Tensor | None], *arguments: Any
) -> tuple[Tensor | None, ...]:
    """Call what computes a layer's gradients, whatever vmap is around, and refuse gradients of them.

    Args:
        function: takes the gradients and the arguments; returns tensors and None.
        gradients: that a backward pass was given.
        arguments: what follows them.
    """
    run = function
    # Only where gradients of these gradients may be asked for does somebody have to refuse them.
    if torch.is_grad_enabled() or transformed():
        run = functools.partial(_LastGradients.apply, function)
    found: tuple[Tensor | None, ...]
    found = over_batched(run, *gradients, *arguments) if batched(gradients) else run(*gradients, *arguments)
    return found


class _LastGradients(torch.autograd.Function):
    """A function whose results have no gradients; it is the first argument."""

    @staticmethod
    def forward(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        del ctx, grads
        raise NotImplementedError(NO_DOUBLE_BACKWARD)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return looped(_LastGradients.apply, info, in_dims, *arguments)


def _each(
    function: Callable[..., Any], size: int, dims: Sequence[int | None], arguments: Sequence[Any]
) -> tuple[Tensor | None, ...]:
    """Results of a function for each slice, stacked in dimension 0."""
    slices = [
        function(
            *(value if dim is None else value.select(dim, index) for value, dim in zip(arguments, dims, strict=True))
        )
        for index in range(size)
    ]
    return tuple(None if values[0] is None else torch.stack(values) for values in zip(*slices, strict=True))
