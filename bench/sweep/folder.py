"""The folder of a sweep: what it was begun with, every unit as its node measured it, and the run folders made of them.

`units/` is the truth: a unit is done when its folder exists, and that appears atomically. The run folders
under `hosts/` are assembled from it and can be rebuilt at any time.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.plan.validation import validate
from bench.records import durable
from bench.records.folder import RunFolder
from bench.records.schema import Status
from bench.records.tables import now
from bench.run.planning import Described
from bench.sweep.hosts import HostKind
from bench.sweep.pulling import JobEnd, UnitJob
from kernels.host.output import sync_folder

STATE, EVENTS, UNITS, HOSTS = "sweep.json", "events.jsonl", "units", "hosts"
#: Status of the cases that a unit did not get to, by how it ended.
STATUSES = {"timeout": Status.TIMEOUT, "crashed": Status.CRASHED, "failed": Status.ERROR, "done": Status.ERROR}


@dataclass(frozen=True)
class SweepState:
    """Facts that a sweep was begun with, and that must be the same when it is resumed.

    Attributes:
        suite: word of `--suite`.
        options: of the command line, by name.
        units: names of the units, in order.
        kinds: of the hosts.
        repeats: hosts of a kind that measure each unit.
        code: digest of the code.
        commit: of the checkout.
        plugins: digests of the plugins.
        command: the command line.
    """

    suite: str
    options: dict[str, Any]
    units: tuple[str, ...]
    kinds: tuple[HostKind, ...]
    repeats: int
    code: str
    commit: str
    plugins: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class StoredUnit:
    """A unit that was measured, as its `unit.json` has it.

    Attributes:
        path: its folder, a run folder without tables.
        unit: its name.
        number, kind, repeat: of its job.
        host, hostname: where it was measured.
        ended: `done`, `timeout`, `crashed` or `failed`.
        reason: why it is not done.
        wall_s: time that it took by the clock of its host, seconds.
        lost: nodes that were lost with it before.
    """

    path: Path
    unit: str
    number: int
    kind: str
    repeat: int
    host: str
    hostname: str
    ended: str
    reason: str
    wall_s: float | None
    lost: tuple[str, ...]

    @property
    def job(self) -> UnitJob:
        """The job that it is the result of."""
        return UnitJob(self.number, self.kind, self.repeat)


class SweepFolder:
    """One folder that one sweep writes.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, state: SweepState) -> None:
        """Write what the sweep was begun with."""
        content = json.dumps(dataclasses.asdict(state), indent=2) + "\n"
        (self.path / UNITS).mkdir(exist_ok=True)
        durable.replace(self.path / STATE, content.encode())

    def state(self) -> SweepState:
        """Read back what the sweep was begun with.

        Raises:
            UsageError: no sweep was begun in this folder, or its file is not as a sweep writes it.
        """
        path = self.path / STATE
        if not path.is_file():
            msg = f"{self.path} holds no sweep that was begun ({STATE} is missing); begin one with --out {self.path}"
            raise UsageError(msg)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            msg = f"{path} cannot be read ({error}); the sweep cannot be resumed"
            raise UsageError(msg) from error
        return validate(SweepState, data, str(path))

    def lost(self, end: JobEnd) -> None:
        """Write down that a node was lost with a job."""
        event = {"event": "lost", **dataclasses.asdict(end.job), "host": end.node.name, "reason": end.lost}
        durable.append(self.path / EVENTS, (json.dumps({**event, "time": now()}) + "\n").encode())

    def losses(self) -> dict[UnitJob, list[str]]:
        """Names of the nodes that were lost with each job so far; a torn last line does not count."""
        found: dict[UnitJob, list[str]] = {}
        path = self.path / EVENTS
        whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for values in map(json.loads, whole):
            job = UnitJob(values["number"], values["kind"], values["repeat"])
            found.setdefault(job, []).append(values["host"])
        return found

    def store(self, stored: Mapping[str, Any], files: Mapping[str, bytes], planned: Sequence[Described]) -> StoredUnit:
        """Keep the files of a unit, in one step; cases that it did not get to are recorded with the reason.

        Args:
            stored: fields of its `unit.json`.
            files: of its run folder.
            planned: its cases.

        Raises:
            OSError: when something cannot be written; the unit is not there then.
        """
        place = self.path / UNITS / _folder_name(stored)
        new = place.with_name(f".{place.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for name, content in files.items():
            durable.replace(new / name, content)
        try:
            _complete(RunFolder(new), planned, stored)
        except UsageError as error:
            # Files that do not fit together are no result, and end only this unit.
            reason = f"the files that came back do not fit together: {str(error).removeprefix(f'{new}/')}"
            return self.store({**stored, "ended": "failed", "reason": reason}, {}, planned)
        durable.replace(new / "unit.json", (json.dumps(dict(stored), indent=2) + "\n").encode())
        new.replace(place)
        sync_folder(place.parent)
        return _stored(place)

    def stored(self) -> list[StoredUnit]:
        """Units that are done: by repeat, then by kind, then in the order of the suite."""
        folders = [path for path in (self.path / UNITS).glob("*") if not path.name.startswith(".")]
        return sorted(map(_stored, folders), key=lambda found: (found.repeat, found.kind, found.number))

    def mend(self) -> None:
        """Take away what a killed sweep left half written."""
        for path in (self.path / UNITS).glob(".*.new"):
            shutil.rmtree(path)

    def run_path(self, kind: str, repeat: int) -> Path:
        """Folder of the run that the units of a kind and a repeat make up."""
        return self.path / HOSTS / kind / f"run-{repeat}"


def _folder_name(stored: Mapping[str, Any]) -> str:
    """Name of a unit's folder: readable, and of each job its own."""
    name = re.sub(r"[^A-Za-z0-9=]+", "-", stored["unit"]).strip("-")[:60]
    return f"{stored['number']:03d}-{name}.{stored['kind']}.{stored['repeat']}"


def _stored(path: Path) -> StoredUnit:
    file = path / "unit.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    return validate(StoredUnit, {"path": path} | data, str(file))


def _complete(folder: RunFolder, planned: Sequence[Described], stored: Mapping[str, Any]) -> None:
    """Record what a unit did not get to, so that each of its cases has a row; raw values without one go."""
    folder.mend(lambda _: True)
    there = {values["variant"] for values in folder.records()}
    reason = stored["reason"] or "the unit ended without a record of it"
    status = STATUSES[stored["ended"]]
    folder.append(*(
        found.record(status=status, reason=f"{reason} (on {stored['host']})")
        for found in planned
        if found.case.variant not in there
    ))  # fmt: skip
