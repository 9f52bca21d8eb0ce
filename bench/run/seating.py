"""Seats as the parent sees them: the processes that a group's variants take their turns in.

A process stands still unless one of its variants has the turn: it is stopped, so that threads that go on spinning after
a call, and whatever else it does, take nothing from the one that is timed. Variants that run on torch's own threads
share a process, where what processes differ by (heap, placement) cancels in their ratios; what brings threads or an
environment of its own has a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from bench.plan.cases import Case
from bench.records.block import Turn
from bench.run.clock_check import Watch
from bench.run.worker_process import Event, Home, Settings, Worker, WorkerError
from bench.timing.rounds import Player

#: Stage of a seating in which a process starts, reported as the worker reports its own stages.
STARTS = "starts"
#: Starts a worker; a context manager, inside which it lives.
Start = Callable[[Settings], Worker]


@dataclass(frozen=True)
class Place:
    """Cases that share one process.

    Attributes:
        cases: the variants, of one group.
        environment: variables that the process is started with.
        home: interpreter and checkout of the process; None for those of the settings.
    """

    cases: tuple[Case, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    home: Home | None = None

    def settings(self, common: Settings) -> Settings:
        """Settings of its process, from those of all."""
        found = common.with_environment(self.environment)
        return found if self.home is None else dataclasses.replace(found, home=self.home)


class Placed(Protocol):
    """Facts of a case that decide which process it gets."""

    @property
    def case(self) -> Case:
        """The case."""

    @property
    def alone(self) -> bool:
        """Return whether it takes its turns in a process of its own."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables that its process is started with."""


def places(cases: Iterable[Placed]) -> list[Place]:
    """Return the processes: one for all cases that run on torch's threads, one more for each of the others."""
    cases = list(cases)
    together = tuple(found.case for found in cases if not found.alone)
    apart = [Place((found.case,), found.environment) for found in cases if found.alone]
    return [*([Place(together)] if together else []), *apart]


@dataclass
class Seat:
    """A process in which variants take turns.

    Attributes:
        number: from 0, in its seating.
        worker: the process.
        limit_s: longest time that it may be silent, seconds.
        watch: the turns that it took.
    """

    number: int
    worker: Worker
    limit_s: float
    watch: Watch = field(default_factory=Watch)

    @contextlib.contextmanager
    def going(self) -> Iterator[None]:
        """Let the process continue, and stop it again."""
        self.worker.go_on()
        try:
            yield
        finally:
            self.worker.stop()

    def turn(self, name: str) -> Turn:
        """Give a turn to what is ready under a name.

        Raises:
            WorkerError: naming it, when the process fails.
        """
        with self.going():
            before, asked_s = self.worker.queued(), time.perf_counter()
            try:
                (event,) = self.worker.ask("turn", self.limit_s, name=name)
            except WorkerError as error:
                raise dataclasses.replace(error, variant=error.variant or name) from error
            answered_s = time.perf_counter()
            queued = self.worker.queued().since(before)
        turn = Turn.of(event)
        return dataclasses.replace(turn, late_s=self.watch.add(turn, asked_s, answered_s, queued))


@dataclass(frozen=True)
class Seated(Player):
    """A variant in its seat."""

    name: str
    at: Seat

    @property
    def seat(self) -> int:
        """Number of the process in which it takes its turns."""
        return self.at.number

    def turn(self) -> Turn:
        """Take a turn while all others stand still."""
        return self.at.turn(self.name)


class Seating:
    """One full set of fresh seats for the variants of a group; a context manager, inside which they live.

    Args:
        places: what sits where.
        start: starts the process of a place.
        settings: of all processes.
        limit_s: longest time that one may be silent, seconds.
        told: takes the events of builds, gates and stages.
        turns: fields of the request that makes variants ready: `block_s`, `energy`.
    """

    def __init__(
        self,
        places: Sequence[Place],
        start: Start,
        settings: Settings,
        limit_s: float,
        told: Callable[[Event], object],
        *,
        turns: Mapping[str, Any] | None = None,
    ) -> None:
        self._places, self._start, self._settings = places, start, settings
        self._limit_s, self._told, self._turns = limit_s, told, dict(turns or {})
        self._stack = contextlib.ExitStack()
        self.seats: list[Seat] = []
        self.players: dict[str, Seated] = {}

    def __enter__(self) -> Self:
        """Start nothing yet."""
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes."""
        self._stack.close()

    def sit(self, seed: int, *, audit: bool = True) -> None:
        """Start the processes and make all variants ready, one after the other; one that fails the gate gets no turns.

        Args:
            seed: of the gate's problem.
            audit: whether the timed calls are audited too, here and by `stand`.

        Raises:
            WorkerError: when a process fails.
        """
        for place in self._places:
            self._told({"event": "stage", "name": STARTS})
            worker = self._stack.enter_context(self._start(place.settings(self._settings)))
            seat = Seat(len(self.seats), worker, self._limit_s)
            self.seats.append(seat)
            with seat.going():
                cases = [dataclasses.asdict(case) for case in place.cases]
                passed = self._asked(seat, "sit", cases=cases, seed=seed, audit=audit, **self._turns)
            self.players |= {name: Seated(name, seat) for name in passed}

    def stand(self, seed: int) -> None:
        """Gate all variants again, after the rounds.

        Raises:
            WorkerError: when a process fails.
        """
        for seat in self.seats:
            with seat.going():
                self._asked(seat, "stand", seed=seed)

    def doubts(self) -> dict[str, str]:
        """Reasons why samples cannot be true, by variant: who shares a process shares its clock."""
        found = {name: player.at.watch.doubt() for name, player in self.players.items()}
        return {name: reason for name, reason in found.items() if reason}

    def _asked(self, seat: Seat, request: str, **fields: Any) -> list[str]:
        """Send a request, hand on its events; the variants that passed the gate in it."""
        passed = []
        for event in seat.worker.ask(request, self._limit_s, **fields):
            self._told(event)
            if event["event"] == "gate" and event["passed"]:
                passed.append(event["variant"])
        return passed
