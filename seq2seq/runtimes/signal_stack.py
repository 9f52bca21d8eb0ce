"""Keep the stack on which this thread's signals are handled.

Compiling for a CPU, OpenVINO 2026.4 gives the thread an alternate signal stack of 11,568 bytes, which is gone
later: the next signal that Python handles there ends the process with a segmentation fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Give the thread back the signal stack, or none, that it had before."""
    if sys.platform != "linux":
        yield
        return
    libc, before = ctypes.CDLL(None), _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)
