"""The cores that a process may use: its affinity and its container's quota, which limits time where affinity does not.

A container with a quota of one CPU sees all cores of the machine. Two threads that spin for each other there are
stopped half of the time, and wait for each other the other half.
Sources: cgroups(7), proc_pid_mountinfo(5), Linux Documentation/scheduler/sched-bwc.rst and admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROCESS = Path("/proc/self")


def usable_cores(process: Path = _PROCESS) -> int:
    """Cores that this process may use: those of its affinity, at most its quota rounded up, and at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(process)
    return affinity if quota is None else max(1, min(affinity, math.ceil(quota)))


def cpu_quota(process: Path = _PROCESS) -> float | None:
    """CPUs that this process and its control groups may use, by the strictest of them; None without a limit.

    Args:
        process: folder of the process under /proc.
    """
    return min((quota for folder in _groups(process) if (quota := _quota(folder)) is not None), default=None)


def _groups(process: Path) -> Iterator[Path]:
    """Folders of the control groups that limit the CPU time of a process, each before its parent."""
    own = {}
    for line in _lines(process / "cgroup"):
        _, controllers, group = line.split(":", 2)
        # Version 2 has one hierarchy, whose line names no controllers.
        if not controllers or "cpu" in controllers.split(","):
            own["cgroup" if controllers else "cgroup2"] = PurePosixPath(group)
    for line in _lines(process / "mountinfo"):
        fields, _, kind = line.partition(" - ")
        name, _, options = [*kind.split(" ", 2), "", "", ""][:3]
        if name not in own or (name == "cgroup" and "cpu" not in options.split(",")):
            continue
        root, mounted = map(_unquoted, fields.split(" ")[3:5])
        top, path = Path(mounted), own[name]
        # Where the mount shows a part of the hierarchy that the group is not in, its top is the nearest that is known.
        below = path.relative_to(root) if path.is_relative_to(root) and ".." not in path.parts else PurePosixPath()
        folder = top / below
        yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(top)))


def _quota(folder: Path) -> float | None:
    """CPUs that one control group may use; None where it has no limit or cannot be read."""
    found = _lines(folder / "cpu.max") or [
        " ".join(line for name in ("quota", "period") for line in _lines(folder / f"cpu.cfs_{name}_us"))
    ]
    # Without a limit: `max 100000` in version 2, `-1 100000` in version 1.
    match = re.fullmatch(r"(\d+) (\d+)", found[0].strip())
    return int(match[1]) / int(match[2]) if match and int(match[2]) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unquoted(path: str) -> str:
    """A path of mountinfo, in which spaces and the like are octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
