"""The recommendation of `--objective load`: the variant that sustains the highest load under a latency bound.

It is made from the searches of `bench serve`: each repeat ends between the highest load that held and the lowest above
it that did not.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench import units
from bench.analysis.intervals import RESAMPLES
from bench.errors import UsageError
from bench.plan import own_model
from bench.plan.cases import OWN, REFERENCE
from bench.plan.identity import GroupKey
from bench.recommend.answer import Advice, Miss, Recommendation, Rival, misses, over
from bench.recommend.chances import Chances
from bench.recommend.clearer import MoreRepeats
from bench.recommend.facts import Facts, needs_of
from bench.recommend.question import EQUIVALENT, SURE, Question
from bench.records import serving
from bench.records.reader import RecordedRun, read_environment, read_run
from bench.records.schema import Record, Status
from bench.records.serving import ServingRecord, ServingTest

#: Standard error of a median over that of a mean, where values are normal and not few.
MEDIAN_ERROR = math.sqrt(math.pi / 2)
#: Bounds whose ratio is this near to 1 are the same; they are read from text.
SAME = 1e-6
#: From this share of disturbed tests on, the answer says so, and a first place is a doubtful one: as with rounds.
DISTURBED = 0.5
#: Phase of the test that asks one query after the other.
ALONE = "single-stream"


@dataclass(frozen=True)
class ServedRun:
    """A folder into which `bench serve` wrote.

    Attributes:
        run: its other records; none where nothing but serving was measured.
        records: one per variant.
        tests: LoadGen's tests, by workload and variant.
    """

    run: RecordedRun
    records: tuple[ServingRecord, ...]
    tests: Mapping[tuple[str, str], tuple[ServingTest, ...]]


def read_served(path: Path, question: Question) -> ServedRun:
    """Read the serving records of a run folder.

    Raises:
        UsageError: it holds none of the scenario `server`; with the command that measures them.
    """
    if not path.is_dir():
        msg = f"{path} is not a folder; expected the folder of `bench serve`, with {serving.FILE} in it"
        raise UsageError(msg)
    records = tuple(serving.read(path))
    if not records:
        # A folder that is no run either is refused by the reader.
        run = read_run(path)
        msg = f"{path} has no serving records, which --objective load needs; measure them into it: "
        raise UsageError(msg + _command_for(run, question))
    if other := next((record for record in records if record.scenario != "server"), None):
        msg = f"{path} was served in the scenario {other.scenario}, which finds no highest load; measure with: "
        raise UsageError(msg + "python -m bench serve --bound p99=20ms")
    plain = RecordedRun(path, (), 0, {}, read_environment(path))
    run = read_run(path) if (path / "records.jsonl").is_file() else plain
    tests: dict[tuple[str, str], tuple[ServingTest, ...]] = {}
    for test in serving.read_tests(path):
        key = (test.workload, test.variant)
        tests[key] = (*tests.get(key, ()), test)
    return ServedRun(run, records, tests)


def recommend_load(
    served: ServedRun, question: Question, needs: Mapping[str, Sequence[str]] | None = None
) -> tuple[Advice, ...]:
    """Answer which variant of each workload sustains the highest load under the bound.

    Without a bound in the question the one that was measured holds. Under another bound no load was searched for, so
    the answer is unclear, with what the tests saw and the command that measures it.

    Args:
        served: as `read_served` gives it.
        question: with the objective `load`.
        needs: of the variants by name; those that the run recorded unless given.

    Raises:
        UsageError: nothing that is asked about was served, or for bounds that serving knows nothing of.
    """
    if question.calls is not None:
        msg = "--calls spreads a start over calls, and no start is in the load of --objective load; leave it out"
        raise UsageError(msg)
    groups: dict[GroupKey, list[ServingRecord]] = {}
    for record in served.records:
        if question.asks_for(record.workload, record.mode):
            groups.setdefault(GroupKey(record.workload, record.mode, record.device, record.threads), []).append(record)
    if not groups:
        there = ", ".join(dict.fromkeys(f"{record.workload} in {record.mode}" for record in served.records))
        msg = f"{served.run.path} has no serving records{question.scope}; it has those of {there}"
        raise UsageError(msg)
    known = needs_of(served.run) if needs is None else needs
    return tuple(_Group(served, key, tuple(records), question, known).answer() for key, records in groups.items())


class _Group:
    """The variants of one workload, as they were served."""

    def __init__(
        self,
        served: ServedRun,
        key: GroupKey,
        records: Sequence[ServingRecord],
        question: Question,
        needs: Mapping[str, Sequence[str]],
    ) -> None:
        self.served, self.key, self.records = served, key, records
        first = records[0]
        self.percentile, self.measured_s = first.percentile or 0.0, first.bound_s or 0.0
        self.bound_s = question.latency_bound_s or self.measured_s
        self.question = dataclasses.replace(question, latency_bound_s=self.bound_s, served_percentile=self.percentile)
        of_run = {
            record.variant: record
            for record in served.run.records
            if (record.workload, record.mode, record.device) == key[:3] and record.status is Status.OK
        }
        self.ok = {record.variant: record for record in records if record.status is Status.OK}
        # What the rounds of the same folder measured of a variant counts; without them only the gate's error is known.
        as_run = {
            name: of_run.get(name, Record(variant=name, parity_error=found.parity_error))
            for name, found in self.ok.items()
        }
        self.facts = {name: Facts.of(record, of_run.get(REFERENCE), needs) for name, record in as_run.items()}
        # The bound on latency is that of the search; the others are those of every objective.
        plain = dataclasses.replace(question, latency_bound_s=None)
        self.missed = {name: misses(record, self.facts[name], plain) for name, record in as_run.items()}
        self.left_out = {
            found.variant: f"{found.status.value}: {found.reason}" for found in records if found.status is not Status.OK
        }

    def answer(self) -> Advice:
        """Return the answer for the group."""
        if not self.ok:
            return self._advice(Recommendation.UNCLEAR, notes=("no variant was served and passed its gate",))
        if abs(self.bound_s / self.measured_s - 1) > SAME:
            return self._other_bound()
        rated = {name: found for name, found in self.ok.items() if found.qps is not None}
        self.left_out |= {name: found.reason for name, found in self.ok.items() if name not in rated}
        self.left_out |= {name: "; ".join(map(str, found)) for name, found in self.missed.items() if found}
        fine = [name for name in rated if not self.missed[name]]
        if fine:
            return self._best(fine)
        near = {name: found for name in self.ok if (found := self._misses(name))}
        if not near:
            # LoadGen lets no test of them count, so it is not known whether they keep the bound.
            return self._advice(Recommendation.UNCLEAR, clearer=self._again(list(self.ok)))
        nearest = min(near, key=lambda name: max(miss.factor for miss in near[name]))
        return self._advice(
            Recommendation.NONE, variant=nearest, facts=self.facts[nearest], misses=tuple(map(str, near[nearest]))
        )

    def _best(self, fine: Sequence[str]) -> Advice:
        drawn = {name: loads(self.served.tests.get((self.key[0], name), ())) for name in fine}
        if several := [name for name in fine if drawn[name] is not None]:
            # One repeat has no spread, so such a variant cannot be compared with the others.
            alone = [name for name in fine if name not in several]
            self.left_out |= {
                name: f"{serving.load_text(self.ok[name])} queries/s in a single repeat" for name in alone
            }
        repeated, fine = bool(several), several or fine
        costs = {name: 1 / self._load(name) for name in fine}
        draws = [np.full(RESAMPLES, costs[name]) if (own := drawn[name]) is None else 1 / own for name in fine]
        rated = Chances(costs, np.stack(draws))
        best, alike = rated.best, rated.alike() if repeated else tuple(fine)
        near = rated.of_best(best, EQUIVALENT) if repeated else None
        sure = len(fine) == 1 or (near is not None and near >= SURE)
        others = sorted((name for name in fine if name != best), key=lambda name: costs[name])
        rivals = tuple(
            Rival(name, rated.excess(name, best), self._memory(name, best), rated.of_best(name) if repeated else None)
            for name in others
        )
        notes: tuple[str, ...] = (
            () if repeated else ("a single repeat has no interval, so it is not known how sure this is",)
        )
        open_ended = self._open_ended(best, fine)
        notes += tuple(
            f"`{name}` held the bound at {load:.4g} queries/s, but too few of its searches found where it stops holding"
            for name, load in open_ended.items()
        )
        doubts = {name: doubt for name in fine if (doubt := serving.beyond_offline(self.ok[name]))}
        notes += tuple(doubts.values())
        share = self.ok[best].disturbed_share or 0.0
        if share >= DISTURBED:
            notes += (f"something else used the machine during {100 * share:.0f} % of its tests",)
        # Where there is no other variant to ship, doubtful loads change nothing.
        disturbed = share >= DISTURBED and len(fine) > 1
        widest = max(
            (rival.excess for rival in rivals if rival.variant in alike), key=lambda e: e.high / e.low, default=None
        )
        clearer = None
        if not sure and widest is not None:
            clearer = self._again([name for name in alike if name != REFERENCE], widest.value, widest.high / widest.low)
        elif open_ended or best in doubts:
            clearer = self._again([name for name in (best, *open_ended) if name != REFERENCE])
        elif disturbed:
            clearer = self._again([name for name in fine if name != REFERENCE])
        doubtful = bool(open_ended) or best in doubts or disturbed
        record = self.ok[best]
        return self._advice(
            Recommendation.RECOMMENDED if sure and not doubtful else Recommendation.UNCLEAR,
            variant=best,
            value=f"{serving.load_text(record)} queries/s",
            probability=rated.of_best(best) if repeated else None,
            near_best=near,
            rivals=rivals,
            alike=alike,
            cheapest=min(alike, key=lambda name: self.facts[name].burden),
            facts=self.facts[best],
            notes=notes,
            clearer=clearer,
        )

    def _open_ended(self, best: str, rated: Sequence[str]) -> dict[str, float]:
        """Loads that variants that are not rated held in a repeat, of those that may bear as much as the best."""
        found = {}
        for name in self.ok:
            held = [test.target_qps for test in self._tests(name) if test.repeat is not None and test.verdict == "held"]
            may_win = bool(held) and max(held) * (1 + EQUIVALENT) >= self._load(best)
            if may_win and name not in rated and not self.missed[name]:
                found[name] = max(held)
        return found

    def _load(self, name: str) -> float:
        return self.ok[name].qps or math.nan

    def _other_bound(self) -> Advice:
        """Say what the tests saw of a bound that was not searched for."""
        asked, searched = units.seconds(self.bound_s), units.seconds(self.measured_s)
        notes = [f"the search was for p{self.percentile:g} {searched}, not for {asked}"]
        for name in self.ok:
            tests = [test for test in self._tests(name) if test.searched]
            kept = [test.target_qps for test in tests if test.latency_bound_s <= self.bound_s]
            passed = [test.target_qps for test in tests if test.latency_bound_s > self.bound_s]
            up_to = f"kept {asked} in a test at {max(kept):.4g} queries/s" if kept else f"kept {asked} in no test"
            beyond = f" and exceeded it in one at {min(passed):.4g}" if passed else ""
            notes.append(f"`{name}` {up_to}{beyond}")
        return self._advice(
            Recommendation.UNCLEAR, notes=tuple(notes), clearer=self._again([n for n in self.ok if n != REFERENCE])
        )

    def _tests(self, name: str) -> list[ServingTest]:
        """Tests of a variant whose latency counts."""
        return [test for test in self.served.tests.get((self.key[0], name), ()) if test.counts]

    def _misses(self, name: str) -> tuple[Miss, ...]:
        """Bounds that a variant misses; empty where no test says how long it takes."""
        found = self.missed[name]
        if self.ok[name].qps is not None:
            return found
        tests = [test for test in self._tests(name) if test.searched or test.phase == ALONE]
        if not tests:
            return ()
        least = min(tests, key=lambda test: test.latency_bound_s)
        if least.latency_bound_s <= self.bound_s:
            return ()
        where = "one query after the other" if least.phase == ALONE else f"{least.target_qps:.4g} queries/s"
        late = over(f"p{self.percentile:g}", least.latency_bound_s, self.bound_s, units.seconds)
        return (*found, Miss(late.factor, f"{late.text}, even at {where}"))

    def _memory(self, name: str, best: str) -> float | None:
        own, other = self.facts[name].memory_bytes, self.facts[best].memory_bytes
        return None if own is None or other is None else own - other

    def _again(self, names: Sequence[str], value: float = 1.0, spread: float = 1.0) -> MoreRepeats:
        """The command that serves variants again, with the repeats that would tell them apart."""
        repeats = max((self.ok[name].repeats for name in names), default=0)
        bound = f"p{self.percentile:g}={1e3 * self.bound_s:.6g}ms"
        own = own_model.words(self.served.run.environment) if self.key[0].startswith(OWN) else []
        served = own or ["--workload", self.key[0]]
        served += ["--mode", self.key.mode] if self.key.mode != "inference" else []
        first = self.records[0]
        served += ["--batching", "step"] if first.batching == "step" else []
        served += ["--lengths", first.lengths] if first.lengths == "bucketed" else []
        return MoreRepeats.of(served, names, bound, repeats, value, spread)

    def _advice(self, verdict: Recommendation, **fields: object) -> Advice:
        return Advice(
            self.key,
            self.question,
            verdict,
            left_out=self.left_out,
            commits=self.facts,
            **fields,  # type: ignore[arg-type]
        )


def loads(tests: Sequence[ServingTest], count: int = RESAMPLES, seed: int = 0) -> np.ndarray | None:
    """Highest load that a variant bears, drawn `count` times as far as its repeats leave it open; None below two.

    The median of the repeats, each of which ended somewhere between its two loads, and an error of that median with the
    tails of Student's t. The repeats of variants are no pairs: each searched at a time of its own.

    Args:
        tests: of the variant.
        count: draws.
        seed: of the draws.
    """
    ends = [found for _, found in sorted(serving.ends(tests).items())]
    if len(ends) < 2:  # noqa: PLR2004 - a spread needs two
        return None
    low, high = (np.log([found[place] for found in ends]) for place in (0, 1))
    # Variants draw different numbers: their errors have nothing in common.
    generator = np.random.default_rng([seed, *np.frombuffer(tests[0].variant.encode(), np.uint8)])
    # The step of the search is the same for all repeats, so what it hides does not average out.
    values = low + generator.random((count, 1)) * (high - low)
    error = MEDIAN_ERROR * values.std(axis=1, ddof=1) / math.sqrt(len(ends))
    return np.asarray(np.exp(np.median(values, axis=1) + error * generator.standard_t(len(ends) - 1, count)))


def _command_for(run: RecordedRun, question: Question) -> str:
    """The command that serves what a run measured, into its folder."""
    records = [r for r in run.records if r.mode == "inference" and r.status is Status.OK]
    workloads = [question.workload] if question.workload else list(dict.fromkeys(r.workload for r in records))
    variants = [name for name in dict.fromkeys(r.variant for r in records) if name != REFERENCE]
    bound = f"{1e3 * question.latency_bound_s:g}ms" if question.latency_bound_s else "20ms"
    words = ["python", "-m", "bench", "serve", "--out", str(run.path), "--bound", f"p99={bound}"]
    words += [word for name in workloads for word in ("--workload", name)]
    return shlex.join([*words, *(word for name in variants for word in ("--variant", name))])
