"""The recommendation over a mix of input sets: least expected time of a call, and the worst regret in any set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.plan.identity import GroupKey
from bench.recommend.answer import misses
from bench.recommend.chances import Chances, chances
from bench.recommend.facts import Facts
from bench.recommend.question import EQUIVALENT, SURE, Objective, Question
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
        unclear: true if the rounds do not decide which is best.
    """

    title: str
    sets: Mapping[str, float]
    variant: str | None = None
    expected_s: float | None = None
    probability: float | None = None
    near_best: float | None = None
    regrets: Mapping[str, Regret] | None = None

    @property
    def unclear(self) -> bool:
        """Return True if the rounds do not show that it is the best, or as good."""
        return self.near_best is None or self.near_best < SURE


def mixes(run: RecordedRun, question: Question) -> tuple[MixAnswer, ...]:
    """One answer a mix: groups that differ in their input set alone; nothing where the run has no such sets."""
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
    rated: dict[str, Chances] = {}
    for name, records in sets.items():
        fine = [r for r in records if r.status is Status.OK and not misses(r, Facts.of(r, None, {}), question)]
        names = [r.variant for r in fine if run.group(r).times(r.variant)]
        rated[name] = chances(run.group(records[0]), names, objective)
    shared = [name for name in next(iter(rated.values())).costs if all(name in found.costs for found in rated.values())]
    if not shared:
        return MixAnswer(title, weights)
    parts = {name: found.only(shared) for name, found in rated.items()}
    costs = {v: sum(weights[name] * part.costs[v] for name, part in parts.items()) for v in shared}
    # Every set was measured in processes of its own, so its resamples are independent of those of the others.
    generator = np.random.default_rng(0)
    drawn = sum(weights[n] * part.drawn[:, generator.permutation(part.drawn.shape[1])] for n, part in parts.items())
    total = Chances(costs, np.asarray(drawn))
    best = total.best
    regrets = {v: _regret(v, parts) for v in sorted(costs, key=lambda v: costs[v])}
    chance, near = total.of_best(best), total.of_best(best, EQUIVALENT)
    return MixAnswer(title, weights, best, costs[best], chance, near, regrets)


def _regret(variant: str, parts: Mapping[str, Chances]) -> Regret:
    found = []
    for name, part in parts.items():
        best = part.best
        found.append(Regret(name, part.costs[variant] / part.costs[best] - 1, best))
    return max(found, key=lambda regret: regret.share)
