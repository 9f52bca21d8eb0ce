"""Figures over repeats: the interval holds the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest

from bench.analysis.repeats import spread


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Of 400 sets of five repeats, 92 to 98 % have the truth in their 95 % interval."""
    generator = np.random.default_rng(4)
    found = [spread(np.exp(generator.normal(0, 0.2, 5)).tolist()) for _ in range(400)]
    assert 0.92 <= np.mean([interval.low <= 1 <= interval.high for interval in found]) <= 0.98


def test_two_ends_are_both_in_the_interval():
    """It reaches from below the lower ends to above the upper ones."""
    found = spread([100, 104, 98], [106, 110, 104])
    assert found.value == 100
    assert found.low < 98
    assert found.high > 110


def test_one_repeat_has_no_interval():
    assert spread([100]) is None
    assert spread([100.0, 100.0]).low == pytest.approx(100)
