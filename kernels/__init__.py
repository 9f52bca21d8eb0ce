"""LSTM kernels, the module that runs them, and the plain equations that they are checked against.

`LSTM` and `replace_lstm` are loaded when they are first asked for, so that importing this package costs nothing. It is
called `kernels` in the checkout and `seq2seq_kernels` when installed, so its modules use relative imports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .head import ShortlistHead
    from .lstm import LSTM
    from .replace import replace_lstm

__all__ = ["LSTM", "ShortlistHead", "replace_lstm"]

_HOMES = {"LSTM": ".lstm", "ShortlistHead": ".head", "replace_lstm": ".replace"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
