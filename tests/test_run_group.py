"""A record keeps the error of its gates that came nearest to its limit."""

from __future__ import annotations

import math

import pytest

from bench.run.group import nearest


@pytest.mark.parametrize(
    ("errors", "expected"),
    [([0.0], 0.0), ([0.0, 1e-7, None], 1e-7), ([math.nan, 1.0], math.nan), ([None], None), ([], None)],
)
def test_the_nearest_error_is_kept(errors, expected):
    """An error of exactly 0 is one; what is not a number is the worst; where none was measured there is none."""
    gates = [{"batched_error": error, "batched_limit": None if error is None else 2.0} for error in errors]
    found = nearest(gates, ("batched",))
    assert found == pytest.approx(
        {} if expected is None else {"batched_error": expected, "batched_limit": 2.0}, nan_ok=True
    )
