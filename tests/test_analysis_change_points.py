"""Change points of a series: planted ones are found where they are, and noise is seldom taken for one."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.analysis import change_points
from bench.analysis.intervals import Interval


def series(values, doubt: float = 0.005) -> list[Interval]:
    """Figures with intervals of a relative half-width."""
    return [Interval(value, value / (1 + doubt), value * (1 + doubt)) for value in values]


def test_a_planted_change_is_found_where_it_is():
    """A step of 15 % among runs that differ by 1 % is one change, at its place, and its interval holds it."""
    generator = np.random.default_rng(5)
    levels = np.where(np.arange(20) < 12, 2.0, 1.7) * np.exp(generator.normal(0, 0.01, 20))
    (change,) = change_points.changes(series(levels))
    assert change.place == 12
    assert change.factor.low < 0.85 < change.factor.high < 1
    assert change.chance < change_points.CHANCE


def test_two_changes_are_found():
    """Up and down again are two changes."""
    levels = np.repeat([1.0, 1.3, 1.0], 6) * np.exp(np.random.default_rng(2).normal(0, 0.01, 18))
    assert [change.place for change in change_points.changes(series(levels))] == [6, 12]


@pytest.mark.parametrize("runs", [6, 10, 30])
@pytest.mark.parametrize("noise", [0.001, 0.03])
def test_noise_is_seldom_taken_for_a_change(runs, noise):
    """Of 300 histories without a change no more are given one than is told, whatever their noise and length."""
    generator = np.random.default_rng(1)
    found = [change_points.changes(series(np.exp(generator.normal(0, noise, runs)), noise / 5)) for _ in range(300)]
    assert sum(bool(changes) for changes in found) <= 300 * change_points.FALSE_ALARMS


def test_a_quiet_series_shows_what_a_noisy_one_hides():
    """A step of 2 % is a change among runs that differ by 0.2 %, and none among runs that differ by 3 %."""
    generator = np.random.default_rng(3)
    step, drawn = np.where(np.arange(10) < 5, 1.0, 0.98), generator.normal(0, 1, 10)
    quiet, noisy = (change_points.changes(series(step * np.exp(noise * drawn), 1e-4)) for noise in (0.002, 0.03))
    assert [change.place for change in quiet] == [5]
    assert noisy == ()


def test_figures_that_are_doubtful_themselves_show_no_small_change():
    """Runs may agree better than their own intervals; then the intervals are their noise."""
    step = np.where(np.arange(10) < 5, 1.0, 0.98)
    assert change_points.changes(series(step, 0.1)) == ()
    assert len(change_points.changes(series(step, 0.001))) == 1


def test_one_run_that_stands_out_is_no_change():
    """A single outlier is a disturbance until a second run says the same."""
    assert change_points.changes(series([1.0, 1.01, 0.99, 1.0, 0.6, 1.0, 1.01, 0.99])) == ()


@settings(max_examples=50)
@given(st.lists(st.floats(0.1, 10), max_size=12), st.floats(0.001, 1))
def test_changes_are_in_order_and_levels_last(values, doubt):
    """Whatever the series, change points rise, and every level lasts at least two runs."""
    found = change_points.changes(series(values, doubt))
    places = [0, *(change.place for change in found), len(values)]
    if len(places) > 2:
        assert all(after - before >= change_points.LEAST for before, after in pairwise(places))
    assert all(math.isfinite(change.factor.high) and 0 <= change.chance <= 1 for change in found)
