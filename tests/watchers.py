"""Stand-ins for those that watch calls: modes that hand every call on, and a subclass of Tensor."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Functions(TorchFunctionMode):
    """See each function of torch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the call on."""
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    """See each operator."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand the call on."""
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """A tensor that is not exactly a torch.Tensor."""
