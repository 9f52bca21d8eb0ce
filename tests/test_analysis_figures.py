"""From rounds to figures: what a record says is what arithmetic by hand gives."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bench.analysis.figures import figures, speedup
from bench.analysis.intervals import Interval, percentile
from bench.machine.core_distance import FAR_WORDS
from bench.machine.interference import Interference
from bench.plan.cases import LEAST_ROUNDS, Case
from bench.records.block import Block
from bench.records.rounds import Round, Samples
from bench.records.schema import COLUMNS, ROUND_COLUMNS, SAMPLE_COLUMNS

CASE = Case("seed", "fast", "inference", "cpu", 2)
FACTS = {"batch": 16, "valid_steps": 320}


def block(*calls_s: float) -> Block:
    """A block as a CPU gives it."""
    return Block(calls_s, 0, 0.0, None)


def queued(calls: int, wall_s: float, device_s: float | None, *calls_s: float) -> Block:
    """A block as a GPU gives it."""
    return Block(calls_s, calls, wall_s, device_s)


def process(*pairs: tuple[float, float], disturbed: tuple[int, ...] = ()) -> list[Round]:
    """A process's rounds: seconds of one call of the reference and of the fast variant in each."""
    return [
        Round(
            number,
            {"reference": block(slow), "fast": block(fast)},
            beside=Interference(why="planted" if number in disturbed else ""),
        )
        for number, (slow, fast) in enumerate(pairs)
    ]


def figured(*processes: list[Round], interval: float = 0.02) -> dict[str, object]:
    """Figures of the fast variant."""
    return figures(CASE, Samples(list(processes)), "reference", interval, FACTS)


def test_the_speedup_is_the_median_of_ratios_formed_inside_rounds():
    """A drift that meets both variants of a round alike leaves their ratio as it is: never a ratio of medians."""
    drift = (1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 100.0)
    ratios = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
    found = figured(process(*((level * ratio, level) for level, ratio in zip(drift, ratios, strict=True))))
    assert found["speedup"] == pytest.approx(3.5)
    assert 2.0 <= found["speedup_lo"] <= 3.5 <= found["speedup_hi"] <= 5.0


def test_the_speedup_is_over_the_rounds_of_all_processes():
    """Rounds of all processes are pooled for the median: 1, 2, 2, 3, 3, 3, ... has the median 3."""
    found = figured(process(*[(1.0, 1.0)] * 2, *[(2.0, 1.0)] * 4), process(*[(3.0, 1.0)] * 7))
    assert found["speedup"] == 3.0
    assert found["processes"] == 2


def test_throughput_is_work_over_the_median_time_of_a_call():
    """Blocks of several calls count by their mean; the median over rounds divides what a call does."""
    rounds = [
        Round(n, {"reference": block(1.0), "fast": block(mean / 2, 3 * mean / 2)})
        for n, mean in enumerate((0.1, 0.2, 0.4, 0.2, 0.3, 0.1, 0.2))
    ]
    found = figured(rounds)
    assert found["throughput_seq_per_s"] == pytest.approx(16 / 0.2)
    assert found["throughput_steps_per_s"] == pytest.approx(320 / 0.2)


def test_counts_are_of_samples_calls_and_processes():
    """A sample is a block, a call one timed call in it."""
    rounds = [Round(n, {"reference": block(1.0), "fast": block(0.1, 0.2, 0.3)}) for n in range(7)]
    found = figured(rounds, rounds[:6])
    assert (found["samples"], found["calls"], found["processes"], found["disturbed"]) == (13, 39, 2, 0)


def test_percentiles_are_those_of_single_calls():
    """Each is numpy's quantile with the interval over processes and rounds; what 40 calls cannot carry is empty."""
    times = np.random.default_rng(0).permutation(np.arange(1, 41)) / 1000
    rounds = [Round(n, {"reference": block(1.0), "fast": block(*times[n::8])}) for n in range(8)]
    found = figured(rounds[:5], rounds[5:])
    processes = [[times[n::8] for n in numbers] for numbers in (range(5), range(5, 8))]
    assert found["latency_p50_s"] == pytest.approx(np.quantile(times, 0.5))
    expected = percentile(processes, 0.5)
    assert (found["latency_p50_lo_s"], found["latency_p50_hi_s"]) == (expected.low, expected.high)
    assert not [name for name in found if "p95" in name or "p99" in name]


def test_disturbed_rounds_are_left_out_while_enough_clean_ones_remain():
    """Six clean rounds decide; the disturbed ones, here absurd, appear in no figure."""
    found = figured(process(*[(2.0, 1.0)] * LEAST_ROUNDS, *[(1.0, 1.0)] * 9, disturbed=tuple(range(LEAST_ROUNDS, 15))))
    assert found["speedup"] == 2.0
    assert (found["samples"], found["disturbed"]) == (LEAST_ROUNDS, 0)


def test_disturbed_rounds_are_kept_and_counted_where_too_few_are_clean():
    """With five clean rounds all are kept, and the disturbed ones are told."""
    clean = LEAST_ROUNDS - 1
    found = figured(process(*[(2.0, 1.0)] * clean, *[(1.0, 1.0)] * 9, disturbed=tuple(range(clean, clean + 9))))
    assert found["speedup"] == 1.0
    assert (found["samples"], found["disturbed"]) == (clean + 9, 9)


def test_each_process_decides_for_itself_which_rounds_it_keeps():
    """One disturbed process does not bring the disturbed rounds of another back."""
    disturbed = process(*[(1.0, 1.0)] * 3, disturbed=(0, 1, 2))
    mixed = process(*[(2.0, 1.0)] * LEAST_ROUNDS, (9.0, 1.0), disturbed=(LEAST_ROUNDS,))
    assert [len(rounds) for rounds in Samples([disturbed, mixed]).kept()] == [3, LEAST_ROUNDS]
    assert [len(rounds) for rounds in Samples([disturbed, mixed, mixed]).kept()] == [0, LEAST_ROUNDS, LEAST_ROUNDS]


def test_a_disturbed_process_is_left_out_where_three_others_are_clean():
    """Its rounds, here absurd, appear in no figure, and no figure is marked."""
    clean = [process(*[(2.0, 1.0)] * LEAST_ROUNDS) for _ in range(3)]
    disturbed = process(*[(9.0, 1.0)] * 40, disturbed=tuple(range(40)))
    found = figured(clean[0], disturbed, *clean[1:])
    assert (found["speedup"], found["speedup_hi"], found["processes"], found["disturbed"]) == (2.0, 2.0, 3, 0)
    assert [len(rounds) for rounds in Samples([clean[0], disturbed, *clean[1:]]).kept()] == [6, 0, 6, 6]
    fewer = figured(*clean[:2], disturbed, disturbed)
    assert (fewer["processes"], fewer["disturbed"]) == (4, 80)


def test_clean_processes_count_for_a_variant_only_where_it_took_part():
    """One that rests in the clean processes keeps its disturbed rounds, and says so."""
    early = process(*[(9.0, 1.0)] * 8, disturbed=tuple(range(8)))
    late = [[Round(n, {"reference": block(2.0)}) for n in range(8)] for _ in range(3)]
    samples = Samples([early, *late])
    assert [len(rounds) for rounds in samples.kept("reference")] == [0, 8, 8, 8]
    assert [len(rounds) for rounds in samples.kept("fast")] == [8, 0, 0, 0]
    assert figured(*samples.processes)["disturbed"] == 8
    assert (samples.lacking("reference"), samples.lacking("fast")) == (0, 2)


@pytest.mark.parametrize(("clean", "disturbed", "kept"), [(5, 1, 5), (3, 3, 6), (5, 9, 14), (6, 40, 6), (1, 0, 1)])
def test_a_process_of_few_rounds_is_clean_if_most_of_them_are(clean, disturbed, kept):
    """Of a slow variant there may be fewer rounds than would otherwise be asked for."""
    rounds = process(*[(2.0, 1.0)] * (clean + disturbed), disturbed=tuple(range(clean, clean + disturbed)))
    assert [len(found) for found in Samples([rounds]).kept()] == [kept]


@pytest.mark.parametrize(
    ("dirty", "clean", "lacking"),
    [(5, 0, 3), (3, 2, 1), (1, 1, 1), (1, 2, 0), (2, 2, 1), (1, 0, 2), (3, 3, 0), (0, 2, 0)],
)
def test_what_a_variant_lacks_is_clean_processes(dirty, clean, lacking):
    """Three, or one more than are disturbed; when they have come, nothing is lacking and nothing disturbed is kept."""
    spoilt = [process(*[(2.0, 1.0)] * 8, disturbed=tuple(range(8))) for _ in range(dirty)]
    quiet = [process(*[(2.0, 1.0)] * 8) for _ in range(clean)]
    assert Samples([*spoilt, *quiet]).lacking("fast") == lacking
    later = Samples([*spoilt, *quiet, *(process(*[(2.0, 1.0)] * 8) for _ in range(lacking))])
    assert later.lacking("fast") == 0
    assert not any(found.disturbed for rounds in later.kept("fast") for found in rounds)


def test_a_variant_that_rested_in_all_clean_rounds_keeps_its_own():
    """As when the rounds in which it took part were found disturbed only later: it has figures, and they are marked."""
    rounds = process(*[(2.0, 1.0)] * 8, disturbed=tuple(range(8)))
    rounds += [Round(8 + n, {"reference": block(2.0)}) for n in range(8)]
    found = figured(rounds)
    assert (found["speedup"], found["samples"], found["disturbed"]) == (2.0, 8, 8)


def test_the_reference_has_a_speedup_of_exactly_one():
    """It is its own yardstick: no resampling, no width."""
    samples = Samples([process(*[(2.0, 1.0)] * 8)])
    assert speedup(samples, "reference", "reference") == Interval(1.0, 1.0, 1.0)


def test_without_a_reference_there_is_no_speedup_but_all_else():
    """If the reference dropped out, times stand and the ratio is empty."""
    rounds = [Round(n, {"fast": block(0.5)}) for n in range(8)]
    found = figured(rounds)
    assert found["latency_p50_s"] == 0.5
    assert "speedup" not in found
    assert "interval_wide" not in found


def test_a_variant_without_rounds_has_no_figures():
    """Nothing measured is nothing told."""
    rounds = [Round(n, {"reference": block(0.5)}) for n in range(8)]
    assert figured(rounds) == {}
    assert figured() == {}
    assert speedup(Samples([rounds]), "reference", "fast") is None


def test_a_process_before_the_variant_came_is_not_counted():
    """A process in which the variant did not run leaves its counts and its ratio alone."""
    without = [Round(n, {"reference": block(0.5)}) for n in range(8)]
    found = figured(without, process(*[(2.0, 1.0)] * 8))
    assert (found["processes"], found["samples"], found["speedup"]) == (1, 8, 2.0)


@pytest.mark.parametrize(("asked", "wide"), [(0.001, True), (10.0, False)])
def test_an_interval_wider_than_asked_is_marked(asked, wide):
    """The mark compares half the interval with what the suite asked for."""
    generator = np.random.default_rng(0)
    rounds = process(*((2 * (1 + 0.1 * generator.random()), 1.0) for _ in range(20)))
    assert figured(rounds, interval=asked)["interval_wide"] is wide


def test_on_a_gpu_the_queued_block_is_the_sample():
    """Speedup and throughput come from blocks queued without waiting, latency from single calls, device time apart."""
    rounds = [
        Round(n, {"reference": queued(4, 8.0, 6.0, 9.0, 9.0), "fast": queued(4, 2.0, 1.0, *[3.0] * 6)})
        for n in range(6)
    ]
    found = figured(rounds)
    assert found["speedup"] == 4.0
    assert found["throughput_seq_per_s"] == 16 / 0.5
    assert found["latency_p50_s"] == 3.0
    assert found["device_p50_s"] == 0.25
    assert found["calls"] == 36


def test_figures_are_columns_of_a_record():
    """Every figure has its column, on a GPU and on a CPU, and a CPU has no device time."""
    many = [Round(n, {"reference": block(1.0), "fast": block(*[0.5] * 50)}) for n in range(8)]
    assert set(figured(many)) <= set(COLUMNS)
    assert {"latency_p99_lo_s", "speedup_hi", "interval_wide"} <= set(figured(many))
    assert "device_p50_s" not in figured(many)


def test_rows_have_the_columns_of_the_schema():
    """One row a timed interval, its values under their names."""
    rounds = [
        Round(0, {"fast": block(0.25, 0.5), "reference": block(1.0)}),
        Round(1, {"reference": block(1.0), "fast": block(0.125)}, beside=Interference(why="planted")),
        Round(2, {"reference": block(1.0)}),
    ]
    rows = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in Samples().rows(CASE, 3, rounds)]
    assert [(r["round"], r["position"], r["kind"], float(r["wall_s"]), r["disturbed"]) for r in rows] == [
        (0, 0, "call", 0.25, 0),
        (0, 0, "call", 0.5, 0),
        (1, 1, "call", 0.125, 1),
    ]
    for row in rows:
        assert (row["workload"], row["variant"], row["mode"]) == ("seed", "fast", "inference")
        assert (row["device"], row["threads"], row["process"], row["calls"]) == ("cpu", 2, 3, 1)
        assert row["device_s"] == ""


def test_a_queued_block_has_a_row_of_its_own():
    """It comes before its single calls, with its number of calls and its device time."""
    rounds = [Round(0, {"fast": queued(4, 2.0, 1.0, 0.75)})]
    rows = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in Samples().rows(CASE, 0, rounds)]
    assert [(r["kind"], r["calls"], r["wall_s"], r["device_s"]) for r in rows] == [
        ("block", 4, "2", "1"),
        ("call", 1, "0.75", ""),
    ]


def test_disturbed_rounds_narrow_no_interval():
    """If disturbed rounds have to be used, intervals are as wide as if the clean ones alone had been counted."""
    pairs = [(2.0, 1.0 + 0.1 * (n % 5)) for n in range(45)]
    clean, disturbed = (process(*pairs, disturbed=tuple(numbers)) for numbers in ((), range(5, 45)))
    assert Samples([disturbed]).stretch() == pytest.approx(3.0)
    narrow, wide = (speedup(Samples([rounds]), "reference", "fast") for rounds in (clean, disturbed))
    assert wide.value == narrow.value
    assert math.log(wide.high / wide.value) == pytest.approx(3 * math.log(narrow.high / narrow.value))
    assert math.log(wide.low / wide.value) == pytest.approx(3 * math.log(narrow.low / narrow.value))
    told = [figured(rounds) for rounds in (clean, disturbed)]
    widths = [math.log(found["latency_p50_hi_s"] / found["latency_p50_lo_s"]) for found in told]
    assert widths[0] > 0
    assert widths[1] == pytest.approx(3 * widths[0])


FAR = f"{FAR_WORDS} 550 ns, 175 at best in this run"


@pytest.mark.parametrize(
    ("reasons", "stretch"),
    [
        # All in the state that the cores were far apart: it is known as well as any.
        ([FAR] * 9, 1.0),
        # Where something else came to it, a round tells nothing of that state.
        ([FAR] * 4 + [f"{FAR}; a thread of ours waited 9 ms for a core"] * 5, 1.5),
        ([f"a thread of ours waited 9 ms for a core; {FAR}"] * 9, 3.0),
        # A clean round shows that there is another state.
        ([FAR] * 8 + [""], 3.0),
    ],
)
def test_cores_that_were_far_apart_in_all_rounds_are_a_state(reasons, stretch):
    """Rounds of one state reduce the doubt about it; they stay disturbed ones, and their figures marked."""
    rounds = process(*[(2.0, 1.0)] * 9)
    rounds = [replace(found, beside=Interference(why=why)) for found, why in zip(rounds, reasons, strict=True)]
    assert Samples([rounds]).stretch() == pytest.approx(stretch)
    assert figured(rounds)["disturbed"] == sum(map(bool, reasons))


def test_a_process_without_a_clean_round_is_as_doubtful_as_one_round():
    """Nothing is divided by nothing."""
    assert Samples([process(*[(2.0, 1.0)] * 9, disturbed=tuple(range(9)))]).stretch() == 3.0
    assert Samples([]).stretch() == 1.0


def test_a_round_s_row_has_the_columns_of_rounds_csv():
    """Facts that a round knows about itself arrive under the names of the dictionary, in their order."""
    beside = Interference("others took 1.00 cores", 1.0, 0.25, 0.005, 7, 1.5, 2400.0, 1980.0, "power cap", 2)
    row = Round(3, {}, 0.25, 0.1, beside).row("seed/inference/cpu/1t", 2)
    assert dict(zip(ROUND_COLUMNS, row, strict=True)) == {
        "group": "seed/inference/cpu/1t",
        "process": 2,
        "round": 3,
        "wall_s": "0.25",
        "waited_s": "0.1",
        "why": "others took 1.00 cores",
        "others_share": 1.0,
        "stolen_share": 0.25,
        "delay_s": 0.005,
        "switches": 7,
        "load": 1.5,
        "frequency_mhz": 2400.0,
        "gpu_clock_mhz": 1980.0,
        "gpu_throttled": "power cap",
        "gpu_others": 2,
    }
