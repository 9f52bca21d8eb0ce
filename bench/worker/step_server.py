"""Serving by step in the child: queries join and leave rows of a variant between steps, and none waits for a batch.

In the mode `decode` each is fed with what it generates, until its end token.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor

from bench.gate import batched
from bench.gate.decoded_rows import check_decoded
from bench.gate.tolerance import limit_for
from bench.plan.cases import Case
from bench.records.wire import ANSWER
from bench.timing import clock
from bench.worker.batching_queue import BatchCounts
from bench.worker.serving import SERVERS, WARM_CALLS, Server
from seq2seq.decoding.rows import DecodingRows, StepRows
from seq2seq.execution.variants import VARIANTS


class JoiningQueue:
    """Queries that wait for a free row, in the order in which they came; filled by one thread, emptied by another."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[tuple[int, int]] = deque()
        self._closed = False

    def put(self, queries: Iterable[tuple[int, int]]) -> None:
        """Add queries: number and sample of each."""
        with self._changed:
            self._waiting.extend(queries)
            self._changed.notify()

    def close(self) -> None:
        """Take no more; what waits still leaves."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, most: int, *, wait: bool) -> list[tuple[int, int]]:
        """Take the oldest queries.

        Args:
            most: how many.
            wait: whether to wait for the first where none is there; then nothing comes only once the queue is closed.
        """
        with self._changed:
            while wait and not self._waiting and not self._closed:
                self._changed.wait()
            return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]


class StepServer(Server):
    """A variant whose rows queries join and leave."""

    @staticmethod
    def refuses(case: Case) -> str | None:
        """Reason why a variant cannot take single steps, or None."""
        variant = VARIANTS[case.executed]
        if variant.runtime is not None:
            return f"its runtime ({variant.runtime}) is given whole sequences, and keeps no state between calls"
        if variant.compiler is not None:
            return f"it compiles whole sequences ({variant.compiler}), and single steps would run without that"
        if case.mode == "decode" and variant.captures_step:
            return "it captures the step of a whole batch as one CUDA graph, and rows would run without that"
        return None

    def refuses_model(self) -> str | None:
        """Reason why no query can go through its model a step at a time, or None."""
        if not self.executable.model.streams():
            return "its model is no chain of LSTMs of one direction, so a query cannot go through it a step at a time"
        if self.case.mode == "decode" and not self.executable.model.config.target_vocabulary:
            return "its decoder generates values and no tokens, so no end token ends a query"
        if self.case.mode == "decode" and self.executable.beam > 1:
            return f"its workload asks for a beam of {self.executable.beam}, and rows decode greedily"
        return None

    @property
    def sequences(self) -> batched.QueryLibrary:
        """The queries, which are sequences of a workload of this project."""
        return cast("batched.QueryLibrary", self.library)

    def rows(self, count: int) -> StepRows:
        """Free rows over the library; call it inside `settings`."""
        kind = DecodingRows if self.case.mode == "decode" else StepRows
        prepared = self.executable.prepare(self.sequences.batch)
        return kind(self.executable.model, prepared, self.library.lengths, count)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Everything that holds while steps are taken."""
        with self.executable.context(), self.executable.casting():
            yield

    def check_together(self, parity_limit: float, seed: int) -> batched.Batched:
        """Compare queries that join and leave with themselves alone."""
        with self.settings():
            rows = self.rows(self.largest)
            if not isinstance(rows, DecodingRows):
                return batched.check_rows(rows, self.run, self.sequences, parity_limit, seed)
            precision = self.executable.variant.precision
            yardsticks = self.gate.quantities(seed, precision)
            outputs, scores = (limit_for(float(yardsticks[name]), precision) for name in ("outputs", "scores"))
            config = self.executable.model.config
            return check_decoded(rows, self.forced, config, self.sequences, (outputs, scores), seed)

    def forced(self, batch: Any) -> Tensor:
        """Outputs of a batch whose decoder reads a given target; call it inside the executable's context."""
        return self.executable.forward(self.executable.prepare(batch)).outputs

    def warm_up(self) -> tuple[float, float]:
        """Answer one query in one row, and as many as there are rows together; returns the seconds of each."""
        took_s = []
        for count in (1, self.largest):
            with self.settings():
                rows = self.rows(count)
                for _ in range(WARM_CALLS):
                    start = time.perf_counter()
                    for query in range(count):
                        rows.join(query, query % len(self.library.lengths))
                    while rows.active:
                        rows.advance()
                    clock.synchronize(self.case.device)
                took_s.append(time.perf_counter() - start)
        return took_s[0], took_s[-1]

    def make_queue(self, scenario: str) -> JoiningQueue:
        """The queue of a test; one query after the other needs one row."""
        self._count = 1 if scenario == "single-stream" else self.largest
        return JoiningQueue()

    def serve(self, queue: Any, connected: socket.socket) -> BatchCounts:
        """Answer what comes, until the queue is closed and empty."""
        served = BatchCounts()
        with self.settings():
            rows = self.rows(self._count)
            while True:
                joining = queue.take(rows.free, wait=not rows.active)
                for number, sample in joining:
                    rows.join(number, sample)
                if not rows.active:
                    break
                self.energy.begin()
                start = time.perf_counter()
                together = rows.active
                finished = rows.advance()
                clock.synchronize(self.case.device)
                served.add_step(together, len(finished), time.perf_counter() - start)
                # A generator that was ended before its answers came is not this process's concern.
                with contextlib.suppress(OSError):
                    if finished:
                        connected.sendall(b"".join(ANSWER.pack(query.query) for query in finished))
                if finished:
                    self.energy.answered(len(finished))
        served.valid_steps, served.computed_steps = rows.valid, rows.computed
        return served


SERVERS["step"] = StepServer
