"""Errors of the user in one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

from kernels.host.usage import meant

__all__ = ["UsageError", "meant"]


class UsageError(ValueError):
    """Bad input from the command line or a file; the command line prints it as one line and exits with 2."""
