"""Subwords: any text comes back as it was, equal texts give equal vocabularies, and special tokens stay special."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from seq2seq.data.errors import DataUnavailableError
from seq2seq.data.tokens import BEGIN, END, PAD, SMALLEST_VOCABULARY, SPECIAL, UNKNOWN, Subwords

pytest.importorskip("hypothesis")
pytest.importorskip("tokenizers")
from hypothesis import given
from hypothesis import strategies as st

TEXTS = ["the small bank of Graz", "the small ferry", "die kleine Fähre", "the bank", "%(name)s of the bank"] * 3
SUBWORDS = Subwords.train(TEXTS, 300)

#: Any text that UTF-8 can encode, the names of special tokens among it.
texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(SPECIAL), max_size=6).map("".join)


@given(texts)
def test_text_comes_back_as_it_was(text):
    """Whatever the characters, decoding the tokens of a text gives the text, blanks included."""
    assert SUBWORDS.decode(SUBWORDS.encode(text)) == text


@given(texts)
def test_text_has_no_special_tokens(text):
    """No text is encoded to a special token, not even their names; all tokens are in the vocabulary."""
    tokens = SUBWORDS.encode(text)
    assert all(len(SPECIAL) <= token < SUBWORDS.size for token in tokens)


@given(texts)
def test_vocabulary_survives_json(text):
    """A vocabulary that was written and read again encodes like the first, special names included."""
    read = Subwords.from_json(SUBWORDS.to_json())
    assert read.size == SUBWORDS.size
    assert read.encode(text) == SUBWORDS.encode(text)


def test_special_tokens_have_their_ids():
    """The ids are those that every task counts on, and decoding leaves them out."""
    assert (PAD, UNKNOWN, BEGIN, END) == (0, 1, 2, 3)
    tokens = SUBWORDS.encode("bank")
    assert SUBWORDS.decode([BEGIN, *tokens, UNKNOWN, END, PAD]) == "bank"


def test_half_a_character_is_replaced():
    """Bytes that form no character, as a model may write them, come out as U+FFFD instead of raising."""
    assert SUBWORDS.decode(SUBWORDS.encode("\U0001f600")[:2]).startswith("�")


def test_frequent_pieces_become_one_token():
    """Learning shortens what comes often, and never goes beyond the vocabulary asked for."""
    assert len(SUBWORDS.encode("the small bank")) < len("the small bank") / 2
    assert SUBWORDS.size <= 300
    assert Subwords.train(TEXTS, SMALLEST_VOCABULARY).size == SMALLEST_VOCABULARY


def test_other_processes_learn_the_same():
    """The vocabulary does not depend on the hash seed or the threads of the process that learns it."""
    program = (
        "from seq2seq.data.tokens import Subwords; "
        f"print(Subwords.train({TEXTS!r}, 300).to_json() == {SUBWORDS.to_json()!r})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


def test_vocabulary_without_room_for_bytes_is_refused():
    with pytest.raises(ValueError, match="vocabulary is 259, expected at least 260"):
        Subwords.train(TEXTS, SMALLEST_VOCABULARY - 1)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": "1.0"}'])
def test_other_json_is_refused(text):
    """A value that is no vocabulary is refused with what was expected."""
    with pytest.raises(ValueError, match=r"not a vocabulary \(.*\), expected what Subwords.to_json wrote"):
        Subwords.from_json(text)


def test_vocabulary_with_other_special_tokens_is_refused():
    """A vocabulary whose special tokens have other ids would end texts at the wrong token."""
    with pytest.raises(ValueError, match=r"have the ids \[0, 1, 3, 2\], expected 0 to 3"):
        Subwords.from_json(
            SUBWORDS.to_json().replace("<begin>", "<x>").replace("<end>", "<begin>").replace("<x>", "<end>")
        )


def test_missing_package_says_what_to_install(monkeypatch):
    """Without tokenizers, learning and reading a vocabulary say what to install."""
    text = SUBWORDS.to_json()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: Subwords.train(TEXTS, 300), lambda: Subwords.from_json(text)):
        with pytest.raises(DataUnavailableError, match=r"tokenizers, which is not installed: pip install tokenizers"):
            call()
