"""The search for the highest load that holds."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.serve.search import LoadVerdict, SearchSteps, highest


@given(st.floats(1.0, 1e4), st.floats(1.0, 1e4), st.floats(1.05, 2.0))
def test_a_planted_limit_is_found(limit, start, factor):
    """Wherever the search starts, its two ends hold the limit between them, as near as was asked for."""
    found = highest(
        lambda load: LoadVerdict.HELD if load <= limit else LoadVerdict.BROKEN,
        SearchSteps(start, factor, 1.5, 0.1, 1e6),
    )
    if found.held is not None:
        assert found.held <= limit
    if found.above is not None:
        assert found.above > limit
        assert found.limit is LoadVerdict.BROKEN


def test_the_ends_are_as_near_as_asked_for():
    found = highest(lambda load: LoadVerdict("held" if load <= 777 else "broken"), SearchSteps(100, 1.6, 1.02, 1, 1e5))
    assert found.held <= 777 < found.above <= 1.02 * found.held


def test_where_nothing_holds_no_load_is_named():
    found = highest(lambda _: LoadVerdict.BROKEN, SearchSteps(100, 1.6, 1.1, 10, 1e5))
    assert (found.held, found.above) == (None, 10)


def test_where_everything_holds_the_highest_load_tried_is_the_ceiling():
    found = highest(lambda _: LoadVerdict.HELD, SearchSteps(100, 1.6, 1.1, 10, 1000))
    assert (found.held, found.above) == (1000, None)


def test_an_invalid_test_at_the_end_is_told():
    """A search that ended at a fault of the generator has found no limit of the variant."""
    found = highest(lambda load: LoadVerdict("held" if load <= 500 else "invalid"), SearchSteps(100, 1.6, 1.1, 10, 1e5))
    assert found.limit is LoadVerdict.INVALID
