"""Raw values: whatever byte a process was killed at, what was whole before stays, and nothing else."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import UsageError
from bench.records.raw_csv import RawFile

FILE = RawFile("values.csv.gz", ("name", "number", "value"), ("name",))
WORDS = st.text('ab,"\n é', max_size=5)
APPENDS = st.lists(st.lists(st.tuples(WORDS, st.integers(0, 9), WORDS), min_size=1, max_size=4), min_size=1, max_size=4)


def rows_of(path: Path) -> list[tuple[str, ...]]:
    """All rows, the header first, as any reader of gzip and CSV sees them."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return [tuple(row) for row in csv.reader(file)]


@given(APPENDS, st.data())
def test_a_kill_at_any_byte_costs_the_last_append_alone(appends, data):
    """Cut anywhere inside the last append, the file mended holds the appends before it, and takes more."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE.name
        for rows in appends[:-1]:
            FILE.append(Path(folder), rows)
        before = path.stat().st_size if path.exists() else 0
        FILE.append(Path(folder), appends[-1])
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(before, len(whole) - 1))])
        assert FILE.mend(Path(folder), lambda _: True) == 0
        kept = [tuple(map(str, row)) for rows in appends[:-1] for row in rows]
        assert rows_of(path) == [FILE.columns, *kept]
        FILE.append(Path(folder), [("more", 1, "x")])
        assert rows_of(path) == [FILE.columns, *kept, ("more", "1", "x")]


@given(APPENDS, st.sets(WORDS))
def test_rows_of_no_record_are_taken_out_and_counted(appends, known):
    """Only rows whose key is known stay, in their order; a second mending finds nothing to do."""
    with tempfile.TemporaryDirectory() as folder:
        for rows in appends:
            FILE.append(Path(folder), rows)
        everything = [tuple(map(str, row)) for rows in appends for row in rows]
        kept = [row for row in everything if row[0] in known]
        assert FILE.mend(Path(folder), lambda key: key[0] in known) == len(everything) - len(kept)
        assert rows_of(Path(folder) / FILE.name) == [FILE.columns, *kept]
        written = (Path(folder) / FILE.name).read_bytes()
        assert FILE.mend(Path(folder), lambda key: key[0] in known) == 0
        assert (Path(folder) / FILE.name).read_bytes() == written
        assert FILE.lacks(Path(folder), [(name,) for name in known]) == {(n,) for n in known} - {(r[0],) for r in kept}


def test_a_file_that_is_not_there_lacks_everything_and_needs_no_mending(tmp_path):
    """A run that was killed before its first samples."""
    assert FILE.mend(tmp_path, lambda _: True) == 0
    assert FILE.lacks(tmp_path, [("a",)]) == {("a",)}
    assert not list(tmp_path.iterdir())


def test_a_file_of_other_columns_is_refused_and_left_alone(tmp_path):
    """Rows of another release must not be read by place."""
    text = io.StringIO("name,value\na,1\n").read().encode()
    (tmp_path / FILE.name).write_bytes(gzip.compress(text))
    with pytest.raises(UsageError, match="other columns"):
        FILE.mend(tmp_path, lambda _: True)
    assert gzip.decompress((tmp_path / FILE.name).read_bytes()) == text


@pytest.mark.parametrize("cut", [b"a,1", b"a,1,x,y"], ids=["short", "long"])
@pytest.mark.parametrize("use", ["rows", "mend", "lacks"])
def test_a_row_of_other_cells_is_refused_with_its_line(tmp_path, use, cut):
    """A row that was edited by hand has no place in a table, whoever reads it; the file stays as it is."""
    FILE.append(tmp_path, [["a", "1", "x"]])
    path = tmp_path / FILE.name
    path.write_bytes(path.read_bytes() + gzip.compress(b"b,2,x\n" + cut + b"\n"))
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"line 4 has \d cells?, expected 3; put back the file"):
        list(getattr(FILE, use)(tmp_path, *{"rows": (), "mend": (bool,), "lacks": ([("z",)],)}[use]))
    assert path.read_bytes() == before


@pytest.mark.parametrize("use", ["rows", "mend", "lacks"])
def test_bytes_that_are_no_text_are_refused(tmp_path, use):
    """A damaged file is one line, also when the run is resumed."""
    FILE.append(tmp_path, [["a", "1", "x"]])
    path = tmp_path / FILE.name
    path.write_bytes(path.read_bytes() + gzip.compress(b"\xff,2,x\n"))
    with pytest.raises(UsageError, match=r"cannot be read \(.*; put back the file"):
        list(getattr(FILE, use)(tmp_path, *{"rows": (), "mend": (bool,), "lacks": ([("z",)],)}[use]))
