"""Nodes that measure nothing: made-up runs, at once, and nodes that are lost when a test says so."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from run_folders import FACTS, make_run

from bench.__main__ import parser
from bench.plan.cases import Case, Selection, Suite
from bench.records.folder import RunFolder
from bench.records.raw_csv import ENERGY, ROUNDS
from bench.records.reader import read_environment
from bench.records.schema import ENERGY_COLUMNS, ROUND_COLUMNS, Status
from bench.run.planning import Described
from bench.sweep import command
from bench.sweep.hosts import HostKind, kind_of
from bench.sweep.node import KEPT
from bench.sweep.pulling import JobEnd, SweepNode, UnitJob
from bench.sweep.units import SweepUnit

VARIANTS = ("reference", "onednn", "absent")
TOLD: dict[str, Any] = {
    "hostname": "made",
    "machine_id": "made",
    "machine": {
        "architecture": "x86_64",
        "processor": "Some CPU @ 2.20GHz",
        "stepping": "family 6, model 1, stepping 2",
        "caches": {"L1 data": "48K", "L2 unified": "2048K"},
        "vector_flags": ["avx2", "fma"],
        "cores_physical": 2,
        "cores_logical": 4,
        "cpu_quota": "none",
        "gpu": "none",
        "frequency_mhz": 2200,
        "memory_bytes": 16_000_000_000,
    },
    "software": {"python": "3.11.7", "torch": "2.13.0", "matplotlib": "3.9"},
    "usable_cores": 2,
    "code": "code",
    "commit": "0123456789abcdef",
    "plugins": [],
    "niceness": 0,
}
#: Two kinds that differ in the number of cores.
SMALL = kind_of(TOLD)
LARGE = kind_of(TOLD | {"usable_cores": 8})


def node(name: str, kind: HostKind = SMALL) -> SweepNode:
    """A node of a kind."""
    return SweepNode(name, f"id-{name}", f"host-{name}", kind)


def made_units(count: int, expected_s: float = 1.0) -> tuple[SweepUnit, ...]:
    """Units of a workload each, with three variants."""
    found = []
    for number in range(1, count + 1):
        cases = [Case(f"seed@batch={number}", variant, "inference", "cpu", 1) for variant in VARIANTS]
        described = tuple(Described(case, dict(FACTS), None) for case in cases)
        select = (Selection((cases[0].workload,), VARIANTS, ("inference",)),)
        suite = Suite("made", "", select, budget_s=1.0, device="cpu")
        found.append(SweepUnit(number, suite, described, expected_s))
    return tuple(found)


class FakeCluster:
    """Nodes in memory; a job ends at the next look, unless its node was lost meanwhile.

    Args:
        nodes: that are there at first.
        folder: for the made-up runs.
        before_end: called with each job and its node before it ends; what it returns ends it instead, as the reason
            why the node was lost, or as a result.
    """

    def __init__(
        self,
        nodes: Sequence[SweepNode],
        folder: Path,
        before_end: Callable[[UnitJob, SweepNode], str | dict[str, Any] | None] = lambda _job, _node: None,
    ) -> None:
        self.there = {found.name: found for found in nodes}
        self.folder = folder
        self.before_end = before_end
        self.begun: list[tuple[UnitJob, str]] = []
        self.running: dict[str, tuple[UnitJob, SweepNode, dict[str, Any]]] = {}
        self.cancelled = False
        self.others = 0.0
        self.power_w: dict[str, float] = {}
        self._number = 0

    @contextlib.contextmanager
    def connected(self) -> Iterator[FakeCluster]:
        """Nothing to reach."""
        yield self

    def nodes(self) -> Sequence[SweepNode]:
        """Nodes that are not lost."""
        return list(self.there.values())

    def begin(self, job: UnitJob, node: SweepNode, request: dict[str, Any]) -> None:
        """One at a time."""
        assert node.name not in self.running, "a node got two units at a time"
        self.begun.append((job, node.name))
        self.running[node.name] = (job, node, request)

    def ended(self, wait_s: float) -> Sequence[JobEnd]:
        """The one that began first, so that others are under way while it is kept."""
        assert wait_s > 0
        for name, (job, found, request) in list(self.running.items()):
            del self.running[name]
            instead = self.before_end(job, found)
            if isinstance(instead, str):
                self.there.pop(name, None)
                return [JobEnd(job, found, None, instead)]
            return [JobEnd(job, found, instead or self.measured(found, request))]
        return []

    def cancel(self) -> None:
        """Note that it was asked for."""
        self.cancelled = True

    def measured(self, found: SweepNode, request: dict[str, Any]) -> dict[str, Any]:
        """The files of a made-up run of a unit: `absent` is one that cannot run."""
        self._number += 1
        threads = request["threads"] or found.kind.threads
        path = make_run(
            self.folder / str(self._number),
            workloads=(request["cases"][0]["workload"],),
            speedups={"reference": 1.0, "onednn": 2.0},
            failed={"absent": (Status.UNAVAILABLE, "made up")},
            threads=threads,
            rounds=8,
            processes=2,
            figured=True,
            drift=1.0 + 0.1 * (found.name == "slow"),
            seed=self._number,
        )
        case = Case(request["cases"][0]["workload"], "reference", "inference", "cpu", threads)
        values = {"group": case.group, "wall_s": 1.0, "others_share": self.others, "why": "others" * bool(self.others)}
        row = dict.fromkeys(ROUND_COLUMNS, 0) | values
        RunFolder(path).append_rows(ROUNDS, [[row[name] for name in ROUND_COLUMNS]])
        if power_w := self.power_w.get(found.name):
            values = dict.fromkeys(ENERGY_COLUMNS, 1) | request["cases"][0] | {"energy_j": power_w, "threads": threads}
            RunFolder(path).append_rows(ENERGY, [[values[name] for name in ENERGY_COLUMNS]])
            facts = read_environment(path) | {"energy": {"cpu": {"source": "made", "power_w": power_w}}}
            RunFolder(path).write_json("environment.json", facts)
        files = {name: (path / name).read_bytes() for name in KEPT if (path / name).is_file()}
        return {"files": files, "ended": "done", "reason": "", "wall_s": 3.0}


def arguments(*words: str) -> argparse.Namespace:
    """Options of a sweep."""
    return parser().parse_args(["sweep", *words])


def plan_made(monkeypatch, count: int = 3, expected_s: float = 1.0) -> tuple[SweepUnit, ...]:
    """Have sweeps measure made-up units, without a worker that knows the names; nor is a page drawn."""
    units = made_units(count, expected_s)
    suite = Suite("made", "", tuple(part for unit in units for part in unit.suite.select), budget_s=3.0)
    monkeypatch.setattr(command, "_planned", lambda _options, _console: (suite, units))
    monkeypatch.setattr(command.summary, "pages", lambda *_: None)
    return units


def told(**machine: Any) -> dict[str, Any]:
    """What a host says of itself, with other facts of its machine."""
    return TOLD | {"machine": TOLD["machine"] | machine}
