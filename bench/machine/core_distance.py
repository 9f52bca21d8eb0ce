"""Time that two cores need to pass a word to each other: what a hypervisor changes without a trace in the guest.

When it moves a virtual core to another cluster of the host's cores, a word between two threads takes several times as
long, and so does every parallel region; neither stolen time nor a wait for a core shows. On a virtual machine with 2
cores of a Zen 4 a word there and back took 50 or 310 ns, for seconds or minutes on end, and calls of `seed` 0.41 or
0.57 ms with it. So both are timed beside each round, by two processes that write to memory that they share.

An interpreted word takes 0.2 us more, and that changes with the clock, which other work and heat slow down. So its time
is divided by that of the same loop with nobody at the other end.

It looks at the two lowest cores that the run may use, and at no others. It judges by the shortest distance so far, and
again when that has become shorter (`bench.run.group`): only groups that ended before the cores were near for the first
time are not marked.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from typing import IO, Self

#: The distance beside a round may be this many times the run's shortest.
FAR = 1.4
#: Words of a batch, of which the quickest counts, and batches.
WORDS, BATCHES = 25, 16
#: Looks at the memory before the other side counts as gone: at first it has to wake up.
FIRST_LOOKS, LOOKS = 100_000, 5_000
#: Where the sides write, and the word that ends it.
_OURS, _THEIRS, _ALONE, _OVER = 0, 1024, 2048, 255
_PARTNER = f"""
import mmap, os, sys
shared = mmap.mmap(int(sys.argv[1]), {mmap.PAGESIZE})
os.sched_setaffinity(0, {{int(sys.argv[2])}})
def answer(words):
    looks = {FIRST_LOOKS}
    for number in range(words):
        word = number % 100 + 1
        while (seen := shared[{_OURS}]) != word:
            looks -= 1
            if not looks or seen == {_OVER}:
                return
        shared[{_THEIRS}] = word
        looks = {LOOKS}
while os.read(0, 100):
    answer({WORDS * BATCHES})
"""
#: Bound here, before anything can replace it.
_now_ns = time.perf_counter_ns


class CoreDistance:
    """Times words between two cores; a context manager, inside which the other process lives.

    Attributes:
        shortest: the shortest distance so far; None before the first.
    """

    def __init__(self) -> None:
        self.shortest: float | None = None
        self._partner: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the other process, where there are two cores and the system can bind a process to one."""
        # A system that refuses, as under seccomp, costs these times alone.
        with contextlib.suppress(OSError):
            self._start()
        return self

    def _start(self) -> None:
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "memfd_create") else []
        if len(cores) < 2:  # noqa: PLR2004 - a word goes from one to another
            return
        self._core = cores[0]
        memory = os.memfd_create("core-distance")
        try:
            os.ftruncate(memory, mmap.PAGESIZE)
            self._shared = mmap.mmap(memory, mmap.PAGESIZE)
            self._partner = subprocess.Popen(  # noqa: S603 - our own lines and two numbers
                # Without site-packages: it is a page of memory and a loop.
                [sys.executable, "-I", "-S", "-c", _PARTNER, str(memory), str(cores[1])],
                stdin=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(memory,),
                bufsize=0,
                # Ctrl-C is for this process, which ends the other one.
                start_new_session=True,
            )
        finally:
            os.close(memory)

    def __exit__(self, *_: object) -> None:
        """End the other process."""
        if self._partner is not None:
            self._partner.kill()
            self._partner.communicate()
            self._partner = None
            self._shared.close()

    def beside(self, device: str, threads: int) -> Self | None:
        """Return it where calls pass words between cores; None where they run on a GPU or in one thread."""
        return self if device == "cpu" and threads > 1 else None

    def look(self) -> float | None:
        """Measure the distance now, and remember the shortest; None where it cannot be measured."""
        found = self.measure()
        if found is not None:
            self.shortest = min(found, self.shortest or found)
        return found

    def far(self, distance: float | None) -> str:
        """Say in words that a distance was longer than the cores can be apart at best; empty where it was not."""
        if distance is None or self.shortest is None or distance <= FAR * self.shortest:
            return ""
        return (
            f"a word to the other core and back took {distance:.1f} times as long as one that stays, "
            f"{self.shortest:.1f} at best in this run"
        )

    def measure(self) -> float | None:
        """Time of a word there and back over that of one that stays; None where nobody answers or no core was free.

        It ends the other process where that died or the system refuses, as when the cores of the run were changed.
        """
        if self._partner is None or self._partner.stdin is None:
            return None
        try:
            return self._measure(self._partner.stdin)
        except OSError:
            self.__exit__()
            return None

    def _measure(self, wake: IO[bytes]) -> float | None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})
        try:
            self._shared[_OURS] = self._shared[_THEIRS] = 0
            wake.write(b"x")
            there = self._quickest_ns(_OURS, _THEIRS)
            stays = self._quickest_ns(_ALONE, _ALONE)
            return None if there is None or stays is None else there / stays
        finally:
            # The other side ends its loop, even if it wakes up only now: it must not run beside a turn.
            self._shared[_OURS] = _OVER
            os.sched_setaffinity(0, before)

    def _quickest_ns(self, to: int, back: int) -> float | None:
        """Nanoseconds of a word that is written to one place and read from another."""
        shared, quickest, looks, number = self._shared, float("inf"), FIRST_LOOKS, 0
        for _ in range(BATCHES):
            start = _now_ns()
            for _ in range(WORDS):
                word = number % 100 + 1
                number += 1
                shared[to] = word
                while shared[back] != word:
                    looks -= 1
                    if not looks:
                        return None
                looks = LOOKS
            quickest = min(quickest, (_now_ns() - start) / WORDS)
        return quickest
