"""A run folder read back, whatever ended the run: the one way from its files to records, rounds and environment.

Report, comparison and export all start here. records.jsonl says what was measured and samples.csv.gz what the clock
said; records.csv is made for people, and nothing reads it. Nothing here imports torch or pandas.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import UsageError
from bench.machine.interference import SHARE, Interference
from bench.plan.identity import CaseKey, GroupKey
from bench.plan.validation import validate
from bench.records import ranks, serving
from bench.records.folder import RunFolder
from bench.records.raw_csv import ROUNDS, SAMPLES
from bench.records.rounds import Floats, Samples
from bench.records.samples import read_samples
from bench.records.schema import EMPTY, ROUND_COLUMNS, Record, Status


@dataclass(frozen=True)
class RecordedRun:
    """A run folder in memory.

    Attributes:
        path: the folder.
        records: the latest of each case.
        superseded: how many earlier records of the same cases there are.
        samples: rounds of each group; empty where the folder has no raw samples.
        environment: the sections of environment.json; empty without the file.
    """

    path: Path
    records: tuple[Record, ...]
    superseded: int
    samples: Mapping[GroupKey, Samples]
    environment: Mapping[str, Any]

    def group(self, record: Record) -> Samples:
        """The rounds that a record's case was measured in."""
        return self.samples.get(record.key.group, Samples())

    def calls(self, record: Record) -> Floats:
        """Single calls that the figures of a record were made of, seconds, in the order of their rounds."""
        found = [timed for rounds in self.group(record).calls(record.variant) for timed in rounds]
        return np.concatenate(found) if found else np.empty(0)


def read_run(path: Path) -> RecordedRun:
    """Read a run folder.

    A case that was recorded more than once counts with its last record. What a killed run left torn counts as not
    recorded, as when the run is resumed.

    Raises:
        UsageError: the folder holds no record, or a file in it is not as a run writes it.
    """
    if not path.is_dir():
        msg = f"{path} is not a folder; expected the folder of a run, with records.jsonl in it"
        raise UsageError(msg)
    found = read_records(path)
    records = tuple({record.key: record for record in found}.values())
    samples = read_samples(path / SAMPLES.name)
    run = RecordedRun(path, records, len(found) - len(records), samples, read_environment(path))
    for record in records:
        if record.status is Status.OK and samples and not run.group(record).times(record.variant):
            what = f"{record.group} {record.variant}, which records.jsonl has as ok"
            msg = f"{path / SAMPLES.name} has no sample of {what}; expected the files of one run"
            raise UsageError(msg)
    return run


def read_records(path: Path) -> tuple[Record, ...]:
    """The records of a run folder in the order in which they were written, at least one.

    Raises:
        UsageError: there is none, or a line is not a record that this release can read.
    """
    folder = RunFolder(path)
    entries = folder.read().entries
    if not entries:
        begun = (path / "plan.json").exists()
        quoted = shlex.quote(str(path))
        advice = f"finish the run: python -m bench run --resume {quoted}" if begun else "expected the folder of a run"
        if not begun and (path / "records.csv").exists():
            advice = "records.csv is a table made from it, and cannot take its place"
        if not begun and (path / serving.FILE).exists():
            advice = f"it was served alone: python -m bench recommend {quoted} --objective load"
        if not begun and (path / ranks.FILE).exists():
            advice = f"it holds what bench ranks measured: see {path / ranks.TABLE} and plots beside it"
        there = folder.records_path.exists()
        msg = f"{folder.records_path} holds no record; {advice}" if there else f"{path} has no records.jsonl; {advice}"
        raise UsageError(msg)
    return tuple(
        validate(Record, EMPTY | entry.values, f"{folder.records_path}, line {number}")
        for number, entry in enumerate(entries, start=1)
    )


def read_environment(path: Path) -> dict[str, Any]:
    """The sections of environment.json in a run folder; empty without the file.

    Raises:
        UsageError: it is not a JSON object.
    """
    return _json_object(path / "environment.json", "what the run may be compared with")


def planned_cases(path: Path) -> frozenset[CaseKey]:
    """The cases that a run was begun for; none where the folder does not say.

    Raises:
        UsageError: plan.json is not as a run writes it.
    """
    plan = _json_object(path / "plan.json", "what the run was to measure")
    try:
        return frozenset(map(CaseKey.read, plan.get("cases", [])))
    except (TypeError, KeyError, ValueError) as error:
        msg = f"{path / 'plan.json'} holds no list of cases; put back the file that the run wrote"
        raise UsageError(msg) from error


@dataclass(frozen=True)
class Beside:
    """Summary of what else used the machine while a run measured, and of the rounds that anything disturbed.

    Attributes:
        rounds, disturbed: how many there were, and how many of them were disturbed.
        far: how many of these only because the cores were far apart.
        others, most: cores that other processes and the hypervisor kept busy, on average and at most.
    """

    rounds: int
    disturbed: int
    far: int
    others: float
    most: float

    @property
    def quiet(self) -> bool:
        """Return whether next to nothing did."""
        return not self.disturbed and self.most <= SHARE


def read_beside(path: Path) -> Beside | None:
    """Summarise rounds.csv.gz of a run folder over all rounds; None without the file.

    Raises:
        UsageError: the file is damaged or not one of ours.
    """
    names = list(ROUND_COLUMNS)
    rows = [dict(zip(names, row, strict=True)) for row in ROUNDS.rows(path)]
    if not rows:
        return None
    try:
        walls_s = np.array([float(row["wall_s"]) for row in rows])
        taken = np.array([float(row["others_share"]) + float(row["stolen_share"]) for row in rows])
    except ValueError as error:
        msg = f"{path / ROUNDS.name} holds a row that is not a round ({error}); put back the file that the run wrote"
        raise UsageError(msg) from error
    # Rounds without a length have no weight; if a run has only such rounds, the plain mean is taken.
    weights = walls_s if walls_s.sum() > 0 else np.ones(len(rows))
    reasons = [Interference(why=row["why"]) for row in rows if row["why"]]
    far = sum(reason.far_alone for reason in reasons)
    return Beside(len(rows), len(reasons), far, float(np.average(taken, weights=weights)), float(taken.max()))


def _json_object(path: Path, says: str) -> dict[str, Any]:
    """The content of a JSON file of a run folder; empty without the file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON ({error}); put back the file that the run wrote: it says {says}"
        raise UsageError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path} holds {type(found).__name__}; expected a JSON object; it says {says}"
        raise UsageError(msg)
    return found
