"""Precision of cuDNN's float32 arithmetic, set so that torch's older switch for it stays readable.

torch has a switch for each kind of operator and an older one for all (`torch.backends.cudnn.allow_tf32`, which
`torch.backends.cudnn.flags` reads). Where they disagree, reading the older one raises RuntimeError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

#: Operators of cuDNN that have a switch each.
_OPERATORS = ("rnn", "conv")


def lstm_precision() -> str:
    """Precision of cuDNN's LSTM in float32: `tf32`, `ieee` or `none`, which is `ieee` too.

    Does not use `torch.backends.cudnn.rnn.fp32_precision`: in some builds, a module of that name hides it once
    imported.
    """
    return str(torch._C._get_fp32_precision_getter("cuda", "rnn"))  # noqa: SLF001 - what torch's own property calls


def wanted_precision(dtype: torch.dtype, *, tf32: bool) -> str:
    """Precision that cuDNN must be set to for an LSTM of a type.

    `ieee` forbids tensor cores for bfloat16 as well (`RNNDescriptor::set` in ATen's native/cudnn), so only float32
    without TF32 asks for it.
    """
    return "ieee" if dtype == torch.float32 and not tf32 else "tf32"


@contextlib.contextmanager
def cudnn_precision(precision: str) -> Iterator[None]:
    """Set what cuDNN may do in float32 inside the block: `tf32` or `ieee`; without a GPU too."""
    before = [torch._C._get_fp32_precision_getter("cuda", operator) for operator in _OPERATORS]  # noqa: SLF001
    older = _older_switch()
    torch._C._set_cudnn_allow_tf32(precision == "tf32")  # noqa: SLF001 - what `torch.backends.cudnn.allow_tf32` calls
    for operator in _OPERATORS:
        torch._C._set_fp32_precision_setter("cuda", operator, precision)  # noqa: SLF001
    try:
        yield
    finally:
        torch._C._set_cudnn_allow_tf32(older)  # noqa: SLF001
        for operator, value in zip(_OPERATORS, before, strict=True):
            torch._C._set_fp32_precision_setter("cuda", operator, value)  # noqa: SLF001


def _older_switch() -> bool:
    """The older switch. It can be read only where all agree, so the others are set to TF32 if they do not."""
    with contextlib.suppress(RuntimeError):
        return bool(torch._C._get_cudnn_allow_tf32())  # noqa: SLF001
    for operator in _OPERATORS:
        torch._C._set_fp32_precision_setter("cuda", operator, "tf32")  # noqa: SLF001
    with contextlib.suppress(RuntimeError):
        return bool(torch._C._get_cudnn_allow_tf32())  # noqa: SLF001
    return False
