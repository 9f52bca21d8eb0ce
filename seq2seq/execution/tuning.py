"""Settings of the process that a CPU variant can be started with: how OpenMP waits, where threads run, who allocates.

They are environment variables that libraries read once, when they are loaded, so each needs a process of its own.
"""

from __future__ import annotations

import ctypes.util
import functools
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from seq2seq.execution.requirements import Requirement
from seq2seq.workloads.workload import Workload

_MAPS, _TASKS = Path("/proc/self/maps"), Path("/proc/self/task")


@dataclass(frozen=True)
class Tuning:
    """One way to start a process.

    Attributes:
        name: what it is called.
        summary: one line for people.
        environment: variables that the process is started with.
        requirements: what it needs on the machine.
    """

    name: str
    summary: str
    environment: Mapping[str, str]
    requirements: tuple[Requirement, ...] = field(default=())


def needs_linux(device: str, mode: str, workload: Workload) -> str | None:
    """Refuse systems other than Linux, where binding threads and preloading libraries works differently."""
    del device, mode, workload
    return None if sys.platform.startswith("linux") else "binds threads and loads libraries as Linux does"


def needs_library(soname: str, package: str) -> Requirement:
    """A shared library that the loader finds, which Debian and Ubuntu have in a package."""

    def check(device: str, mode: str, workload: Workload) -> str | None:
        del device, mode, workload
        if _found(soname.removeprefix("lib").partition(".so")[0]) != soname:
            return f"needs {soname}, which is not installed: sudo apt-get install {package}"
        return None

    return check


@functools.cache
def _found(name: str) -> str | None:
    return ctypes.util.find_library(name)


def _preloading(name: str, soname: str, package: str) -> Tuning:
    needs = needs_linux, needs_library(soname, package)
    return Tuning(name, f"memory from {name}", {"LD_PRELOAD": soname}, needs)


TUNINGS = (
    Tuning("passive", "OpenMP's threads sleep while they wait", {"OMP_WAIT_POLICY": "PASSIVE"}),
    Tuning("active", "OpenMP's threads spin while they wait", {"OMP_WAIT_POLICY": "ACTIVE"}),
    Tuning(
        "bound",
        "OpenMP's threads bound to a core each",
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"},
        (needs_linux,),
    ),
    _preloading("tcmalloc", "libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"),
    _preloading("jemalloc", "libjemalloc.so.2", "libjemalloc2"),
)


def in_force(environment: Mapping[str, str]) -> str:
    """Describe what has become of variables in this process: set, library loaded, threads bound, or not."""
    return ", ".join(_in_force(name, value) for name, value in environment.items())


def _in_force(name: str, value: str) -> str:
    if os.environ.get(name) != value:
        return f"{name}={value} was NOT set in this process"
    if name == "LD_PRELOAD" and value not in _MAPS.read_text(encoding="utf-8", errors="replace"):
        return f"{name}={value} was NOT loaded"
    if name == "OMP_PROC_BIND":
        masks = [os.sched_getaffinity(int(task.name)) for task in _TASKS.iterdir()]
        cores = sorted({min(mask) for mask in masks if len(mask) == 1})
        return f"{name}={value} (threads bound to {'core ' + ', '.join(map(str, cores)) if cores else 'NO core'})"
    return f"{name}={value}"
