"""More rounds for a run that has ended: its undecided groups get further seatings, and their records new figures.

What was measured stays: further seatings are numbered on from those that are there, and figures are made of all of
them. Samples are written before the records that rest on them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.analysis import racing
from bench.analysis.figures import speedup
from bench.errors import UsageError
from bench.plan.cases import REFERENCE, Group
from bench.plan.identity import CaseKey
from bench.records.folder import RunFolder
from bench.records.rounds import Samples
from bench.records.samples import read_samples
from bench.records.schema import COLUMNS, Status
from bench.run.group import Host, Measurement, figured, placed
from bench.run.planning import Described
from bench.run.worker_process import scratch_folder


class Writing(Host, Protocol):
    """The run that is measured further, as `bench.run.runner` has it."""

    folder: RunFolder


@dataclass(frozen=True)
class Open:
    """A group that has no clear answer yet.

    Attributes:
        group: which.
        cases: its cases that ended ok.
        samples: their rounds so far.
        standing: what is known.
        needed_s: how long further rounds would take, estimated from the present doubt, seconds.
    """

    group: Group
    cases: tuple[Described, ...]
    samples: Samples
    standing: racing.Standing
    needed_s: float

    def told(self) -> str:
        """Say what is undecided and what would decide it."""
        if rivals := ", ".join(sorted(self.standing.undecided)):
            said = f"{self.standing.best} cannot be told apart from {rivals}"
        elif self.standing.wide:
            said = f"intervals are wider than the suite asks for: {', '.join(sorted(self.standing.wide))}"
        else:
            said = f"too few undisturbed rounds of {', '.join(sorted(self.standing.disturbed))}"
        # The estimate ends there; how much more it would take is not known.
        least = "at least" if self.needed_s >= racing.MOST_S else "about"
        more = f"to settle the whole group takes {least} {duration(self.needed_s)} of further rounds"
        return f"{self.group.name}: {said}; {more}"


def undecided(groups: Iterable[tuple[Group, tuple[Described, ...]]], folder: RunFolder, interval: float) -> list[Open]:
    """Groups of a run that have no clear answer.

    Args:
        groups: of the run's plan.
        folder: of the run.
        interval: half-width of a speedup's interval that the suite asks for, as a share.

    Raises:
        UsageError: for files that are not as a run writes them.
    """
    ok = {CaseKey.read(values) for values in folder.records() if values["status"] == Status.OK}
    samples = read_samples(folder.path / "samples.csv.gz")
    found = []
    for group, cases in groups:
        mine = tuple(described for described in cases if described.case.key in ok)
        if not mine:
            continue
        of_group = samples.get(mine[0].case.key.group, Samples())
        names = [described.case.variant for described in mine]
        standing = racing.standing(of_group, names, REFERENCE, interval)
        if standing is None or not standing.needing:
            continue
        widths = [width for name in standing.wide if (width := _width(of_group, name)) is not None]
        factor = racing.missing_factor(standing, interval, widths)
        found.append(Open(group, mine, of_group, standing, racing.further_s(of_group, names, factor)))
    return found


def measure(runner: Writing, groups: Iterable[Open], seconds: float) -> None:
    """Give undecided groups further seatings, those that need least first, so that as many as can be are decided.

    Args:
        runner: of the groups.
        groups: which.
        seconds: of rounds, for all of them.

    Raises:
        OSError: when something cannot be written.
    """
    left_s = seconds
    with scratch_folder() as scratch:
        runner.plan.kernel.write(scratch / "shared")
        for each in sorted(groups, key=lambda found: found.needed_s):
            budget_s = min(each.needed_s, left_s)
            if budget_s < min(racing.LEAST_S, seconds):
                return
            runner.console.say(f"{each.group.name}: measuring {duration(budget_s)} longer")
            left_s -= budget_s
            before = len(each.samples.processes)
            measured = Measurement(runner, each.group, scratch, list(each.cases), budget_s, each.samples)
            measured.more()
            _write(runner, each, measured, before)


def _write(runner: Writing, each: Open, measured: Measurement, before: int) -> None:
    """Append the new samples, then put new records in place of the old ones, all in one step."""
    old = {CaseKey.read(values): values for values in runner.folder.records()}
    new = [figured(runner, d, _kept(old[d.case.key]), measured) for d in each.cases]
    found = placed(new, measured.samples, runner.plan.suite.interval)
    records = {d.case.key: record for d, record in zip(each.cases, found, strict=True)}
    runner.folder.append_seatings([d.case for d in each.cases], found, measured.samples, before)
    runner.folder.replace(records)
    for record in records.values():
        runner.console.record(record, again=True)


def duration(seconds: float) -> str:
    """`40s` or `3min`, as `--more` takes it."""
    return f"{math.ceil(seconds)}s" if seconds < 90 else f"{math.ceil(seconds / 60)}min"  # noqa: PLR2004


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a record that ended ok, and that further rounds do not measure again."""
    return {name: value for name, value in values.items() if name in COLUMNS and name != "status"}


def _width(samples: Samples, variant: str) -> float | None:
    found = speedup(samples, REFERENCE, variant)
    return None if found is None or not math.isfinite(found.half_width) else found.half_width


def check_finished(left: int, folder: Path) -> None:
    """Refuse more rounds for a run that has not ended.

    Raises:
        UsageError: naming the command that finishes it.
    """
    if left:
        msg = f"{left} cases of {folder} are not recorded yet; finish the run first, with --resume and without --more"
        raise UsageError(msg)
