"""Time to quality: what is kept of it, and the figures that are made from that.

`QualityRecord` is the single source of the columns of quality.csv; `quality-rounds.csv.gz` and `quality-losses.csv.gz`
hold the raw values, from which `figures` makes all the others again.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.plan.cases import REFERENCE, Quality
from bench.records.raw_csv import RawFile
from bench.records.schema import Status, column, in_markdown, meanings
from bench.records.tables import write_csv

FILE = "quality.csv"
#: Steps that a loss is averaged over before curves are compared: single batches differ more than variants do.
SMOOTHED_STEPS = 20
RESAMPLES = 2000

ROUND_COLUMNS = {
    "task": "As in quality.csv.",
    "variant": "As in quality.csv.",
    "step": "The number of optimizer steps taken by the end of the block.",
    "training_s": "The time of the block's steps, in seconds.",
    "evaluation_s": "The time of the evaluation after the block, in seconds.",
    "quality": "The quality that the evaluation found.",
    "baseline": "The quality of the baseline in the same evaluation.",
    "why": "What disturbed the block, in words. Empty if nothing did.",
}
LOSS_COLUMNS = {
    "task": "As in quality.csv.",
    "variant": "As in quality.csv.",
    "step": "The number of the optimizer step, from 1.",
    "loss": "The training loss of its batch.",
}
ROUNDS = RawFile("quality-rounds.csv.gz", tuple(ROUND_COLUMNS), ("task", "variant"))
LOSSES = RawFile("quality-losses.csv.gz", tuple(LOSS_COLUMNS), ("task", "variant"))


@dataclass(frozen=True)
class QualityRecord:
    """One row of quality.csv: one variant's training, from the same weights on the same batches as the others'."""

    task: str = column("What was trained, and its data.", "")
    variant: str = column("The name of the variant.", "")
    device: str = column("The device that was used: `cpu` or `cuda`.", "")
    threads: int = column("The number of CPU threads that the worker was given.", 0)
    status: Status = column("As in records.csv.", Status.OK)
    reason: str = column("Why the status is not ok. Empty for ok.", "")
    metric: str = column("What quality means here; lower is better.", "")
    baseline: float | None = column("The quality of the baseline, the seasonal naive forecast.")
    target: float | None = column("The quality to be reached: the share of the baseline's that the suite asks for.")
    reached: bool | None = column("True if the target was reached within the suite's limit of steps.")
    steps_to_target: int | None = column(
        "The number of optimizer steps until the first evaluation that reached the target."
    )
    time_to_target_s: float | None = column("The time of those steps, without evaluations, in seconds.")
    time_to_target_lo_s: float | None = column(
        "Lower end of the 95 % interval of `time_to_target_s` (bootstrap over blocks), in seconds. How many steps "
        "another seed would take is not in it."
    )
    time_to_target_hi_s: float | None = column(
        "Upper end of the 95 % interval of `time_to_target_s` (bootstrap over blocks), in seconds."
    )
    speedup: float | None = column(
        "The `time_to_target_s` of `reference` divided by that of this variant, a ratio: 1 for `reference`."
    )
    step_s: float | None = column("The time of a step, as the median over blocks, in seconds.")
    steps: int | None = column("The number of optimizer steps in all, the same for all variants that ended.")
    training_s: float | None = column("The time of all steps, in seconds.")
    evaluation_s: float | None = column("The time of all evaluations, in seconds.")
    final_quality: float | None = column("The quality after all steps.")
    best_quality: float | None = column("The best quality of any evaluation.")
    curve_distance: float | None = column(
        f"The largest gap between this variant's loss and `reference`'s, both averaged over {SMOOTHED_STEPS} steps, as "
        "a share of the range of the reference's: max|S_v - S_r| / (max S_r - min S_r)."
    )
    disturbed_share: float | None = column("The share of the blocks during which something else used the machine.")
    parity_error: float | None = column("The relative error of the quantity nearest to its limit, over both gates.")
    parity_limit: float | None = column("The limit that applied to `parity_error`.")


COLUMNS = tuple(found.name for found in dataclasses.fields(QualityRecord))


@dataclass
class Trained:
    """Record of one variant's training.

    Attributes:
        variant: its name.
        rounds: a block each, by the columns of `ROUND_COLUMNS` without task and variant.
        losses: of each step.
        fields: of its record that are known otherwise: status, reason, parity.
    """

    variant: str
    rounds: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return int(self.rounds[-1]["step"]) if self.rounds else 0

    def step_at(self, target: float) -> int | None:
        """Step of the first evaluation that reached a target."""
        return next((int(found["step"]) for found in self.rounds if found["quality"] <= target), None)


def figures(
    part: Quality, metric: str, device: str, threads: int, trained: Mapping[str, Trained]
) -> list[QualityRecord]:
    """The records of one task's variants.

    Args:
        part: what was asked for.
        metric: name of the quality.
        device: it ran on.
        threads: of each worker.
        trained: by variant.
    """
    known = next((found["baseline"] for one in trained.values() for found in one.rounds), None)
    target = None if known is None else part.target_share * known
    own: dict[str, Any] = {"task": task_name(part), "device": device, "threads": threads, "metric": metric}
    own |= {"baseline": known, "target": target}
    ended = {name: one for name, one in trained.items() if one.fields.get("status", Status.OK) is Status.OK}
    reference = ended.get(REFERENCE)
    records = []
    for name, one in trained.items():
        found = _figures(one, reference, target) if name in ended and target is not None else {}
        records.append(QualityRecord(**(own | {"variant": name} | found | one.fields)))
    return records


def _figures(one: Trained, reference: Trained | None, target: float) -> dict[str, Any]:
    training = [float(found["training_s"]) for found in one.rounds]
    steps = np.diff([0, *(int(found["step"]) for found in one.rounds)])
    found: dict[str, Any] = {
        "reached": (at := one.step_at(target)) is not None,
        "steps_to_target": at,
        "step_s": float(np.median(np.array(training) / steps)),
        "steps": one.steps,
        "training_s": sum(training),
        "evaluation_s": sum(float(r["evaluation_s"]) for r in one.rounds),
        "final_quality": one.rounds[-1]["quality"],
        "best_quality": min(r["quality"] for r in one.rounds),
        "disturbed_share": sum(bool(r["why"]) for r in one.rounds) / len(one.rounds),
    }
    if at is not None:
        until = training[: [int(r["step"]) for r in one.rounds].index(at) + 1]
        low, high = _interval(until)
        found |= {"time_to_target_s": sum(until), "time_to_target_lo_s": low, "time_to_target_hi_s": high}
    if reference is not None:
        found["curve_distance"] = curve_distance(one.losses, reference.losses)
        other = reference.step_at(target)
        if at is not None and other is not None:
            theirs = sum(float(r["training_s"]) for r in reference.rounds if int(r["step"]) <= other)
            found["speedup"] = theirs / found["time_to_target_s"]
    return found


def curve_distance(losses: Sequence[float], reference: Sequence[float]) -> float | None:
    """Largest gap between two smoothed curves, as a share of the range of the reference's; None where there is none.

    Args:
        losses: of a variant's steps.
        reference: of the reference's steps.
    """
    steps = min(len(losses), len(reference))
    if steps < SMOOTHED_STEPS:
        return None
    mine, theirs = _smoothed(losses[:steps]), _smoothed(reference[:steps])
    extent = float(theirs.max() - theirs.min())
    return float(np.abs(mine - theirs).max()) / extent if extent > 0 else None


def _smoothed(losses: Sequence[float]) -> Any:
    return np.convolve(np.array(losses), np.full(SMOOTHED_STEPS, 1 / SMOOTHED_STEPS), "valid")


def _interval(blocks: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the blocks' sum, by drawing as many of them again."""
    drawn = np.random.default_rng(0).choice(np.array(blocks), (RESAMPLES, len(blocks))).sum(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


def task_name(part: Quality) -> str:
    """Name of a part in the files."""
    return f"{part.task}, {part.data}, {part.size}"


def write(folder: Path, records: Sequence[QualityRecord], trained: Sequence[tuple[str, Trained]]) -> None:
    """Write raw values, then quality.csv, whose presence says that the stage has ended.

    Args:
        folder: the run's.
        records: of all parts.
        trained: each with the name of its task.
    """
    for path in (folder / ROUNDS.name, folder / LOSSES.name):
        # What an interrupted stage left belongs to no record.
        path.unlink(missing_ok=True)
    ROUNDS.append(
        folder, ([task, one.variant, *_values(found)] for task, one in trained for found in one.rounds)
    )  # fmt: skip
    LOSSES.append(
        folder, ([task, one.variant, step, loss] for task, one in trained for step, loss in enumerate(one.losses, 1))
    )
    write_csv(folder / FILE, COLUMNS, map(dataclasses.asdict, records))


def _values(found: Mapping[str, Any]) -> list[Any]:
    return [found[name] for name in ROUND_COLUMNS if name not in {"task", "variant"}]


def read(folder: Path) -> list[QualityRecord]:
    """The records of a run folder; none where it has no such stage.

    Raises:
        ValueError: when quality.csv has other columns than this release writes.
    """
    path = folder / FILE
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            msg = f"{path} has other columns than this release writes; use the release that recorded it"
            raise ValueError(msg)
        return [_parse(row) for row in reader]


def _parse(row: dict[str, str]) -> QualityRecord:
    values: dict[str, Any] = {}
    for found in dataclasses.fields(QualityRecord):
        cell = row[found.name]
        if found.name == "status":
            values[found.name] = Status(cell)
        elif found.type == "str":
            values[found.name] = cell
        elif cell == "":
            values[found.name] = None
        elif "bool" in str(found.type):
            values[found.name] = cell == "True"
        else:
            values[found.name] = int(cell) if "int" in str(found.type) else float(cell)
    return QualityRecord(**values)


def read_rounds(folder: Path) -> list[dict[str, Any]]:
    """The rows of quality-rounds.csv.gz with their numbers as numbers."""
    import gzip  # noqa: PLC0415

    path = folder / ROUNDS.name
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows: list[dict[str, Any]] = list(csv.DictReader(file))
    for row in rows:
        row |= {name: float(row[name] or math.nan) for name in ("step", "training_s", "quality", "baseline")}
    return rows


def dictionary() -> str:
    """The dictionary of columns in Markdown, as in results/columns.md."""
    return in_markdown({FILE: meanings(QualityRecord), ROUNDS.name: ROUND_COLUMNS, LOSSES.name: LOSS_COLUMNS})
