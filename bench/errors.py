"""Errors of the user in one line: what was wrong, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input from the command line or a file; the command line prints it as one line and exits with 2."""


def meant(word: str, names: Iterable[str]) -> str:
    """Advice for a name that does not exist: `did you mean 'seed'?`, or the names where none is near."""
    known = {name.lower(): name for name in names}
    near = [known[found] for found in difflib.get_close_matches(word.lower(), known)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose from {', '.join(known.values())}"
