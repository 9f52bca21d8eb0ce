"""Numbers of command lines: what is one is taken as it stands, and anything else is one line."""

from __future__ import annotations

import argparse

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given
from hypothesis import strategies as st

from kernels.host.numbers import DIGITS, seconds, share, whole


@given(st.integers(0, 10**DIGITS - 1), st.integers(0, 3))
def test_whole_numbers_are_taken_with_leading_zeros(number, zeros):
    assert whole(0)("0" * zeros + str(number)) == number


@given(st.integers(1, 50), st.integers(51, 100), st.integers(-200, 200))
def test_whole_numbers_outside_their_limits_are_refused(least, below, number):
    """Exactly those from `least` to below `below` are taken."""
    if least <= number < below:
        assert whole(least, below)(str(number)) == number
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"not a whole number from {least} to {below - 1}"):
            whole(least, below)(str(number))


@given(st.text())
def test_any_text_is_a_number_or_one_line(text):
    """Nothing but ArgumentTypeError is raised, whatever was typed."""
    for convert in (whole(), whole(0, 7), seconds, share):
        try:
            number = convert(text)
        except argparse.ArgumentTypeError:
            continue
        assert number >= 0


@pytest.mark.parametrize("text", ["", " ", "1.0", "+1", "1_000", "٣", "0x1", "nan"])
def test_what_is_no_whole_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
        whole()(text)


def test_a_number_of_thousands_of_digits_is_refused_at_once():
    """Python itself refuses to read it, with another kind of error."""
    with pytest.raises(argparse.ArgumentTypeError, match="5000 digits, expected at most 18"):
        whole()("9" * 5000)


def test_percentages():
    assert (share("3%"), share(" 3 % "), share("0")) == (0.03, 0.03, 0.0)
    for text in ("100%", "-1%", "nan", "3%%", "%"):
        with pytest.raises(argparse.ArgumentTypeError, match="percentage"):
            share(text)


def test_seconds_are_above_zero_and_finite():
    assert seconds("1e-3") == 1e-3
    for text in ("0", "-1", "inf", "nan", "soon"):
        with pytest.raises(argparse.ArgumentTypeError, match="seconds above 0"):
            seconds(text)
