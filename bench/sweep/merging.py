"""Run folders of a sweep: the units of one kind of hosts, as `report`, `compare` and `recommend` read any run.

Figures are copied, never averaged. Hosts of another kind have another folder, and so has the repeat on another host.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.analysis import comparability
from bench.analysis.roofline import Ceilings
from bench.plan.cases import Suite
from bench.records import durable
from bench.records.folder import RunFolder
from bench.records.raw_csv import ENERGY, RAW_FILES
from bench.records.reader import read_environment
from bench.sweep.folder import StoredUnit
from bench.sweep.hosts import HostKind
from bench.sweep.units import SweepUnit


@dataclass(frozen=True)
class MergedRun:
    """A run folder that grows unit by unit.

    Attributes:
        path: the folder.
        kind: of its hosts.
        suite: as the command line wanted it.
        units: that it will have.
        threads: of its cases.
        command: the command line of the sweep.
    """

    path: Path
    kind: HostKind
    suite: Suite
    units: Sequence[SweepUnit]
    threads: int
    command: str

    def rebuild(self, stored: Sequence[StoredUnit]) -> None:
        """Put the folder together again.

        Raises:
            OSError: when something cannot be written; the units are safe.
        """
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir(parents=True)
        planned = [dataclasses.asdict(found.case) for unit in self.units for found in unit.cases_with(self.threads)]
        RunFolder(self.path).write_json("plan.json", {"suite": dataclasses.asdict(self.suite), "cases": planned})
        for number, _ in enumerate(stored, start=1):
            self.add(stored[:number], last=number == len(stored))

    def add(self, stored: Sequence[StoredUnit], *, last: bool = True) -> None:
        """Add the last of some units, whose others are there: raw values first, as a record says that they are there.

        Args:
            stored: all units of the folder, with the new one.
            last: whether no other follows at once, so that tables are made.
        """
        folder, new = RunFolder(self.path), stored[-1].path
        for file in (*RAW_FILES, ENERGY):
            if rows := list(file.rows(new)):
                folder.append_rows(file, rows)
        if last:
            folder.write_json("environment.json", self._environment(stored))
        durable.append(folder.records_path, (new / "records.jsonl").read_bytes())
        if last:
            folder.write_table()

    def _environment(self, stored: Sequence[StoredUnit]) -> dict[str, Any]:
        """Return what the units have in common, and what is particular to each host."""
        found = [(unit, read_environment(unit.path)) for unit in stored]
        known = [facts for _, facts in found if facts]
        merged: dict[str, Any] = dict(known[0]) if known else self._bare()
        for of_one_host in ("load", "energy"):
            merged.pop(of_one_host, None)
        ceilings: dict[str, Ceilings] = {}
        needs: dict[str, Any] = {}
        own_time_s: dict[str, float] = {}
        for facts in known:
            for device, section in (facts.get("ceilings") or {}).items():
                new = Ceilings.of(section)
                ceilings[device] = ceilings[device].best_of(new) if device in ceilings else new
            needs |= facts.get("needs") or {}
            for name, seconds in (facts.get("run", {}).get("own_time_s") or {}).items():
                own_time_s[name] = round(own_time_s.get(name, 0.0) + seconds, 3)
        merged |= {"ceilings": {device: limits.as_json() for device, limits in ceilings.items()}, "needs": needs}
        merged["run"] = {
            "suite": self.suite.name,
            "command": self.command,
            "budget_s": self.suite.budget_s,
            "interval": self.suite.interval,
            "processes": self.suite.processes,
            "case_limit_s": self.suite.case_limit_s,
            "plugins": merged.get("run", {}).get("plugins", {}),
            "own_time_s": own_time_s,
            # Each by the clock of its own host; times of two hosts are added, never subtracted.
            "duration_s": round(sum(unit.wall_s or 0.0 for unit in stored), 1),
            "kind": self.kind.key,
            "hosts": sorted({unit.host for unit in stored}),
        }
        merged["units"] = [
            {"unit": unit.unit, "host": unit.host, "hostname": unit.hostname, "ended": unit.ended,
             "wall_s": unit.wall_s, "seed": facts.get("run", {}).get("seed"), "load": facts.get("load"),
             "energy": facts.get("energy")}
            for unit, facts in found
        ]  # fmt: skip
        merged["host_differences"] = host_differences(found)
        return merged

    def _bare(self) -> dict[str, Any]:
        """Facts of the kind only, if no unit got so far as to write its own."""
        machine = {name: value for name, value in self.kind.facts.items() if name not in {"software", "usable_cores"}}
        return {"machine": machine, "software": dict(self.kind.facts.get("software", {})), "threads": {}, "git": {}}


def host_differences(found: Sequence[tuple[StoredUnit, dict[str, Any]]]) -> list[str]:
    """Differences of a kind's hosts in what does not make them another kind, such as memory and governor.

    Args:
        found: units with their environment.json.
    """
    first: dict[str, dict[str, Any]] = {}
    for unit, facts in found:
        if facts:
            first.setdefault(unit.host, facts)
    if not first:
        return []
    (base_name, base), *others = first.items()
    lines = []
    for name, facts in others:
        told = (*map(str, comparability.hardware(base, facts)), *map(str, comparability.state(base, facts)))
        lines += [f"{base_name} against {name}: {line}" for line in dict.fromkeys(told)]
    return lines
