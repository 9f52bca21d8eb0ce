"""The high-water mark: a known allocation is what it reads, whatever was higher before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bench.machine import memory

ROOT = Path(__file__).parent.parent
#: Touches so many bytes, and lets them go: a block of that size is mapped and unmapped as a whole.
TOUCH = """
from bench.machine import memory
def touch(size):
    block = bytearray(size)
    for place in range(0, size, 4096):
        block[place] = 1
"""
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux keeps a high-water mark")


def fresh(code: str) -> list[int]:
    """Return what a fresh process prints, as whole numbers."""
    done = subprocess.run([sys.executable, "-c", TOUCH + code], capture_output=True, text=True, check=True, cwd=ROOT)
    return [int(word) for word in done.stdout.split()]


@linux
@pytest.mark.parametrize("earlier", [0, 300_000_000])
def test_a_known_allocation_reads_as_what_it_is(earlier):
    """100 MB above the baseline read as 100 MB within 5 %, also after three times as much was used before."""
    size = 100_000_000
    baseline, peak, after = fresh(
        f"touch({earlier})\n"
        "baseline = memory.resident_bytes()\n"
        "assert memory.reset_peak()\n"
        f"touch({size})\n"
        "print(baseline, memory.peak_bytes(), memory.resident_bytes())\n"
    )
    assert peak - baseline == pytest.approx(size, rel=0.05)
    # It is the mark that was read, not what is resident now.
    assert after - baseline < 0.2 * size


@linux
def test_without_a_reset_the_mark_is_that_of_all_time():
    """The reset is needed: the mark alone never comes down."""
    told = "print(memory.peak_bytes())\n"
    before, after = fresh(f"touch(200_000_000)\n{told}touch(1_000_000)\n{told}")
    assert after >= before > 200_000_000


@linux
def test_resident_memory_is_psutil_s():
    """Two readers of one process agree."""
    ours, theirs = memory.resident_bytes(), psutil.Process(os.getpid()).memory_info().rss
    assert ours == pytest.approx(theirs, rel=0.05)


def test_without_proc_the_peak_is_unknown(monkeypatch, tmp_path):
    """If the system keeps no mark, nothing is guessed, and resident memory comes from psutil."""
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    assert memory.peak_bytes() is None
    assert not memory.reset_peak()
    assert memory.resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_a_status_without_the_mark_is_unknown(monkeypatch, tmp_path):
    """Some sandboxes have the file without the line."""
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t    2048 kB\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert memory.peak_bytes() is None
    assert memory.resident_bytes() == 2048 * 1024


def test_the_mark_is_read_in_bytes(monkeypatch, tmp_path):
    """The system tells kB of 1024 bytes."""
    (tmp_path / "status").write_text("VmPeak:\t 999 kB\nVmHWM:\t  3 kB\nVmRSS:\t 2 kB\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    assert memory.peak_bytes() == 3072


def test_memory_that_cannot_be_had_is_none(monkeypatch, tmp_path):
    """Without /proc and with a psutil that raises there is no figure, and no error."""

    def broken(*_):
        raise psutil.AccessDenied

    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    monkeypatch.setattr(memory.psutil, "Process", broken)
    assert memory.resident_bytes() is None
    assert memory.peak_bytes() is None
    assert memory.above(10, memory.resident_bytes()) is None
    assert (memory.above(10, 3), memory.above(3, 10)) == (7, 0)
