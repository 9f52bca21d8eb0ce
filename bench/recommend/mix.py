"""The recommendation over a mix of input sets: least expected time of a call, and the worst regret in any set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.plan.cases import REFERENCE
from bench.plan.identity import GroupKey
from bench.recommend.answer import doubts, misses
from bench.recommend.chances import Chances, chances
from bench.recommend.facts import Facts
from bench.recommend.question import EQUIVALENT, SURE, TIMED, Objective, Question
from bench.records.reader import RecordedRun
from bench.records.schema import Record, Status


@dataclass(frozen=True)
class Regret:
    """Loss of a variant in the input set where it loses most.

    Attributes:
        input_set: which.
        share: its time over that of the best there, less 1.
        best: the variant that is best there.
    """

    input_set: str
    share: float
    best: str


@dataclass(frozen=True)
class MixAnswer:
    """The best variant for a mix of input sets.

    Attributes:
        title: of the mix.
        sets: weight of each input set, which add up to 1.
        variant: the one with the least expected time; None where no variant ran, within the bounds, in every set.
        expected_s: its expected time of a call.
        probability: that it has the least.
        near_best: that it is at most `EQUIVALENT` above the least.
        regrets: the worst of each variant, in the order of their expected times.
        notes: what stands against calling the variant recommended, each with the input set that it is about; or why
            there is none.
        percentile: the expected value of what: `p50`, or `p99` where that is the objective.
    """

    title: str
    sets: Mapping[str, float]
    variant: str | None = None
    expected_s: float | None = None
    probability: float | None = None
    near_best: float | None = None
    regrets: Mapping[str, Regret] | None = None
    notes: tuple[str, ...] = ()
    percentile: str = "p50"

    @property
    def unclear(self) -> bool:
        """Return True if the rounds do not show that it is the best or as good, or a doubt stands against it."""
        return self.near_best is None or self.near_best < SURE or bool(self.notes)


def mixes(run: RecordedRun, question: Question) -> tuple[MixAnswer, ...]:
    """One answer per mix, that is, groups that differ only in their input set; nothing if the run has no such sets.

    Only times add up over a mix, so an objective that is measured once per case has no answer for it.
    """
    if question.objective not in TIMED:
        return ()
    found: dict[GroupKey, dict[str, list[Record]]] = {}
    for record in run.records:
        name = record.input_set or ""
        if name and question.asks_for(record.workload, record.mode):
            base = record.key.group._replace(workload=record.workload.removesuffix(f"/{name}"))
            found.setdefault(base, {}).setdefault(name, []).append(record)
    return tuple(_mix(run, base, sets, question) for base, sets in found.items() if len(sets) > 1)


def _mix(run: RecordedRun, base: GroupKey, sets: Mapping[str, Sequence[Record]], question: Question) -> MixAnswer:
    raw = {name: max(r.weight or 1.0 for r in records) for name, records in sets.items()}
    weights = {name: weight / sum(raw.values()) for name, weight in raw.items()}
    title = f"{base.workload}, {base.mode}, {base.device}: mix of {len(sets)} input sets"
    objective = question.objective if question.objective is Objective.P99 else Objective.P50
    ok = {name: {r.variant: r for r in records if r.status is Status.OK} for name, records in sets.items()}
    rated = {name: _rated(run, ok[name], question, objective, weights[name]) for name in sets}
    shared = [name for name in next(iter(rated.values())).costs if all(name in found.costs for found in rated.values())]
    if not shared:
        none = [name for name, found in rated.items() if not found.costs]
        where = f"in {' and '.join(none)}" if none else "in every input set"
        return MixAnswer(title, weights, notes=(f"no variant ran within the bounds {where}",))
    parts = {name: found.only(shared) for name, found in rated.items()}
    costs = {v: sum(weights[name] * part.costs[v] for name, part in parts.items()) for v in shared}
    # Every set was measured in processes of its own, so its resamples are independent of those of the others.
    generator = np.random.default_rng(0)
    drawn = sum(weights[n] * part.drawn[:, generator.permutation(part.drawn.shape[1])] for n, part in parts.items())
    total = Chances(costs, np.asarray(drawn))
    best = total.best
    regrets = {v: _regret(v, parts) for v in sorted(costs, key=lambda v: costs[v])}
    chance, near = total.of_best(best), total.of_best(best, EQUIVALENT)
    notes = tuple(
        f"in {name}, {note.text}"
        for name in sets
        for note in doubts(ok[name][best], question, once=False, ordered=False)
        if note.unsure
    )
    percentile = "p99" if objective is Objective.P99 else "p50"
    return MixAnswer(title, weights, best, costs[best], chance, near, regrets, notes, percentile)


def _rated(
    run: RecordedRun, ok: Mapping[str, Record], question: Question, objective: Objective, weight: float
) -> Chances:
    """Costs in one input set, of the variants that keep the bounds there."""
    facts = {name: Facts.of(record, ok.get(REFERENCE), {}) for name, record in ok.items()}
    fine = [r for r in ok.values() if not misses(r, facts[r.variant], question) and run.group(r).times(r.variant)]
    if not fine:
        return Chances({}, np.empty((0, 0)))
    found = chances(run.group(fine[0]), [record.variant for record in fine], objective)
    if question.calls is None or objective is Objective.P99:
        return found
    # Each set has a first call of its own, for which its part of the calls has to pay.
    starts = {name: start for name in found.costs if (start := facts[name].start_s) is not None}
    return found.only(list(starts)).with_starts(starts, question.calls * weight) if starts else found.only([])


def _regret(variant: str, parts: Mapping[str, Chances]) -> Regret:
    found = []
    for name, part in parts.items():
        best = part.best
        found.append(Regret(name, part.costs[variant] / part.costs[best] - 1, best))
    return max(found, key=lambda regret: regret.share)
