"""Data shared by the parts of the self-test: the user's request, a part's result, and how it is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.console import Console
from bench.errors import UsageError
from bench.plan.cases import Case, Filters, Selection, Suite
from bench.run.planning import make_plan
from bench.run.worker_process import Settings
from bench.selftest.pairs import Pair

#: Short calls, long calls, and calls on packed sequences.
WORKLOADS = (("seed", "inference"), ("seed", "training"), ("speech-las-scaled", "inference"))


@dataclass(frozen=True)
class Options:
    """Settings of a self-test: what to measure, and how long.

    Attributes:
        pairs: pairs of each setting; None for the part's own number.
        seconds: of rounds a pair.
        processes: workers that share them.
        threads: numbers of CPU threads, one setting each.
        workloads: workload and mode of each case; pairs take them in turn.
        variant: that is measured against itself.
        wait_policy: as in `Settings`.
        planted: slowdowns, as shares of a call; empty for the standard ones.
        group: variants that `carryover` has take turns; empty for the standard ones.
        unstopped: `carryover` in one process that is never stopped.
    """

    pairs: int | None = None
    seconds: float = 5.0
    processes: int = 4
    threads: tuple[int, ...] = (1,)
    workloads: tuple[tuple[str, str], ...] = WORKLOADS
    variant: str = "reference"
    wait_policy: str = "default"
    planted: tuple[float, ...] = ()
    group: tuple[str, ...] = ()
    unstopped: bool = False

    def settings(self, threads: int) -> Settings:
        """Settings of workers with this number of threads."""
        return Settings(threads, self.wait_policy)

    def cases(self, threads: int, count: int) -> Iterator[Case]:
        """The next `count` cases, in turn."""
        return islice(cycle(Case(w, self.variant, mode, "cpu", threads) for w, mode in self.workloads), count)

    def check(self) -> None:
        """Ask a worker whether all this exists and runs here.

        Raises:
            UsageError: when it does not.
        """
        select = tuple(Selection((w,), (self.variant,), (mode,)) for w, mode in self.workloads)
        plan = make_plan(
            Suite("selftest", "", select), Filters(variants=(self.variant,), threads=1), self.settings(1), build=True
        )
        for found in plan.cases:
            if found.unavailable and found.case.executed == self.variant:
                msg = f"{self.variant} cannot run {found.case.workload} here: {found.unavailable}; name another variant"
                raise UsageError(msg)


@dataclass
class Found:
    """Result of a part.

    Attributes:
        name: of the part.
        columns, rows: the table for people.
        raw: one row a measurement, for the CSV.
        missed: targets that were not reached, in words; empty when all were.
        met: targets that were, in words.
    """

    name: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    raw: list[dict[str, Any]] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)

    def judge(self, reached: bool, words: str) -> None:
        """Note a target as met or missed."""
        (self.met if reached else self.missed).append(words)

    def write(self, folder: Path, console: Console) -> None:
        """Print the table and the verdicts, write the CSV."""
        console.table(self.columns, self.rows)
        pd.DataFrame(self.raw).to_csv(folder / f"{self.name}.csv", index=False)
        for words in self.met:
            console.say(f"{self.name}: reached: {words}", "green")
        for words in self.missed:
            console.say(f"{self.name}: MISSED: {words}", "red")


def row_of(pair: Pair, **more: Any) -> dict[str, Any]:
    """A pair as a row of the CSV."""
    case, speedup = pair.case, pair.speedup
    return {
        **more,
        "workload": case.workload,
        "variant": case.variant,
        "mode": case.mode,
        "threads": case.threads,
        "ratio": speedup.value,
        "ratio_lo": speedup.low,
        "ratio_hi": speedup.high,
        "rounds": pair.rounds,
        "noticed": pair.noticed,
        "marked": int(pair.marked),
        "planted_share": pair.planted_share,
        "call_s": pair.call_s,
        "wall_s": pair.wall_s,
    }


def percent(values: float | Sequence[float], digits: int = 2) -> str:
    """`0.0123` as `1.23 %`; several are joined by a slash."""
    numbers = [values] if isinstance(values, int | float) else list(values)
    return " / ".join(f"{100 * value:.{digits}f}" for value in numbers) + " %"


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, 90th percentile and largest of the values; NaN when there are none."""
    found = np.array(list(values), dtype=float)
    if not len(found):
        return math.nan, math.nan, math.nan
    return float(np.quantile(found, 0.5)), float(np.quantile(found, 0.9)), float(found.max())


def least(share: float, count: int) -> int:
    """Least count, of `count`, for a rate of at least `share`, rounded in favour of chance; of 100 it is exact."""
    return math.floor(round(share * count, 9))


def most(share: float, count: int) -> int:
    """Largest count, of `count`, for a rate of at most `share`, rounded in favour of chance; of 100 it is exact."""
    return math.ceil(round(share * count, 9))
