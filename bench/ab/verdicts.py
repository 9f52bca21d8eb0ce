"""Verdicts on what a run folder of `ab` holds, in the words and with the exit codes of `compare`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bench.ab.names import BASE, NEW, on
from bench.analysis.compare import CasePair, CaseVerdict, CompareOptions, Comparison, allow_for_all, verdict
from bench.analysis.intervals import ratio_interval
from bench.plan.identity import CaseKey
from bench.records.reader import RecordedRun
from bench.records.schema import Record, Status

#: How the reason of a case begins that ran but was left out because it failed on the other side.
NOT_TIMED = "not timed: "
#: Longer than this many times the budget is not advice.
MOST_TIMES = 20.0


def judge(run: RecordedRun, shown: tuple[Path, Path], options: CompareOptions) -> Comparison:
    """Compare NEW with BASE, case by case.

    Args:
        run: as read back from its folder.
        shown: what BASE and NEW are called.
        options: margin and threshold.
    """
    by_case: dict[CaseKey, dict[str, Record]] = {}
    for record in run.records:
        variant, _, side = record.variant.partition("#")
        by_case.setdefault(record.key.group.of(variant), {})[side] = record
    pairs = [
        _pair(key, sides[BASE], sides[NEW], run, options.margin)
        for key, sides in by_case.items()
        if sides.keys() == {BASE, NEW}
    ]
    base, new = (
        RecordedRun(path, tuple(r for r in run.records if r.variant.endswith(f"#{side}")), 0, {}, {})
        for path, side in zip(shown, (BASE, NEW), strict=True)
    )
    return Comparison(base, new, options, (), (), (), allow_for_all(pairs))


def _pair(key: CaseKey, base: Record, new: Record, run: RecordedRun, margin: float) -> CasePair:
    fine = base.status is Status.OK, new.status is Status.OK
    if not all(fine):
        # A side that ran, but was not timed because the other side failed, has not failed itself.
        broken = [r for r in (base, new) if r.status is not Status.OK and not r.reason.startswith(NOT_TIMED)]
        found = CaseVerdict.NEITHER
        if len(broken) == 1:
            found = CaseVerdict.BROKEN if broken[0] is new else CaseVerdict.FIXED
        note = "; ".join(f"{r.variant.partition('#')[2]} {r.status}: {r.reason}" for r in broken)
        return CasePair(key, base, new, found, note=note)
    samples = run.group(base)
    names = on(key.variant, BASE), on(key.variant, NEW)
    change = ratio_interval(samples.ratios(*names)).widened(samples.stretch(*names))
    base_s, new_s = (float(np.median(np.concatenate(samples.times(name)))) for name in names)
    return CasePair(key, base, new, verdict(change, margin), "time", base_s, new_s, change)


def advice(comparison: Comparison, budget_s: float, seatings: int) -> list[str]:
    """Say for each unclear case what would make it clear."""
    lines = []
    for pair in comparison.pairs:
        if pair.verdict is not CaseVerdict.UNCLEAR or pair.change is None:
            continue
        times = times_longer(pair, comparison.options.margin)
        name = f"{pair.key.variant} {pair.key.workload} {pair.key.mode}"
        if times > MOST_TIMES:
            lines.append(f"unclear: {name}: the interval is far too wide; measure again on a quiet machine")
            continue
        # Doubt within a process falls with the time, doubt between processes with their number.
        more = f"--budget {math.ceil(budget_s * times)} --seatings {math.ceil(seatings * min(times, 8.0))}"
        lines.append(f"unclear: {name}: about {times:.1f} times as long would decide: {more}")
    return lines


def times_longer(pair: CasePair, margin: float) -> float:
    """Factor by which to measure longer until the interval of an unclear pair lies within the margin or excludes 1.

    An interval shrinks with the root of the time; the nearer of the two answers counts.
    """
    assert pair.change is not None  # noqa: S101 - an unclear pair has one
    centre = math.log(pair.change.value)
    reach = max(math.log(pair.change.high) - centre, centre - math.log(pair.change.low))
    needed = max(abs(centre), math.log1p(margin) - abs(centre))
    return max(1.1, (reach / needed) ** 2)
