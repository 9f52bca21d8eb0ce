"""Carry-over: how much longer does a variant take because of the one that had the turn before it?

All variants of a group take turns as in a run, together with three planted variants that behave like bad runtimes
(`bench/worker/planted_neighbours.py`). The order is balanced, so each variant follows each other one equally often; its
turns after one predecessor are then compared with its usual turns in the rounds around them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from bench.analysis.intervals import CONFIDENCE, Interval, ratio_interval
from bench.console import Console
from bench.errors import UsageError
from bench.machine.core_distance import CoreDistance
from bench.plan.cases import Filters, Selection, Suite
from bench.records.rounds import Round, Samples
from bench.records.schema import Status
from bench.run.forks import ForkServer, fork_servers
from bench.run.planning import Described, make_plan
from bench.run.seating import Place, Seating, places
from bench.run.worker_process import Event, Settings, Worker, WorkerError, scratch_folder
from bench.selftest.pairs import LIMIT_S
from bench.selftest.part import WORKLOADS, Found, Options, percent
from bench.timing.rounds import rounds

#: The group unless the user names another: every way to run a model that brings a runtime or a compiler of its own.
GROUP = ("reference", "onednn", "cpu-fused", "onnxruntime", "openvino", "torchscript")
WORKLOAD = ("forecast-deepar", "inference")
PLANTED_FILE = Path(__file__).parent.parent / "worker" / "planted_neighbours.py"
SPINNER = "planted-spinner"
PLANTED = (SPINNER, "planted-cache-filler", "planted-fragmenter")
#: Effect on a successor's time that is allowed, and half-width of an interval that can show it.
TARGET, NARROW = 0.01, 0.01
#: Turns below which a bootstrap's interval does not hold 95 %.
LEAST_TURNS = 6


@dataclass(frozen=True)
class Effect:
    """Effect of a predecessor on the time of a variant.

    Attributes:
        before: who had the turn before.
        after: whose time it is; empty for all successors together.
        change: time after it over the usual one, with its 95 % interval.
        turns: that followed it.
    """

    before: str
    after: str
    change: Interval
    turns: int

    def surely_beyond(self, comparisons: int) -> bool:
        """Return whether it is beyond the target with all comparisons allowed for (Bonferroni)."""
        outside = (1 - CONFIDENCE) / 2
        wider = self.change.widened(float(stats.norm.isf(outside / comparisons) / stats.norm.isf(outside)))
        return wider.low > 1 + TARGET or wider.high < 1 - TARGET

    def __str__(self) -> str:
        """`onednn after onnxruntime +3.1 % [+2.0, +4.4]`."""
        ends = f"[{signed(self.change.low)}, {signed(self.change.high)}]"
        return f"{self.after or 'successors'} after {self.before} {signed(self.change.value)} % {ends}"


def run(options: Options, folder: Path, console: Console) -> Found:
    """Measure the group at each number of threads."""
    found = Found("carryover", ["threads", "time of", *(f"after {name}" for name in names(options))])
    for threads in options.threads:
        settings = dataclasses.replace(options.settings(threads), plugins=(PLANTED_FILE,))
        cases = described(options, settings)
        seatings = measure(cases, settings, options, folder, console)
        pooled = pooled_effects(seatings)
        if not pooled:
            msg = f"{sum(map(len, seatings))} rounds at {threads} threads are too few; give more --budget"
            raise WorkerError(Status.ERROR, msg)
        judge(found, threads, options, pair_effects(seatings), pooled)
    return found


def names(options: Options) -> tuple[str, ...]:
    """Variants of the group, the planted ones last."""
    return (*(options.group or GROUP), *PLANTED)


def workload(options: Options) -> tuple[str, str]:
    """Workload and mode of the group."""
    return WORKLOAD if options.workloads == WORKLOADS else options.workloads[0]


def described(options: Options, settings: Settings) -> list[Described]:
    """The cases of the group that run here.

    Raises:
        UsageError: for a name that does not exist, or when a planted variant or all others cannot run.
    """
    name, mode = workload(options)
    select = Selection((name,), names(options), (mode,))
    plan = make_plan(Suite("selftest", "", (select,)), Filters(threads=settings.threads), settings, build=True)
    asked = [found for found in plan.cases if found.case.variant in names(options)]
    here = [found for found in asked if not found.unavailable]
    if len(here) <= len(PLANTED) or not {found.case.variant for found in here}.issuperset(PLANTED):
        reasons = "; ".join(f"{found.case.variant}: {found.unavailable}" for found in asked if found.unavailable)
        msg = f"{name} {mode} cannot show a carry-over here ({reasons}); name another --workload or --group"
        raise UsageError(msg)
    return here


def check(options: Options) -> None:
    """Ask a worker whether the group exists and runs here.

    Raises:
        UsageError: when it does not.
    """
    described(options, dataclasses.replace(options.settings(1), plugins=(PLANTED_FILE,)))


def budget_s(options: Options, variants: int) -> float:
    """Seconds of rounds: the user's share for each ordered pair of variants."""
    return options.seconds * variants * (variants - 1)


class Unstopped(Worker):
    """A worker that never stands still."""

    def stop(self) -> None:
        """Let it continue."""


def measure(
    cases: Sequence[Described], settings: Settings, options: Options, folder: Path, console: Console
) -> list[list[Round]]:
    """Rounds of each seating, led as a run leads them; with `options.unstopped` all share a process that never stops.

    Raises:
        WorkerError: when a process fails, or a gate refuses a variant.
    """
    seats = [Place(tuple(found.case for found in cases))] if options.unstopped else places(cases)
    kind = Unstopped if options.unstopped else Worker
    share_s = budget_s(options, len(cases)) / options.processes
    measured = []
    log = folder / "workers.log"
    with (
        scratch_folder() as scratch,
        fork_servers(settings, log, [()] * options.processes) as forks,
        CoreDistance() as distance,
    ):
        cores = distance.beside("cpu", settings.threads)
        for number in range(options.processes):
            console.status(f"carryover, {settings.threads} threads: seating {number + 1} of {options.processes}")
            start = functools.partial(_start, kind, log, scratch, forks[number] if forks else None)
            with Seating(seats, start, settings, LIMIT_S, _refuse) as seating:
                seating.sit(2 * number)
                measured.append(list(rounds(seating.players, "cpu", share_s, number, cores=cores)))
                seating.stand(2 * number + 1)
    return measured


def _start(kind: type[Worker], log: Path, cache: Path, forks: ForkServer | None, settings: Settings) -> Worker:
    return kind(settings, log, cache, forks)


def _refuse(event: Event) -> None:
    """Refuse to compare times of a variant that is not right."""
    if event["event"] == "gate" and not event["passed"]:
        reason = f"{event['variant']} did not pass the gate {event['when']} the rounds: {event['reason']}"
        raise WorkerError(Status.PARITY_FAILED, reason, variant=event["variant"])


@dataclass(frozen=True)
class _Turn:
    """A turn: the variant before it, its own, and its time over that variant's time in the rounds around it."""

    before: str
    after: str
    ratio: float


def pair_effects(seatings: Sequence[Sequence[Round]]) -> list[Effect]:
    """Effect of each predecessor on each other variant that followed it at least `LEAST_TURNS` times."""
    return _effects(seatings, lambda turn: (turn.before, turn.after))


def pooled_effects(seatings: Sequence[Sequence[Round]]) -> list[Effect]:
    """Effect of each predecessor on all successors that are not planted."""
    return _effects(seatings, lambda turn: None if turn.after in PLANTED else (turn.before, ""))


def _effects(seatings: Sequence[Sequence[Round]], key: Callable[[_Turn], tuple[str, str] | None]) -> list[Effect]:
    """Effects of the turns that have a key; those of a seating stay together, as processes differ."""
    kept = Samples([list(found) for found in seatings]).kept()
    turns = [list(_turns(found, {r.number for r in used})) for found, used in zip(seatings, kept, strict=True)]
    usual = _usual(itertools.chain(*turns))
    ratios: dict[tuple[str, str], list[list[float]]] = defaultdict(lambda: [[] for _ in turns])
    for number, taken in enumerate(turns):
        for turn in taken:
            if (chosen := key(turn)) is not None and turn.before != turn.after:
                ratios[chosen][number].append(turn.ratio / usual[turn.after])
    effects = []
    for (before, after), by_seating in ratios.items():
        values = [np.array(of_seating) for of_seating in by_seating if of_seating]
        if (count := sum(map(len, values))) >= LEAST_TURNS:
            effects.append(Effect(before, after, ratio_interval(values), count))
    return effects


def _turns(seating: Sequence[Round], used: set[int]) -> Iterator[_Turn]:
    """Turns of the used rounds of a seating that followed another turn, each over the rounds around it.

    As many rounds to both sides count as there are variants: a variant has followed each other one about twice in them.
    """
    times: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
    last, last_number = "", -1
    for found in seating:
        # A turn after a pause follows no other.
        before = last if found.number == last_number + 1 and not found.waited_s else ""
        for name in found.order or tuple(found.blocks):
            if found.number in used and name in found.blocks:
                times[name].append((found.number, before, found.blocks[name].typical_s))
            before = name
        last, last_number = before, found.number
    for name, taken in times.items():
        for number, before, time_s in taken:
            if before:
                around_s = statistics.median(s for other, _, s in taken if abs(other - number) <= len(times))
                yield _Turn(before, name, time_s / around_s)


def _usual(turns: Iterable[_Turn]) -> dict[str, float]:
    """The usual ratio of each variant: the middle of its medians after each predecessor.

    A few predecessors that disturb do not move it, as they would move the median of all turns.
    """
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in turns:
        ratios[turn.after][turn.before].append(turn.ratio)
    return {
        name: statistics.median(statistics.median(after) for after in by_predecessor.values())
        for name, by_predecessor in ratios.items()
    }


def judge(found: Found, threads: int, options: Options, pairs: Sequence[Effect], pooled: Sequence[Effect]) -> None:
    """Fill in table and rows, and compare the effects with the targets."""
    real = [effect for effect in pairs if not {effect.before, effect.after} & set(PLANTED)]
    sure = [effect for effect in pairs if effect.surely_beyond(max(1, len(real)))]
    shown = {(e.before, e.after): signed(e.change.value) + " !" * (e in sure) for e in pairs}
    shown |= {(e.before, ""): signed(e.change.value) for e in pooled}
    for after in (*names(options), ""):
        cells = [shown.get((before, after), "") for before in names(options)]
        if any(cells):
            found.rows.append([str(threads), after or "all but the planted", *cells])
    name, mode = workload(options)
    for effect in (*pairs, *pooled):
        found.raw.append({
            "threads": threads, "workload": name, "mode": mode, "before": effect.before, "after": effect.after,
            "change": effect.change.value, "change_lo": effect.change.low, "change_hi": effect.change.high,
            "turns": effect.turns, "surely_beyond": int(effect in sure), "unstopped": int(options.unstopped),
        })  # fmt: skip
    where = f"at {threads} thread{'s' if threads > 1 else ''}"
    bad = [effect for effect in sure if effect in real]
    told = "".join(f"; {effect}" for effect in sorted(bad, key=lambda e: -abs(e.change.value - 1))[:3])
    found.judge(
        not bad,
        f"{len(bad)} of {len(real)} pairs of real variants certainly beyond {percent(TARGET, 0)} {where}, target 0"
        f"{told}",
    )
    width = statistics.median(effect.change.half_width for effect in pooled)
    found.judge(
        width <= NARROW,
        f"effects on all successors known to +-{percent(width)} {where}, target +-{percent(NARROW, 0)}; "
        "more --budget narrow it",
    )
    for effect in pooled:
        # Fast after a predecessor is as wrong as slow, but a planted one is there to cost something.
        off = effect.change.value - 1 if effect.before in PLANTED else abs(effect.change.value - 1)
        if effect.before == SPINNER or effect.before not in PLANTED:
            found.judge(off <= TARGET, f"{effect} {where}, target {percent(TARGET, 0)}")


def signed(change: float) -> str:
    """`1.031` as `+3.1`: percent."""
    return f"{100 * (change - 1):+.1f}"
