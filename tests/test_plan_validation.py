"""Data from a file against the dataclass that it should fit."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bench.errors import UsageError
from bench.plan.validation import validate


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


def test_good_data_becomes_the_dataclass():
    """Nested tables become dataclasses, lists tuples, and defaults fill what is not said."""
    data = {"title": "t", "parts": [{"size": 3}, {"size": 4, "name": "four"}], "words": ["x", "y"]}
    assert validate(Outer, data, "f") == Outer("t", 0.5, (Inner(3), Inner(4, "four")), ("x", "y"))


def test_a_whole_number_serves_as_a_float():
    """TOML's `budget_s = 3` fits a field of floats."""
    assert validate(Outer, {"title": "t", "share": 3}, "f").share == 3.0


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


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"title": "t", "tittle": "x"}, "f: unknown field 'tittle'; did you mean 'title'?"),
        ({"title": "t", "zzz": "x"}, "f: unknown field 'zzz'; choose from title, share, parts, words"),
        (
            {"title": "t", "parts": [{"size": 1, "sise": 2}]},
            "unknown field 'sise' of [[parts]] 1; did you mean 'size'?",
        ),
        ({"parts": {"size": 1}}, "f: title is missing; parts: write [[parts]] with two brackets: each begins one part"),
        (
            {"title": "t", "parts": [{"size": 1}, {"size": "x"}]},
            'size of [[parts]] 2: expected a whole number, got "x"',
        ),
        ({"title": "t", "words": ["a", 1]}, "entry 2 of words: expected a text, got 1"),
        ({"title": "t", "words": {"a": 1}}, "words: expected a list, got a table"),
        ({"title": "t", "share": "half"}, 'share: expected a number, got "half"'),
        ({"title": ["t"]}, "title: expected a text, got a list"),
        ({"title": "t", "parts": [3]}, "[[parts]] 1: expected a table, got 3"),
        ({"title": "t", "share": "x" * 99}, f'share: expected a number, got "{"x" * 39}...'),
    ],
    ids=str,
)
def test_a_problem_is_told_in_the_words_of_the_file(data, said):
    """A near name is offered, one bracket for two is recognised, and nothing of Python is shown."""
    with pytest.raises(UsageError) as error:
        validate(Outer, data, "f")
    assert said in str(error.value)
    assert "{" not in str(error.value)


def test_a_list_is_asked_for_by_the_file_s_word():
    """TOML has no tuples."""
    with pytest.raises(UsageError, match=r"(?i)words: .*list") as error:
        validate(Outer, {"title": "t", "words": "a word"}, "f")
    assert "tuple" not in str(error.value)
