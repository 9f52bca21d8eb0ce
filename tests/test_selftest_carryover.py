"""Carry-over: what a variant costs the next one is found where it is there, real cases that were misjudged among them.

tests/misjudged/ holds groups of real runs, records and raw values as those runs wrote them: in some ONNX Runtime's
threads went on spinning while the next variant was timed, in others no variant disturbed another.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import main
from bench.analysis.run_summary import doubts
from bench.console import Console
from bench.machine import interference
from bench.plan.cases import Case
from bench.records.block import Block
from bench.records.raw_csv import ROUNDS
from bench.records.reader import read_run
from bench.records.rounds import Round
from bench.records.schema import ROUND_COLUMNS
from bench.run.planning import Described
from bench.run.seating import places
from bench.run.worker_process import Settings
from bench.selftest.carryover import (
    GROUP,
    PLANTED,
    PLANTED_FILE,
    SPINNER,
    TARGET,
    described,
    judge,
    measure,
    pair_effects,
    pooled_effects,
)
from bench.selftest.part import Found, Options
from bench.timing.rounds import orders
from kernels.host.cores import usable_cores

ROOT = Path(__file__).parent.parent
MISJUDGED = Path(__file__).parent / "misjudged"
SPUN = {
    ("forecast-deepar", "inference", "cpu", 2),
    ("deepbench@batch=1,hidden=1024,length=50", "inference", "cpu", 2),
    ("deepbench@batch=16,hidden=512,length=50", "inference", "cpu", 2),
    ("deepbench@batch=64,hidden=256,length=50", "inference", "cpu", 2),
}
QUIET = {("forecast-deepar", "training", "cpu", 2), ("translation-small-scaled", "inference", "cpu", 2)}
KEPT = {
    (path.name, key): samples for path in sorted(MISJUDGED.iterdir()) for key, samples in read_run(path).samples.items()
}


def made_up(names, costs, *, rounds=200, seatings=3, noise=0.02, drift=0.0, seed=0) -> list[list[Round]]:
    """Rounds in which a predecessor lengthens a successor's turn by a share, `costs[before, after]`."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(seatings):
        seating, before = [], ""
        for place, order in enumerate(itertools.islice(orders(names, seed + number), rounds)):
            blocks = {}
            for name in order:
                time_s = 0.01 * (1 + names.index(name)) * (1 + drift * place / rounds)
                time_s *= (1 + costs.get((before, name), 0.0)) * generator.lognormal(0, noise)
                blocks[name] = Block((time_s,))
                before = name
            seating.append(Round(place, blocks, order=order))
        found.append(seating)
    return found


def verdicts(rounds, names) -> Found:
    """What the part says of rounds."""
    found = Found("carryover", [])
    judge(found, 2, Options(group=tuple(names)), pair_effects(rounds), pooled_effects(rounds))
    return found


def test_groups_of_both_kinds_are_kept():
    """Each kept group is known for what it was."""
    assert {key for _, key in KEPT} == SPUN | QUIET


def slowing(samples) -> list[str]:
    """Predecessors that certainly slow their successors, of a group."""
    effects = pooled_effects(samples.processes)
    return [effect.before for effect in effects if effect.surely_beyond(len(effects)) and effect.change.value > 1]


@pytest.mark.parametrize(("run", "key"), [found for found in KEPT if found[1] in SPUN])
def test_a_runtime_that_spun_is_found_in_real_rounds(run, key):
    """It stands out of all predecessors, and no other one certainly slows its successors."""
    effects = sorted(pooled_effects(KEPT[run, key].processes), key=lambda effect: effect.change.value)
    assert effects[-1].before == "onnxruntime"
    assert effects[-1].change.value > 1.2
    assert effects[-2].change.value < 1.05
    assert slowing(KEPT[run, key]) in (["onnxruntime"], [])


def test_few_real_rounds_suffice_to_be_sure():
    """Of groups with 18 rounds; in one of them its successors were interrupted too rarely to tell."""
    assert sum(slowing(samples) == ["onnxruntime"] for (_, key), samples in KEPT.items() if key in SPUN) == 3


@pytest.mark.parametrize(("run", "key"), [found for found in KEPT if found[1] in QUIET])
def test_no_carry_over_is_found_in_real_rounds_without_any(run, key):
    """Neither over all successors nor over one."""
    rounds = KEPT[run, key].processes
    effects = [*pooled_effects(rounds), *pair_effects(rounds)]
    assert effects
    assert not [str(effect) for effect in effects if effect.surely_beyond(len(effects))]


@pytest.mark.parametrize("path", sorted(MISJUDGED.iterdir()), ids=lambda path: path.name)
def test_marks_of_real_rounds_stay(path):
    """Judged again from what was measured, each round is marked for the same reason."""
    marked = 0
    for row in ROUNDS.rows(path):
        found = dict(zip(ROUND_COLUMNS, row, strict=True))
        stretch = interference.Interference(why=found["why"].partition("a thread of ours")[0].strip("; "))
        again = interference.of_round(stretch, float(found["delay_s"]), int(found["switches"]), float(found["wall_s"]))
        assert again.why == found["why"]
        marked += bool(again.why)
    assert marked > 15


@pytest.mark.parametrize("path", sorted(MISJUDGED.iterdir()), ids=lambda path: path.name)
def test_figures_of_disturbed_groups_are_doubtful(path):
    """Of a group in which one variant spun no figure but the baseline's own 1 is without a mark, and none is narrow."""
    for record in (found for found in read_run(path).records if found.variant != "reference"):
        if (record.workload, record.mode, record.device, record.threads) in SPUN:
            assert doubts(record), record.variant
            assert record.disturbed == record.samples or record.disturbed > record.samples / 2
            assert record.speedup_hi / record.speedup_lo > 1.3, record.variant


@given(cost=st.floats(0.1, 1.0), seed=st.integers(0, 99))
def test_a_cost_is_found_where_it_is(cost, seed):
    """At its pair, of its size, and at no other pair."""
    names = ["a", "b", "c", "d"]
    effects = pair_effects(made_up(names, {("a", "c"): cost}, rounds=60, seed=seed))
    assert len(effects) == 12
    sure = [effect for effect in effects if effect.surely_beyond(12)]
    assert [(effect.before, effect.after) for effect in sure] == [("a", "c")]
    assert sure[0].change.value == pytest.approx(1 + cost, rel=0.03)


def test_a_drift_is_no_carry_over():
    """A machine that gets twice as slow in a seating does so to everybody."""
    names = [*GROUP, *PLANTED]
    assert not [str(e) for e in pair_effects(made_up(names, {}, drift=1.0)) if e.surely_beyond(72)]


def test_nobody_follows_across_a_pause():
    """A turn after which a quiet moment was waited for costs nothing, so it is no predecessor."""
    rounds = made_up(["a", "b"], {}, rounds=40)
    kept = pooled_effects(rounds)
    paused = [[Round(r.number, r.blocks, waited_s=1.0, order=r.order) for r in seating] for seating in rounds]
    assert sum(effect.turns for effect in pooled_effects(paused)) == 40 * 3 < sum(effect.turns for effect in kept)


def test_a_right_design_reaches_the_targets():
    """Noise alone misses nothing."""
    found = verdicts(made_up([*GROUP, *PLANTED], {}, rounds=400), GROUP)
    assert found.missed == []
    assert len(found.met) == 2 + len(GROUP) + 1
    assert len(found.rows) == len(GROUP) + len(PLANTED) + 1


def test_a_runtime_that_disturbs_its_successors_misses():
    """Named with its effect, for each pair and for all successors."""
    costs = {("onnxruntime", name): 0.05 for name in GROUP}
    found = verdicts(made_up([*GROUP, *PLANTED], costs, rounds=400), GROUP)
    assert any(words.startswith("5 of 30 pairs of real variants certainly beyond 1 %") for words in found.missed)
    assert any(words.startswith("successors after onnxruntime +") for words in found.missed)
    assert len(found.missed) == 2


def test_a_spinner_that_costs_its_successors_misses():
    """The planted one is held against the target as the real ones are; the others are shown."""
    costs = {(name, after): 0.05 for name in PLANTED for after in GROUP}
    found = verdicts(made_up([*GROUP, *PLANTED], costs, rounds=400), GROUP)
    assert [words.partition(" +")[0] for words in found.missed] == [f"successors after {SPINNER}"]


def test_a_measurement_too_coarse_to_tell_misses():
    """An effect that cannot be seen is not one that is not there."""
    found = verdicts(made_up([*GROUP, *PLANTED], {}, rounds=20, noise=0.5), GROUP)
    assert any("effects on all successors known to +-" in words for words in found.missed)


def test_whoever_brings_threads_sits_alone():
    """The others share a process."""
    cases = [
        Described(Case("seed", name, "inference", "cpu", 1), {}, None, alone=name == "b", environment={"X": "1"})
        for name in "abc"
    ]
    first, second = places(cases)
    assert [case.variant for case in first.cases] == ["a", "c"]
    assert (second.cases[0].variant, second.environment) == ("b", {"X": "1"})


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--group", "referense"], "did you mean 'reference'"),
        (["--workload", "seed", "--mode", "decode"], "cannot show a carry-over here ("),
    ],
)
def test_bad_input_is_one_line(tmp_path, words, said, capsys):
    """What was wrong and what to do, exit code 2."""
    assert main(["selftest", "carryover", *words, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


@pytest.mark.slow
def test_the_part_runs_in_real_seats(warm_workers, tmp_path):
    """Table, CSV and plot, and a verdict for each target; whether so short a run reaches them is chance."""
    words = ["--budget", "1", "--seatings", "1", "--threads", "1", "--workload", "seed", "--group", "reference"]
    done = warm_workers.run("selftest", "carryover", *words, "--out", str(tmp_path / "out"))
    assert done.returncode in {0, 1}, done.stderr
    if "rounds at 1 threads are too few" not in done.stdout:
        assert done.stdout.count("carryover: reached") + done.stdout.count("carryover: MISSED") == 3
        rows = pd.read_csv(tmp_path / "out" / "carryover.csv")
        assert set(rows["before"]) <= {"reference", *PLANTED}
        assert (tmp_path / "out" / "carryover.png").stat().st_size > 10_000


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
@pytest.mark.skipif(usable_cores() < 2, reason="with one core no thread spins beside another")
def test_a_spinner_is_seen_where_it_is_not_stopped(tmp_path):
    """In one process that goes on it costs its successors more than the target, and more than in seats that stop it."""
    if (busy := psutil.cpu_percent(0.5) / 100 * (psutil.cpu_count() or 1)) > 0.3:
        pytest.skip(f"others use {busy:.1f} cores")
    threads = usable_cores()

    def change(*, unstopped: bool):
        options = Options(
            seconds=2, processes=1, threads=(threads,), workloads=(("seed", "inference"),), group=("reference",),
            unstopped=unstopped,
        )  # fmt: skip
        settings = Settings(threads, plugins=(PLANTED_FILE,))
        rounds = measure(described(options, settings), settings, options, tmp_path, Console())
        taken = [found for seating in rounds for found in seating]
        busy = sum("others took" in found.beside.why for found in taken)
        if busy > len(taken) / 5:
            pytest.skip(f"others used the machine in {busy} of {len(taken)} rounds")
        return {effect.before: effect for effect in pooled_effects(rounds)}[SPINNER].change

    stopped, spun = change(unstopped=False), change(unstopped=True)
    # Which core a thread gets is chance, and in some processes the spinning ones meet few others.
    for _ in range(6):
        if spun.low <= 1 + TARGET:
            spun = change(unstopped=True)
    assert spun.low > 1 + TARGET
    assert stopped.value < spun.low
