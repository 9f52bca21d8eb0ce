"""Cells: a number or timestamp means one thing, the one that was written, or it is refused with what was expected."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from seq2seq.data.cells import EPOCH_UNITS, check_format, read_number, read_timestamp

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

#: What stands between thousands, and the decimal mark, as languages have them; and the marks that read them.
STYLES = [
    (",", ".", "."), (".", ",", ","), (" ", ",", ","), ("\u00a0", ",", ","), ("\u202f", ",", ","), ("'", ".", "."),
    ("\u2019", ".", "."), (" ", ".", None), ("'", ".", None), ("", ".", None), ("", ".", "."), ("", ",", ","),
]  # fmt: skip
moments = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30))  # noqa: DTZ001 - as files have them


@pytest.mark.parametrize(("apart", "mark", "decimal"), STYLES)
@given(value=st.decimals(-(10**9), 10**9, places=3) | st.integers(-(10**9), 10**9))
def test_a_number_is_read_as_it_was_written(apart, mark, decimal, value):
    """Whatever stands between thousands and before decimals, none is ever a thousandth or a thousandfold."""
    text = f"{value:,}".translate({ord(","): apart, ord("."): mark})
    assert read_number(text, decimal) == float(value)


@pytest.mark.parametrize(
    ("cell", "decimal", "value"),
    [
        ("1.002", None, 1.002), ("1.002", ".", 1.002), ("1.002", ",", 1002), ("1,002", ",", 1.002),
        ("1,002", ".", 1002),
        ("1.234.567", ",", 1234567), ("1 002,5", ",", 1002.5), ("1e3", None, 1000), ("1,5e-1", ",", 0.15),
        (".5", None, 0.5),
        ("5.", None, 5), ("+5", None, 5), ("\u22125", None, -5), ("0.500", None, 0.5), ("1002.5", ".", 1002.5),
    ],
)  # fmt: skip
def test_marks_mean_what_the_option_says(cell, decimal, value):
    """A point is the decimal mark unless a comma is; then it stands between thousands."""
    assert read_number(cell, decimal) == value


@pytest.mark.parametrize(
    ("cell", "decimal"),
    [
        ("1,002", None), ("1,5", None), ("1,002.5", None), ("1,5", "."), ("1.5", ","), ("0.500", ","), ("12.34", ","),
        ("1.0025", ","), ("1,00,000", "."), ("1.002.5", ","), ("1 002 5", None), ("1 002.003", ","), ("1'002,003", "."),
        ("1,002,", ","), ("1.5e3", ","), ("inf", None), ("-inf", None), ("1e999", None), ("1_000", None),
        ("0x1f", None),
        ("5 %", None), ("€ 5", None), ("(5)", None), ("5-", None), ("--5", None), ("1 2", None), ("", None),
        ("9" * 400, None),
    ],
)  # fmt: skip
def test_what_could_mean_something_else_is_no_number(cell, decimal):
    """Groups that are not of three, marks that are not the option's, and whatever is no finite number."""
    with pytest.raises(
        ValueError, match=f"is not a number, expected one with decimal mark '[{decimal or '.'}]'"
    ) as caught:
        read_number(cell, decimal)
    assert ("decimal=," in str(caught.value)) == (decimal is None and "," in cell)
    assert len(str(caught.value)) < 200


@given(moments, st.sampled_from(["T", " "]), st.sampled_from(["auto", "microseconds", "nanoseconds"]))
def test_a_timestamp_is_read_to_the_microsecond(moment, separator, precision):
    """As pandas and databases write it; zeros of nanoseconds change nothing."""
    text = moment.isoformat(separator, "microseconds" if precision == "nanoseconds" else precision)
    assert read_timestamp(text + "000" * (precision == "nanoseconds"), None) == moment


@given(moments, st.integers(-14 * 60, 14 * 60))
def test_a_time_zone_is_brought_to_utc(moment, minutes):
    """The moment stays the same, summer and winter."""
    stamp = moment.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    found = read_timestamp(stamp.isoformat(), None)
    assert found == stamp
    assert found.tzinfo == UTC


@pytest.mark.parametrize("unit", EPOCH_UNITS)
@given(moment=st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)))  # noqa: DTZ001
def test_a_number_that_counts_since_1970_is_read_with_its_unit(unit, moment):
    """Whole or with decimals, before 1970 as after."""
    count = (moment.replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    per = EPOCH_UNITS[unit]
    text = f"{count / per:f}" if unit in {"s", "ms"} else str(int(count / per))
    assert read_timestamp(text, unit) == moment.replace(tzinfo=UTC)


@pytest.mark.parametrize(
    "cell",
    ["1704067200", "1704010100000", "1704067200000", "1704010100000000", "1704067200.25", "1.7e9", "20240101123045",
     "-5", "2024-01-01012:00", "20240101012:00", "12", "45292"],
)  # fmt: skip
def test_a_number_is_no_date(cell):
    """Python takes some numbers of milliseconds for a day of the year 1704; the unit has to be named."""
    with pytest.raises(ValueError, match=r"is not a timestamp, .* as --option timestamp_format=s, or ms, us, ns"):
        read_timestamp(cell, None)


@pytest.mark.parametrize(
    ("cell", "form", "message"),
    [
        ("2024-01-01T00:00:00.123456789", None, "finer than a microsecond"),
        ("2024-01-01T00:00:00.1234567+01:00", None, "finer than a microsecond"),
        ("1704067200000000001", "ns", "finer than a microsecond"),
        ("soon", "ms", "'soon' is not a timestamp, expected a number of ms since 1970"),
        ("nan", "s", "is not a timestamp, expected a number of s"),
        ("1e99", "s", "beyond the years 1 to 9999"),
        ("1e999999", "s", "is not a timestamp, expected a number of s"),
        ("0001-01-01T00:00+14:00", None, "beyond the years 1 to 9999"),
        ("31.01.2024", None, "expected ISO 8601 such as 2024-01-31 18:00, or name its timestamp_format$"),
        ("2024-02-30", None, "expected ISO 8601"),
        ("2024-01-31", "%d.%m.%Y", "is not a timestamp, expected %d.%m.%Y"),
        ("x" * 1000, None, r"^'x{40}\.\.\.' is not a timestamp"),
    ],
)
def test_what_is_no_timestamp_is_refused(cell, form, message):
    """With what was expected."""
    with pytest.raises(ValueError, match=message):
        read_timestamp(cell, form)


@pytest.mark.parametrize("form", ["%d.%m.%Y %H:%M", "%Y%m%d%H%M%S", "%Y-%m-%dT%H:%M:%S.%f%z", "s", "ns"])
def test_formats_are_known(form):
    """Those of strptime, and units."""
    check_format(form)


@pytest.mark.parametrize("form", ["%Q", "%-d.%m.%Y", "%d.%m.%"])
def test_a_format_that_cannot_be_is_refused(form):
    """Before any row is blamed."""
    with pytest.raises(ValueError, match=r"timestamp_format is .*, expected directives of strptime"):
        check_format(form)
