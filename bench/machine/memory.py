"""Highest memory that a piece of work needs: the kernel's own high-water mark, reset before.

Linux keeps the mark (`VmHWM`) and lets a process reset it; elsewhere the peak stays unknown rather than guessed.
Source: proc_pid_clear_refs(5), proc_pid_status(5).
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from bench.machine.facts import known

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int | None:
    """Resident memory of this process now, bytes; None if the system does not report it."""
    return _status("VmRSS") or known(lambda: int(psutil.Process().memory_info().rss))


def above(value: int | None, baseline: int | None) -> int | None:
    """Bytes that a value lies above a baseline, at least 0; None where one of them is not known."""
    return None if value is None or baseline is None else max(0, value - baseline)


def reset_peak() -> bool:
    """Set the high-water mark to what is resident now; false where the system cannot."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_bytes() -> int | None:
    """The high-water mark of resident memory since the last reset, bytes; None where the system keeps none."""
    return _status("VmHWM")


def _status(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
