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
_TO = (Tensor.to, Tensor.type, Tensor.type_as)


class Unrounded(TorchFunctionMode):
    """While it is on, the casts that models are written with leave float64 as it is.

    They are `float()`, `to` and `type` of a dtype, `to` and `type_as` of another tensor, and the softmaxes with a
    dtype. What else narrows is not held back: a type by its name, a sum with a dtype, `copy_` into a float32 tensor.
    What comes from integers is cast as it is written.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, with float64 in place of float32 where it would round."""
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
    """Type that is cast to: a dtype, or that of a tensor."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return torch.float64 if isinstance(value, torch.dtype) and value == torch.float32 else value
