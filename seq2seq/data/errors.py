"""Errors for a file that cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """A file of data cannot be used; the message is one line: file, row (1-based), cause, what was expected."""
