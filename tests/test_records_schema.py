"""The schema: what a record is, is what its columns say, and the dictionary of columns is made from it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from bench.records import quality, ranks, schema, serving
from bench.records.schema import (
    COLUMNS,
    ENERGY_COLUMNS,
    ROUND_COLUMNS,
    SAMPLE_COLUMNS,
    SCHEMA_VERSION,
    Record,
    Status,
    dictionary,
)

PAGE = Path(__file__).parent.parent / "results" / "columns.md"


def test_a_record_s_columns_are_its_fields_in_order():
    """Names and order are those of the dataclass, each once."""
    assert tuple(Record().as_dict()) == COLUMNS == tuple(f.name for f in dataclasses.fields(Record))
    assert len(set(COLUMNS)) == len(COLUMNS)


def test_every_column_has_a_meaning_and_a_default():
    """A record can be made of what is known, and the dictionary says what every cell is."""
    for field in dataclasses.fields(Record):
        assert field.metadata["meaning"].strip()
        assert field.default is not dataclasses.MISSING


def test_units_are_in_the_names():
    """Seconds and bytes are told in the meaning of every column whose name ends with them."""
    for field in dataclasses.fields(Record):
        if re.search(r"(?<!_per)_s$", field.name):
            assert "seconds" in field.metadata["meaning"] or "time" in field.metadata["meaning"], field.name
        if field.name.endswith("_bytes"):
            assert "bytes" in field.metadata["meaning"], field.name


def test_nothing_measured_is_empty_never_zero():
    """Figures that nobody measured are None."""
    plain = Record()
    for field in dataclasses.fields(Record):
        if "None" in str(field.type):
            assert getattr(plain, field.name) is None, field.name


def test_a_record_is_plain_json():
    """A record survives JSON, its status as the word that the schema lists."""
    record = Record(workload="seed", status=Status.PARITY_FAILED, interval_wide=True, speedup=2.5)
    again = json.loads(json.dumps(record.as_dict()))
    assert again["status"] == "parity-failed"
    assert Record(**again) == record


def test_the_schema_lists_every_status():
    """The column's meaning names all of them."""
    meaning = next(f.metadata["meaning"] for f in dataclasses.fields(Record) if f.name == "status")
    assert re.findall(r"`([a-z-]+)`", meaning) == [status.value for status in Status]


def test_a_record_says_which_schema_it_is_of():
    """The version is in every row."""
    assert Record().as_dict()["schema_version"] == SCHEMA_VERSION


def test_the_dictionary_holds_every_column_of_every_file_once():
    """One row per column, in order, with its meaning."""
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", dictionary(), re.MULTILINE)
    assert [name for name, _ in rows] == [*COLUMNS, *SAMPLE_COLUMNS, *ROUND_COLUMNS, *ENERGY_COLUMNS]
    assert all(meaning.strip() for _, meaning in rows)


#: The unit that a meaning names, by the end of a column's name.
UNITS = {"_s": "second", "_bytes": "bytes", "_j": "joules", "_w": "in watts", "_mb": "in MB", "_mhz": "in MHz"}


@pytest.mark.parametrize("module", [schema, serving, ranks, quality], ids=lambda module: module.__name__)
def test_every_meaning_is_a_sentence_and_names_its_unit(module):
    """A sentence begins with a capital and ends with a full stop; a time says seconds, an energy joules, and so on."""
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", module.dictionary(), re.MULTILINE)
    assert rows
    for name, meaning in rows:
        assert re.fullmatch(r"[A-Z1`].+\.", meaning), name
        unit = next((unit for end, unit in UNITS.items() if name.endswith(end)), None)
        if unit and not meaning.startswith("As in ") and not name.endswith("_per_s"):
            assert unit in meaning, name


def test_the_printed_dictionary_is_the_schema_s():
    """results/columns.md describes the columns as the code does."""
    page = PAGE.read_text(encoding="utf-8")
    assert dictionary().strip() in page
    assert f"Schema version {SCHEMA_VERSION}." in page
