"""The native entry to the CPU kernel (`entry.cpp`): one call from Python that checks, allocates and runs.

It is compiled against torch's headers, in two to three seconds, and is a library of its own: the kernel itself knows
nothing of torch. Where it cannot be built, calls take the long way through Python; `hindrance` says why, and
with it `Choice.detour`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import packing, teams
from .build import BuildError, compiled, compiler
from .told import Told

FLAGS = ("-O2", "-fPIC", "-shared")
#: What torch asks of its extensions, and what the headers used here do with as well: for older compilers.
STANDARDS = ("c++20", "c++17")
SOURCE = "entry.cpp"
LIBRARIES = ("c10", "torch_cpu", "torch_python")


class Numbers(ctypes.Structure):
    """`Numbers` of entry.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("layers", "features", "hidden", "directions", "states", "work")),
        *((name, ctypes.c_int64) for name in ("worth", "least_long", "cast", "sums_from")),
        *((name, ctypes.c_void_p) for name in ("forgotten", "run", "failure")),
    )


def hindrance() -> str | None:
    """Reason why there is no native entry here, or None; compiles it, unless it lies compiled in its cache."""
    found = _library()
    return found if isinstance(found, str) else None


def bind(
    native: ctypes.CDLL,
    layers: int,
    parameters: Sequence[tuple[Tensor, int, int]],
    held: object,
    told: Told,
    **sizes: int,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The functions `at_once`, `step` and `trains` of a module; where there is no native entry, ones that take no call.

    `at_once(parameters, x, hx, batch_first)` returns `((output, (h_n, c_n)), choices)`, and `step(parameters, x, h, c,
    resets)` `(output, choices)`, h and c written in place; `parameters` is the module's dict. Both return None, and
    have done nothing, for a call that is not as plain as an earlier one: with gradients, autocast, a mode, transform
    or tracer, a subclass of Tensor, another type, size, device or memory order, or parameters that changed.

    `trains`, of the arguments of `at_once`, returns True for a call with gradients that is as plain in all else, be
    the parameters' values what they are, and None for any other. It runs nothing. With `cast` it wants autocast to
    bfloat16 on, else it wants autocast off.

    Args:
        native: the kernel.
        layers: address of `Layers`.
        parameters: of the module, in its order: each with its address and version when it was packed.
        held: keeps alive what the addresses point into, and the parameters. Python's collector does not see what a
            function holds, so `trains`, which only compares addresses, leaves the parameters to its caller: a hook of
            theirs may refer to the module.
        told: what `at_once` and `step` return besides their results.
        sizes: features, hidden, directions, states, work, least_long and cast of `Numbers`.

    Raises:
        MemoryError, RuntimeError: from the functions, where the kernel fails.
    """
    entry = _library()
    if isinstance(entry, str):
        return declined, declined, declined
    run, failure = (ctypes.cast(native[name], ctypes.c_void_p).value for name in ("lstm_layers", "failure"))
    numbers = Numbers(
        layers=layers,
        worth=2 * teams.WORTH_A_THREAD,
        forgotten=ctypes.addressof(packing.forgotten),
        run=run,
        failure=failure,
        sums_from=told.sums_from,
        **sizes,
    )
    bound: tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]] = entry.bind(
        ctypes.byref(numbers), tuple(parameters), (held, native), told.choices
    )
    return bound


def declined(*_: object) -> None:
    """Take no call."""


@functools.cache
def _library() -> ctypes.PyDLL | str:
    """The entry, or why there is none; what failed once is not tried again in this process."""
    try:
        entry = ctypes.PyDLL(str(_compiled()))
        entry.set_up.argtypes = [ctypes.py_object] * 3
        entry.set_up.restype = None
        entry.bind.argtypes = [ctypes.c_void_p, *[ctypes.py_object] * 3]
        entry.bind.restype = ctypes.py_object
        entry.set_up(Tensor, forward_ad, teams.team)
    except BuildError as error:
        return str(error)
    except (OSError, AttributeError, RuntimeError) as error:
        return f"the entry to the CPU kernel cannot be built or loaded ({error})"
    return entry


def _compiled() -> Path:
    """The entry's library, by the first standard of C++ that serves.

    Raises:
        BuildError: by the last one's, where none does.
    """
    root = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"  # noqa: SLF001 - it has no public name
    links = [f"-L{root / 'lib'}", *(f"-l{name}" for name in LIBRARIES)]
    # isystem: what the compiler warns of in torch's headers is not ours.
    rest = [abi, "-isystem", str(root / "include"), SOURCE, *links]
    *earlier, last = ([*compiler(), *FLAGS, f"-std={standard}", *rest] for standard in STANDARDS)
    for command in earlier:
        with contextlib.suppress(BuildError):
            return compiled(command)
    return compiled(last)
