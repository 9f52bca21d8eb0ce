"""Weights in the order in which the CPU kernel reads them, kept from call to call while they stand unchanged."""

from __future__ import annotations

import collections
import ctypes
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .build import library

#: How weights are kept: the name, its number in the C++ source, and its type.
STORAGE = {
    "fp32": (0, torch.float32),
    "bf16": (1, torch.bfloat16),
    "int8": (2, torch.int8),
    "split": (3, torch.bfloat16),
    "w8a8": (5, torch.int8),
}
#: How training under autocast to bf16 keeps them, which no module is asked for: bf16, with gradients.
TRAINED = "bf16-trained"
#: All of them.
KEPT = STORAGE | {TRAINED: (4, torch.bfloat16)}
#: Packed weights remembered at most; a model has two a layer and direction, in training by AMX four.
LIMIT = 512
#: Bytes of a large page of x86-64: weights that fill one are read faster from large pages, 5 to 10 % of one sequence.
LARGE_PAGE = 1 << 21
#: Weights up to this many are always looked at in full, which takes two microseconds.
SMALL = 1 << 16


@dataclass(frozen=True)
class Packed:
    """Packed weights and, for int8 and w8a8, the scale of each row.

    Attributes:
        values: in the kernel's order.
        scale: (4H,) float32, or None.
        sampled: mark of some of the values that were packed.
        mark: mark of all of them.
    """

    values: Tensor
    scale: Tensor | None
    sampled: int
    mark: int


@dataclass(frozen=True)
class _Entry:
    """Packed weights, with the memory they were packed from and its state."""

    storage: StorageWeakRef
    version: int
    packed: Packed


_entries: collections.OrderedDict[tuple[object, ...], _Entry] = collections.OrderedDict()
_lock = threading.Lock()
#: Times that packed weights were dropped: what was kept before the last time must not be used. Native code reads it.
forgotten = ctypes.c_int64(0)


def pack(weight: Tensor, order: str, storage: str = "fp32", *, whole: bool = True, lasting: bool = False) -> Packed:
    """Pack weights, or take what an earlier call packed of the same ones.

    They are the same when they lie in the same living memory, torch's version counter stands where it stood (every
    in-place change raises it, an optimizer's too), and their values are unchanged. The last is for changes through
    `.data`, NumPy or shared memory, which the counter does not see.

    Args:
        weight: (4H, depth), contiguous float32; for the order `linear` (outputs, depth).
        order: `forward`; `backward` (as `fp32` or `TRAINED`); or `linear`, of a linear layer (`fp32`).
        storage: key of `KEPT`.
        whole: look at all values. Else 128 samples of more than `SMALL` have to do, for calls so short that reading
            the weights once more would be felt; a change behind the counter that spares them goes unnoticed.
        lasting: they will be read in many calls before they change, so that large pages pay.
    """
    if weight.is_inference():  # Such tensors have no version counter.
        return _pack(weight, order, storage)
    key = (weight.data_ptr(), tuple(weight.shape), order, storage)
    at, count = weight.data_ptr(), weight.numel()
    whole = whole or count <= SMALL
    with _lock:
        found = _entries.get(key)
        if found:
            _entries.move_to_end(key)
    # A dead storage's memory may have been given to another tensor, hence the look whether it lives.
    if found and not found.storage.expired() and found.version == weight._version:  # noqa: SLF001
        kept = found.packed
        alike = library().mark_all(at, count) == kept.mark if whole else library().mark(at, count) == kept.sampled
        if alike:
            return kept
    packed = _pack(weight, order, storage, lasting=lasting)
    entry = _Entry(StorageWeakRef(weight.untyped_storage()), weight._version, packed)  # noqa: SLF001
    with _lock:
        new = key not in _entries
        _entries[key] = entry
        while len(_entries) > LIMIT:
            _entries.popitem(last=False)
        # Not where an entry was replaced, which training does at each step.
        for dead in [k for k, e in _entries.items() if e.storage.expired()] if new else ():
            del _entries[dead]
    return packed


def _memory(count: int, dtype: torch.dtype, *, lasting: bool) -> Tensor:
    """Return memory for this many packed numbers, in large pages if it fills them and the system has some.

    Not where an optimizer will soon have changed the weights: new large pages cost what reading them once gains.
    """
    size = count * dtype.itemsize
    if size < LARGE_PAGE or not lasting:
        return torch.empty(count, dtype=dtype, device="cpu")
    room = torch.empty(size + LARGE_PAGE, dtype=torch.uint8, device="cpu")
    start = -room.data_ptr() % LARGE_PAGE
    library().in_large_pages(room.data_ptr() + start, size // LARGE_PAGE * LARGE_PAGE)
    return room[start : start + size].view(dtype)


def _pack(weight: Tensor, order: str, storage: str, *, lasting: bool = False) -> Packed:
    rows, depth = weight.shape
    at, count, hidden = weight.data_ptr(), weight.numel(), rows // 4
    number, dtype = KEPT[storage]
    native = library(kept=number)
    # Before they are read: what is changed meanwhile must not look as if it had been packed.
    marks = native.mark(at, count), native.mark_all(at, count)
    if order == "linear":
        values = torch.empty(native.linear_numbers(rows, depth), dtype=torch.float32, device="cpu")
        native.pack_linear(at, values.data_ptr(), rows, depth)
        return Packed(values, None, *marks)
    if order == "backward":
        bytes_ = native.packed_backward_bytes(hidden, depth, number)
        values = torch.empty(bytes_ // dtype.itemsize, dtype=dtype, device="cpu")
        native.pack_backward(at, values.data_ptr(), hidden, depth, number)
        return Packed(values, None, *marks)
    if reason := native.hindrance(number).decode():
        msg = f"weight_storage={storage!r} cannot be used here: {reason}; use 'fp32'"
        raise RuntimeError(msg)
    bytes_ = native.packed_bytes(hidden, depth, number)
    values = _memory(bytes_ // dtype.itemsize, dtype, lasting=lasting)
    scale = torch.empty(rows, dtype=torch.float32, device="cpu") if dtype == torch.int8 else None
    scale_at = None if scale is None else scale.data_ptr()
    native.pack_forward(at, values.data_ptr(), scale_at, hidden, depth, number)
    return Packed(values, scale, *marks)


def forget() -> None:
    """Drop all packed weights, also those that modules keep."""
    with _lock:
        _entries.clear()
        forgotten.value += 1
