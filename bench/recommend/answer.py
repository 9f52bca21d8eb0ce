"""The recommendation for one group of a run, and for every group of it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench import units
from bench.analysis.intervals import RESAMPLES, Interval, least_calls
from bench.errors import UsageError
from bench.machine.interference import DISTURBED
from bench.plan.cases import REFERENCE
from bench.plan.identity import GroupKey
from bench.recommend.chances import Chances, chances
from bench.recommend.clearer import Clearer, MoreRepeats, clearer, more_calls
from bench.recommend.facts import Facts, needs_of
from bench.recommend.question import EQUIVALENT, SURE, TIMED, Objective, Question
from bench.records.reader import RecordedRun
from bench.records.schema import Record, Status

#: Calls below which a 99th percentile has no interval, even if they were independent.
P99_CALLS = least_calls(0.99)
#: Workload, mode, device, threads.


class Recommendation(enum.StrEnum):
    """Recommendation on a group."""

    RECOMMENDED = "recommended"
    UNCLEAR = "unclear"
    NONE = "none"


@dataclass(frozen=True)
class Rival:
    """A variant other than the recommended one.

    Attributes:
        excess: its cost over that of the recommended one, with its interval; only the value if it was measured once.
        memory_bytes: its memory less that of the recommended one; None where either is not known.
        probability: that it is the best.
    """

    variant: str
    excess: Interval
    memory_bytes: float | None
    probability: float | None


@dataclass(frozen=True)
class BreakEven:
    """Calls from which on a start that takes longer has paid for itself.

    Attributes:
        against: the variant that is caught up with last.
        calls: after the first start on a machine.
        later_calls: after a later one, which finds compiled what is compiled once; None where it makes no difference.
    """

    against: str
    calls: float
    later_calls: float | None = None


@dataclass(frozen=True)
class Advice:
    """A recommendation, or why there is none.

    Attributes:
        key: of the group.
        variant: to ship; where nothing keeps the bounds, the nearest; None where nothing can be rated.
        value: cost of the objective as people read it.
        probability: that it is the best of those that keep the bounds; None for what is measured once.
        near_best: probability that it is at most `EQUIVALENT` worse than the best.
        rivals: the others that keep the bounds, the best first.
        alike: those that cannot be told apart from the best, itself among them.
        cheapest: the cheapest of those to own.
        facts: of the variant.
        excess: cost over that of the best of those that were compared.
        break_even: against the last one to be caught up with, of those that start sooner.
        misses: bounds that the nearest variant misses, and by how much.
        left_out: variants that do not keep the bounds or cannot be rated, with the reason.
        clearer: what would make an unclear answer clear.
        notes: doubts in words.
        commits: facts of all variants that were rated.
    """

    key: GroupKey
    question: Question
    verdict: Recommendation
    variant: str | None = None
    value: str = ""
    probability: float | None = None
    near_best: float | None = None
    rivals: tuple[Rival, ...] = ()
    alike: tuple[str, ...] = ()
    cheapest: str | None = None
    facts: Facts | None = None
    break_even: BreakEven | None = None
    misses: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    clearer: Clearer | MoreRepeats | None = None
    notes: tuple[str, ...] = ()
    commits: Mapping[str, Facts] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The group in words."""
        workload, mode, device, threads = self.key
        return f"{workload}, {mode}, {device}, {threads} thread{'s' if threads != 1 else ''}"


def recommend(
    run: RecordedRun, question: Question, needs: Mapping[str, Sequence[str]] | None = None
) -> tuple[Advice, ...]:
    """Answer a question for every group of a run.

    Args:
        run: as `bench.records.reader.read_run` gives it.
        question: what to look for.
        needs: of the variants by name; those that the run recorded unless given.

    Raises:
        UsageError: the run has no case in the mode, or no metric that a bound is about.
    """
    groups: dict[GroupKey, list[Record]] = {}
    for record in run.records:
        if question.asks_for(record.workload, record.mode):
            groups.setdefault(record.key.group, []).append(record)
    if not groups:
        there = ", ".join(dict.fromkeys(f"{record.workload} in {record.mode}" for record in run.records))
        msg = f"{run.path} has no case{question.scope}; it has {there}"
        raise UsageError(msg)
    if question.max_drop is not None and not any(getattr(r, "metric", None) is not None for r in run.records):
        msg = (
            f"--max-drop bounds the change of a metric, and {run.path} has none; measure with --metric, or leave it out"
        )
        raise UsageError(msg)
    known = needs_of(run) if needs is None else needs
    return tuple(_answer(run, key, records, question, known) for key, records in groups.items())


def _answer(
    run: RecordedRun, key: GroupKey, records: Sequence[Record], question: Question, needs: Mapping[str, Sequence[str]]
) -> Advice:
    ok = {record.variant: record for record in records if record.status is Status.OK}
    facts = {name: Facts.of(record, ok.get(REFERENCE), needs) for name, record in ok.items()}
    rated, left_out = _rated(run, list(ok.values()), facts, question)
    if not rated.costs:
        why = () if ok else ("no variant ran and passed its gate",)
        left_out |= {r.variant: f"{r.status.value}: {r.reason}" for r in records if not ok}
        wanted = question.objective is Objective.P99 and ok
        advice = more_calls(run.group(next(iter(ok.values()))), list(ok), P99_CALLS) if wanted else None
        return Advice(
            key, question, Recommendation.UNCLEAR, left_out=left_out, clearer=advice, notes=why, commits=facts
        )
    missed = {name: misses(ok[name], facts[name], question) for name in rated.costs}
    fine = [name for name in rated.costs if not missed[name]]
    left_out |= {name: f"{'; '.join(map(str, found))}" for name, found in missed.items() if found}
    if not fine:
        return _nearest(key, question, rated, missed, facts, left_out)
    rated = rated.only(fine)
    best = rated.best
    once = question.objective not in TIMED
    alike = rated.alike()
    near = None if once else rated.of_best(best, EQUIVALENT)
    notes = doubts(ok[best], question, once=once, alone=len(fine) == 1)
    sure = once or len(fine) == 1 or (near is not None and near >= SURE)
    verdict = Recommendation.RECOMMENDED if sure and not any(note.unsure for note in notes) else Recommendation.UNCLEAR
    others = sorted((name for name in fine if name != best), key=lambda name: rated.costs[name])
    rivals = tuple(_rival(rated, name, best, facts, once=once) for name in others)
    open_ends = [rival for rival in rivals if rival.variant in alike]
    widest = max(open_ends, key=lambda rival: rival.excess.high / rival.excess.low, default=None)
    advice = None
    if not sure and widest:
        advice = clearer(widest.excess, run.group(ok[best]), fine, (best, widest.variant))
    return Advice(
        key,
        question,
        verdict,
        best,
        shown(rated.costs[best], ok[best], question),
        None if once else rated.of_best(best),
        near,
        rivals,
        alike,
        min(alike, key=lambda name: facts[name].burden),
        facts[best],
        None if once else _break_even(best, {name: ok[name] for name in fine}, facts),
        left_out=left_out,
        clearer=advice,
        notes=tuple(note.text for note in notes),
        commits=facts,
    )


def _rated(
    run: RecordedRun, ok: Sequence[Record], facts: Mapping[str, Facts], question: Question
) -> tuple[Chances, dict[str, str]]:
    """Costs of the variants that have what the objective is about, and why others do not."""
    names = [record.variant for record in ok]
    if question.objective in TIMED:
        measured = [record.variant for record in ok if run.group(record).times(record.variant)]
        found = chances(run.group(ok[0]), measured, question.objective) if measured else Chances({}, np.empty((0, 0)))
        if question.calls is not None and question.objective is not Objective.P99:
            starts = {name: start for name in found.costs if (start := facts[name].start_s) is not None}
            found = found.only(list(starts)).with_starts(starts, question.calls) if starts else found.only([])
        reason = "no raw samples"
        if question.objective is Objective.P99:
            reason = f"too few calls for a 99th percentile: it takes {P99_CALLS} independent calls"
    else:
        memory = question.objective is Objective.MEMORY
        values = {name: facts[name].memory_bytes if memory else facts[name].start_s for name in names}
        costs = {name: float(value) for name, value in values.items() if value}
        found = Chances(costs, np.tile(np.array(list(costs.values()))[:, None], (1, RESAMPLES)))
        reason = "not measured"
    return found, {name: reason for name in names if name not in found.costs}


@dataclass(frozen=True)
class Miss:
    """A bound that a variant misses.

    Attributes:
        factor: value over limit; infinite where the value is not known.
        text: in words.
    """

    factor: float
    text: str

    def __str__(self) -> str:
        """Return the miss in words."""
        return self.text


def misses(record: Record, facts: Facts, question: Question) -> tuple[Miss, ...]:
    """Bounds that a variant exceeds, or for which its value is not known."""
    percentile = "p99" if question.objective is Objective.P99 else "p50"
    bounds = (
        ("error", facts.error, question.max_error, units.error),
        ("change of the metric", facts.drop, question.max_drop, units.share),
        (percentile, getattr(record, f"latency_{percentile}_s"), question.latency_bound_s, units.seconds),
        ("memory", facts.memory_bytes, question.memory_bound_bytes, units.megabytes),
    )
    found = []
    for name, value, limit, text in bounds:
        if limit is None:
            continue
        if value is None:
            found.append(Miss(float("inf"), f"its {name} is not known"))
        elif value > limit:
            found.append(over(name, value, limit, text))
    return tuple(found)


def over(name: str, value: float, limit: float, text: Callable[[float], str]) -> Miss:
    """The miss of a value that is over its limit.

    Args:
        name: of the quantity.
        value: of it.
        limit: that it is over.
        text: formats either.
    """
    factor = value / limit if limit else float("inf")
    more = f"{factor:.3g} times" if factor >= 2 else f"{100 * (factor - 1):.2g} % over"  # noqa: PLR2004
    return Miss(factor, f"{name} {text(value)} is {more} the bound of {text(limit)}")


def _nearest(
    key: GroupKey,
    question: Question,
    rated: Chances,
    missed: Mapping[str, tuple[Miss, ...]],
    facts: Mapping[str, Facts],
    left_out: Mapping[str, str],
) -> Advice:
    """The variant that misses the bounds by the least."""
    near = min(rated.costs, key=lambda name: (max(m.factor for m in missed[name]), rated.costs[name]))
    texts = tuple(miss.text for miss in missed[near])
    return Advice(
        key, question, Recommendation.NONE, near, facts=facts[near], misses=texts, left_out=left_out, commits=facts
    )


@dataclass(frozen=True)
class Note:
    """A doubt about a variant.

    Attributes:
        text: in words, as the rest of a sentence.
        unsure: whether the variant cannot be recommended because of it.
    """

    text: str
    unsure: bool = False


def doubts(
    record: Record, question: Question, *, once: bool, alone: bool = False, ordered: bool = True
) -> tuple[Note, ...]:
    """Doubts about the variant that is recommended.

    Args:
        record: of the variant.
        question: that it answers.
        once: whether its cost was measured once.
        alone: whether there is no other variant to ship, so that a doubtful time changes nothing.
        ordered: whether the answer is the order of the variants in its group, however far they are apart.
    """
    found = []
    percentile = "p99" if question.objective is Objective.P99 else "p50"
    high = getattr(record, f"latency_{percentile}_hi_s")
    bound = question.latency_bound_s
    if bound is not None and high is not None and high > bound:
        text = f"its {percentile} is within the bound, but the interval reaches {units.seconds(high)}"
        found.append(Note(text, unsure=True))
    if record.reason:
        found.append(Note(f"one of its processes failed: {record.reason}", unsure=True))
    if once:
        found.append(Note("measured once in a fresh process, so there is no probability"))
    elif record.disturbed and record.samples and record.disturbed >= record.samples / 2:
        # As in the tables of a run, where such a variant has the star of a winner only if it is certain without them.
        text = f"{record.disturbed} of its {record.samples} samples were taken while {DISTURBED}"
        # What else was asked depends on how much faster it is.
        certain = ordered and record.certain and question.objective is not Objective.P99 and question.calls is None
        text += "; the order is certain without them" if certain else ""
        found.append(Note(text, unsure=not alone and not certain))
    return tuple(found)


def _rival(rated: Chances, name: str, best: str, facts: Mapping[str, Facts], *, once: bool) -> Rival:
    own, other = facts[name].memory_bytes, facts[best].memory_bytes
    memory = None if own is None or other is None else own - other
    return Rival(name, rated.excess(name, best), memory, None if once else rated.of_best(name))


def _break_even(best: str, fine: Mapping[str, Record], facts: Mapping[str, Facts]) -> BreakEven | None:
    """Calls after which the best has caught up with all that start sooner; None where none does."""

    def caught_up(starts_s: Mapping[str, float | None]) -> BreakEven | None:
        known = {
            name: (start, time_s)
            for name in fine
            if (start := starts_s[name]) is not None and (time_s := fine[name].latency_p50_s) is not None
        }
        if best not in known:
            return None
        own_start_s, own_s = known[best]
        found = [
            BreakEven(name, (own_start_s - start) / (time_s - own_s))
            for name, (start, time_s) in known.items()
            if start < own_start_s and time_s > own_s
        ]
        return max(found, key=lambda even: even.calls, default=None)

    first_s = {name: facts[name].start_s for name in fine}
    later_s = {name: facts[name].later_start_s for name in fine}
    first = caught_up(first_s)
    if first is None or later_s == first_s:
        return first
    later = caught_up(later_s)
    return dataclasses.replace(first, later_calls=later.calls if later else 0.0)


def shown(cost: float, record: Record, question: Question) -> str:
    """The cost of an objective as people read it."""
    if question.objective is Objective.MEMORY:
        return units.megabytes(cost)
    if question.objective is Objective.THROUGHPUT and record.batch:
        return f"{units.count(record.batch / cost)} sequences/s"
    if question.objective is Objective.P50 and question.calls is None and record.latency_p50_s is not None:
        # The figure that the run itself shows: the median of all calls, where ranks come from medians of rounds.
        text = units.estimated_seconds(record.latency_p50_s, record.latency_p50_lo_s, record.latency_p50_hi_s)
        return f"{text} of its median" if text == units.NO_ESTIMATE else text
    return units.seconds(cost)
