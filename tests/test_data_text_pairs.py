"""Files of pairs: what is read is what was written, and a bad file is named with row, cause and what was expected."""

from __future__ import annotations

import inspect
import json
import re
import unicodedata

import pytest

from seq2seq.data.errors import DataError
from seq2seq.data.text_file import ENCODING
from seq2seq.data.text_pairs import read_jsonl, read_pairs, read_tsv, tidy
from seq2seq.tasks import summarization, translation

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

KEYS = ("document", "summary")
GOOD = b'{"document": "d", "summary": "s"}'
#: What is in a TSV, the row that is named (None: the file), and a part of the message.
BAD_TSV = {
    "empty": (b"", None, "is empty, expected at least one row"),
    "byte order mark alone": (b"\xef\xbb\xbf", None, "is empty, expected at least one row"),
    "blank": (b"\n\n", None, "is empty, expected at least one row"),
    "latin-1": (b"a\tb\nb\xe4r\tc\n", 2, "byte 0xe4 is not utf-8"),
    "utf-16 without a mark": ("a\tb\n".encode("utf-16-le"), 1, "as --option encoding=utf-16-le, which reads 'a\\tb'"),
    "column too few": (b"a\tb\nc\n", 2, "1 column, expected source<TAB>target"),
    "column too many": (b"a\tb\tc\n", 1, "3 columns, expected source<TAB>target"),
    "empty source": (b"a\tb\nc\td\n\te\n", 3, "the source is empty, expected text on both sides"),
    "empty target": (b"a\t \n", 1, "the target is empty, expected text on both sides"),
    "no-break space alone": ("a\t\u00a0\n".encode(), 1, "the target is empty, expected text on both sides"),
    "empty line": (b"a\tb\n\nc\td\n", 2, "1 column, expected source<TAB>target"),
}
OBJECT = 'expected an object {"document": "...", "summary": "..."}'
BAD_JSONL = {
    "empty": (b"", None, "is empty, expected at least one row"),
    "latin-1": (b'{"document": "\xe4", "summary": "s"}', 1, "byte 0xe4 is not utf-8"),
    "not JSON": (GOOD + b'\n{"document": \n', 2, "not JSON ("),
    "two lines of one object": (b'{\n"document": "d", "summary": "s"}\n', 1, OBJECT),
    "list": (b'["d", "s"]', 1, f"a JSON array, {OBJECT}"),
    "number": (b"1", 1, f"a JSON number, {OBJECT}"),
    "null": (b"null", 1, f"a JSON null, {OBJECT}"),
    "too long a number": (b"1" * 5000, 1, "not JSON ("),
    "nested too deeply": (b"[" * 100_000, 1, "not JSON ("),
    "key missing": (GOOD + b'\n{"document": "d"}', 2, f"no key 'summary', {OBJECT}"),
    "no text": (b'{"document": ["d"], "summary": "s"}', 1, "'document' is a JSON array, expected a string"),
    "empty summary": (b'{"document": "d", "summary": ""}', 1, "the summary is empty, expected text on both sides"),
    "half a character": (b'{"document": "d", "summary": "\\ud83d"}', 1, "'summary' holds half a surrogate pair"),
}

#: A text as a file may hold it: characters of any script, on one line, no tab.
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\t\r\n\ufeff"), min_size=1, max_size=20).map(tidy)
pairs = st.lists(st.tuples(*[texts.filter(str.strip)] * 2), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("pairs")


def assert_one_line(error: pytest.ExceptionInfo[DataError], path, row, part) -> None:
    """The message is one line that starts with file and row and holds the cause."""
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: " if row is None else f"{path}, row {row}: ")
    assert part in message
    assert re.search("expected|save the file", message)


@given(pairs)
def test_tsv_gives_the_pairs_it_holds(folder, expected):
    """Pairs come back in order; Unicode's own line ends and no-break spaces are text."""
    path = folder / "pairs.tsv"
    path.write_bytes("".join(f"{source}\t{target}\n" for source, target in expected).encode())
    assert read_tsv(path) == expected


@given(pairs, st.booleans())
def test_jsonl_gives_the_pairs_it_holds(folder, expected, ascii_only):
    """Pairs come back in order, whether characters are spelt out or not; other keys are passed over."""
    path = folder / "pairs.jsonl"
    rows = [{"id": 1, "document": source, "summary": target} for source, target in expected]
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows).encode())
    assert read_jsonl(path, KEYS) == expected


@pytest.mark.parametrize("name", BAD_TSV)
def test_bad_tsv_is_named(tmp_path, name):
    """Each kind of bad TSV is refused in one line of file, row, cause and what was expected."""
    content, row, part = BAD_TSV[name]
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_tsv(path)
    assert_one_line(error, path, row, part)


@pytest.mark.parametrize("name", BAD_JSONL)
def test_bad_jsonl_is_named(tmp_path, name):
    """Each kind of bad JSON lines is refused in one line of file, row, cause and what was expected."""
    content, row, part = BAD_JSONL[name]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_jsonl(path, KEYS)
    assert_one_line(error, path, row, part)


@pytest.mark.parametrize("name", ["absent.tsv", "."])
def test_what_cannot_be_read_is_named(tmp_path, name):
    """A missing file and a folder are refused with the system's reason."""
    path = tmp_path / name
    with pytest.raises(DataError) as error:
        read_pairs(path, KEYS)
    assert_one_line(error, path, None, "cannot be read: ")


def test_windows_files_are_read(tmp_path):
    """A byte order mark and carriage returns are not part of the texts."""
    path = tmp_path / "windows.tsv"
    path.write_bytes(b"\xef\xbb\xbfa\tb\r\nc\td\r\n")
    assert read_tsv(path) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("suffix", [".jsonl", ".JSONL", ".ndjson", ".json"])
def test_suffix_decides_the_form(tmp_path, suffix):
    """JSON lines are known by their suffix; anything else is TSV, whose message has the columns' names."""
    path = tmp_path / f"file{suffix}"
    path.write_bytes(GOOD)
    assert read_pairs(path, KEYS) == [("d", "s")]
    with pytest.raises(DataError, match="1 column, expected document<TAB>summary"):
        read_pairs(path.rename(tmp_path / "file.txt"), KEYS)


def test_texts_are_brought_to_one_line(tmp_path):
    """Line ends and runs of blanks within a text become one space; a no-break space stays."""
    path = tmp_path / "lines.jsonl"
    path.write_text(json.dumps({"document": " a\n\tb  c\r\n", "summary": "d\u00a0: e"}), encoding="utf-8")
    assert read_jsonl(path, KEYS) == [("a b c", "d\u00a0: e")]


@pytest.mark.parametrize(("encoding", "hint"), [("latin-1", "latin-1"), ("cp1252", "latin-1"), ("cp1250", "cp1252")])
@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.jsonl"])
def test_a_file_of_another_encoding_is_read_when_it_is_named(name, encoding, hint, tmp_path):
    """The error says how, in a way that the texts' tasks take."""
    path = tmp_path / name
    rows = (
        ["é\tü", "a\tb"]
        if name.endswith("tsv")
        else ['{"document": "é", "summary": "ü"}', '{"document": "a", "summary": "b"}']
    )
    more = {"cp1250": "ž"}.get(encoding, "")
    path.write_bytes("\n".join(rows).replace("é", "é" + more).encode(encoding))
    with pytest.raises(DataError, match=rf"row 1: byte 0x\w\w is not utf-8: .*, as --option encoding={hint}, which"):
        read_pairs(path, KEYS)
    assert read_pairs(path, KEYS, encoding) == [("é" + more, "ü"), ("a", "b")]
    for task in (translation, summarization):
        assert inspect.signature(task.load).parameters["encoding"].default == ENCODING


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.jsonl"])
def test_marks_and_line_ends_are_no_text(name, encoding, end, tmp_path):
    """Whatever byte order mark and line ends a system writes, the pairs are the same."""
    path = tmp_path / name
    rows = ["é\tb", "c\td"] if name.endswith("tsv") else ['{"d": "é", "s": "b"}', '{"d": "c", "s": "d"}']
    path.write_bytes("".join(row + end for row in rows).encode(encoding))
    assert read_pairs(path, ("d", "s")) == [("é", "b"), ("c", "d")]


def test_texts_and_keys_of_either_normal_form_are_the_same(tmp_path):
    """An accent that stands apart joins its letter: pairs, and names of the columns, do not depend on the system."""
    path = tmp_path / "pairs.jsonl"
    apart = unicodedata.normalize("NFD", "Größe")
    path.write_text(json.dumps({apart: apart, "t": "x"}), encoding="utf-8")
    assert read_jsonl(path, ("Größe", "t")) == read_jsonl(path, (apart, "t")) == [("Größe", "x")]
