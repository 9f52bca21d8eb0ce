"""Pages of a forked process made its own: then it has the memory and the faults of a process that was never forked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine import own_pages

ROOT = Path(__file__).parent.parent
SIZE = 64 << 20
#: A child that gives back what its parent noted.
UNMAPS = """
import mmap, os
from bench.machine import own_pages

block = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block.write(bytes([1]) * (1 << 20))
assert own_pages.note()
child = os.fork()
if not child:
    block.close()
    own_pages.take()
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
#: A child's resident memory over its parent's, and its faults as it writes what its parent wrote.
FORK = f"""
import json, mmap, os, resource, sys
from bench.machine import memory, own_pages

def write(block, value):
    for place in range(0, len(block), 4096):
        block[place] = value

block, untouched = bytearray({SIZE}), mmap.mmap(-1, {SIZE})
write(block, 1)
assert own_pages.note()
parent, (reading, writing) = memory.resident_bytes(), os.pipe()
if os.fork() == 0:
    if sys.argv[1] == "take":
        own_pages.take()
    resident, before = memory.resident_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    write(block, 2)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    os.write(writing, json.dumps([resident / parent, faults]).encode())
    os._exit(0)
os.wait()
print(os.read(reading, 1000).decode())
"""
needs_populate = pytest.mark.skipif(not own_pages.note(), reason="this system cannot give a child pages of its own")


@needs_populate
@pytest.mark.parametrize(("how", "least", "most"), [("take", 0, 100), ("leave", SIZE // 4096, 2 * SIZE // 4096)])
def test_a_child_pays_nothing_for_what_its_parent_did(how, least, most):
    """It has the same pages resident, and none that its parent never touched; without it every page costs a fault."""
    line = [sys.executable, "-c", FORK, how]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=ROOT)
    share, faults = json.loads(done.stdout)
    assert least <= faults <= most
    if how == "take":
        assert share == pytest.approx(1, abs=0.03)


def test_a_fresh_process_is_left_as_it_is(monkeypatch):
    """Without notes there is nothing to take."""
    monkeypatch.setattr(own_pages, "_noted", [])
    asked = []
    monkeypatch.setattr(own_pages, "_touch", asked.append)
    own_pages.take()
    assert not asked


def test_a_system_that_cannot_says_so(monkeypatch):
    """Its children keep what they share, and the parent knows."""

    def refuse(_runs: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(own_pages, "_touch", refuse)
    assert not own_pages.note()


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("7ffd1000-7ffd2000 r--p 00000000 00:00 0                          [vvar]", False),
        ("7ffd2000-7ffd4000 r-xp 00000000 00:00 12                         [vdso]", False),
        ("ffffffffff600000-ffffffffff601000 r-xp 00000000 00:00 0          [vsyscall]", False),
        ("7ffd0000-7ffd1000 rw-p 00000000 00:00 0                          [stack]", True),
        ("55550000-55551000 rw-p 00000000 00:00 0 ", True),
        ("7f000000-7f001000 r-xp 00001000 08:01 1234567                    /usr/lib/libc.so.6", True),
        ("7f000000-7f001000 rw-s 00001000 08:01 1234567                    /dev/shm/words", False),
    ],
)
def test_the_kernel_s_own_pages_are_left_alone(line, ours):
    """Nor are those that processes share on purpose."""
    assert (own_pages._MAPPING.match(line) is not None) is ours


@needs_populate
def test_memory_that_was_given_back_is_left_out():
    """A child may unmap what its parent had, and takes the rest."""
    done = subprocess.run([sys.executable, "-c", UNMAPS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_parts_of_runs_in_mappings():
    """Runs are cut where mappings end, and may be used as these say."""
    page_run = own_pages.PageRun
    runs = [page_run(10, 20, writable=True), page_run(40, 10, writable=True), page_run(90, 5, writable=False)]
    mappings = [page_run(0, 15, writable=True), page_run(20, 25, writable=False), page_run(48, 10, writable=True)]
    assert own_pages._within(runs, mappings) == [
        page_run(10, 5, writable=True),
        page_run(20, 10, writable=False),
        page_run(40, 5, writable=False),
        page_run(48, 2, writable=True),
    ]
