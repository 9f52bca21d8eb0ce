"""A run as its report shows it: the groups, their winners and the summary that terminal, plots and page share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from bench import units
from bench.machine.interference import DISTURBED
from bench.plan.cases import split_name
from bench.plan.identity import GroupKey
from bench.records.reader import RecordedRun, read_run
from bench.records.schema import Record, Status

BEST, DOUBT = "*", "~"
WIDE = "the interval is wider than the suite asked for"
#: Meaning of each mark and of the columns that need a word.
LEGEND = {
    "vs best": "time of the fastest variant of the group / time of this one, compared within the same rounds",
    BEST: "the winner: by `vs best`, every other variant of its group is certainly slower",
    DOUBT: f"a doubtful figure: its samples were taken while {DISTURBED}, a process failed, or the interval is wider "
    "than the suite asks for",
    units.NO_ESTIMATE: f"the interval is too wide: its ends are more than {units.MOST_SPREAD:g} times apart",
}


@dataclass(frozen=True)
class ReportedRun(RecordedRun):
    """A recorded run with the groups that a report is made of."""

    @property
    def suite(self) -> str:
        """Name of the suite, or the folder's where environment.json does not say."""
        section = self.environment.get("run")
        name = section.get("suite") if isinstance(section, Mapping) else None
        return str(name or self.path.resolve().name)

    @cached_property
    def groups(self) -> tuple[RankedGroup, ...]:
        """The run's groups in the order they were recorded."""
        return groups(self.records)


@dataclass(frozen=True)
class RankedGroup:
    """The cases that differ only in their variant: fastest first, and last those that did not run."""

    key: GroupKey
    title: str
    records: tuple[Record, ...]

    @property
    def ok(self) -> tuple[Record, ...]:
        """The records that ran and passed the gate, fastest first."""
        return tuple(record for record in self.records if record.status is Status.OK)

    @property
    def leaders(self) -> tuple[Record, ...]:
        """The fastest record, the reference included, and those not certainly slower; empty when nothing ran.

        If a run did not record how variants compare, two of them differ if their intervals do not overlap: those of the
        speedup, or those of the median if no reference ran.
        """
        timed = [record for record in self.ok if pace(record)[0] < UNTIMED]
        if not timed:
            return ()
        if any(record.standing for record in timed):
            leading = [record for record in timed if record.standing not in {"slower", ""}]
            return tuple(sorted(leading, key=lambda record: record.standing != "best"))
        best, *others = timed
        return (best, *(record for record in others if not _faster(best, record)))

    @property
    def winner(self) -> Record | None:
        """The record that is certainly the fastest; None if there is no such record."""
        if len(self.leaders) != 1:
            return None
        (best,) = self.leaders
        return best if decided(best) else None

    @property
    def sweep_axis(self) -> str:
        """Axis of the sweep that this group is one point of; empty outside sweeps."""
        return self.records[0].sweep_axis

    @property
    def sweep_key(self) -> tuple[GroupKey, str]:
        """Key that the points of one sweep share: that of the group without the swept override, and the axis."""
        return self.key._replace(workload=sweep_base(self.key.workload, self.sweep_axis)), self.sweep_axis

    @property
    def sweep_title(self) -> str:
        """The title that the points of one sweep share, or `title` outside sweeps."""
        if not self.sweep_axis:
            return self.title
        return f"{self.sweep_key[0].workload}{self.title.removeprefix(self.key.workload)}, over {self.sweep_axis}"


def load_run(run_dir: Path) -> ReportedRun:
    """Read a run folder for its report.

    Raises:
        UsageError: see `bench.records.reader.read_run`.
    """
    return ReportedRun(**vars(read_run(run_dir)))


def summary_table(records: Iterable[Record]) -> pd.DataFrame:
    """The table a run ends with: one row per case, strings in human units, groups together and fastest first.

    `BEST` follows the variant that is certainly the fastest in its group, `DOUBT` precedes doubtful times; `LEGEND`
    explains both.
    """
    rows = [summary_row(record, best=record is group.winner) for group in groups(records) for record in group.records]
    return pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS), dtype=str)


SUMMARY_COLUMNS = (
    "workload",
    "mode",
    "variant",
    "status",
    "speedup",
    "vs best",
    "p50",
    "p99",
    "steps/s",
    "peak memory",
    "first call",
    "what ran",
)


def summary_row(record: Record, *, best: bool) -> dict[str, str]:
    """One row of `summary_table`; a case that did not end `ok` shows its reason and no figure."""
    row = dict.fromkeys(SUMMARY_COLUMNS, "")
    row |= {"workload": record.workload, "mode": record.mode, "variant": record.variant, "status": record.status.value}
    if record.status is not Status.OK:
        return row | {"what ran": record.reason}
    mark = DOUBT if doubts(record) else ""
    times = {
        "speedup": units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi),
        "p50": percentile(record, "p50")[0],
        "p99": percentile(record, "p99")[0],
        "steps/s": rate(record, record.throughput_steps_per_s),
    }
    return row | {
        "variant": f"{record.variant} {BEST}" if best else record.variant,
        "vs best": versus_best(record),
        **{name: text and mark + text for name, text in times.items()},
        "peak memory": peak_memory(record),
        "first call": units.seconds(record.first_call_s),
        "what ran": "; ".join(filter(None, (record.reason, record.evidence))),
    }


def legend(table: pd.DataFrame) -> list[str]:
    """Lines that explain the marks in a summary table, one for each mark that occurs in it."""
    shown = [*map(str, table.columns), *map(str, table.to_numpy().ravel())]
    width = max(map(len, LEGEND))
    # A mark begins or ends a cell; a column is one.
    return [
        f"{mark:<{width}}  {meaning.replace('`', '')}"
        for mark, meaning in LEGEND.items()
        if any(mark in (cell, cell[: len(mark)], cell[-len(mark) :]) for cell in shown)
    ]


def versus_best(record: Record) -> str:
    """Ratio to the best of the group, formed within rounds; empty if the run did not record it."""
    if record.vs_best is None:
        return ""
    return units.ratio_interval(record.vs_best, record.vs_best_lo, record.vs_best_hi)


def percentile(record: Record, name: str) -> tuple[str, float | None]:
    """A percentile of single calls, as `p50`: in human units, and the seconds to sort by where it is estimated."""
    value, lo, hi = (getattr(record, f"latency_{name}{end}_s") for end in ("", "_lo", "_hi"))
    return units.estimated_seconds(value, lo, hi), value if units.estimated(lo, hi) else None


def rate(record: Record, value: float | None) -> str:
    """A throughput in human units; as it is formed from the median time, it is no estimate where that is none."""
    known = units.estimated(record.latency_p50_lo_s, record.latency_p50_hi_s)
    return units.count(value) if known or value is None else units.NO_ESTIMATE


def peak_memory(record: Record) -> str:
    """Peak of the process, and of the CUDA allocator where there was one."""
    host, cuda = units.megabytes(record.memory_peak_bytes), units.megabytes(record.memory_cuda_allocated_bytes)
    return " + ".join(part for part in (host, cuda and f"{cuda} CUDA") if part)


def doubts(record: Record) -> tuple[str, ...]:
    """Reasons why the times of `record` carry the mark; empty if they carry none."""
    found = []
    if record.disturbed:
        out_of = f" of {record.samples}" if record.samples else ""
        found.append(f"{record.disturbed}{out_of} samples were taken while {DISTURBED}")
    if record.interval_wide:
        found.append(WIDE)
    if record.reason:
        found.append(record.reason)
    return tuple(found)


def decided(record: Record) -> bool:
    """Return whether nothing that casts doubt on a leader's figure casts doubt on its first place.

    The ratios within rounds, which have intervals of their own, decide which is first: a wide interval of the speedup
    leaves open only by how much. Disturbed samples leave the order open, unless it is certain without them.
    """
    if record.certain and not record.reason:
        return True
    allowed = {WIDE} if record.standing else set()
    return allowed.issuperset(doubts(record))


def groups(records: Iterable[Record]) -> tuple[RankedGroup, ...]:
    """The groups of `records`, titled with device and threads only where a run has several of them."""
    sorted_in: dict[GroupKey, list[Record]] = {}
    for record in records:
        sorted_in.setdefault(record.key.group, []).append(record)
    devices, threads = {key.device for key in sorted_in}, {key.threads for key in sorted_in}
    return tuple(
        RankedGroup(key, group_title(key, devices, threads), tuple(sorted(members, key=pace)))
        for key, members in sorted_in.items()
    )


def group_title(key: GroupKey, devices: set[str], threads: set[int]) -> str:
    """`seed, inference`, and what else distinguishes a group from the others of its run."""
    workload, mode, device, thread_count = key
    more = [device] if len(devices) > 1 else []
    more += [f"{thread_count} thread{'s' if thread_count != 1 else ''}"] if len(threads) > 1 else []
    return ", ".join([workload, mode, *more])


#: Places of records in their group, by what is known of their time.
ESTIMATED, NOT_ESTIMATED, BY_TIME, UNTIMED, FAILED = range(5)


def pace(record: Record) -> tuple[int, float]:
    """Sorting key, fastest first; by time where no reference ran, and last what has no figure."""
    if record.status is not Status.OK:
        return (FAILED, 0.0)
    if record.speedup is not None:
        known = units.estimated(record.speedup_lo, record.speedup_hi)
        return (ESTIMATED if known else NOT_ESTIMATED, -record.speedup)
    return (BY_TIME, record.latency_p50_s) if record.latency_p50_s is not None else (UNTIMED, 0.0)


def _faster(best: Record, other: Record) -> bool:
    """Return whether the intervals of two records are apart, that of the first on the faster side."""
    if best.speedup is not None and other.speedup is not None:
        lower, upper = best.speedup_lo, other.speedup_hi
    else:
        lower, upper = other.latency_p50_lo_s, best.latency_p50_hi_s
    return lower is not None and upper is not None and lower > upper


def sweep_base(workload: str, axis: str) -> str:
    """`seed@batch=64` on the axis `batch` as `seed`; other overrides stay."""
    name, overrides = split_name(workload)
    kept = [part for part in overrides.split(",") if part and not part.startswith(axis)]
    return f"{name}@{','.join(kept)}" if kept else name
