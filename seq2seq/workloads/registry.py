"""Finds workloads by name: those of `published.py`, those of plugins and own models, and checkpoints.

A name may carry overrides: `seed@batch=64,hidden=128` is the workload `seed` with those sizes changed. And
`checkpoint:PATH` is the workload of a checkpoint, which takes those that leave its model as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from seq2seq.workloads.checkpoint import PREFIX, checkpoint_workload
from seq2seq.workloads.published import WORKLOADS
from seq2seq.workloads.workload import UnknownWorkloadError, Workload, overridden

__all__ = ["PROVIDERS", "WORKLOADS", "find_workload"]

#: Functions that find workloads whose names begin with a prefix of their own, by that prefix.
PROVIDERS: dict[str, Callable[[str], Workload]] = {}


def find_workload(name: str) -> Workload:
    """The workload of a name, with its overrides applied.

    Raises:
        UnknownWorkloadError: for a name or override that does not exist, or a size out of range.
    """
    if name.startswith(PREFIX):
        return _of_checkpoint(name)
    for prefix, find in PROVIDERS.items():
        if name.startswith(prefix):
            return find(name)
    base, at, overrides = name.partition("@")
    if base not in WORKLOADS:
        msg = f"no workload is called {base!r}; there are {', '.join(WORKLOADS)}, and {PREFIX}PATH"
        raise UnknownWorkloadError(msg)
    workload = overridden(WORKLOADS[base], overrides) if at else WORKLOADS[base]
    return dataclasses.replace(workload, name=name)


def _of_checkpoint(name: str) -> Workload:
    """The workload of a checkpoint; overrides follow the last @, where no / comes after it."""
    base, at, overrides = name.rpartition("@")
    if not at or "/" in overrides:
        base, overrides = name, ""
    workload = checkpoint_workload(base.removeprefix(PREFIX))
    return dataclasses.replace(overridden(workload, overrides) if overrides else workload, name=name)
