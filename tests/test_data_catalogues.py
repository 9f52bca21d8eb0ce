"""Message catalogues: what was translated and nothing else, each pair once, and Django's own are read whole."""

from __future__ import annotations

import struct
import sys

import pytest

from seq2seq.data import catalogues
from seq2seq.data.catalogues import catalogue_pairs, read_catalogue
from seq2seq.data.errors import DataError, DataUnavailableError
from seq2seq.data.text_file import composed

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

HEADER = ("", "Content-Type: text/plain; charset=UTF-8\n")


def write_catalogue(path, entries, order="<"):
    """A .mo file of (key, value) entries, as msgfmt lays it out."""
    encoded = [(key.encode(), value.encode()) for key, value in entries]
    tables, texts, offset = [b"", b""], b"", 28 + 16 * len(encoded)
    for side in (0, 1):
        for entry in encoded:
            tables[side] += struct.pack(f"{order}2I", len(entry[side]), offset + len(texts))
            texts += entry[side] + b"\0"
    header = struct.pack(f"{order}7I", 0x950412DE, 0, len(encoded), 28, 28 + 8 * len(encoded), 0, 0)
    path.write_bytes(header + tables[0] + tables[1] + texts)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a property."""
    return tmp_path_factory.mktemp("catalogues")


#: In the normal form that texts are read in.
words = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=9).map(composed)


@given(pairs=st.lists(st.tuples(words, words), max_size=5), order=st.sampled_from("<>"))
def test_messages_are_read_in_either_byte_order(folder, pairs, order):
    """Written messages come back in order, without the header."""
    assert read_catalogue(write_catalogue(folder / "some.mo", [HEADER, *pairs], order)) == pairs


def test_plurals_give_singular_and_last_form(tmp_path):
    """A plural is two pairs; of several forms the last is that of large numbers."""
    path = write_catalogue(tmp_path / "some.mo", [("%d day\0%d days", "%d jour\0%d de jours\0%d jours")])
    assert read_catalogue(path) == [("%d day", "%d jour"), ("%d days", "%d jours")]


def test_contexts_are_taken_off(tmp_path):
    """The context that distinguishes equal messages for programmers is no part of the message."""
    path = write_catalogue(tmp_path / "some.mo", [("alt. month\x04May", "Mai")])
    assert read_catalogue(path) == [("May", "Mai")]


def test_messages_are_brought_to_one_line(tmp_path):
    """Line ends become spaces; placeholders and no-break spaces stay."""
    path = write_catalogue(tmp_path / "some.mo", [("\n  Delete\n%(name)s?\n", "Supprimer\n%(name)s\u00a0?")])
    assert read_catalogue(path) == [("Delete %(name)s?", "Supprimer %(name)s\u00a0?")]


def test_untranslated_messages_are_left_out(tmp_path):
    path = write_catalogue(tmp_path / "some.mo", [("Yes", "Ja"), ("No", ""), ("%d day\0%d days", "%d Tag\0")])
    assert read_catalogue(path) == [("Yes", "Ja"), ("%d day", "%d Tag")]


def test_other_files_are_refused(tmp_path):
    """An empty file, one of another kind, one cut short and one of another encoding are refused in one line."""
    whole = write_catalogue(tmp_path / "whole.mo", [("Yes", "Ja")]).read_bytes()
    latin = whole.replace(b"Ja", b"J\xe4")
    for content in (b"", b"\x00" * 40, whole[:26], whole[:-2], latin):
        path = tmp_path / "other.mo"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"^[^\n]*other.mo: not a message catalogue \([^\n]*$"):
            read_catalogue(path)


@pytest.mark.parametrize("language", catalogues.LANGUAGES)
def test_django_has_hundreds_of_pairs(language):
    """The package holds about as many pairs as was counted in its source, each once, none empty, on one line each."""
    pytest.importorskip("django")
    pairs = catalogue_pairs(language)
    assert len(pairs) > 700
    assert len(set(pairs)) == len(pairs)
    assert all(text.strip() == text != "" and "\n" not in text and "\0" not in text for pair in pairs for text in pair)
    assert ("Monday", {"de": "Montag", "fr": "lundi"}[language]) in pairs
    assert any("%(name)s" in source and "%(name)s" in target for source, target in pairs)
    assert not any("\x04" in source for source, _ in pairs)


@pytest.fixture
def fresh_pairs():
    """Catalogues are read anew within the test, and again after it."""
    catalogue_pairs.cache_clear()
    yield
    catalogue_pairs.cache_clear()


@pytest.mark.usefixtures("fresh_pairs")
def test_django_is_not_imported(monkeypatch):
    """Reading its catalogues does not run the framework, which would want settings."""
    pytest.importorskip("django", reason="the package is what is read")
    for name in [name for name in sys.modules if name.partition(".")[0] == "django"]:
        monkeypatch.delitem(sys.modules, name)
    catalogue_pairs("de")
    assert "django" not in sys.modules


@pytest.mark.usefixtures("fresh_pairs")
def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(catalogues.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataUnavailableError, match="Django, which is not installed: pip install Django"):
        catalogue_pairs("de")


def test_unknown_language_is_refused():
    pytest.importorskip("django")
    with pytest.raises(DataUnavailableError, match="no catalogues of the language 'xx', expected one of de, fr"):
        catalogue_pairs("xx")
