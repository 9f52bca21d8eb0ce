"""Text files of any encoding: read as they were written, or refused in one line that names an encoding which fits."""

from __future__ import annotations

import codecs
import re
from encodings.aliases import aliases

import pytest

from seq2seq.data.errors import DataError
from seq2seq.data.text_file import decode

pytest.importorskip("hypothesis")
from hypothesis import assume, given
from hypothesis import strategies as st

ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "iso8859-1", "iso8859-15", "cp1251")
ENCODINGS += ("koi8-r", "shift_jis", "gb18030", "utf-7")
#: Letters that each of these has is left to what encodes: texts that cannot be written are passed over.
letters = st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\ufeff")
line_ends = st.sampled_from(["\n", "\r\n", "\r", "\r\r\n"])


def encoded(text: str, encoding: str) -> bytes:
    """The bytes of a text, where the encoding has all of its letters and another cannot be taken for it."""
    try:
        raw = text.encode(encoding)
        assume(raw.decode(encoding) == text)
        if encoding.startswith(("cp125", "iso8859")) and not raw.isascii():
            raw.decode("utf-8")
            assume(False)
    except UnicodeEncodeError:
        assume(False)
    except UnicodeDecodeError:
        pass
    return raw


@pytest.mark.parametrize("encoding", ENCODINGS)
@given(data=st.data(), end=line_ends)
def test_a_text_comes_back_from_its_encoding(encoding, data, end):
    """Whatever the encoding and line ends, the lines are those that were written."""
    alphabet = letters if encoding.startswith(("utf", "gb")) else st.sampled_from("az €ßöÿžЖяあ漢„…")
    lines = data.draw(st.lists(st.text(alphabet, max_size=8), min_size=1, max_size=4))
    kept = [line for line in lines if all(part.encode(encoding, "ignore") for part in line)]
    raw = encoded("".join(line + end for line in kept), encoding)
    assert decode(raw, "x", encoding) == "".join(line + "\n" for line in kept)


@pytest.mark.parametrize(
    ("spelling", "encoding"),
    [
        ("1252", "cp1252"), ("cp-1252", "cp1252"), ("CP 1252", "cp1252"), ("windows-1252", "cp1252"),
        ("Win1252", "cp1252"), ("latin1", "latin-1"), ("ISO 8859-1", "latin-1"), ("ISO_8859-15", "iso8859-15"),
        ("UTF8", "utf-8"), ("utf_16_le", "utf-16-le"), ("Shift-JIS", "shift_jis"),
    ],
)  # fmt: skip
def test_an_encoding_is_known_in_any_spelling(spelling, encoding):
    """Case, hyphens, blanks and Windows' own names are the same encoding."""
    text = "あ" if encoding == "shift_jis" else "öß"
    assert decode(text.encode(encoding), "x", spelling) == text


@pytest.mark.parametrize(
    "name", ["utf-99", "", "base64", "rot13", "zlib", "a\0b", "größe", "undefined", "idna", "unicode_escape"]
)
def test_an_unknown_encoding_is_refused(name):
    """A name that is no encoding of texts is refused by name."""
    with pytest.raises(DataError, match=rf"{re.escape(repr(name))} is not an encoding of texts that Python knows"):
        decode(b"abc\n", "x", name)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE])
def test_a_byte_order_mark_outweighs_what_is_named(mark):
    """It says which UTF a text is; that it is no UTF is a contradiction."""
    name = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_BE: "utf-16-be", codecs.BOM_UTF32_LE: "utf-32-le"}
    raw = mark + "Größe\n".encode(name.get(mark, "utf-16-le"))
    assert decode(raw, "x") == decode(raw, "x", "utf-16-le") == "Größe\n"
    with pytest.raises(DataError, match=r"starts with the byte order mark of utf-\d+, expected cp1252; leave the enc"):
        decode(raw, "x", "cp1252")


def test_files_that_were_joined_have_no_marks_within():
    """A mark at the start of a line is no letter."""
    assert decode("\ufeffa\n\ufeffb\n".encode(), "x") == "a\nb\n"


#: Bytes, the encoding that is named, and what the one line says.
REFUSED = {
    "latin-1": (b"a\nGr\xf6\xdfe\n", "utf-8", r"row 2: byte 0xf6 .* as --option encoding=latin-1, which reads 'Größe'"),
    "windows": (b"a\r5 \x80\r", "utf-8", r"row 2: byte 0x80 .* as --option encoding=cp1252, which reads '5 €'"),
    "neither": (b"\x81\x80\n", "utf-8", r"row 1: byte 0x81 .*, or name its encoding with --option encoding=NAME$"),
    "windows read as latin-1": (
        b"5 \x80\n",
        "latin1",
        r"the control character '\\x80': .*encoding=cp1252, which reads",
    ),
    "utf-8 read as windows": ("Größe\n".encode(), "1252", "is utf-8, expected cp1252 as it was named; leave the enc"),
    "utf-8 read as ascii": (
        "Größe\n".encode(),
        "ascii",
        r"byte 0xc3 is not ascii: .* encoding=utf-8, which reads 'Grö",
    ),
    "little end": ("a,b\n1,2\n".encode("utf-16-le"), "utf-8", "as --option encoding=utf-16-le, which reads 'a,b'"),
    "big end": ("a,b\n1,2\n".encode("utf-16-be"), "utf-8", "as --option encoding=utf-16-be, which reads 'a,b'"),
    "big end, no ascii": ("aö\n".encode("utf-16-be"), "utf-8", "as --option encoding=utf-16-be, which reads 'aö'"),
    "either end": ("a\n".encode("utf-16-be"), "utf-16", "has no byte order mark, .* name utf-16-le or utf-16-be"),
    "marked and cut": (b"\xff\xfea\0b", "utf-8", "byte 0x62 is not utf-16: its byte order mark says that it is; save"),
    "marked and mixed": (
        b"\xef\xbb\xbf\xe4\n",
        "utf-8",
        "byte 0xe4 is not utf-8: its byte order mark says that it is;",
    ),
    "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0", "utf-8", r"row 1: byte 0x89 is not utf-8: expected a text file$"),
    "a zero": (b"a\0b\n", "utf-8", r"row 1: .* control character '\\x00': expected a text file$"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bytes_of_another_encoding_are_refused(case):
    """The line names row and cause, and an encoding only where the bytes are text in it, with what they read."""
    raw, encoding, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        decode(raw, "x", encoding)
    assert "\n" not in str(caught.value)
    found = re.search("--option encoding=([a-z0-9-]+)", str(caught.value))
    assert found is None or decode(raw, "x", found[1])


@given(st.binary(max_size=40), st.sampled_from(sorted({*ENCODINGS, *aliases.values(), "idna", "utf-8"})))
def test_any_bytes_are_a_text_or_one_line(raw, encoding):
    """Nothing else is raised, and the encoding that a line names reads the bytes."""
    try:
        text = decode(raw, "x", encoding)
    except DataError as error:
        message = str(error)
        found = re.search("--option encoding=([a-z0-9-]+)", message)
        text = decode(raw, "x", found[1]) if found else ""
    else:
        message = ""
    assert "\n" not in message
    assert "\r" not in text
