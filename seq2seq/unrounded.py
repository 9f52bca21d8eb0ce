"""Keeps float64 what other people's code casts to float32 on the way.

Models are written to be right in half precision: a norm or a softmax casts to float32 whatever came in. In float64,
where the gate computes its truth, such a cast is a rounding, and truth would be no better than what it judges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SOFTMAX = (torch.softmax, functional.softmax, Tensor.softmax, functional.log_softmax, torch.log_softmax)
_TO = (Tensor.to, Tensor.type)


class Unrounded(TorchFunctionMode):
    """While it is on, no cast takes a float64 tensor to float32; what comes from integers is cast as it is written."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, with float64 in the place of float32 where it would round."""
        del types
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in _TO or func in _SOFTMAX:
                args = tuple(map(_wide, args))
                kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value
