"""Accounts for a run's own time: rounds, starts, gates and everything else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

#: What a run spends time on, in the order in which it is reported. Everything else is `other`.
KINDS = (
    "timed rounds", "waiting", "cold runs", "starts", "gates", "warm-up", "ceilings", "second instrument", "quality",
    "other",
)  # fmt: skip


@dataclass
class Stopwatch:
    """Seconds by kind; one kind runs at a time, so that they add up to the run.

    Args:
        clock: returns the time, seconds.
    """

    clock: Callable[[], float] = time.perf_counter
    spent_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0), init=False)

    def __post_init__(self) -> None:
        self._kind, self._since = "other", self.clock()

    def switch(self, kind: str) -> str:
        """Count for another kind from now on; returns the one before.

        Raises:
            KeyError: for a kind that is not in `KINDS`.
        """
        now = self.clock()
        self.spent_s[self._kind] += now - self._since
        before, self._kind, self._since = self._kind, kind, now
        _ = self.spent_s[kind]
        return before

    @contextlib.contextmanager
    def on(self, kind: str) -> Iterator[None]:
        """Count for a kind inside the block."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, source: str, target: str) -> None:
        """Count seconds of one kind for another."""
        self.spent_s[source] -= seconds
        self.spent_s[target] += seconds

    def found(self) -> dict[str, float]:
        """Seconds by kind so far."""
        self.switch(self._kind)
        return {kind: round(seconds, 2) for kind, seconds in self.spent_s.items()}


def told(spent_s: dict[str, float]) -> str:
    """Describe where the time went, largest part first: `timed rounds 52 %, cold runs 21 %, ...`."""
    total = sum(spent_s.values())
    if total <= 0:
        return "nothing was measured"
    shares = sorted(((seconds / total, kind) for kind, seconds in spent_s.items()), reverse=True)
    return ", ".join(f"{kind} {100 * share:.0f} %" for share, kind in shares if share >= 0.005)  # noqa: PLR2004
