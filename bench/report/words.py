"""The answer of a run in sentences: which variant is fastest, by how much, and whether that is sure.

Names stand between backticks, which the page turns into code. A sentence never claims more than its
intervals: overlap with the runner-up, overlap with the reference and doubtful samples are all said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench import units
from bench.record import Record, Status
from bench.report.frames import REFERENCE, Group, Run, doubts


@dataclass(frozen=True)
class Answer:
    """One sentence or a few, and the group or sweep they are about."""

    where: str
    text: str


def lead(run: Run) -> str:
    """How many cases the answers rest on."""
    total = len(run.records)
    refused = Counter(record.status.value for record in run.records if record.status is not Status.OK)
    if not refused:
        return f"{'The one case' if total == 1 else f'All {total} cases'} ran and passed the parity gate."
    listed = ", ".join(f"{number} {status}" for status, number in refused.most_common())
    return f"Of {total} cases, {total - refused.total()} ran and passed the parity gate ({listed})."


def answers(groups: Iterable[Group]) -> tuple[Answer, ...]:
    """One answer a group; the groups of a sweep share one."""
    found: list[Answer] = []
    sweeps: dict[object, list[Group]] = {}
    for group in groups:
        if group.sweep_axis:
            sweeps.setdefault(group.sweep_key, []).append(group)
        else:
            found.append(Answer(group.title, group_answer(group)))
    return (*found, *(sweep_answer(members) for members in sweeps.values()))


def group_answer(group: Group) -> str:
    """The fastest variant of one group, against the reference and against the next."""
    best = group.best
    if best is None:
        return "No variant ran and passed the gate, so there is nothing to compare."
    reference = next((record for record in group.ok if record.variant == REFERENCE), None)
    sentences = [opening(best, group)]
    others = [record for record in group.ok[1:] if record.speedup is not None]
    if others and best.speedup is not None:
        sentences.append(against_next(best, others[0]))
    if best.variant != REFERENCE and reaches_one(best):
        sentences.append("Its interval reaches 1, so this may be no gain at all.")
    if reference and best.precision != reference.precision:
        sentences.append(same_precision(group, reference))
    if doubts(best):
        sentences.append(f"This figure is doubtful: {' and '.join(doubts(best))}.")
    return " ".join(filter(None, sentences))


def opening(best: Record, group: Group) -> str:
    """Who is fastest."""
    if best.variant == REFERENCE:
        alone = len(group.ok) == 1
        return "Only the `reference` ran." if alone else "Nothing is faster than the `reference`."
    if best.speedup is None:
        return f"`{best.variant}` is fastest by median time; there is no reference to compare with."
    if best.speedup <= 1:
        return f"`{best.variant}` is the best that ran, at {figure(best)} the speed of the reference."
    return f"`{best.variant}` is fastest, {figure(best)} as fast as the reference."


def against_next(best: Record, runner_up: Record) -> str:
    """Whether the next variant can be told from the best."""
    text = f"The next is `{runner_up.variant}` with {figure(runner_up)}"
    if None in (best.speedup_lo, runner_up.speedup_hi):
        return f"{text}."
    if runner_up.speedup_hi >= best.speedup_lo:  # type: ignore[operator]
        return f"{text}: the intervals overlap, so the run does not tell which of the two is faster."
    return f"{text}: the intervals do not overlap."


def reaches_one(record: Record) -> bool:
    """Whether the interval holds the reference's own speed."""
    return record.speedup_lo is not None and record.speedup is not None and record.speedup_lo <= 1 < record.speedup


def same_precision(group: Group, reference: Record) -> str:
    """The fastest that computes in the reference's precision, since a narrower type is not the same work."""
    alike = [record for record in group.ok if record.precision == reference.precision and record.speedup is not None]
    if not alike or alike[0].variant == REFERENCE:
        return f"In {reference.precision}, nothing is faster than the `reference`."
    return f"In {reference.precision}, `{alike[0].variant}` is fastest with {figure(alike[0])}."


def sweep_answer(members: list[Group]) -> Answer:
    """The fastest variant at each value of a sweep, values with the same one together."""
    where = members[0].sweep_title
    by_best: dict[str, list[Record]] = {}
    for group in sorted(members, key=lambda group: group.records[0].sweep_value or 0):
        if group.best is not None:
            by_best.setdefault(group.best.variant, []).append(group.best)
    if not by_best:
        return Answer(where, "No variant ran and passed the gate, so there is nothing to compare.")
    parts = []
    for variant, records in by_best.items():
        values = listed([f"{record.sweep_value}" for record in records])
        parts.append(f"`{variant}` at {values}{span(records) if variant != REFERENCE else ''}")
    mark = " Some of these figures are doubtful." if any(doubts(r) for rs in by_best.values() for r in rs) else ""
    return Answer(where, f"Fastest is {'; '.join(parts)}.{mark}")


def span(records: list[Record]) -> str:
    """Smallest and largest speedup of `records`."""
    speedups = [record.speedup for record in records if record.speedup is not None]
    if not speedups:
        return ""
    lo, hi = units.ratio(min(speedups)), units.ratio(max(speedups))
    return f" ({lo})" if lo == hi else f" ({lo} to {hi})"


def figure(record: Record) -> str:
    """Speedup with its interval."""
    return units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)


def listed(words: list[str]) -> str:
    """`1, 2 and 3`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
