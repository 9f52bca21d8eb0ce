"""The distance of two cores: its change is told, and its measurement leaves nothing behind."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from bench.machine import core_distance
from bench.machine.core_distance import CoreDistance

two_cores = pytest.mark.skipif(
    not hasattr(os, "memfd_create") or len(os.sched_getaffinity(0)) < 2, reason="there is one core, or no way to it"
)


FAR_WORDS = "a word from core to core and back took 610 ns, 250 at best in this run"


def test_a_change_is_told_against_the_shortest_so_far(monkeypatch):
    """As it was measured on a virtual machine whose host moved a core; what is not known says nothing."""
    found = iter([(255.0, 80.0), (250.0, 80.0), (340.0, 80.0), None, (610.0, 80.0), (252.0, 80.0)])
    monkeypatch.setattr(CoreDistance, "times_ns", lambda _: next(found))
    distance = CoreDistance()
    said = [distance.far(distance.look()) for _ in range(6)]
    assert said == [""] * 4 + [FAR_WORDS, ""]


def test_what_began_far_is_told_once_the_cores_were_near(monkeypatch):
    """The same time says nothing at first and something afterwards."""
    found = iter([(610.0, 80.0), (250.0, 80.0)])
    monkeypatch.setattr(CoreDistance, "times_ns", lambda _: next(found))
    distance = CoreDistance()
    first = distance.look()
    assert distance.far(first) == ""
    distance.look()
    assert distance.far(first) == FAR_WORDS


@pytest.mark.parametrize(("device", "threads", "passes"), [("cpu", 2, True), ("cpu", 1, False), ("cuda", 2, False)])
def test_only_threads_of_a_cpu_pass_words(device, threads, passes):
    """One thread has nobody to talk to, and a GPU's work is not done here."""
    distance = CoreDistance()
    assert distance.beside(device, threads) is (distance if passes else None)


@two_cores
def test_a_word_there_takes_longer_than_one_that_stays():
    """Of several tries, since others may have a core; this process may run on all cores afterwards."""
    cores = os.sched_getaffinity(0)
    with CoreDistance() as distance:
        found = [times for _ in range(20) if (times := distance.times_ns()) is not None]
    assert os.sched_getaffinity(0) == cores
    if not found:
        pytest.skip("others have the second core")
    there_ns, alone_ns = (min(times) for times in zip(*found, strict=True))
    assert 20 < alone_ns < there_ns < 5_000


def test_a_slower_clock_is_no_distance(monkeypatch):
    """With all times twice as long, as after a boost, nothing is said; nor once the first loop was slow by chance."""
    found = iter([(250.0, 120.0), (250.0, 80.0), (500.0, 160.0), (250.0, 80.0), (600.0, 85.0)])
    monkeypatch.setattr(CoreDistance, "times_ns", lambda _: next(found))
    distance = CoreDistance()
    assert [bool(distance.far(distance.look())) for _ in range(5)] == [False] * 4 + [True]


@two_cores
def test_the_other_side_sleeps_between_two_looks_and_ends_with_the_run(monkeypatch):
    """Also after a look that it was too late for."""
    with CoreDistance() as distance:
        other = psutil.Process(distance._partner.pid)
        distance.times_ns()
        monkeypatch.setattr(core_distance, "FIRST_LOOKS", 1)
        assert distance.times_ns() is None
        time.sleep(0.1)
        before = sum(other.cpu_times()[:2])
        time.sleep(0.3)
        assert sum(other.cpu_times()[:2]) - before <= 0.01
    assert not other.is_running()


def test_one_core_has_no_distance(monkeypatch):
    """No process is started, and nothing is said."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with CoreDistance() as distance:
        assert (distance.look(), distance.far(None)) == (None, "")


def refuse(*_: object) -> None:
    """As a system that forbids a call."""
    raise PermissionError(1, "Operation not permitted")


@two_cores
@pytest.mark.parametrize("call", ["memfd_create", "ftruncate"])
def test_a_system_that_refuses_to_begin_has_no_distance(call, monkeypatch):
    """As under seccomp: the run goes on without these times."""
    monkeypatch.setattr(os, call, refuse)
    with CoreDistance() as distance:
        assert (distance.look(), distance.far(None)) == (None, "")


@two_cores
def test_a_system_that_refuses_later_ends_it(monkeypatch):
    """As when the cores of the run were changed: nothing is said from then on, and the other process is gone."""
    with CoreDistance() as distance:
        other = psutil.Process(distance._partner.pid)
        with monkeypatch.context() as patched:
            patched.setattr(os, "sched_setaffinity", refuse)
            assert (distance.look(), distance.far(None)) == (None, "")
        assert not other.is_running()
        assert distance.times_ns() is None


@two_cores
def test_the_other_side_hears_no_ctrl_c():
    """The terminal sends it to the processes of one session."""
    with CoreDistance() as distance:
        assert os.getsid(distance._partner.pid) != os.getsid(0)
