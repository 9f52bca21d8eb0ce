"""Number of threads that a call of the CPU kernel takes, and the work that they share out."""

from __future__ import annotations

import functools
import threading
import time

import torch

from .build import library

#: Work below which a second thread costs more than it brings, in multiplications.
WORTH_A_THREAD = 1 << 18
#: The same of one step, after which the threads that share out hidden units meet: at a place in the machine where they
#: are far from each other a meeting takes half a microsecond, as long as this many multiplications and more.
WORTH_A_MEETING = 1 << 15


def threads_for(work: int) -> int:
    """Threads for a number of multiplications: at most torch's, and at most the cores that they can run on."""
    threads = min(torch.get_num_threads(), work // WORTH_A_THREAD)
    return min(threads, cores()) if threads > 1 else 1


def cores() -> int:
    """Cores in the affinity mask: more threads than that would wait for each other's cores.

    The system is asked at most four times a second, since asking takes half a microsecond.
    """
    return _cores(threading.get_ident(), time.monotonic_ns() >> 28)


@functools.lru_cache(maxsize=64)
def _cores(thread: int, period: int) -> int:
    del thread, period
    return int(library().cores())


def work(batch: int, steps: int, hidden: int, features: int = 0) -> int:
    """Multiplications of a direction of a layer; `features` where its input is projected too."""
    return batch * steps * hidden * (hidden + features + 16) * 4


def team(work: int, batch: int, hidden: int) -> tuple[int, bool]:
    """Threads, and whether they share out rows (no thread waits) or hidden units (all meet once a step)."""
    threads = threads_for(work)
    if batch >= 8 * threads or threads == 1:
        return threads, True
    threads = min(threads, -(-hidden // library().lanes()), 4 * batch * hidden * hidden // WORTH_A_MEETING)
    return (threads, False) if threads > 1 else (1, True)


def long(batch: int, steps: int, threads: int, storage: str = "fp32") -> bool:
    """Return whether a call multiplies enough rows for one thread's look at all weights to be a twentieth of it."""
    return batch * steps >= least_long(storage) * threads


def least_long(storage: str) -> int:
    """Rows a thread from which a call is `long`, its weights kept as a key of `kernels.cpu.packing.STORAGE`."""
    return 32 if storage == "fp32" else 2048
