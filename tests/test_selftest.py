"""The self-test: it passes a core that is right, refuses one that is not, and its plants are what they say."""

from __future__ import annotations

import argparse
import contextlib
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from bench.__main__ import main
from bench.analysis.intervals import Interval
from bench.arguments import parser
from bench.console import Console
from bench.errors import UsageError
from bench.plan.cases import Case
from bench.run.worker_process import Settings
from bench.selftest import command, neighbour, null, plots, power
from bench.selftest.names import PARTS
from bench.selftest.pairs import Pair
from bench.selftest.part import WORKLOADS, Found, Options, least, most, percent, row_of, spread

ROOT = Path(__file__).parent.parent
CASE = Case("seed", "reference", "inference", "cpu", 1)
TINY = "seed@batch=2,length=3"


def a_pair(ratio: float, *, width: float = 0.005, kept_disturbed: int = 0, wall_s: float = 6.5, planted: float = 0.0):
    """A pair whose interval reaches `width` to both sides."""
    interval = Interval(ratio, ratio - width, ratio + width)
    return Pair(CASE, interval, 200, kept_disturbed, kept_disturbed, planted, 1e-3, wall_s)


class Planted:
    """Workers whose pairs are made up: `answer` gives the pair of a number and a slowdown."""

    def __init__(self, answer) -> None:
        self.answer, self.number = answer, -1

    def pair(self, case, budget_s, slowdown=0.0):
        """The next pair."""
        del case, budget_s
        self.number += 1
        return self.answer(self.number, slowdown)


def judged(monkeypatch, part, answer, *, pairs: int, threads: int = 1) -> Found:
    """Return what a part says of made-up pairs."""
    monkeypatch.setattr(part, "bench", lambda *_: contextlib.nullcontext(Planted(answer)))
    return part.run(Options(pairs=pairs, threads=(threads,)), Path(), Console())


def sides(number: int) -> float:
    """Alternately above and below 1."""
    return 1.0 if number % 2 else -1.0


def test_a_right_core_reaches_the_null_targets(monkeypatch):
    """Ratios within 0.4 % whose intervals hold 1, but for one of twenty."""
    found = judged(
        monkeypatch, null, lambda n, _: a_pair(1 + 0.004 * sides(n), width=0.001 if n % 20 == 0 else 0.005), pairs=40
    )
    assert found.missed == []
    assert len(found.met) == 3
    assert found.rows == [["1", "40", "0", "0.40 / 0.40 / 0.40 %", "38 of 40", "+-0.50 %"]]


def test_a_biased_core_misses(monkeypatch):
    """A core that favours one name by 2 % is refused for the ratio and for the interval."""
    found = judged(monkeypatch, null, lambda *_: a_pair(1.02), pairs=40)
    assert len(found.missed) == 2
    assert "p90 of |ratio - 1| 2.00 % at 1 thread, target 0.50 %" in found.missed
    assert "0 of 40 intervals hold 1 at 1 thread, target 36 to 40" in found.missed


def test_intervals_that_hold_too_often_miss(monkeypatch):
    """Of a hundred, all is too many: such intervals are wider than they have to be."""
    found = judged(monkeypatch, null, lambda n, _: a_pair(1 + 0.001 * sides(n)), pairs=100)
    assert found.missed == ["100 of 100 intervals hold 1 at 1 thread, target 92 to 99"]


def test_more_threads_have_twice_the_room(monkeypatch):
    """0.8 % is too much at one thread and fine at two."""
    for threads, reached in ((1, False), (2, True)):
        found = judged(
            monkeypatch, null, lambda n, _: a_pair(1 + 0.008 * sides(n), width=0.01), pairs=40, threads=threads
        )
        assert (not any("p90" in words for words in found.missed)) is reached


def test_marked_pairs_are_counted_apart(monkeypatch):
    """A quarter may be lost to marking, however wrong they are; more may not."""
    for lost, reached in ((10, True), (11, False)):
        found = judged(
            monkeypatch,
            null,
            lambda n, _, lost=lost: a_pair(1.5, kept_disturbed=3) if n < lost else a_pair(1.0),
            pairs=40,
        )
        assert (found.missed == []) is reached
        assert found.rows[0][2] == str(lost)


def test_a_null_test_without_one_clean_pair_misses(monkeypatch):
    """Nothing measured is nothing reached."""
    found = judged(monkeypatch, null, lambda *_: a_pair(1.0, kept_disturbed=1), pairs=4)
    assert found.missed == ["4 of 4 pairs lost to marking at 1 thread, target at most 1"]
    assert found.met == []


def slowed(share: float) -> float:
    """The ratio of a slowdown."""
    return 1 / (1 + share)


def test_a_core_with_power_finds_what_is_planted(monkeypatch):
    """Every slowdown from 2 % on is found, nothing else is called slower."""
    found = judged(monkeypatch, power, lambda _, share: a_pair(slowed(share), planted=share), pairs=20)
    assert found.missed == []
    called = {row[1]: (row[4], row[5]) for row in found.rows}
    assert called == {"0 %": ("0", "0"), "1 %": ("0", "0"), "2 %": ("20", "0"), "3 %": ("20", "0"), "5 %": ("20", "0")}


def test_a_blunt_core_misses(monkeypatch):
    """If intervals are too wide to exclude 1, the planted 3 % are not found."""
    found = judged(monkeypatch, power, lambda _, share: a_pair(slowed(share), width=0.05), pairs=20)
    assert found.missed == ["3 % found in 0 of 20 pairs at 1 thread, target 19"]


def test_a_core_that_raises_false_alarms_misses(monkeypatch):
    """Two alarms in twenty pairs of the same code are too many, in whichever direction."""
    found = judged(
        monkeypatch,
        power,
        lambda n, share: a_pair({0: 0.97, 5: 1.03}.get(n, 1.0) if not share else slowed(share)),
        pairs=20,
    )
    assert found.missed == ["2 false alarms in 20 pairs at 1 thread, target at most 1"]


def test_a_core_that_takes_too_long_misses(monkeypatch):
    """A test that finds 3 % in a minute does not find them in ten seconds."""
    found = judged(monkeypatch, power, lambda _, share: a_pair(slowed(share), wall_s=60.0), pairs=20)
    assert found.missed == ["a pair took 60.0 s at most at 1 thread, target 10 s"]


def test_every_slowdown_meets_every_workload(monkeypatch):
    """Slowdowns take turns, and so do workloads, so that neither keeps one quarter of an hour to itself."""
    found = judged(monkeypatch, power, lambda _, share: a_pair(slowed(share)), pairs=3)
    assert [row["planted"] for row in found.raw] == list(power.SLOWDOWNS) * 3
    assert [case.workload for case in Options().cases(1, 4)] == [name for name, _ in (*WORKLOADS, WORKLOADS[0])]


def test_a_neighbour_that_is_not_noticed_misses(monkeypatch):
    """Four of five rounds are not enough, and an unmarked ratio 5 % off is a false figure."""
    monkeypatch.setattr(neighbour, "neighbour", contextlib.nullcontext)
    answers = iter([a_pair(1.0), Pair(CASE, Interval(1.05, 1, 1.1), 100, 80, 0, 0.0, 2e-3, 6.0)])
    found = judged(monkeypatch, neighbour, lambda *_: next(answers), pairs=1)
    assert len(found.missed) == 2
    assert found.missed[0].startswith("neighbour noticed in 80.0 % of rounds")
    assert found.rows[1][-1] == "2.00"


def test_rates_are_exact_of_a_hundred_and_kind_to_chance_below():
    """95 of 100, but 19 of 20 and 4 of 5; at most 99 of 100, and all of 40."""
    assert [least(0.95, n) for n in (100, 20, 5)] == [95, 19, 4]
    assert [most(0.99, n) for n in (100, 40)] == [99, 40]
    assert [most(0.01, n) for n in (100, 20)] == [1, 1]


def test_extra_work_is_the_share_it_says():
    """Calibrated on a call of known length, half a call's work takes about half a call."""
    probe = pytest.importorskip("bench.worker.selftest")
    from bench.timing.seat import Subject

    subject = Subject(lambda: probe.burn(20_000))
    assert probe.extra_work(subject, 0.5) == pytest.approx(10_000, rel=0.25)


def test_extra_work_takes_processor_time():
    """It is work, not sleep: a hundred times as much of it takes far more of the processor."""
    probe = pytest.importorskip("bench.worker.selftest")
    took_s = []
    for amount in (30_000, 3_000_000):
        start_s = time.process_time()
        probe.burn(amount)
        took_s.append(time.process_time() - start_s)
    assert took_s[1] > 20 * took_s[0]


@pytest.mark.parametrize("name", PARTS)
def test_every_part_has_a_plot(tmp_path, name):
    """From the columns of its CSV, with one thread and with two."""
    rows = []
    for threads in (1, 2):
        for number in range(4):
            pair = a_pair(1 + 0.01 * number)
            more = {"number": number, "planted": 0.01 * number, "omp_wait": "default", "neighbour": number % 2}
            more |= {"before": "ab"[number % 2], "after": ["a", "b", "", "b"][number], "change": 1 + 0.01 * number}
            rows.append(row_of(pair, **more) | {"threads": threads, "instrument": f"tool {number}", "over_ours": 1.0})
    plots.draw(name, rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_spread_of_nothing_is_no_number():
    """No pair has no median; the table says nan rather than 0."""
    assert percent(spread([])) == "nan / nan / nan %"


def arguments(**more) -> argparse.Namespace:
    """Values of the parser without options."""
    plain = {"pairs": None, "budget": 5.0, "seatings": 4, "threads": None, "workload": None, "mode": None}
    plain |= {"variant": "reference", "omp_wait": "default", "planted": None, "group": None, "unstopped": False}
    return argparse.Namespace(**(plain | more))


def test_one_thread_and_all_are_measured_unless_named():
    """On a machine of one core they are one setting."""
    assert command.options_of(arguments(), 8).threads == (1, 8)
    assert command.options_of(arguments(), 1).threads == (1,)
    assert command.options_of(arguments(threads=[4]), 8).threads == (4,)


def test_what_is_planted_can_be_chosen():
    """In percent, as it is said; each once."""
    assert command.options_of(arguments(planted=[0.0, 0.03, 0.03]), 2).planted == (0.0, 0.03)
    words = ["selftest", "power", "--planted", "0", "--planted", "3%"]
    assert parser().parse_args(words).planted == [0.0, 0.03]


def test_a_mode_needs_its_workload():
    """The standard workloads have modes of their own."""
    with pytest.raises(UsageError, match="--mode without --workload"):
        command.options_of(arguments(mode="training"), 2)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed"], "no part 'speed', choose from null, power, instrument, neighbour, carryover"),
        (["null", "--variant", "cudnn"], "cudnn cannot run seed here: "),
        (["null", "--planted", "3"], "--planted is read by power alone, and null would run; leave it out"),
        (["null", "power", "--unstopped"], "--unstopped is read by carryover alone"),
        (["null", "--group", "reference"], "--group is read by carryover alone"),
        (["carryover", "--pairs", "3"], "--pairs is read by null, power, instrument, neighbour alone"),
        (["carryover", "--variant", "onednn"], "--variant is read by null"),
        (["null", "--workload", "nothing"], "no workload matches 'nothing'"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    """Bad input gives one line with what was wrong and what was expected, and exit code 2."""
    assert main(["selftest", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


@pytest.mark.slow
def test_the_parts_run_in_real_workers(warm_workers, tmp_path):
    """Table, CSV and plot of each; the exit code says whether the targets were met, which so short a run may miss."""
    out = tmp_path / "selftest"
    short = ["--pairs", "1", "--budget", "0.5", "--seatings", "1", "--threads", "1", "--workload", TINY]
    done = warm_workers.run("selftest", "null", "power", "instrument", *short, "--out", str(out))
    assert done.returncode in {0, 1}, done.stderr
    assert ("MISSED" in done.stdout) == (done.returncode == 1)
    assert {path.name for path in out.iterdir()} >= {
        f"{name}.{kind}" for name in ("null", "power", "instrument") for kind in ("csv", "png")
    }
    power_rows = pd.read_csv(out / "power.csv")
    assert list(power_rows["planted"]) == list(power.SLOWDOWNS)
    planted = power_rows.set_index("planted")["planted_share"]
    assert planted[0.0] == 0
    assert 0.02 < planted[0.05] < 0.10
    tools = pd.read_csv(out / "instrument.csv").set_index("instrument")
    assert len(tools) == 6
    # The same calls by six ways: a wrong unit or a wrong count of calls would be off by more than a busy machine is.
    assert tools["over_ours"].between(0.1, 10.0).all(), tools["over_ours"]


@pytest.mark.slow
@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="with one core a neighbour and we take turns")
def test_a_real_neighbour_is_noticed_in_every_round(warm_workers, tmp_path):
    """A process that keeps one core busy is noticed in at least 95 % of rounds, and the figure is marked or right."""
    short = ["--pairs", "1", "--budget", "1", "--seatings", "1", "--threads", "1", "--workload", "seed"]
    warm_workers.run("selftest", "neighbour", *short, "--out", str(tmp_path / "out"))
    rows = pd.read_csv(tmp_path / "out" / "neighbour.csv").set_index("neighbour")
    assert rows.loc[1, "noticed"] >= 0.95 * rows.loc[1, "rounds"] > 0
    assert rows.loc[1, "marked"] == 1 or abs(rows.loc[1, "ratio"] - 1) <= null.TARGET_ONE


def test_workers_are_told_the_wait_policy():
    """The setting that is asked for reaches the workers' environment."""
    assert Options(wait_policy="passive").settings(3) == Settings(3, "passive")
