"""Time that two cores need to pass a word to each other: what a hypervisor changes without a trace in the guest.

When it moves a virtual core to another cluster of the host's cores, a word between two threads takes several times as
long, and so does every parallel region; neither stolen time nor a wait for a core shows. On a virtual machine with 2
cores of a Zen 4 a word there and back took 50 or 310 ns, for seconds or minutes on end, and calls of `seed` 0.41 or
0.57 ms with it. So both are timed beside each round, by two processes that write to memory that they share.

An interpreted word takes 0.2 us more, and that changes with the clock, which other work and heat slow down. So the same
loop is timed with nobody at the other end, and where that takes longer than it did at best, the time of the word is
shortened in proportion.

It looks at the two lowest cores that the run may use, and at no others. It judges by the shortest time so far, and
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

#: A word next to a round may take this many times as long as the run's shortest. On the machine above it took 235 to
#: 340 ns near and 570 to 690 far.
FAR = 1.6
#: What a round says of cores that are far apart begins so.
FAR_WORDS = "a word from core to core and back took"
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
        shortest_ns: the shortest time of a word so far; None before the first.
    """

    def __init__(self) -> None:
        self.shortest_ns: float | None = None
        self._alone_ns = float("inf")
        self._partner: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the other process, where there are two cores and the system can bind a process to one."""
        # A system that refuses, as under seccomp, costs only these times.
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
        """Time a word, nanoseconds at the run's best clock, and remember the shortest; None if there is none."""
        times_ns = self.times_ns()
        if times_ns is None:
            return None
        there_ns, alone_ns = times_ns
        self.shortest_ns = min(there_ns, self.shortest_ns or there_ns)
        self._alone_ns = min(alone_ns, self._alone_ns)
        return there_ns * self._alone_ns / alone_ns

    def far(self, took_ns: float | None) -> str:
        """Say in words that a word took longer than where the cores are near; empty where it did not."""
        if took_ns is None or self.shortest_ns is None or took_ns <= FAR * self.shortest_ns:
            return ""
        return f"{FAR_WORDS} {took_ns:.0f} ns, {self.shortest_ns:.0f} at best in this run"

    def times_ns(self) -> tuple[float, float] | None:
        """Time of a word there and back and of one that stays; None if no answer comes or no core was free.

        It ends the other process where that died or the system refuses, as when the cores of the run were changed.
        """
        if self._partner is None or self._partner.stdin is None:
            return None
        try:
            return self._times_ns(self._partner.stdin)
        except OSError:
            self.__exit__()
            return None

    def _times_ns(self, wake: IO[bytes]) -> tuple[float, float] | None:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})
        try:
            self._shared[_OURS] = self._shared[_THEIRS] = 0
            wake.write(b"x")
            there = self._quickest_ns(_OURS, _THEIRS)
            alone = self._quickest_ns(_ALONE, _ALONE)
            return None if there is None or alone is None else (there, alone)
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
