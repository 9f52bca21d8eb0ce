"""Pages that a forked process shares with its parent, made its own: then it is as a fresh process in its memory.

A child shares the pages that its parent wrote until one of them writes again, and none of the parent's pages of files
are mapped in it. Its first call would pay for copies and faults that a fresh process has behind it after its imports,
and its resident memory would begin lower. So the parent notes which of its pages are resident before it forks, and a
child that is to be like a fresh process touches the same pages.
Source: proc_pid_pagemap(5), and madvise(2) on MADV_POPULATE_READ and MADV_POPULATE_WRITE, Linux 5.14.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_READ, _WRITE = 22, 23
#: Bits of a page's entry: in memory, swapped out.
_THERE = np.uint64(1 << 63 | 1 << 62)
#: A private mapping that can be read, and is not the kernel's own.
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r(.).p \S+ \S+ \d+(?!\d| *\[v)")


@dataclass(frozen=True)
class PageRun:
    """Pages in a row.

    Attributes:
        start: address.
        size: bytes.
        writable: whether the process may write them.
    """

    start: int
    size: int
    writable: bool


#: Pages that were resident in this process, or in the one that it was forked from; empty in a fresh process.
_noted: list[PageRun] = []


def note() -> bool:
    """Note the resident pages of this process for its children; false where the system cannot give children theirs."""
    try:
        found = resident()
        # Changes nothing here, where they are resident, and shows that it can be done.
        _touch(found)
    except OSError:
        return False
    _noted[:] = found
    return True


def take() -> None:
    """Make the noted pages this process's own; nothing where none were noted.

    Pages that it has given back since it was forked, as the memory of a model that was loaded, are left out.

    Raises:
        OSError: when the system refuses.
    """
    if _noted:
        _touch(_within(_noted, _mappings()))


def resident() -> list[PageRun]:
    """Return the pages of this process's private mappings that are in memory or swapped out.

    Raises:
        OSError: when the system does not report them.
    """
    page, found = mmap.PAGESIZE, []
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:  # noqa: PTH123 - read by offset
        for whole in _mappings():
            entries = np.frombuffer(
                os.pread(pages.fileno(), whole.size // page * 8, whole.start // page * 8), np.uint64
            )
            there = np.concatenate([[False], (entries & _THERE) != 0, [False]])
            edges = np.flatnonzero(there[1:] != there[:-1]).reshape(-1, 2)
            found += [PageRun(whole.start + int(a) * page, int(b - a) * page, whole.writable) for a, b in edges]
    return found


def _mappings() -> list[PageRun]:
    """Private mappings of this process that can be read, in the order of their addresses."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    found = [mapping for line in lines if (mapping := _MAPPING.match(line))]
    return [PageRun(int(m[1], 16), int(m[2], 16) - int(m[1], 16), m[3] == "w") for m in found]


def _within(runs: list[PageRun], mappings: list[PageRun]) -> list[PageRun]:
    """Return the parts of runs that lie in mappings, as these may be used now; both in the order of addresses."""
    found, left = [], iter(mappings)
    mapping = next(left, None)
    for run in runs:
        while mapping and mapping.start < run.start + run.size:
            start = max(run.start, mapping.start)
            end = min(run.start + run.size, mapping.start + mapping.size)
            if start < end:
                found.append(PageRun(start, end - start, mapping.writable))
            if mapping.start + mapping.size > run.start + run.size:
                break
            mapping = next(left, None)
    return found


def _touch(runs: list[PageRun]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    for run in runs:
        advice = _WRITE if run.writable else _READ
        if libc.madvise(ctypes.c_void_p(run.start), ctypes.c_size_t(run.size), advice):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
