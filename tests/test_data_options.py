"""Options of tasks: each is what the task declares, however it is written; what does not fit is one line."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd
import pytest
from pydantic import Field

from seq2seq.cli.arguments import parser
from seq2seq.data.errors import DataError
from seq2seq.data.options import Count, declared, takes_options, typed
from seq2seq.data.series_file import Columns
from seq2seq.tasks import forecasting, speech, summarization, translation
from seq2seq.tasks.forecasting import Choices
from seq2seq.tasks.registry import TASKS

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@dataclass(frozen=True)
class Kinds:
    """One option of each kind."""

    column: str = ""
    maybe: str | None = None
    truth: bool = False
    count: Count = 1
    pair: Annotated[int, Field(ge=2, description="a whole number of at least 2")] | None = None
    rate: float = 0.5
    language: Literal["de", "fr"] = "de"


KINDS = declared(Kinds)


@given(st.text() | st.integers().map(str) | st.sampled_from(["true", "False", "nan", "1e3", "None", ""]))
def test_a_text_stays_the_text_it_is(text):
    """If a text is expected, a year, a truth and nothing at all are texts."""
    assert typed({"column": text, "maybe": text}, KINDS, "x") == {"column": text, "maybe": text}


@pytest.mark.parametrize("spelling", ["false", "False", "FALSE", "no", "No", "off", "0", "n", False])
def test_a_falsehood_is_false_in_any_spelling(spelling):
    """As Python, YAML and people write it."""
    assert typed({"truth": spelling}, KINDS, "x") == {"truth": False}


@pytest.mark.parametrize("spelling", ["true", "True", "TRUE", "yes", "on", "1", "y", True])
def test_a_truth_is_true_in_any_spelling(spelling):
    """As Python, YAML and people write it."""
    assert typed({"truth": spelling}, KINDS, "x") == {"truth": True}


@given(st.integers(2, 10**6), st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_where_numbers_are_expected(count, rate):
    """From texts as from values of Python."""
    expected = {"count": count, "pair": count, "rate": rate}
    assert typed(expected, KINDS, "x") == expected
    assert typed({name: str(value) for name, value in expected.items()}, KINDS, "x") == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("truth", "maybe", "truth is 'maybe', expected true or false"),
        ("truth", "", "truth is '', expected true or false"),
        ("count", "0", "count is '0', expected a whole number of at least 1"),
        ("count", "2.5", "count is '2.5', expected a whole number of at least 1"),
        ("count", "", "count is '', expected a whole number of at least 1"),
        ("pair", "1", "pair is '1', expected a whole number of at least 2"),
        ("rate", "much", "rate is 'much', expected a number"),
        ("column", 2023, "column is 2023, expected a text"),
        ("language", "xx", "language is 'xx', expected one of de, fr"),
        ("colour", "red", "there is no option 'colour' for x; did you mean 'column'?"),
        ("zzz", "red", "there is no option 'zzz' for x; choose from column, maybe, truth, count, pair, rate"),
    ],
)
def test_what_does_not_fit_is_one_line(name, value, message):
    """Option, value and what was expected."""
    with pytest.raises(DataError) as caught:
        typed({name: value}, KINDS, "x")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_function_is_called_with_its_types():
    """Texts arrive as numbers and truths, the path as it is; the signature is the function's."""

    @takes_options(own=["truth"])
    def load(path=None, *, count: Count = 3, truth: bool = True):
        return path, count, truth

    assert load("2024", count="5", truth="no") == ("2024", 5, False)
    assert load() == (None, 3, True)
    assert list(inspect.signature(load).parameters) == ["path", "count", "truth"]
    with pytest.raises(DataError, match=r"no option .color. for .*; choose from count, truth"):
        load(color="blue")


@pytest.mark.parametrize("task", [translation, summarization, speech])
def test_every_option_of_a_task_is_refused_by_name_when_it_does_not_fit(task):
    """No option passes unread: each that is no text refuses one, and none takes a list."""
    for name, kind in declared(task.load).items():
        value: object = [] if kind is str else "many"
        with pytest.raises(DataError, match=rf"^{name} is {re.escape(repr(value))}, expected a"):
            task.load(**{name: value})


@pytest.mark.parametrize("name", [*declared(Choices), *declared(Columns)])
def test_every_option_of_forecasting_is_refused_by_name_when_it_does_not_fit(name):
    """The same for what is split between windows and columns."""
    with pytest.raises(DataError, match=rf"^{name} is \[\], expected (a|true)"):
        forecasting.load(**{name: []})


@pytest.mark.parametrize("name", ["path", "module", "state", "name", "load", "options"])
@pytest.mark.parametrize("task", TASKS)
def test_no_option_passes_for_an_argument_of_ours(task, name):
    """Whatever our functions call their own arguments, an option of that name is an unknown one."""
    with pytest.raises(DataError, match=f"there is no option '{name}' for {task}; (did you mean|choose from)"):
        TASKS[task](None, **{name: "x"})


@pytest.mark.parametrize(
    ("task", "path", "option"),
    [
        (translation, None, {"encoding": "1252"}),
        (translation, "pairs.tsv", {"language": "fr"}),
        (summarization, None, {"keys": "a,b"}),
        (summarization, "pairs.tsv", {"sentences": "3"}),
        (speech, None, {"encoding": "1252"}),
        (speech, "folder", {"count": "30"}),
        (forecasting, "seattle", {"value": "load"}),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(task, path, option):
    """Options about a file need one, and options about the data that comes along need that."""
    with pytest.raises(DataError, match=f"^{next(iter(option))}: only for (data of your own|the data that|a file)"):
        task.load(path, **option)


@pytest.mark.parametrize("difference", ["False", "off"])
def test_a_falsehood_reaches_the_task(tmp_path, difference):
    """`difference=False` learns no differences, as `difference=false`."""
    path = tmp_path / "s.csv"
    hours = pd.date_range("2024-01-01", periods=300, freq="h")
    pd.DataFrame({"timestamp": hours, "value": [(step * 7919) % 23 for step in range(300)]}).to_csv(path, index=False)
    assert forecasting.load(path, history="24", horizon="6", difference=difference).lag == 0
    assert forecasting.load(path, history="24", horizon="6").lag == 24


@given(st.text(st.characters(codec="utf-8")))
def test_a_command_line_passes_texts_on(text):
    """The parser takes no value for a number or a truth."""
    arguments = parser().parse_args(["train", "forecasting", "--option", f"value={text}", "--option", "season=7"])
    assert arguments.option == [("value", text), ("season", "7")]
