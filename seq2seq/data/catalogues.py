"""English messages and their translations, from the compiled catalogues (.mo) that come in Django's wheel.

The compiler that wrote them has left out fuzzy and untranslated messages. Django itself is not imported.
"""

from __future__ import annotations

import functools
import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path

from seq2seq.data.errors import DataError, DataUnavailableError
from seq2seq.data.text_pairs import Pair, tidy

#: Languages of the catalogues that are read, by the name of their folder.
LANGUAGES = {"de": "German", "fr": "French"}

_MAGIC = 0x950412DE
#: Stands between the context and the message in a key, and between the forms of a plural.
_CONTEXT_END, _FORM_END = "\x04", "\0"


@functools.cache
def catalogue_pairs(language: str) -> tuple[Pair, ...]:
    """English messages and their translations, each pair once, in the order of the files and messages.

    A plural gives two pairs: the singular, and the plural with the translation's last form, that of large numbers.
    Placeholders such as %(name)s are text like any other.

    Args:
        language: `de` or `fr`.

    Raises:
        DataUnavailableError: when Django is not installed.
    """
    found = importlib.util.find_spec("django")
    if found is None or not found.submodule_search_locations:
        msg = "the message catalogues come with the package Django, which is not installed: pip install Django"
        raise DataUnavailableError(msg)
    root = Path(found.submodule_search_locations[0])
    files = sorted(root.glob(f"**/locale/{language}/LC_MESSAGES/*.mo"))
    if not files:
        msg = f"{root} holds no catalogues of the language {language!r}, expected one of {', '.join(LANGUAGES)}"
        raise DataUnavailableError(msg)
    return tuple(dict.fromkeys(pair for path in files for pair in read_catalogue(path)))


def read_catalogue(path: Path) -> list[Pair]:
    """Messages and translations of one .mo file; its header and what is not translated are left out.

    Raises:
        DataError: when the file is not a catalogue in UTF-8.
    """
    pairs = []
    try:
        for key, value in _entries(path.read_bytes()):
            if not key:  # the header
                continue
            forms = key.rpartition(_CONTEXT_END)[2].split(_FORM_END)
            translations = value.split(_FORM_END)
            pairs += [(forms[0], translations[0])]
            if len(forms) > 1:
                pairs += [(forms[1], translations[-1])]
    except (struct.error, ValueError) as error:
        msg = f"{path}: not a message catalogue ({error}), expected a .mo file in UTF-8"
        raise DataError(msg) from error
    tidied = ((tidy(source), tidy(target)) for source, target in pairs)
    return [(source, target) for source, target in tidied if source.strip() and target.strip()]


def _entries(content: bytes) -> Iterator[tuple[str, str]]:
    """Keys and values: a header names two tables of (length, offset), one of keys and one of values."""
    order = next((order for order in "<>" if struct.unpack_from(f"{order}I", content)[0] == _MAGIC), None)
    if order is None:
        msg = "its first bytes are others"
        raise ValueError(msg)
    count, keys, values = struct.unpack_from(f"{order}3I", content, 8)
    for place in range(count):
        texts = []
        for table in (keys, values):
            length, offset = struct.unpack_from(f"{order}2I", content, table + 8 * place)
            if offset + length > len(content):
                msg = "it is cut short"
                raise ValueError(msg)
            texts.append(content[offset : offset + length].decode())
        yield texts[0], texts[1]
