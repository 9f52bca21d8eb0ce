"""Rules for a call to bypass torch's dispatcher: the quick way, if only autograd would have seen the call there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import _C, Tensor, nn
from torch._C import _functorch
from torch.autograd import forward_ad

#: Devices for which the operators have a rule under autocast.
DEVICES = ("cpu", "cuda")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Type that autocast asks for there; None where it is off, or where the operators have no rule for it."""
    if device.type in DEVICES and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def unwatched(tensors: Sequence[Tensor], *, autocast: bool = False) -> bool:
    """Return whether no compiler, tracer, autocast, mode, transform or subclass of Tensor would see a call on these.

    Forward-mode gradients, and tensors whose memory does not hold their values, also go to the dispatcher.

    Args:
        tensors: arguments of the call, at least one.
        autocast: whether autocast is allowed to be on, because the caller casts as it would.
    """
    device = tensors[0].device
    if device.type not in DEVICES or torch.compiler.is_compiling() or intercepted():
        return False
    if not autocast and torch.is_autocast_enabled(device.type):
        return False
    for value in tensors:
        kind = type(value)
        if (kind is not Tensor and kind is not nn.Parameter) or value.is_neg() or value._is_zerotensor():  # noqa: SLF001
            return False
    return True


def exported() -> bool:
    """Return whether torch.jit.trace or torch.onnx.export records the call, to run it elsewhere."""
    return _C._get_tracing_state() is not None or torch.onnx.is_in_onnx_export()  # noqa: SLF001


def intercepted() -> bool:
    """Return whether a tracer, mode or transform would see any call; for callers that no compiler is tracing."""
    return bool(
        _C._len_torch_dispatch_stack()  # noqa: SLF001 - torch has no public name for any of these
        or _C._len_torch_function_stack()  # noqa: SLF001
        or _functorch.peek_interpreter_stack() is not None
        or _C._get_tracing_state() is not None  # noqa: SLF001
        or forward_ad._current_level >= 0  # noqa: SLF001
    )
