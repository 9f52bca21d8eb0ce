"""Figures and their doubt: on synthetic data, whose truth is known, an interval holds it as often as it promises."""

from __future__ import annotations

import numpy as np
import pytest

from bench import statistics
from bench.cases import LEAST_ROUNDS
from bench.statistics import Interval, median_interval, percentile, ratio_interval

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

#: Least samples that bound a percentile with 95 %.
LEAST = {0.50: 6, 0.90: 36, 0.95: 72, 0.99: 368}
ratios = st.floats(0.01, 100)
#: Every process gives at least two rounds.
processes = st.lists(st.lists(ratios, min_size=2, max_size=12).map(np.array), min_size=1, max_size=4)


@pytest.fixture(autouse=True, scope="module")
def fewer_resamples():
    """A tenth of the resamples: intervals a little coarser, tests ten times faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "RESAMPLES", statistics.RESAMPLES // 10)
        yield


def drawn(generator: np.random.Generator, count: int, rounds: int, between: float, within: float) -> list[np.ndarray]:
    """Ratios around 1 of `count` processes, each shifted as a whole by `between`, its rounds by `within`."""
    shifts = generator.normal(0, between, count)
    return [np.exp(shift + generator.normal(0, within, rounds)) for shift in shifts]


@pytest.mark.parametrize(("share", "least"), LEAST.items())
def test_a_percentile_is_empty_until_its_samples_bound_it(share, least):
    """One sample fewer than the interval needs gives nothing, that many give a figure inside its interval."""
    samples = np.random.default_rng(0).exponential(size=least)
    assert percentile(samples[:-1], share) is None
    found = percentile(samples, share)
    assert found is not None
    assert found.value == np.quantile(samples, share)
    assert samples.min() <= found.low <= found.value <= found.high <= samples.max()


def test_no_samples_give_no_figure():
    """An empty array is no error."""
    assert percentile(np.array([]), 0.5) is None
    assert median_interval(np.array([])) is None


def test_the_median_of_six_lies_between_the_extremes():
    """The smallest case can be told by hand: with 6 samples only the extremes bound the median with 95 %."""
    assert median_interval(np.array([3.0, 1, 6, 2, 5, 4])) == Interval(3.5, 1, 6)


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("count", [40, 200])
def test_an_order_statistic_interval_holds_the_true_percentile(share, count):
    """Of 300 intervals about 95 % hold the percentile of the distribution, by construction not fewer."""
    generator = np.random.default_rng(1)
    truth = -np.log(1 - share)  # of the exponential distribution
    found = [percentile(generator.exponential(size=count), share) for _ in range(300)]
    rate = np.mean([interval.low <= truth <= interval.high for interval in found])
    # Three standard errors of 300 draws are 3.8 %; order statistics are few, so an interval may hold more than asked.
    assert 0.912 <= rate <= 0.995


def test_wider_data_gives_a_wider_interval_of_the_median():
    """The interval follows the spread of the samples in proportion."""
    samples = np.random.default_rng(2).normal(size=50)
    narrow, wide = median_interval(100 + samples), median_interval(100 + 10 * samples)
    assert wide.high - wide.low == pytest.approx(10 * (narrow.high - narrow.low))


@settings(max_examples=10)
@given(processes)
def test_an_interval_of_ratios_holds_its_own_value(found):
    """However few and odd the rounds, the value is their median and lies in the interval, and no ratio is below 0."""
    every = np.concatenate(found)
    interval = ratio_interval(found)
    assert interval.value == np.median(every)
    assert 0 < interval.low <= interval.value <= interval.high


@settings(max_examples=5)
@given(processes, st.integers(0, 5))
def test_an_interval_of_ratios_can_be_made_again_to_the_digit(found, seed):
    """Equal rounds and seeds give equal figures."""
    assert ratio_interval(found, seed) == ratio_interval(found, seed)


@pytest.mark.parametrize("count", [1, 3])
def test_the_seed_decides_the_resampling(count):
    """Another seed resamples otherwise, so the bootstrap is one."""
    found = drawn(np.random.default_rng(3), count, 15, 0.05, 0.05)
    assert len({ratio_interval(found, seed) for seed in range(4)}) > 1


def test_processes_that_differ_widen_the_interval():
    """Rounds of the same spread tell less where each process has its own level."""
    rounds = np.random.default_rng(4).normal(0, 0.01, (4, 20))
    alike = ratio_interval([np.exp(row) for row in rounds])
    apart = ratio_interval([np.exp(row + shift) for row, shift in zip(rounds, (-0.1, -0.03, 0.03, 0.1), strict=True)])
    assert apart.high - apart.low > 5 * (alike.high - alike.low)


def test_more_rounds_of_one_process_narrow_the_interval():
    """With one process the rounds alone decide: sixteen times as many give about a quarter of the width."""
    generator = np.random.default_rng(5)
    few, many = (ratio_interval(drawn(generator, 1, rounds, 0, 0.1)) for rounds in (20, 320))
    assert many.half_width < few.half_width / 2


def test_ratios_without_spread_have_an_interval_without_width():
    """Where every round says the same, nothing is in doubt."""
    assert ratio_interval([np.full(8, 2.0)] * 3) == Interval(2.0, 2.0, 2.0)
    assert ratio_interval([np.full(8, 2.0)]) == Interval(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("count", "between", "within", "floor"), [(1, 0.0, 0.05, 0.85), (3, 0.05, 0.01, 0.86), (6, 0.05, 0.01, 0.86)]
)
def test_an_interval_of_ratios_holds_the_truth(count, between, within, floor):
    """Over synthetic runs most intervals hold the true ratio, also where processes differ more than rounds do.

    A plain bootstrap over three processes that differ more than their rounds holds it in 78 of 100 runs; an interval
    over pooled rounds alone in a fifth.
    """
    generator = np.random.default_rng(6)
    found = [ratio_interval(drawn(generator, count, 30, between, within)) for _ in range(80)]
    assert np.mean([interval.low <= 1 <= interval.high for interval in found]) >= floor


def test_half_width_is_a_share_of_the_value():
    """Half of the interval over the value; without a value there is no share."""
    assert Interval(2.0, 1.9, 2.2).half_width == pytest.approx(0.075)
    assert Interval(0.0, 0.0, 1.0).half_width == float("inf")


def test_least_rounds_bound_a_median():
    """A process that gives the least number of rounds gives an interval of the median, one round fewer none."""
    samples = np.arange(1.0, LEAST_ROUNDS + 1)
    assert median_interval(samples) is not None
    assert median_interval(samples[:-1]) is None
