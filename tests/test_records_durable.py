"""Writing that survives: whole or not at all, and never two writers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.records import durable

resource = pytest.importorskip("resource")
ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from pathlib import Path
from bench.records import durable
with durable.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def small_files(size: int):
    """Let the system refuse whatever makes a file longer, after it took what fits; the tests' own output too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_append_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    """The system takes a part first; no torn end is left, and the error names the file."""
    path = tmp_path / "records.jsonl"
    durable.append(path, b"first\n")
    with pytest.raises(OSError, match="too large") as error, small_files(10):
        durable.append(path, b"second\n" * 10)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"first\n"


def test_a_new_file_that_does_not_fit_is_not_there(tmp_path):
    """An empty file would be something else than none."""
    with pytest.raises(OSError, match="too large"), small_files(3):
        durable.append(tmp_path / "samples.csv.gz", b"four")
    assert not list(tmp_path.iterdir())


def test_a_replacement_that_does_not_fit_leaves_the_old_file(tmp_path):
    """All of the old one, and nothing beside it."""
    path = tmp_path / "records.csv"
    durable.replace(path, b"old")
    with pytest.raises(OSError, match="too large") as error, small_files(10):
        durable.replace(path, b"n" * 100)
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replacement_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    """Renamed first and written through later, a power cut could leave an empty file in the old one's place."""
    seen = []
    sync = os.fsync

    def watched(handle: int) -> None:
        seen.append(((tmp_path / "a").exists(), os.fstat(handle).st_size))
        sync(handle)

    monkeypatch.setattr(durable.os, "fsync", watched)
    durable.replace(tmp_path / "a", b"12345")
    assert seen[0] == (False, 5)
    assert [there for there, _ in seen] == [False, True]


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    """In one line, at once; and a holder that was killed blocks nobody."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError) as error, durable.locked(tmp_path):
            pytest.fail("two writers")
        assert f"{tmp_path} is being written by process {holder.pid}" in str(error.value)
        assert "\n" not in str(error.value)
        holder.kill()
        holder.wait()
    with durable.locked(tmp_path):
        assert (tmp_path / durable.LOCK).read_text() == f"{os.getpid()}\n"


def test_a_lock_is_free_after_use(tmp_path):
    """Also when what was done under it failed."""
    with pytest.raises(RuntimeError), durable.locked(tmp_path):
        raise RuntimeError
    with durable.locked(tmp_path):
        pass
