"""Asks for facts about the machine; a question that raises gives no fact, and never ends a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def known(ask: Callable[[], T]) -> T | None:
    """Return the answer of `ask`, or None if it raises.

    Libraries raise what they like for a file that a system lacks, a container hides or a driver garbles: OSError,
    NotImplementedError, RuntimeError, ValueError, KeyError, and py-cpuinfo a bare Exception.
    """
    try:
        return ask()
    except Exception:  # noqa: BLE001 - as above
        return None
