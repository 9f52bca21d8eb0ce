"""Trees of tensors as models take and return them: tuples, dicts, dataclasses, PackedSequence, output objects.

A leaf is whatever holds no other value; its path says where it is: `output.logits`, `args[1][0]`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

#: Values besides tensors that two calls can be compared by.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a value with their paths, in a fixed order.

    Args:
        value: the tree.
        path: of the value itself.
    """
    inner = children(value)
    if inner is None:
        yield path, value
        return
    for step, child in inner:
        yield from flatten(child, path + step)


def tensors(value: Any, path: str) -> dict[str, Tensor]:
    """The tensors of a value by path."""
    return {name: leaf for name, leaf in flatten(value, path) if isinstance(leaf, Tensor)}


def children(value: Any) -> list[tuple[str, Any]] | None:  # noqa: PLR0911 - one a kind
    """Return the parts of a value, each with the step that leads to it; None for a leaf."""
    if isinstance(value, PackedSequence):
        # The other two fields only sort; they are None where the user sorted.
        return [(".data", value.data), (".batch_sizes", value.batch_sizes)]
    if isinstance(value, Mapping):
        return [(f".{key}" if str(key).isidentifier() else f"[{key!r}]", child) for key, child in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", child) for name, child in zip(value._fields, value, strict=True)]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return [(f"[{place}]", child) for place, child in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    if is_arguments(value):
        return [(f".{name}", child) for name, child in vars(value).items()]
    return None


def is_number(value: Any) -> bool:
    """Return whether a leaf is a plain number that is compared within limits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_arguments(value: Any) -> bool:
    """Return whether a value is an object that holds the arguments of a call as `args` and `kwargs`."""
    return hasattr(value, "__dict__") and not callable(value) and bool({"args", "kwargs"} & set(vars(value)))


def rebuilt(value: Any, change: Callable[[str, Any], Any], path: str) -> Any:
    """Return the tree with other leaves.

    Args:
        value: the tree; it is left as it is.
        change: gives the new leaf for a path and the old leaf.
        path: of the value itself.
    """
    if isinstance(value, PackedSequence):
        data, sizes = (change(f"{path}.{name}", getattr(value, name)) for name in ("data", "batch_sizes"))
        places = [None if p is None else p.to(data.device) for p in (value.sorted_indices, value.unsorted_indices)]
        return PackedSequence(data, sizes, *places)
    inner = children(value)
    if inner is None:
        return change(path, value)
    new = [rebuilt(child, change, path + step) for step, child in inner]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*new)
    if isinstance(value, (tuple, list)):
        return type(value)(new)
    twin = copy.copy(value)
    if isinstance(value, Mapping):
        for key, child in zip(value, new, strict=True):
            twin[key] = child
        return twin
    for (step, _), child in zip(inner, new, strict=True):
        # Past __setattr__: a dataclass may be frozen.
        object.__setattr__(twin, step[1:], child)
    return twin


def comparable(value: Any, path: str) -> dict[str, Tensor]:
    """The leaves of an output as tensors by path, for the gate to compare.

    Numbers become tensors. What is equal or not, as a string, is part of the name, so that another value is a missing
    one. Infinite places, as masked scores have, are taken out of the values and compared as a pattern of their own.

    Raises:
        TypeError: for a leaf that cannot be compared, naming it.
    """
    found: dict[str, Tensor] = {}
    for name, leaf in flatten(value, path):
        if isinstance(leaf, Tensor):
            found |= _finite(name, leaf)
        elif is_number(leaf):
            found |= _finite(name, torch.tensor(float(leaf), dtype=torch.float64))
        elif isinstance(leaf, PLAIN):
            # In float64 as numbers are, so that it is not taken for a result that the model casts to float32.
            found[f"{name} is {leaf!r}"] = torch.ones((), dtype=torch.float64)
        else:
            kind = type(leaf)
            msg = f"{name} is a {kind.__module__}.{kind.__qualname__}"
            raise TypeError(msg)
    return found


def _finite(name: str, value: Tensor) -> dict[str, Tensor]:
    if value.layout != torch.strided or value.is_quantized or value.is_complex():
        value = torch.view_as_real(value) if value.is_complex() else value.dequantize().to_dense()
    if not value.is_floating_point():
        return {name: value}
    infinite = value.isinf()
    if not bool(infinite.any()):
        return {name: value}
    signs = torch.where(infinite, value.sign(), 0.0)
    return {name: torch.where(infinite, 0.0, value), f"{name} infinite": signs}
