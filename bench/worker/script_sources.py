"""Looking up source code for TorchScript, in a seat: each class and function once.

While `torch.jit.script` compiles a model it asks for the source of the same classes dozens of times, and before Python
3.13 `inspect` parses their whole file each time: three quarters of what scripting the seed takes in a new process. A
cold run scripts without this, since a user's process does too.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def sources_read_once() -> Iterator[None]:
    """Cache the results of `inspect.getsourcelines` inside the block."""
    real = inspect.getsourcelines
    kept = functools.cache(real)

    def once(object: Any) -> tuple[list[str], int]:  # noqa: A002 - as it is called in `inspect`
        lines, number = kept(object)
        # A caller may change the list.
        return list(lines), number

    inspect.getsourcelines = once
    try:
        yield
    finally:
        inspect.getsourcelines = real
