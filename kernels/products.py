"""Matrix products around the recurrence: by oneDNN for float32 on a CPU, else torch's own.

On a CPU torch hands float32 products to MKL, which leaves AVX-512 alone on other makes than Intel's: 97 against
217 GFLOP/s by oneDNN on a core of an AMD EPYC. torch brings oneDNN with it, and Inductor calls it by the same operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.eager import unwatched

_ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x (..., features), weight (out, features), bias (out,)."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if not _byonednn_linear(*tensors):
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        found: Tensor = _Linear.apply(x, weight, bias)
        return found
    return onednn_linear(x, weight, bias)


def transposed_product(left: Tensor, right: Tensor) -> Tensor:
    """`left.T @ right` for (rows, m) and (rows, n): (m, n), as gradients of weights are summed over all steps."""
    if torch.is_grad_enabled() or not _byonednn_linear(left, right):
        return left.t() @ right
    return onednn_linear(left.t(), right.t(), None)


def _byonednn_linear(*tensors: Tensor) -> bool:
    """Whether oneDNN's operator takes these, and nothing but autograd would miss the call to torch's own."""
    return (
        _ONEDNN
        and unwatched(tensors)
        and all(value.dtype == torch.float32 and value.device.type == "cpu" and value.numel() for value in tensors)
    )


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without gradients, float32 on a CPU: by oneDNN where torch has it."""
    if not _ONEDNN:
        return functional.linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001 - as Inductor does
    return found


class _Linear(torch.autograd.Function):
    """`linear` with its gradients, all by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, inputs = grad.reshape(-1, grad.size(-1)), x.reshape(-1, x.size(-1))
        # With a graph of its own, this pass is to be differentiated too, which torch can and oneDNN's operator cannot.
        onednn = not torch.is_grad_enabled()
        grad_x = grad_weight = None
        if needs_x:
            grad_x = onednn_linear(grad, weight.t(), None) if onednn else grad @ weight
        if needs_weight:
            grad_weight = transposed_product(rows, inputs) if onednn else rows.t() @ inputs
        return grad_x, grad_weight, rows.sum(0) if ctx.biased and needs_bias else None
