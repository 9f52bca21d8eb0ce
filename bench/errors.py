"""Errors of the user in one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kernels.host.usage import meant

__all__ = ["UsageError", "meant", "writing"]


class UsageError(ValueError):
    """Bad input from the command line or a file; the command line prints it as one line and exits with 2."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report a file that the command line names and that cannot be written.

    Raises:
        UsageError: for the OSError that was raised inside.
    """
    try:
        yield
    except OSError as error:
        msg = f"{path} cannot be written: {error.strerror or error}; name another file"
        raise UsageError(msg) from error
