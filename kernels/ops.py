"""The recurrence as operators of torch: what autograd, autocast, torch.compile and torch.export see of the kernels.

`lstm_forward` and `lstm_backward` are opaque; which kernel runs inside is `kernels.dispatch`'s business. Products over
all steps (weight gradients) stay outside of them, in torch operations that a compiler can see. `recurrence` is what a
module calls: the operator, or in plain eager code the same functions without torch's dispatcher in between.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch
from .common.fast_path import DEVICES, autocast_dtype, unwatched
from .common.recurrence import NO_DOUBLE_BACKWARD, Backward, Forward, LayerOptions, state_dtype
from .common.transforms import batched, looped, over_batched, transformed
from .operands import Outputs, check_backward, check_forward, empty_gradients, outputs, read, rows, time_first
from .weight_gradient import weight_gradient

#: Of the operators: the package that brings them, so that a checkout and an installation may meet in one process.
NAMESPACE = str(__package__)


def recurrence(
    gates_input: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    options: LayerOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm_forward` by the shortest way there is; keeps what a backward pass needs where one can follow.

    An operator written in Python costs tens of microseconds a call on its way through torch's dispatcher, as much as
    a short sequence takes on a GPU. So where nothing intercepts operators (compiler, tracer, a mode or a subclass of
    Tensor), the same host code is called directly, on tensors that are cast as autocast would.

    Returns:
        Output, h_n and c_n, as `lstm_forward` does for the same arguments.
    """
    batch_first, implementation, tf32 = options.batch_first, options.implementation, options.tf32
    tensors = [value for value in (gates_input, weight_hh, h0, c0, lengths, resets) if value is not None]
    save = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    run: Any = _Recurrence.apply if save else _run_forward
    if not unwatched(tensors, autocast=True):
        _refuse_tangents(tensors)
        if not transformed():
            output, h_n, c_n, _, _ = lstm_forward(
                gates_input, weight_hh, h0, c0, lengths, batch_first, save, implementation, tf32, resets
            )
            return output, h_n, c_n
        # The operator's own gradients are of a kind that torch.func cannot see into. And they may be asked for at a
        # level that `requires_grad` does not show here.
        save, run = torch.is_grad_enabled(), _Recurrence.apply
    dtype = autocast_dtype(gates_input.device)
    cast = _cast(dtype, gates_input, weight_hh, h0, c0)
    with contextlib.nullcontext() if dtype is None else _without_autocast(gates_input.device.type):
        output, h_n, c_n, _, _ = run(*cast, lengths, batch_first, save, implementation, tf32, resets)
    return output, h_n, c_n


def _refuse_tangents(tensors: Iterable[Tensor]) -> None:
    """Raise for forward-mode gradients, which torch would drop without a message: operators have no rule for them."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:  # noqa: SLF001
        return
    if any(forward_ad.unpack_dual(value).tangent is not None for value in tensors):
        msg = "kernels.LSTM has no forward-mode gradients (jvp); use torch.nn.LSTM, on a CPU with oneDNN disabled"
        raise NotImplementedError(msg)


def _run_forward(
    gates_input: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
    save: bool,
    implementation: str,
    tf32: bool,
    resets: Tensor | None = None,
) -> Outputs:
    """Run one layer's recurrence in one direction or both.

    Args:
        gates_input: `x @ weight_ih.T + bias_ih + bias_hh`, (batch, steps, directions, 4 * hidden_size) if
            `batch_first`, else (steps, batch, directions, 4 * hidden_size); gates in the order i, f, g, o.
        weight_hh: (directions, 4 * hidden_size, hidden_size).
        h0: (directions, batch, hidden_size); zeros when None.
        c0: the same, float32 (float64 for float64 gates).
        lengths: (batch,) int32 on the same device, each at most the steps; all steps when None.
        batch_first: order of the first two dimensions of `gates_input` and of the output.
        save: keep what the backward pass needs.
        implementation: a name of `kernels.dispatch`, or `auto`.
        tf32: whether float32 products may round their factors to TF32.
        resets: (directions, steps, batch) bool on the same device: steps before which h and c of a row become zero
            (`kernels.common.recurrence.resets_of`); nowhere when None.

    Returns:
        output (batch, steps, directions * hidden_size), or with steps first; h and c of the last steps, each
        (directions, batch, hidden_size), c float32; then gates (steps, batch, directions, 4 * hidden_size) and cells
        (steps, batch, directions, hidden_size), both empty unless `save`.
    """
    check_forward(gates_input, weight_hh, h0, c0, lengths, resets, batch_first)
    output, h_n, c_n, gates, cells = outputs(gates_input, weight_hh, batch_first, save)
    args = Forward(
        gates_input=read(gates_input, batch_first),
        weight_hh=weight_hh.contiguous(),
        h0=None if h0 is None else h0.contiguous(),
        c0=None if c0 is None else c0.contiguous(),
        lengths=None if lengths is None else lengths.contiguous(),
        output=time_first(output.unflatten(2, (weight_hh.size(0), -1)), batch_first),
        h_n=h_n,
        c_n=c_n,
        gates=gates if save else None,
        cells=cells if save else None,
        tf32=tf32,
        resets=None if resets is None else resets.contiguous(),
    )
    # Nothing to write, and no kernel takes an empty grid.
    if h_n.numel():
        dispatch.forward(args, implementation)
    return output, h_n, c_n, gates, cells


lstm_forward = torch.library.custom_op(f"{NAMESPACE}::lstm_forward", _run_forward, mutates_args=())


@lstm_forward.register_fake
def _(gates_input: Tensor, weight_hh: Tensor, *others: Any) -> Outputs:
    _, _, _, batch_first, save, *_ = others
    return outputs(gates_input, weight_hh, batch_first, save)


def _run_backward(
    grad_output: Tensor,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    c0: Tensor | None,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    batch_first: bool,
    implementation: str,
    tf32: bool,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lstm_forward` along the recurrence; shapes as there.

    Returns:
        Gradients of `gates_input` (zero past the lengths), of h0 and of c0.
    """
    check_backward(grad_output, grad_h_n, grad_c_n, weight_hh, c0, lengths, resets, gates, cells, batch_first)
    grad_gates, grad_h0, grad_c0 = empty_gradients(gates, cells, batch_first)
    args = Backward(
        weight_hh=weight_hh.contiguous(),
        c0=None if c0 is None else c0.contiguous(),
        lengths=None if lengths is None else lengths.contiguous(),
        gates=rows(gates),
        cells=rows(cells),
        grad_output=read(grad_output.unflatten(2, (weight_hh.size(0), -1)), batch_first),
        grad_h_n=None if grad_h_n is None else grad_h_n.contiguous(),
        grad_c_n=None if grad_c_n is None else grad_c_n.contiguous(),
        grad_gates=time_first(grad_gates, batch_first),
        grad_h0=grad_h0,
        grad_c0=grad_c0,
        tf32=tf32,
        resets=None if resets is None else resets.contiguous(),
    )
    if grad_h0.numel():
        dispatch.backward(args, implementation)
    return grad_gates, grad_h0, grad_c0


lstm_backward = torch.library.custom_op(f"{NAMESPACE}::lstm_backward", _run_backward, mutates_args=())


@lstm_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gates, cells, batch_first = arguments[6:9]
    return empty_gradients(gates, cells, batch_first)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight_hh, h0, c0, lengths, batch_first, save, implementation, tf32, resets = inputs
    out, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.save_for_backward(weight_hh, h0, c0, lengths, resets, out, gates, cells)
    ctx.save, ctx.options = save, (batch_first, implementation, tf32)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, *_: Any) -> Any:
    """Gradients of `lstm_forward`'s arguments: along the recurrence by its operator, of weights as products."""
    if not ctx.save:
        msg = "lstm_forward ran with save=False, which keeps nothing for a backward pass; pass save=True"
        raise RuntimeError(msg)
    given = (grad_output, grad_h_n, grad_c_n)
    many = not torch.compiler.is_compiling() and batched(given)
    run: Any = functools.partial(over_batched, _gradients) if many else _gradients
    found = run(*given, *ctx.saved_tensors, ctx.options, ctx.needs_input_grad[1])
    return *found, None, None, None, None, None, None


def _gradients(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    options: tuple[bool, str, bool],
    weight_needs: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of gates_input, weight_hh, h0 and c0, as far as they are there and needed.

    `options` are batch_first, implementation and tf32.
    """
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    # With create_graph, gradients are enabled here, and the operator's own backward says that there is none.
    given = [grad for grad in (grad_output, grad_h_n, grad_c_n) if grad is not None]
    direct = not torch.is_grad_enabled() and unwatched([*given, weight_hh, gates])
    run: Any = _RecurrenceGradients.apply if transformed() else _run_backward if direct else lstm_backward
    grad_gates, grad_h0, grad_c0 = run(
        grad_output, grad_h_n, grad_c_n, weight_hh, c0, lengths, gates, cells, *options, resets
    )
    grad_weight = None
    if weight_needs:
        outputs_of = output.unflatten(2, (weight_hh.size(0), -1))
        grad_weight = weight_gradient(grad_gates, outputs_of, h0, lengths, resets, options[0])
    return grad_gates, grad_weight, None if h0 is None else grad_h0, None if c0 is None else grad_c0


lstm_forward.register_autograd(_backward, setup_context=_setup_context)


class _Recurrence(torch.autograd.Function):
    """`lstm_forward` with its gradients, without the dispatcher, and for torch.func."""

    forward = staticmethod(_run_forward)
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """Run each slice by itself."""
        return looped(_Recurrence.apply, info, in_dims, *arguments)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    del ctx, grads
    raise NotImplementedError(NO_DOUBLE_BACKWARD)


lstm_backward.register_autograd(_no_double_backward)


class _RecurrenceGradients(torch.autograd.Function):
    """`lstm_backward` for torch.func and batched gradients."""

    forward = staticmethod(_run_backward)
    backward = staticmethod(_no_double_backward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: there are no gradients of gradients."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        """Run each slice by itself."""
        return looped(_RecurrenceGradients.apply, info, in_dims, *arguments)


def _under_autocast(
    device: str,
    gates_input: Tensor,
    weight_hh: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    lengths: Tensor | None,
    *options: Any,
) -> Any:
    """Autocast's rule: gates, weights and h in its type, the cell state in float32; float64 stays as it is.

    `torch.library.register_autocast` has one type for all tensors, fixed beforehand; hence this.
    """
    cast = _cast(torch.get_autocast_dtype(device), gates_input, weight_hh, h0, c0)
    with _without_autocast(device):
        return getattr(torch.ops, NAMESPACE).lstm_forward(*cast, lengths, *options)


def _without_autocast(device: str) -> Any:
    """A context in which calls are passed on to autograd and the kernels; torch.library does it the same way."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")  # noqa: SLF001
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))  # noqa: SLF001


def _cast(
    dtype: torch.dtype | None, gates_input: Tensor, weight_hh: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Tensors in autocast's type, the cell state in float32; as they are without autocast, and in float64."""
    if dtype is None or gates_input.dtype == torch.float64:
        return gates_input, weight_hh, h0, c0
    h0 = None if h0 is None else h0.to(dtype)
    return gates_input.to(dtype), weight_hh.to(dtype), h0, None if c0 is None else c0.to(state_dtype(dtype))


#: The rules last as long as this object.
_AUTOCAST = torch.library.Library(NAMESPACE, "FRAGMENT")
for _device in DEVICES:
    _AUTOCAST.impl("lstm_forward", functools.partial(_under_autocast, _device), f"Autocast{_device.upper()}")
