"""The mark: whatever the names, the last one written is the one that is read."""

from __future__ import annotations

import os
import tempfile

from hypothesis import given
from hypothesis import strategies as st

from bench.timing import turn_mark as mark


@given(st.lists(st.text(max_size=300), min_size=1, max_size=4))
def test_the_last_name_is_read(names):
    """Longer and shorter ones in turn, beyond 100 bytes, with line ends and whatever else a label may hold."""
    with tempfile.TemporaryFile() as file:
        for name in names:
            mark.write(file.fileno(), name)
            assert mark.read(os.pread(file.fileno(), 10_000, 0)) == name


def test_a_mark_that_was_never_set_is_nobody_s():
    """A process that dies before its first turn leaves the file empty."""
    assert not mark.read(b"")
