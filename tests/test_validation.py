"""Data from a file against the dataclass that it should fit, with pydantic and without it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from bench.errors import UsageError
from bench.validation import validate


@dataclass(frozen=True)
class Inner:
    """A part."""

    size: int
    name: str = "unnamed"


@dataclass(frozen=True)
class Outer:
    """A whole of parts."""

    title: str
    share: float = 0.5
    parts: tuple[Inner, ...] = ()
    words: tuple[str, ...] = ("a",)


@pytest.fixture(params=["pydantic", "plain"], autouse=True)
def checker(request, monkeypatch):
    """Every test runs with pydantic, and as if it were not installed."""
    if request.param == "pydantic":
        pytest.importorskip("pydantic")
    else:
        # An entry of None makes the import raise ImportError.
        monkeypatch.setitem(sys.modules, "pydantic", None)
    return request.param


def test_good_data_becomes_the_dataclass():
    """Nested tables become dataclasses, lists tuples, and defaults fill what is not said."""
    data = {"title": "t", "parts": [{"size": 3}, {"size": 4, "name": "four"}], "words": ["x", "y"]}
    assert validate(Outer, data, "f") == Outer("t", 0.5, (Inner(3), Inner(4, "four")), ("x", "y"))


def test_a_whole_number_serves_as_a_float():
    """TOML's `budget_s = 3` fits a field of floats."""
    assert validate(Outer, {"title": "t", "share": 3}, "f").share == 3.0


def test_what_is_valid_is_the_same_with_pydantic_and_without(checker, monkeypatch):
    """A run does not depend on whether pydantic is installed."""
    data = {"title": "t", "share": 0.25, "parts": [{"size": 3}], "words": []}
    found = validate(Outer, data, "f")
    if checker == "pydantic":
        monkeypatch.setitem(sys.modules, "pydantic", None)
        assert validate(Outer, data, "f") == found
    assert found == Outer("t", 0.25, (Inner(3),), ())


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"title": "t", "tittle": "x"}, "'tittle'"),
        ({"title": "t", "parts": [{"size": 1}, {"size": 1, "sise": 2}]}, "'sise'"),
        ({}, "title"),
        ({"title": "t", "parts": [{"name": "x"}]}, "size"),
        ({"title": 3}, "title"),
        ({"title": "t", "share": "half"}, "share"),
        ({"title": "t", "share": [0.5]}, "share"),
        ({"title": "t", "parts": [{"size": "big"}]}, "size"),
        ({"title": "t", "parts": [{"size": 1.5}]}, "size"),
        ({"title": "t", "parts": {"size": 1}}, "parts"),
        ({"title": "t", "parts": [3]}, "parts"),
        ({"title": "t", "words": "a word"}, "words"),
        ({"title": "t", "words": [1]}, "words"),
    ],
    ids=str,
)
def test_bad_data_is_one_line_that_names_origin_and_field(data, named):
    """The first line of the error says where the data came from and which field is wrong, and there is no second."""
    with pytest.raises(UsageError) as error:
        validate(Outer, data, "file x.toml")
    message = str(error.value)
    assert message.startswith("file x.toml: ")
    assert named in message
    assert "\n" not in message


def test_an_unknown_field_is_told_with_those_that_exist():
    """A mistyped name can be mended from the message alone."""
    with pytest.raises(UsageError, match="title, share, parts, words"):
        validate(Outer, {"title": "t", "tittle": "x"}, "f")


def test_a_list_is_asked_for_by_the_file_s_word():
    """TOML has no tuples."""
    with pytest.raises(UsageError, match=r"(?i)words: .*list") as error:
        validate(Outer, {"title": "t", "words": "a word"}, "f")
    assert "tuple" not in str(error.value)
