"""Series: built-in ones complete and on their grid, a user's CSV read as it is meant or refused with row and cause."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from seq2seq.data.errors import DataError, DataUnavailableError
from seq2seq.data.series import NAMES, Frequency, built_in, calendar
from seq2seq.data.series_file import Columns, read_series

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


#: What stands between thousands, the decimal mark, and the option that says so.
NUMBERS = [("", ".", None), (" ", ".", None), ("'", ".", None), (",", ".", "."), (".", ",", ","), ("\u202f", ",", ",")]


@given(
    values=st.lists(st.decimals(-(10**7), 10**7, places=3), min_size=3, max_size=6),
    numbers=st.sampled_from(NUMBERS),
    style=st.tuples(
        st.sampled_from(",;\t"),
        st.sampled_from(["\n", "\r\n", "\r", "\r\r\n"]),
        st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
        st.sampled_from(["NFC", "NFD"]),
        st.booleans(),
    ),
)
def test_a_program_s_way_to_write_a_file_changes_nothing(tmp_path_factory, values, numbers, style):
    """Whatever delimiter, line end, mark, encoding, thousands, normal form and first line, the series is the same."""
    apart, mark, decimal = numbers
    delimiter, end, encoding, form, excel = style
    path = tmp_path_factory.getbasetemp() / "written.csv"
    # Windows-1252 has no accents that stand alone.
    name = unicodedata.normalize("NFC" if encoding == "cp1252" else form, "Größe, m³")
    rows = [f'"Tag"{delimiter}"{name}"{delimiter}']
    rows[:0] = [f"sep={delimiter}"] * excel
    for day, value in enumerate(values, 1):
        text = f"{value:,}".translate({ord(","): apart, ord("."): mark})
        rows.append(f'2024-01-0{day}{delimiter}"{text}"{delimiter}"a{delimiter}{end}b"')
    content = "".join(row + end for row in rows)
    # Nor has it narrow spaces.
    path.write_bytes((content.replace("\u202f", "\u00a0") if encoding == "cp1252" else content).encode(encoding))
    wanted = unicodedata.normalize({"NFC": "NFD", "NFD": "NFC"}[form], "Größe, m³")
    named = {"encoding": "1252"} if encoding == "cp1252" else {}
    (series,) = read_series(path, Columns.of({"timestamp": "Tag", "value": wanted, "decimal": decimal, **named}))
    assert series.values.tolist() == [float(value) for value in values]


@pytest.mark.parametrize(("step_us", "name", "season"), [
    (250_000, "every 0.25 s", 345_600), (1000, "every 0.001 s", 86_400_000), (1, "every 1e-06 s", 86_400_000_000),
    (100_000, "every 0.1 s", 864_000), (1_500_000, "every 1.5 s", 57_600), (60_000_000, "every 60 s", 1440),
])  # fmt: skip
def test_steps_below_a_second_are_steps(write, step_us, name, season):
    """None of the values is lost, the calendar knows their place in a day, and the next timestamps follow."""
    stamps = pd.date_range("2024-01-01T06:00", periods=40, freq=pd.Timedelta(microseconds=step_us))
    rows = "".join(f"{stamp.isoformat()},{number}\n" for number, stamp in enumerate(stamps))
    (series,) = read_series(write("timestamp,value\n" + rows))
    assert series.values.tolist() == list(range(40))
    assert (str(series.frequency), series.frequency.season, series.filled) == (name, season, 0)
    assert series.timestamps(2)[-1] == stamps[-1] + 2 * (stamps[1] - stamps[0])
    assert Frequency(**json.loads(json.dumps(dataclasses.asdict(series.frequency)))) == series.frequency
    places = calendar(series.timestamps(), ["day"])
    angle = torch.atan2(places[:, 0], places[:, 1]) - np.pi / 2
    torch.testing.assert_close(angle, torch.arange(40.0).double() * step_us * 2 * np.pi / 86_400e6, atol=1e-12, rtol=0)


def test_numbers_that_count_since_1970_are_read_with_their_unit(write):
    """In milliseconds; they are in UTC."""
    rows = "".join(f"{1704010100000 + 500 * step},{step}\n" for step in range(5))
    (series,) = read_series(write("timestamp,value\n" + rows), Columns(timestamp_format="ms"))
    assert (series.start, str(series.frequency)) == (pd.Timestamp("2023-12-31T08:08:20"), "every 0.5 s")
    assert series.converted
    with pytest.raises(
        DataError, match=r"row 2: '1704010100000' is not a timestamp, .* timestamp_format=s, or ms, us, ns"
    ):
        read_series(write("timestamp,value\n" + rows))


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
def test_hours_of_a_zone_with_summer_time_are_all_there(write, zone):
    """An hour that clocks show twice is two hours, and one that they leave out is not missing."""
    stamps = pd.date_range("2024-01-01", "2024-12-31", freq="h", tz=zone)
    rows = "".join(f"{stamp.isoformat()},{number}\n" for number, stamp in enumerate(stamps))
    (series,) = read_series(write("timestamp,value\n" + rows))
    assert series.values.tolist() == list(range(len(stamps)))
    assert series.timestamps().equals(stamps.tz_convert("UTC").tz_localize(None).as_unit("us"))


def test_the_column_without_a_name_is_that_of_an_empty_name(write):
    """As DataFrame.to_csv writes its index."""
    (series,) = read_series(write(HOURS.replace("timestamp", "")), Columns.of({"timestamp": ""}))
    assert series.values.tolist() == [1, 2, 4]


@pytest.mark.parametrize("delimiter", ["\\t", "tab", "\t"])
def test_a_tab_can_be_named(write, delimiter):
    """As it is typed where no tab can be."""
    (series,) = read_series(write(HOURS.replace(",", "\t")), Columns.of({"delimiter": delimiter}))
    assert series.values.tolist() == [1, 2, 4]


def test_the_delimiter_is_the_one_that_finds_the_columns(write):
    """Names with commas do not make commas the delimiter."""
    content = 'timestamp;"a, b, c";value\n2024-01-01;;1\n2024-01-02;;2\n2024-01-03;;4\n'
    (series,) = read_series(write(content))
    assert series.values.tolist() == [1, 2, 4]


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
    assert (series.filled, series.averaged) == (3, 1)


#: Content, what is given beside it, and what the one line says.
BAD = {
    "empty": (b"", {}, "is empty, expected at least one row"),
    "blank": (b" \n\n", {}, "is empty, expected at least one row"),
    "header alone": (b"timestamp,value\n", {}, "holds a header and no values"),
    "encoding": (HOURS.encode() + b"2024-01-01 03:00,\xe4\n", {}, "row 5: byte 0xe4 is not utf-8"),
    "unknown encoding": (HOURS, {"encoding": "utf-99"}, "'utf-99' is not an encoding"),
    "no column": (HOURS, {"value": "load"}, "row 1: no column named 'load' in the header timestamp, value"),
    "two columns": ("timestamp,value,value\n" + 3 * "x,1,2\n", {}, "row 1: several columns named 'value'"),
    "a column too few": (HOURS + "2024-01-01 03:00\n", {}, "row 5: has 1 column, expected 2"),
    "a column too many": (HOURS + "2024-01-01 03:00,1,5\n", {}, "row 5: has 3 columns, expected 2"),
    "sep= alone": ("sep=;\n", {}, "is empty, expected a header and at least one row"),
    "a header of separators": (";;\n", {}, "is empty, expected a header and at least one row"),
    "no name": (
        HOURS.replace("timestamp", ""),
        {},
        r"no column named 'timestamp' in the header \(no name\), value; .*--option timestamp=NAME .*nothing after =",
    ),
    "wide header": (",".join(map(str, range(1000))), {}, "header 0, 1, .*, 19 and 980 more; expected one, or --option"),
    "no series": ("timestamp,value,city\n2024-01-01,1,\n", {"series": "city"}, "row 2: the cell of 'city' is empty"),
    "zero byte": (HOURS + "2024-01-01 03:00,\0\n", {}, r"row 5: .* control character '\\x00'"),
    "utf-8 as latin-1": (HOURS.replace("value", "Größe"), {"encoding": "latin1"}, "is utf-8, expected iso8859-1 as it"),
    "trailing separators": (HOURS.replace("1\n", "1,\n"), {}, "row 2: has 3 columns, expected 2 as in the header"),
    "thousands": (
        "timestamp;value\n2024-01-01;1,002\n",
        {},
        "row 2: '1,002' is not a number.*--option decimal=, reads",
    ),
    "thousand of ten": ("timestamp;value\n2024-01-01;1.02\n", {"decimal": ","}, "row 2: '1.02' is not a number"),
    "a long cell": (HOURS + "2024-01-01 03:00," + "x" * 10**5 + "\n", {}, r"row 5: 'x{40}\.\.\.' is not a number"),
    "a longer cell": (
        HOURS + "2024-01-01 03:00," + "x" * 10**6 + "\n",
        {},
        "row 5: is not a row of a CSV .field larger",
    ),
    "mistyped year": (
        HOURS + "2204-01-01 02:00,1\n",
        {"missing": "interpolate"},
        "row 5: .* steps are missing before 2204-01-01 02:00:00; expected at most 400 to fill",
    ),
    "days of a zone": (
        "timestamp,value\n"
        + "".join(f"2024-{day}:00,1\n" for day in ("03-29T00+01", "03-30T00+01", "03-31T00+01", "04-01T00+02")),
        {},
        "row 5: .* is off the daily steps .*, or leave out the time zone where a step is a day",
    ),
    "off by a part": (
        HOURS.replace(":00,4", ":00.300,4") + "2024-01-01 03:00,1\n2024-01-01 04:00,1\n2024-01-01 05:00,1\n",
        {},
        "row 4: .*02:00:00.300000 is off the hourly steps of the series series, expected equal steps; round the",
    ),
    "no number": (HOURS + "2024-01-01 03:00,cold\n", {}, "row 5: 'cold' is not a number"),
    "decimal comma": ("timestamp;value\n2024-01-01;1,5\n", {}, r"row 2: '1,5' is not a number, expected .* mark '\.'"),
    "infinite": (HOURS + "2024-01-01 03:00,inf\n", {}, "row 5: 'inf' is not a number"),
    "underscore": (HOURS + "2024-01-01 03:00,1_0\n", {}, "row 5: '1_0' is not a number"),
    "missing value": (HOURS + "2024-01-01 03:00,\n", {}, "row 5: the value is missing, .* missing=interpolate"),
    "last missing": (HOURS + "2024-01-01 03:00,\n", {"missing": "interpolate"}, "row 5: the first and the last value"),
    "no timestamp": (HOURS + "soon,1\n", {}, "row 5: 'soon' is not a timestamp, expected ISO 8601"),
    "other format": (HOURS, {"timestamp_format": "%d.%m.%Y"}, "row 2: .* is not a timestamp, expected %d.%m.%Y"),
    "zones differ": (HOURS + "2024-01-01T03:00Z,1\n", {}, "row 5: timestamps are with and without a time zone"),
    "twice": (HOURS + "2024-01-01 02:00,1\n", {}, "row 5: 2024-01-01 02:00:00 is there twice"),
    "out of order": (HOURS + "2023-01-01 02:00,1\n", {}, "row 5: 2023-01-01 02:00:00 comes after 2024-01-01 02:00:00"),
    "gap": (HOURS + "2024-01-01 05:00,1\n", {}, "row 5: 2 hourly steps are missing before 2024-01-01 05:00:00"),
    "off the grid": (HOURS + "2024-01-01 02:30,1\n", {"missing": "interpolate"}, "row 5: .* is off the hourly steps"),
    "two rows": ("timestamp,value\n2024-01-01,1\n2024-01-02,1\n", {}, "has 2 timestamps, expected at least 3"),
    "torn quotes": (
        'timestamp,value\n2024-01-01,"1\n',
        {},
        "row 3: is not a row of a CSV|row 2: is not a row of a CSV",
    ),
    "after a torn cell": (
        'timestamp,note,value\n2024-01-01,"a\nb",1\n2024-01-02,,x\n',
        {},
        "row 4: 'x' is not a number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_in_one_line(write, case):
    """Errors are one line that names the file, the row as an editor counts it, and the cause."""
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
        ({"delimeter": ";"}, "no option 'delimeter' for reading a series; did you mean 'delimiter'?"),
        ({"delimiter": ", "}, "expected one character"),
        ({"missing": "ignore"}, "missing is 'ignore', expected 'error' or 'interpolate'"),
        ({"decimal": ";"}, "decimal is ';', expected '.' or ','"),
        ({"delimiter": ""}, "delimiter is '', expected one character"),
        ({"delimiter": '"'}, "expected one character that separates cells"),
        ({"timestamp_format": "%Q"}, "timestamp_format is '%Q', expected directives of strptime"),
        ({"value": 2023}, "value is 2023, expected a text"),
    ],
)
def test_bad_option_is_refused(options, message):
    """An option that there is not, or of another value, is refused with what there is."""
    with pytest.raises(DataError, match=message):
        Columns.of(options)
