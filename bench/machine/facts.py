"""Facts about the machine: what asks for one may raise anything, and a fact that cannot be had ends nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def known(ask: Callable[[], T]) -> T | None:
    """An answer about the machine, or None where it gives none.

    Libraries raise what they like for a file that a system lacks, a container hides or a driver garbles: OSError,
    NotImplementedError, RuntimeError, ValueError, KeyError, and py-cpuinfo a bare Exception.
    """
    try:
        return ask()
    except Exception:  # noqa: BLE001 - as above
        return None
