"""Outputs of a large linear layer whose largest are exact: by integers of 8 bits, then some in float32 (`head.cpp`)."""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import build, teams

SOURCE = "head.cpp"
#: A product costs a quarter to a half of one of float32.
PRODUCTS_IN_ONE = 4

#: `HeadCall` of head.cpp, as bytes: ctypes takes a microsecond to convert as many arguments one by one.
_CALL = struct.Struct("@13q").pack


@dataclass(frozen=True)
class PackedHead:
    """Weights as integers, and what bounds the error of their products.

    Attributes:
        values: uint8, in the kernel's order.
        rows: (3, outputs) float32: of each row its scale, the norm of what rounding leaves, and that of what it keeps.
        weight: the tensor that was packed, whatever its memory order.
        storage: its memory.
        state: its address, shape, strides and version, and the mark of its values.
        at: addresses of `values` and of the three in `rows`.
    """

    values: Tensor
    rows: Tensor
    weight: weakref.ref[Tensor]
    storage: StorageWeakRef
    state: tuple[object, ...]
    at: tuple[int, ...]


def hindrance() -> str | None:
    """Reason why there is no such head on this machine, or None; compiles it, unless it lies compiled in its cache."""
    found = library()
    return found if isinstance(found, str) else None


def instructions() -> str:
    """Name of the instructions that multiply.

    Raises:
        BuildError: where there is no such head.
    """
    return str(build.available(library()).head_instructions().decode())


def pack(weight: Tensor, before: PackedHead | None = None) -> tuple[PackedHead, Tensor]:
    """Pack weights, or take what was packed before of the same ones, unchanged as far as can be seen.

    What torch's version counter sees is noticed, and of what it does not (`.data`, NumPy, shared memory) what reaches
    one of 128 samples.

    Args:
        weight: (outputs, depth), float32 on the CPU. The parameter itself: a copy of it has a version of its own.
        before: what an earlier call returned.

    Returns:
        The packed weights, and the weights in contiguous memory, as `run` takes them.
    """
    # Read before the weights are: what is changed meanwhile must not look as if it had been packed.
    version = None if weight.is_inference() else weight._version  # noqa: SLF001 - it has no public name
    values = weight.contiguous()
    mark = build.library().mark(values.data_ptr(), values.numel())
    state = (weight.data_ptr(), weight.shape, weight.stride(), version, mark)
    # What died may have left its memory to another tensor, hence the look whether both are still there.
    same = before is not None and before.weight() is weight and not before.storage.expired()
    if before and same and version is not None and state == before.state:
        return before, values
    return _packed(weight, values, state), values


def _packed(weight: Tensor, contiguous: Tensor, state: tuple[object, ...]) -> PackedHead:
    native = build.available(library())
    outputs, depth = weight.shape
    values = torch.empty(native.head_bytes(outputs, depth), dtype=torch.uint8, device="cpu")
    rows = torch.empty(3, outputs, dtype=torch.float32, device="cpu")
    at = (values.data_ptr(), *(row.data_ptr() for row in rows))
    native.head_pack(contiguous.data_ptr(), *at, outputs, depth)
    return PackedHead(values, rows, weakref.ref(weight), StorageWeakRef(weight.untyped_storage()), state, at)


def run(h: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedHead, exact: int) -> tuple[Tensor, int]:
    """Compute all outputs of all rows.

    Args:
        h: (rows, depth), contiguous float32 on the CPU.
        weight: (outputs, depth), the same, from `pack`.
        bias: (outputs,), the same; or None.
        packed: of these weights.
        exact: how many of each row's largest outputs are exact.

    Returns:
        (rows, outputs), and how many of them were computed in float32.

    Raises:
        MemoryError, RuntimeError: where native code fails.
    """
    output = h.new_empty(h.size(0), weight.size(0))
    threads = teams.threads_for(output.numel() * h.size(1) // PRODUCTS_IN_ONE)
    native = build.available(library())
    return output, build.checked(
        native, native.head_run(_call(h, weight, bias, packed, output, exact, threads)), "head_failure"
    )


def bounds(h: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedHead) -> Tensor:
    """Return the largest possible error of each row's outputs, (rows,), for arguments as `run` takes them.

    It is NaN or infinity where one has no bound.
    """
    found, native = h.new_empty(h.size(0)), build.available(library())
    build.checked(native, native.head_bounds(_call(h, weight, bias, packed, found, 1, 1)), "head_failure")
    return found


def _call(
    h: Tensor, weight: Tensor, bias: Tensor | None, packed: PackedHead, output: Tensor, exact: int, threads: int
) -> bytes:
    """Return `HeadCall` of head.cpp."""
    return _CALL(
        weight.data_ptr(), 0 if bias is None else bias.data_ptr(), *packed.at, h.data_ptr(), output.data_ptr(),
        h.size(0), weight.size(0), h.size(1), exact, threads,
    )  # fmt: skip


@functools.cache
def library(target: str = build.NATIVE) -> ctypes.CDLL | str:
    """The compiled head, or why there is none; what failed once is not tried again in this process.

    Args:
        target: the compiler's flags for a CPU.
    """
    native = build.load(SOURCE, target, "head")
    if isinstance(native, str):
        return native
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    native.head_hindrance.restype = ctypes.c_char_p
    if reason := native.head_hindrance():
        return str(reason.decode())
    native.head_instructions.restype = native.head_failure.restype = ctypes.c_char_p
    native.head_bytes.restype, native.head_bytes.argtypes = number, [number] * 2
    native.head_pack.restype, native.head_pack.argtypes = number, [*[pointer] * 5, number, number]
    native.head_run.restype, native.head_run.argtypes = number, [ctypes.c_char_p]
    native.head_bounds.restype, native.head_bounds.argtypes = number, [ctypes.c_char_p]
    return native
