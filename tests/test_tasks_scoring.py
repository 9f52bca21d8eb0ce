"""Scores of forecasts: against closed forms, against integration, and on cases done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from seq2seq.tasks import scoring

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

numbers = st.floats(-5, 5)


@given(mean=numbers, deviation=st.floats(0.1, 3), observed=numbers)
def test_gaussian_crps_is_the_integral_that_defines_it(mean, deviation, observed):
    """The closed form is the integral of the squared distance between the two distribution functions."""

    def below(x):
        return stats.norm.cdf(x, mean, deviation) ** 2

    def above(x):
        return stats.norm.sf(x, mean, deviation) ** 2

    left, right = min(mean, observed) - 10 * deviation, max(mean, observed) + 10 * deviation
    expected = integrate.quad(below, left, observed)[0] + integrate.quad(above, observed, right)[0]
    as_tensor = [torch.tensor(value, dtype=torch.float64) for value in (mean, deviation, observed)]
    assert float(scoring.crps_of_gaussian(*as_tensor)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("observed", [-2.0, 0.3, 1.0, 4.0])
def test_crps_of_many_samples_is_the_closed_form(observed):
    """Samples of a Gaussian score what the Gaussian does."""
    samples = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5 + 1
    expected = scoring.crps_of_gaussian(torch.tensor(1.0), 1.5, torch.tensor(observed))
    assert float(scoring.crps_of_samples(samples, torch.tensor(observed))) == pytest.approx(float(expected), rel=0.01)


@given(seed=SEEDS, count=st.integers(2, 9))
def test_crps_of_samples_is_the_mean_over_pairs(seed, count):
    """The sum by ranks is the plain double sum over pairs of different samples."""
    draws = torch.randn(count + 1, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    samples, observed = draws[:-1], draws[-1]
    spread = (samples[:, None] - samples).abs().sum((0, 1)) / (count * (count - 1))
    expected = (samples - observed).abs().mean(0) - spread / 2
    torch.testing.assert_close(scoring.crps_of_samples(samples, observed), expected)


def test_crps_of_few_samples_is_right_on_average():
    """Two samples score on average what the distribution does: the number of samples is no advantage."""
    samples = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    observed = torch.full((200_000,), 0.5, dtype=torch.float64)
    expected = float(scoring.crps_of_gaussian(torch.tensor(0.0), 1.0, torch.tensor(0.5)))
    assert float(scoring.crps_of_samples(samples, observed).mean()) == pytest.approx(expected, rel=0.02)


def test_crps_of_a_point_is_its_absolute_error():
    """A forecast of one path is scored by how far off it is."""
    assert scoring.crps_of_samples(torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 1.0])).tolist() == [2.0, 1.0]


def test_mase_by_hand():
    """Training errors of a season of 2 are 3, 1 and 2, so a forecast off by 1 and 3 scores 1."""
    error = scoring.seasonal_error(torch.tensor([1.0, 5.0, 4.0, 4.0, 6.0]), 2)
    assert error == pytest.approx(2)
    assert scoring.mase(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 4.0]), error) == pytest.approx(1)


@given(seed=SEEDS, factor=st.floats(0.1, 100), offset=st.floats(-100, 100), season=st.integers(1, 5))
def test_mase_has_no_unit(seed, factor, offset, season):
    """Another unit or zero point changes nothing, Fahrenheit or Celsius."""
    values = torch.randn(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def score(series):
        error = scoring.seasonal_error(series[:20], season)
        return scoring.mase(scoring.seasonal_naive(series[:20], season, 10), series[20:], error)

    assert score(values * factor + offset) == pytest.approx(score(values), rel=1e-6)


def test_seasonal_naive_repeats_the_last_season():
    """Three steps of season, seven to forecast: the last three again and again."""
    found = scoring.seasonal_naive(torch.tensor([[9.0, 1.0, 2.0, 3.0]]), 3, 7)
    assert found.tolist() == [[1, 2, 3, 1, 2, 3, 1]]


def test_seasonal_naive_interval_holds_what_it_says():
    """On a seasonal random walk, 80 % intervals hold 80 % of what comes, in the first season as in the second."""
    noise = np.random.default_rng(0).normal(size=(4000, 30))
    walks = torch.from_numpy(noise).view(4000, 10, 3).cumsum(1).flatten(1)
    deviations = torch.stack([scoring.seasonal_naive_deviation(walk[:24], 3, 6) for walk in walks])
    assert float(deviations[:, 3].mean() / deviations[:, 0].mean()) == pytest.approx(math.sqrt(2))
    error = walks[:, 24:] - torch.stack([scoring.seasonal_naive(walk[:24], 3, 6) for walk in walks])
    held = (error.abs() <= 1.2816 * deviations).double().mean(0)
    assert held.tolist() == pytest.approx([0.8] * 6, abs=0.03)


@pytest.mark.parametrize(("values", "cause"), [([1.0, 2.0], "no more than one season"), ([1.0, 2.0] * 4, "repeats")])
def test_series_without_a_seasonal_error_is_refused(values, cause):
    """Nothing is divided by an error that cannot be taken or is zero."""
    with pytest.raises(ValueError, match=cause):
        scoring.seasonal_error(torch.tensor(values), 2)


def test_history_below_a_season_is_refused():
    """The naive forecast needs the whole last season."""
    with pytest.raises(ValueError, match="needs a season of 5"):
        scoring.seasonal_naive(torch.zeros(4), 5, 1)
