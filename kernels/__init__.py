"""LSTM kernels, the module that runs them, and the plain equations that they are checked against.

`LSTM` and `replace_lstm` are loaded when they are first asked for, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.lstm import LSTM
    from kernels.replace import replace_lstm

__all__ = ["LSTM", "replace_lstm"]

_HOMES = {"LSTM": "kernels.lstm", "replace_lstm": "kernels.replace"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module 'kernels' has no attribute {name!r}; it has {', '.join(__all__)}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(_HOMES[name]), name)
