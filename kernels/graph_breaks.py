"""Functions that torch.compile must not trace, with the reasons it then gives.

Imported only while something is traced: to mark a function for Dynamo is to import Dynamo, which takes as long as
torch itself and is of no use to who compiles nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from . import padded_vendor
from . import torch_lstm as vendor
from .torch_lstm import State

_VENDOR = "torch's own LSTM cannot be traced; choose another implementation of kernels.LSTM"
_PACKED = "a PackedSequence cannot be traced; give kernels.LSTM padded input and lengths"

run = torch.compiler.disable(vendor.run, reason=_VENDOR)
run_padded = torch.compiler.disable(vendor.run_padded, reason=_VENDOR)


class Padded:
    """`kernels.padded_vendor`."""

    run = staticmethod(torch.compiler.disable(padded_vendor.run, reason=_VENDOR))


@torch.compiler.disable(reason=_PACKED)  # type: ignore[untyped-decorator]
def run_packed(lstm: Any, packed: PackedSequence, hx: State | None) -> tuple[PackedSequence, State]:
    """`kernels.LSTM` on a packed sequence."""
    found: tuple[PackedSequence, State] = lstm._packed(packed, hx)  # noqa: SLF001 - its own, marked
    return found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def matmul_precision() -> str:
    """Precision of torch's own products in float32, read once, when the graph is made."""
    return str(torch.backends.cuda.matmul.fp32_precision)
