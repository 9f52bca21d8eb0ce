"""Pairs as the parent sees them: a few workers that stay, each of which gives a part of every pair's rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.analysis.figures import speedup
from bench.analysis.intervals import Interval
from bench.plan.cases import BASE, OTHER, Case
from bench.records.rounds import Samples
from bench.run.seating import Seat, Seated
from bench.run.worker_process import Event, Settings, Worker, scratch_folder
from bench.timing.rounds import rounds

#: Seconds without a word after which a worker is given up.
LIMIT_S = 300.0


@dataclass(frozen=True)
class Pair:
    """One variant measured against itself.

    Attributes:
        case: what was measured.
        speedup: of the second name over the first, with its interval.
        rounds: rounds of all processes.
        noticed: rounds that something else disturbed.
        kept_disturbed: those of them that were still used, for lack of undisturbed ones.
        planted_share: extra work of the second name, measured apart, as a share of a call; 0 without.
        call_s: median time of a call of the first name, seconds.
        wall_s: what the pair took in all, seconds.
    """

    case: Case
    speedup: Interval
    rounds: int
    noticed: int
    kept_disturbed: int
    planted_share: float
    call_s: float
    wall_s: float

    @property
    def error(self) -> float:
        """Distance of the ratio from 1, that of a variant with itself."""
        return abs(self.speedup.value - 1)

    @property
    def holds_one(self) -> bool:
        """Return whether the interval holds the truth of a pair without extra work."""
        return self.speedup.low <= 1 <= self.speedup.high

    @property
    def marked(self) -> bool:
        """Return whether a run would show the figure as doubtful."""
        return self.kept_disturbed > 0


class Bench:
    """Workers that stay for many pairs, so that their start is paid once.

    Args:
        workers: that are up; each stands still whenever it is not asked.
    """

    def __init__(self, workers: list[Worker]) -> None:
        self._seats = [Seat(number, worker, LIMIT_S) for number, worker in enumerate(workers)]
        for worker in workers:
            worker.stop()
        self._seed = 0

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self._seats)

    def pair(self, case: Case, budget_s: float, slowdown: float = 0.0) -> Pair:
        """Measure one pair in all workers, one after the other.

        Args:
            case: whose `variant` is measured under two names.
            budget_s: seconds of rounds in all.
            slowdown: extra work of the second name as a share of a call.

        Raises:
            WorkerError: when a worker fails.
        """
        start = time.perf_counter()
        events = self.ask_all("pair", case=dataclasses.asdict(case), slowdown=slowdown)
        planted = [event["share"] for event in itertools.chain(*events) if event["event"] == "planted"]
        return self._pair(case, budget_s, sum(planted) / len(planted), start)

    def interleaved(self, case: Case, budget_s: float) -> Pair:
        """Our rounds over a pair that the workers have prepared."""
        return self._pair(case, budget_s, 0.0, time.perf_counter())

    def ask_all(self, part: str, **fields: Any) -> list[list[Event]]:
        """Send a request of the self-test to each worker in turn; their events, one list per worker.

        Raises:
            WorkerError: when a worker fails.
        """
        answers = []
        for seat in self._seats:
            with seat.going():
                answers.append(list(seat.worker.ask("selftest", LIMIT_S, part=part, **fields)))
        return answers

    def _pair(self, case: Case, budget_s: float, planted: float, start: float) -> Pair:
        """Rounds over the pair that each worker has ready, one worker after the other."""
        processes = []
        for seat in self._seats:
            players = {name: Seated(name, seat) for name in (BASE, OTHER)}
            self._seed += 1
            processes.append(list(rounds(players, case.device, budget_s / len(self._seats), self._seed)))
        return _pair(case, Samples(processes), planted, time.perf_counter() - start)


def _pair(case: Case, samples: Samples, planted: float, wall_s: float) -> Pair:
    ratio = speedup(samples, BASE, OTHER)
    assert ratio is not None  # noqa: S101 - every process gives rounds
    taken = [r for process in samples.processes for r in process]
    kept = [r for process in samples.kept() for r in process]
    calls = sorted(r.blocks[BASE].typical_s for r in kept)
    return Pair(
        case=case,
        speedup=ratio,
        rounds=len(taken),
        noticed=sum(r.disturbed for r in taken),
        kept_disturbed=sum(r.disturbed for r in kept),
        planted_share=planted,
        call_s=calls[len(calls) // 2],
        wall_s=wall_s,
    )


@contextlib.contextmanager
def bench(settings: Settings, processes: int, folder: Path) -> Iterator[Bench]:
    """Start the workers of a self-test and end them.

    Args:
        settings: of all of them.
        processes: how many.
        folder: for their log.
    """
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(scratch_folder())
        workers = [stack.enter_context(Worker(settings, folder / "workers.log", scratch)) for _ in range(processes)]
        yield Bench(workers)
