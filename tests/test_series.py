"""Series: built-in ones complete and on their grid, a user's CSV read as it is meant or refused with row and cause."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from seq2seq.tasks.batch import DataUnavailableError
from seq2seq.tasks.errors import DataError
from seq2seq.tasks.series import NAMES, Frequency, built_in, calendar
from seq2seq.tasks.series_file import Columns, read_series

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

HOURS = "timestamp,value\n2024-01-01 00:00,1\n2024-01-01 01:00,2\n2024-01-01 02:00,4\n"


@pytest.fixture
def write(tmp_path):
    """Writes a file of the given content, and gives its path."""

    def to_file(content: str | bytes) -> Path:
        path = tmp_path / "series.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return to_file


@pytest.mark.parametrize(
    ("name", "frequency", "season", "steps", "filled"),
    [("seattle", "hourly", 24, 8760, 1), ("san-francisco", "hourly", 24, 8760, 1)],
)
def test_temperatures_are_complete(name, frequency, season, steps, filled):
    """A year of hours, with the hour that the package leaves out in March filled by the mean of its neighbours."""
    pytest.importorskip("vega_datasets")
    (series,) = built_in(name)
    assert (str(series.frequency), series.frequency.season) == (frequency, season)
    assert (len(series.values), series.filled) == (steps, filled)
    missing = series.timestamps().get_loc("2010-03-14 03:00")
    assert float(series.values[missing]) == pytest.approx(float(series.values[[missing - 1, missing + 1]].mean()))


def test_temperatures_are_the_package_s():
    """Every value that the package has stands at its timestamp."""
    data = pytest.importorskip("vega_datasets").local_data.sf_temps()
    (series,) = built_in("san-francisco")
    mine = pd.Series(series.values.numpy(), series.timestamps())
    np.testing.assert_array_equal(mine[data["date"]].to_numpy(), data["temp"].to_numpy())


def test_co2_is_filled_in_and_says_so():
    """Weekly from 1958 to 2001, with the 59 weeks without a value counted and interpolated."""
    data = pytest.importorskip("statsmodels.datasets").co2.load_pandas().data["co2"]
    (series,) = built_in("co2")
    assert (str(series.frequency), series.frequency.season, len(series.values)) == ("weekly", 52, len(data))
    assert series.filled == data.isna().sum() == 59
    np.testing.assert_allclose(series.values.numpy(), data.interpolate().to_numpy())


def test_sunspots_are_yearly():
    """All years from 1700 to 2008, none filled."""
    pytest.importorskip("statsmodels.datasets")
    (series,) = built_in("sunspots")
    assert (str(series.frequency), len(series.values), series.filled) == ("yearly", 309, 0)
    assert series.timestamps()[[0, -1]].year.tolist() == [1700, 2008]


@pytest.mark.parametrize(("name", "module"), [("seattle", "vega_datasets"), ("co2", "statsmodels.datasets")])
def test_missing_package_says_what_to_install(monkeypatch, name, module):
    """Without its package a built-in series says which one and how to install it."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataUnavailableError, match=r"is not installed: pip install"):
        built_in(name)


@pytest.mark.parametrize(
    ("frequency", "seconds", "season"),
    [("h", 3600, 24), ("15min", 900, 96), ("D", 86_400, 7), ("W", 604_800, 52), ("10D", 864_000, 37)],
)
def test_frequency_of_fixed_steps(frequency, seconds, season):
    """The step and its season are found, whatever the time of day of the first."""
    found = Frequency.infer(pd.date_range("2024-01-05 07:30", periods=40, freq=frequency))
    assert (found, found.season) == (Frequency(seconds=seconds), season)


@pytest.mark.parametrize(
    ("frequency", "name", "season"),
    [("MS", "monthly", 12), ("ME", "monthly", 12), ("QS", "quarterly", 4), ("YS", "yearly", 1)],
)
def test_frequency_of_months(frequency, name, season):
    """Months, quarters and years are steps though their days differ, counted from the first as from the last day."""
    stamps = pd.date_range("2021-01-01", periods=30, freq=frequency)
    found = Frequency.infer(stamps)
    assert (str(found), found.season) == (name, season)
    assert found.places(stamps).tolist() == list(range(30))
    assert found.following(stamps[0], 30).equals(stamps)


@given(
    name=st.sampled_from(sorted(NAMES)),
    count=st.integers(3, 40),
    start=st.datetimes(pd.Timestamp("1950"), pd.Timestamp("2050")),
)
def test_following_steps_are_on_the_grid(name, count, start):
    """Timestamps that a frequency makes are the ones that it finds again."""
    frequency, start = NAMES[name], pd.Timestamp(start).floor("s").replace(day=min(start.day, 28))
    stamps = frequency.following(start, count)
    assert frequency.places(stamps).tolist() == list(range(count))
    assert Frequency.infer(stamps) == frequency


def test_cycles_fit_the_frequency():
    """A cycle is told of only where it has at least two steps."""
    found = {name: frequency.cycles for name, frequency in NAMES.items()}
    assert found["hourly"] == ("day", "week", "year")
    assert found["daily"] == ("week", "year")
    assert found["weekly"] == found["monthly"] == found["quarterly"] == ("year",)
    assert found["yearly"] == ()


@pytest.mark.parametrize(("cycle", "period"), [("day", "1D"), ("week", "7D"), ("year", "365D")])
def test_calendar_closes_after_a_cycle(cycle, period):
    """A cycle later the place is the same, half a cycle later the opposite one, and all lie on a circle."""
    start = pd.Timestamp("2022-01-01 05:00")
    found = calendar(pd.DatetimeIndex([start, start + pd.Timedelta(period), start + pd.Timedelta(period) / 2]), [cycle])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], -found[2], atol=1e-9, rtol=0)
    torch.testing.assert_close(found.square().sum(1), torch.ones(3, dtype=torch.float64))


def test_file_is_read(write):
    """Timestamps, values and the frequency come out as they were written; the series has the file's name."""
    (series,) = read_series(write(HOURS))
    assert series.values.tolist() == [1, 2, 4]
    assert (series.name, str(series.frequency), series.filled) == ("series", "hourly", 0)
    assert series.timestamps()[-1] == pd.Timestamp("2024-01-01 02:00")


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("when;n\n2024-01-01;1,5\n2024-01-02;2\n2024-01-03;-3,25\n", {"timestamp": "when", "value": "n", "decimal": ","}),  # noqa: E501
        ("value|timestamp\n1.5|01.01.2024\n2|02.01.2024\n-3.25|03.01.2024\n", {"delimiter": "|", "timestamp_format": "%d.%m.%Y"}),  # noqa: E501
        ("timestamp\tvalue\r\n2024-01-01\t1.5\r\n\r\n2024-01-02\t2\r\n2024-01-03\t-3.25\r\n", {}),
        ('﻿timestamp,note,value\n2024-01-01,"a,\nb",1.5\n2024-01-02,,2e0\n2024-01-03,,-3.25\n', {}),
        ("timestamp,value\n2024-01-01T00:00+01:00,1.5\n2024-01-02T00:00+01:00,2\n2024-01-03T01:00+02:00,-3.25\n", {}),
        ("timestamp,value\n2021,1.5\n2022,2\n2023,-3.25\n", {}),
        ("timestamp,value\n2021-01,1.5\n2021-02,2\n2021-03,-3.25\n", {}),
    ],
    ids=["semicolon", "format", "tab", "quoted", "zone", "years", "months"],
)  # fmt: skip
def test_ways_to_write_a_file(write, content, options):
    """Delimiter, decimal mark, format of timestamps, time zones and further columns change nothing of the values."""
    (series,) = read_series(write(content), Columns.of(options))
    assert series.values.tolist() == [1.5, 2, -3.25]


def test_other_encoding_is_read_when_named(write):
    """A file of another encoding is read when the encoding is named."""
    content = HOURS.replace("value", "Größe").encode("latin-1")
    (series,) = read_series(write(content), Columns(value="Größe", encoding="latin-1"))
    assert series.values.tolist() == [1, 2, 4]


def test_column_of_names_makes_several_series(write):
    """Rows of several series may alternate."""
    rows = "".join(f"2024-01-0{day},{day},a\n2024-01-0{day},{-day},b\n" for day in (1, 2, 3))
    found = read_series(write("timestamp,value,city\n" + rows), Columns(series="city"))
    assert {series.name: series.values.tolist() for series in found} == {"a": [1, 2, 3], "b": [-1, -2, -3]}


def test_interpolation_fills_and_counts(write):
    """Missing rows and values are filled on a line and counted; repeated timestamps become their mean."""
    content = HOURS + "2024-01-01 03:00,NA\n2024-01-01 04:00,8\n2024-01-01 07:00,2\n2024-01-01 07:00,4\n"
    (series,) = read_series(write(content), Columns(missing="interpolate"))
    assert series.values.tolist() == pytest.approx([1, 2, 4, 6, 8, 8 - 5 / 3, 8 - 10 / 3, 3])
    assert series.filled == 3


#: Content, what is given beside it, and what the one line says.
BAD = {
    "empty": (b"", {}, "is empty, expected at least one row"),
    "blank": (b" \n\n", {}, "is empty, expected at least one row"),
    "header alone": (b"timestamp,value\n", {}, "holds a header and no values"),
    "encoding": (HOURS.encode() + b"2024-01-01 03:00,\xe4\n", {}, "row 5: byte 0xe4 is no utf-8"),
    "unknown encoding": (HOURS, {"encoding": "utf-99"}, "'utf-99' is no encoding"),
    "no column": (HOURS, {"value": "load"}, "row 1: no column named 'load' in the header timestamp, value"),
    "two columns": ("timestamp,value,value\n" + 3 * "x,1,2\n", {}, "row 1: several columns named 'value'"),
    "a column too few": (HOURS + "2024-01-01 03:00\n", {}, "row 5: has 1 column, expected 2"),
    "a column too many": (HOURS + "2024-01-01 03:00,1,5\n", {}, "row 5: has 3 columns, expected 2"),
    "no number": (HOURS + "2024-01-01 03:00,cold\n", {}, "row 5: 'cold' is no number"),
    "decimal comma": ("timestamp;value\n2024-01-01;1,5\n", {}, r"row 2: '1,5' is no number, expected .* mark '\.'"),
    "infinite": (HOURS + "2024-01-01 03:00,inf\n", {}, "row 5: 'inf' is no number"),
    "underscore": (HOURS + "2024-01-01 03:00,1_0\n", {}, "row 5: '1_0' is no number"),
    "missing value": (HOURS + "2024-01-01 03:00,\n", {}, "row 5: the value is missing, .* missing=interpolate"),
    "last missing": (HOURS + "2024-01-01 03:00,\n", {"missing": "interpolate"}, "row 5: the first and the last value"),
    "no timestamp": (HOURS + "soon,1\n", {}, "row 5: 'soon' is no timestamp, expected ISO 8601"),
    "other format": (HOURS, {"timestamp_format": "%d.%m.%Y"}, "row 2: .* is no timestamp, expected %d.%m.%Y"),
    "zones differ": (HOURS + "2024-01-01T03:00Z,1\n", {}, "row 5: timestamps are with and without a time zone"),
    "twice": (HOURS + "2024-01-01 02:00,1\n", {}, "row 5: 2024-01-01 02:00:00 is there twice"),
    "out of order": (HOURS + "2023-01-01 02:00,1\n", {}, "row 5: 2023-01-01 02:00:00 comes after 2024-01-01 02:00:00"),
    "gap": (HOURS + "2024-01-01 05:00,1\n", {}, "row 5: 2 hourly steps are missing before 2024-01-01 05:00:00"),
    "off the grid": (HOURS + "2024-01-01 02:30,1\n", {"missing": "interpolate"}, "row 5: .* is off the hourly steps"),
    "two rows": ("timestamp,value\n2024-01-01,1\n2024-01-02,1\n", {}, "has 2 timestamps, expected at least 3"),
    "torn quotes": ('timestamp,value\n2024-01-01,"1\n', {}, "row 3: is no row of a CSV|row 2: is no row of a CSV"),
    "after a torn cell": ('timestamp,note,value\n2024-01-01,"a\nb",1\n2024-01-02,,x\n', {}, "row 4: 'x' is no number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(write, case):
    """What is wrong is said in one line that names the file, the row as an editor counts it, and the cause."""
    content, options, message = BAD[case]
    path = write(content)
    with pytest.raises(DataError, match=message) as caught:
        read_series(path, Columns.of(options))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    """A file that is not there is an error of the same kind."""
    with pytest.raises(DataError, match=r"no-such\.csv: cannot be read: No such file"):
        read_series(tmp_path / "no-such.csv")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimeter": ";"}, "no option 'delimeter' for reading a series, expected one of timestamp, value"),
        ({"delimiter": ", "}, "expected one character"),
        ({"missing": "ignore"}, "missing is 'ignore', expected 'error' or 'interpolate'"),
        ({"decimal": ";"}, "decimal is ';', expected"),
    ],
)
def test_bad_option_is_refused(options, message):
    """An option that there is not, or of another value, is refused with what there is."""
    with pytest.raises(DataError, match=message):
        Columns.of(options)
