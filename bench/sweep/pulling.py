"""Decides which node measures what next: nodes pull units one at a time, and the unit of a lost node goes to another.

The nodes are behind `Executor`, so that the same code drives a Ray cluster and the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.sweep.hosts import HostKind
from bench.sweep.units import SweepUnit

#: Nodes that may be lost while they measure a unit before it is recorded as crashed: it may be what ends them.
MOST_LOSSES = 3
#: Seconds for which no node may be there that could measure what is left.
PATIENCE_S = 60.0
#: Seconds between two looks at who is there.
LOOK_S = 2.0


@dataclass(frozen=True)
class SweepNode:
    """A machine of the cluster that measures.

    Attributes:
        name: distinguishes it from the others, and stays the same when the cluster is started again.
        node_id: of the cluster.
        hostname: as the machine calls itself.
        kind: what computes there.
    """

    name: str
    node_id: str
    hostname: str
    kind: HostKind


@dataclass(frozen=True)
class UnitJob:
    """One measurement of a unit.

    Attributes:
        number: of the unit.
        kind: key of the kind of hosts.
        repeat: 1, and on another host of the kind 2 and so on.
    """

    number: int
    kind: str
    repeat: int


@dataclass(frozen=True)
class JobEnd:
    """End of a job on a node.

    Attributes:
        job, node: which, and where.
        result: what `bench.sweep.node.measure_unit` returned; None where the node was lost.
        lost: why there is no result.
    """

    job: UnitJob
    node: SweepNode
    result: dict[str, Any] | None
    lost: str = ""


class Executor(Protocol):
    """Nodes that measure: `bench.sweep.cluster.RayCluster`."""

    def nodes(self) -> Sequence[SweepNode]:
        """Nodes that are there now and may measure."""

    def begin(self, job: UnitJob, node: SweepNode, request: dict[str, Any]) -> None:
        """Have a node measure a job."""

    def ended(self, wait_s: float) -> Sequence[JobEnd]:
        """Jobs that ended since the last call; waits up to some seconds for the first."""


@dataclass
class Pulling:
    """Hands the jobs of a sweep out to nodes until all are done, or none can be.

    Attributes:
        units: what is measured.
        kinds: keys of the kinds of hosts that each measure all of it.
        repeats: hosts of a kind that measure each unit.
        executor: the nodes.
        request: what a node is asked for a unit.
        keep: takes the result of a job, with the node that it came from.
        lose: takes a job whose node was lost.
        say: takes lines for people.
        deadline_s: time of `time.perf_counter` after which nothing begun should end, but for the first.
        done: jobs that are done, with the names of their hosts.
        losses: names of the nodes that were lost with each job.
        patience_s: as `PATIENCE_S`.
    """

    units: Sequence[SweepUnit]
    kinds: Sequence[str]
    repeats: int
    executor: Executor
    request: Callable[[SweepUnit], dict[str, Any]]
    keep: Callable[[UnitJob, SweepNode, dict[str, Any]], None]
    lose: Callable[[JobEnd], None]
    say: Callable[[str, str], None]
    deadline_s: float
    done: dict[UnitJob, str] = field(default_factory=dict)
    losses: dict[UnitJob, list[str]] = field(default_factory=dict)
    patience_s: float = PATIENCE_S
    _running: dict[str, UnitJob] = field(default_factory=dict, init=False)
    _begun_any: bool = field(default=False, init=False)

    @property
    def left(self) -> list[UnitJob]:
        """Jobs that are neither done nor under way: each unit once before any is repeated."""
        under_way = set(self._running.values())
        every = (
            UnitJob(unit.number, kind, repeat)
            for repeat in range(1, self.repeats + 1)
            for unit in self.units
            for kind in self.kinds
        )
        return [job for job in every if job not in self.done and job not in under_way]

    def run(self) -> bool:
        """Hand out jobs until all are done; returns whether they are.

        False when the time is over, or when no node has been there for what is left for `patience_s`.
        """
        idle_since_s = time.perf_counter()
        while self.left or self._running:
            begun = self._hand_out()
            if self._running:
                idle_since_s = time.perf_counter()
            elif not begun and (self._all_late() or time.perf_counter() - idle_since_s > self.patience_s):
                return False
            for end in self.executor.ended(min(LOOK_S, self.patience_s)):
                self._take(end)
        return True

    def _hand_out(self) -> bool:
        """Give every free node a job, where there is one for it."""
        nodes = self.executor.nodes()
        begun = False
        for node in nodes:
            if node.name in self._running:
                continue
            job = next((job for job in self.left if self._fits(job, node, nodes) and not self._late(job)), None)
            if job is None:
                continue
            unit = self._unit(job)
            again = f" again, after the loss of {', '.join(self.losses[job])}" if self.losses.get(job) else ""
            repeat = f", repeat {job.repeat}" if self.repeats > 1 else ""
            self.say(f"{node.name}: {unit.name} begins{repeat}{again}", "")
            self._running[node.name] = job
            self._begun_any = begun = True
            self.executor.begin(job, node, self.request(unit))
        return begun

    def _fits(self, job: UnitJob, node: SweepNode, nodes: Iterable[SweepNode]) -> bool:
        """Return whether a node may have a job: of its kind, no repeat on the same host, elsewhere after a loss."""
        if job.kind != node.kind.key or node.name in self._hosts_of(job):
            return False
        lost = self.losses.get(job, [])
        others = (other for other in nodes if other.kind.key == job.kind and other.name not in {node.name, *lost})
        return node.name not in lost or not any(other.name not in self._hosts_of(job) for other in others)

    def _hosts_of(self, job: UnitJob) -> set[str]:
        """Hosts that measured the job's unit for another repeat, or are measuring it."""
        at_it = [*self.done.items(), *((found, name) for name, found in self._running.items())]
        return {name for found, name in at_it if (found.number, found.kind) == (job.number, job.kind)}

    def _late(self, job: UnitJob) -> bool:
        """Return whether a job is not expected to end in time; the first is always begun, to make progress."""
        return self._begun_any and time.perf_counter() + self._unit(job).expected_s > self.deadline_s

    def _all_late(self) -> bool:
        return all(self._late(job) for job in self.left)

    def _take(self, end: JobEnd) -> None:
        """Keep a result, or leave the job for another node."""
        if self._running.get(end.node.name) != end.job:
            # Of a job that was given up: another node has it, and a unit may not be there twice.
            return
        del self._running[end.node.name]
        result = end.result
        if result is None:
            self.losses.setdefault(end.job, []).append(end.node.name)
            self.lose(end)
            names = ", ".join(self.losses[end.job])
            if len(self.losses[end.job]) < MOST_LOSSES:
                self.say(f"{end.node.name} was lost with {self._unit(end.job).name}: {end.lost}", "yellow")
                return
            reason = f"{MOST_LOSSES} nodes were lost while they measured it ({names}); the last: {end.lost}"
            result = {"files": {}, "ended": "crashed", "reason": reason, "wall_s": None}
        self.done[end.job] = end.node.name
        self.keep(end.job, end.node, result)

    def _unit(self, job: UnitJob) -> SweepUnit:
        return self.units[job.number - 1]
