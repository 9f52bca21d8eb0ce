"""The queue in front of a served variant: queries come one by one, and leave in batches.

A batch leaves when it is as large as batches may be, or when its oldest query has waited long enough. Where lengths are
bucketed, only queries of about the same length share one, so that less of it is padding.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

#: Buckets of lengths, with about as many queries each.
BUCKETS = 4


@dataclass(frozen=True)
class Query:
    """A query: LoadGen's number of it, which sequence it asks about, and when it came in."""

    number: int
    sample: int
    came_s: float


class BatchingQueue:
    """Queries that wait to be batched; filled by one thread, emptied by another.

    Args:
        largest: most queries in a batch.
        wait_s: longest that the oldest query waits for company, seconds.
        bucket_of: bucket of a sample; batches hold queries of one bucket.
        clock: time now, seconds.
    """

    def __init__(
        self,
        largest: int,
        wait_s: float,
        bucket_of: Callable[[int], int] = lambda _: 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._largest, self._wait_s, self._bucket_of, self._clock = largest, wait_s, bucket_of, clock
        self._changed = threading.Condition()
        self._buckets: dict[int, deque[Query]] = {}
        self._closed = False

    def put(self, queries: Iterable[tuple[int, int]]) -> None:
        """Add queries: number and sample of each."""
        now = self._clock()
        with self._changed:
            for number, sample in queries:
                self._buckets.setdefault(self._bucket_of(sample), deque()).append(Query(number, sample, now))
            self._changed.notify()

    def close(self) -> None:
        """Take no more; what waits still leaves."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self) -> list[Query]:
        """Wait for a batch; empty when the queue is closed and nothing is left."""
        with self._changed:
            while True:
                found, wait_s = self._ready()
                if found is not None:
                    return [found.popleft() for _ in range(min(self._largest, len(found)))]
                if self._closed and wait_s is None:
                    return []
                self._changed.wait(wait_s)

    def _ready(self) -> tuple[deque[Query] | None, float | None]:
        """The bucket that a batch can leave from, or how long until its oldest query has waited enough."""
        waiting = sorted((bucket for bucket in self._buckets.values() if bucket), key=lambda bucket: bucket[0].came_s)
        if not waiting:
            return None, None
        # Whoever has waited long enough goes first: full batches of other lengths may come without end.
        left_s = waiting[0][0].came_s + self._wait_s - self._clock()
        if left_s <= 0 or self._closed:
            return waiting[0], None
        full = next((bucket for bucket in waiting if len(bucket) >= self._largest), None)
        return full, None if full else left_s


def buckets(lengths: Sequence[int], count: int = BUCKETS) -> Callable[[int], int]:
    """Give each sample its bucket, of which each holds about as many samples; equal lengths share one.

    Args:
        lengths: of each sample.
        count: buckets.
    """
    ordered = sorted(lengths)
    edges = sorted({ordered[len(ordered) * place // count] for place in range(1, count)})
    found = [bisect.bisect_left(edges, length) for length in lengths]
    return found.__getitem__


@dataclass
class BatchCounts:
    """Counts of what was served.

    Attributes:
        batches, queries: how many; of serving by step, steps instead of batches.
        together: queries in all batches, or in all steps.
        valid_steps, computed_steps: steps of the queries, and steps that their batches computed.
        busy_s: time in which the variant was at work, seconds.
    """

    batches: int = 0
    queries: int = 0
    together: int = 0
    valid_steps: int = 0
    computed_steps: int = 0
    busy_s: float = 0.0

    def add(self, lengths: Sequence[tuple[int, ...]], busy_s: float) -> None:
        """Count a batch whose queries have these lengths, one number a tensor."""
        self.batches += 1
        self.queries += len(lengths)
        self.together += len(lengths)
        for steps in zip(*lengths, strict=True):
            self.valid_steps += sum(steps)
            self.computed_steps += len(steps) * max(steps)
        self.busy_s += busy_s

    def add_step(self, together: int, finished: int, busy_s: float) -> None:
        """Count a step of this many queries, some of which are done."""
        self.batches += 1
        self.together += together
        self.queries += finished
        self.busy_s += busy_s

    @property
    def waste(self) -> float:
        """Share of the computed steps that were padding."""
        return 1 - self.valid_steps / self.computed_steps if self.computed_steps else 0.0
