"""Which kernel runs a recurrence, and why another does not."""

from __future__ import annotations

import importlib
from typing import Any

from kernels.recurrence import Backward, Forward, loop_backward, loop_forward

#: Modules that bring a kernel: `forward(args)` and `backward(args)`.
MODULES = {"cell": "kernels.gpu.cell", "sequence": "kernels.gpu.sequence", "persistent": "kernels.gpu.persistent"}


def forward(args: Forward, implementation: str) -> None:
    """Run a forward recurrence."""
    if implementation in {"loop", "auto"}:
        loop_forward(args)
    else:
        _module(implementation).forward(args)


def backward(args: Backward, implementation: str) -> None:
    """Run a backward recurrence."""
    if implementation in {"loop", "auto"}:
        loop_backward(args)
    else:
        _module(implementation).backward(args)


def _module(implementation: str) -> Any:
    return importlib.import_module(MODULES[implementation])
