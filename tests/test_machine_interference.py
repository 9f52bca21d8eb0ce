"""Interference with a round: a neighbour on another core is noticed, our own work and an idle machine are not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import namedtuple

import psutil
import pytest

from bench.machine import interference
from bench.machine.interference import (
    DELAY_SHARE,
    LEAST_S,
    LOOK_S,
    SHARE,
    STRETCH_S,
    Interference,
    Reading,
    disturbed,
    judge,
    longest_delay_s,
    of_round,
    others_s,
    read,
    read_delays,
    stolen_s,
    wait_until_quiet,
)

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")  # noqa: PYI024 - as psutil's


def spent(wall_s: float, others: float, own: float = 0.0, stolen: float = 0.0) -> tuple[Reading, Reading]:
    """Readings around a time in which others and this process took so many CPU seconds."""
    return Reading(100.0, 50.0, 20.0, 5.0), Reading(100.0 + wall_s, 50.0 + others + own, 20.0 + own, 5.0 + stolen)


@pytest.fixture
def neighbour():
    """A process that keeps one core busy until the test has ended, at most a minute."""
    busy = "import time\nprint(flush=True)\nend = time.time() + 60\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield
        process.kill()


@pytest.mark.skipif((psutil.cpu_count() or 1) < 2, reason="with one core a neighbour and we take turns")
@pytest.mark.usefixtures("neighbour")
def test_a_busy_neighbour_is_noticed():
    """A process that uses another core is noticed in at least 95 % of readings of 0.2 s."""
    noticed = 0
    for _ in range(20):
        before = read()
        time.sleep(0.2)
        noticed += disturbed(before, read())
    assert noticed >= 19


def test_own_work_counts_as_own():
    """CPU time of this process is in both the system's and its own count, so it is no other's."""
    before = read()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    after = read()
    assert after.own_s - before.own_s > 0.1
    # What others took meanwhile is the test machine's business; ours must not be on top of it.
    assert others_s(before, after) <= max(0.0, (after.busy_s - before.busy_s) - 0.1)


def test_own_work_is_not_blamed_on_others():
    """Own work on four cores and nothing else is no disturbance."""
    assert others_s(*spent(1.0, others=0.0, own=4.0)) == pytest.approx(0.0)
    assert not disturbed(*spent(1.0, others=0.0, own=4.0))


def test_an_idle_machine_is_no_disturbance():
    """Nothing took time but us waiting."""
    assert not disturbed(*spent(10.0, others=0.0))


@pytest.mark.parametrize(
    ("wall_s", "others", "expected"),
    [
        (1.0, SHARE + 0.01, True),
        (1.0, SHARE - 0.01, False),
        (10.0, 10 * SHARE - 0.01, False),
        (10.0, 10 * SHARE + 0.01, True),
        # A short round: one or two ticks of the counter are no evidence.
        (0.01, LEAST_S - 0.001, False),
        (0.01, LEAST_S + 0.001, True),
    ],
)
def test_others_may_take_a_tenth_of_a_core(wall_s, others, expected):
    """Beyond that share, and beyond what the counters can tell from nothing, a round is disturbed."""
    assert disturbed(*spent(wall_s, others, own=wall_s)) is expected


def test_stolen_time_disturbs():
    """Time that the hypervisor gave to somebody else counts like a neighbour's."""
    assert stolen_s(*spent(1.0, others=0.0, stolen=0.5)) == pytest.approx(0.5)
    assert disturbed(*spent(1.0, others=0.0, stolen=0.5))


def test_counters_that_run_apart_give_no_negative_time():
    """Ticks of the system's counter lag behind the process's own: less than nothing is nothing."""
    assert others_s(*spent(1.0, others=-0.03, own=1.0)) == 0.0
    # And stolen time is not offset by it.
    assert disturbed(*spent(1.0, others=-0.3, own=1.0, stolen=0.2))


def test_a_reading_counts_what_was_busy(monkeypatch):
    """Idle time, waiting for disks, stolen time, and guests (inside `user` already) are not busy."""
    times = Times(10.0, 1.0, 4.0, 1000.0, 50.0, 0.5, 0.25, 8.0, 3.0, 2.0)
    monkeypatch.setattr(interference.psutil, "cpu_times", lambda: times)
    found = read()
    assert found.busy_s == pytest.approx(10.0 + 1.0 + 4.0 + 0.5 + 0.25)
    assert found.stolen_s == 8.0


def test_a_system_without_the_finer_counters_can_be_read(monkeypatch):
    """Other systems, as macOS and Windows, tell neither stolen time nor waiting for disks."""
    few = namedtuple("Few", "user nice system idle")  # noqa: PYI024 - as psutil's
    monkeypatch.setattr(interference.psutil, "cpu_times", lambda: few(3.0, 1.0, 2.0, 100.0))
    found = read()
    assert (found.busy_s, found.stolen_s) == (6.0, 0.0)


def test_a_stretch_is_long_enough_to_tell_a_tenth_of_a_core():
    """Activity that the counters cannot tell from nothing is no more than the share that disturbs."""
    assert STRETCH_S * SHARE >= LEAST_S


def test_a_stretch_says_what_disturbed_it():
    """Whose time it was stands in the reason, in cores."""
    found = judge(*spent(1.0, others=0.75, own=1.0, stolen=0.25))
    assert found.why == "others took 0.75 cores, the hypervisor 0.25"
    assert (found.others_share, found.stolen_share) == (0.75, 0.25)


def test_a_quiet_stretch_gives_no_reason():
    """Only what was found is said."""
    assert judge(*spent(1.0, others=0.05, own=1.0)).why == ""


def test_threads_that_had_to_wait_disturb_their_round_alone():
    """A round keeps its stretch's findings; waiting for a core is its own."""
    quiet = Interference(others_share=0.03)
    assert of_round(quiet, 0.9 * DELAY_SHARE, 3, 1.0).why == ""
    late = of_round(quiet, 1.1 * DELAY_SHARE, 3, 1.0)
    assert late.why.startswith("a thread of ours waited 55.0 ms")
    assert (late.others_share, late.switches) == (0.03, 3)
    both = of_round(Interference(why="others took 1.00 cores"), 0.5, 0, 1.0)
    assert both.why == "others took 1.00 cores; a thread of ours waited 500.0 ms for a core"


@pytest.mark.skipif(not interference._TASKS.is_dir(), reason="the scheduler's account is Linux's")
def test_waiting_for_a_core_is_counted():
    """If two processes share one core, each sees how long it had to wait for it."""
    code = (
        "import os, sys, time\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from bench.machine.interference import longest_delay_s, queued_s, read_delays, switches\n"
        "if os.fork() == 0:\n"
        "    end = time.time() + 0.6\n"
        "    while time.time() < end: pass\n"
        "    os._exit(0)\n"
        "wall, cpu = time.perf_counter(), time.process_time()\n"
        "task = [f'{os.getpid()}/task/{os.getpid()}']\n"
        "before, lost, queued, end = read_delays(), switches(), queued_s(task), time.time() + 0.5\n"
        "while time.time() < end: pass\n"
        "after, lost, queued = read_delays(), switches() - lost, queued_s(task) - queued\n"
        "wall, cpu = time.perf_counter() - wall, time.process_time() - cpu\n"
        "print(longest_delay_s(before, after), lost, wall - cpu, queued)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    delay_s, lost, without_core_s, queued_s = map(float, done.stdout.split())
    # Two processes share one core, so about half of the time is waited for; more where others want it too.
    assert delay_s > 0.1
    assert abs(delay_s - without_core_s) < 0.1
    # Both are of the same account, but read apart, and the other process may have its turn between the two.
    assert abs(delay_s - queued_s) < 0.1
    assert lost > 5
    assert interference.queued_s(["no/such/thread"]) is None
    assert interference.queued_s(["thread-self", "no/such/thread"]) is None


def test_waiting_for_quiet_ends_with_the_patience(monkeypatch):
    """A machine that is never quiet is waited for no longer than allowed, and not at all without patience."""
    monkeypatch.setattr(interference, "disturbed", lambda *_: True)
    start = time.perf_counter()
    spent_s = wait_until_quiet(3.5 * LOOK_S)
    assert 2.9 * LOOK_S < spent_s < 3.6 * LOOK_S
    assert time.perf_counter() - start < 5 * LOOK_S
    assert wait_until_quiet(0.5 * LOOK_S) < 0.5 * LOOK_S


def test_waiting_for_quiet_ends_when_it_is_quiet(monkeypatch):
    """The first quiet look is enough."""
    answers = [True, True, False, True]
    monkeypatch.setattr(interference, "disturbed", lambda *_: answers.pop(0))
    wait_until_quiet(100.0, sleep=lambda _: None)
    assert answers == [True]


def test_the_thread_that_waited_longest_counts():
    """A parallel region waits for its last thread, so small delays of many do not add up; new ones count."""
    before = {"1": 5_000_000, "2": 0, "gone": 9_000_000}
    after = {"1": 6_000_000, "2": 2_000_000, "3": 500_000}
    assert longest_delay_s(before, after) == pytest.approx(0.002)
    assert longest_delay_s(before, after | {"3": 4_000_000}) == pytest.approx(0.004)
    assert longest_delay_s(before, {}) == 0.0


def test_what_the_system_does_not_tell_is_unknown_and_not_zero(monkeypatch, tmp_path):
    """Elsewhere than on Linux there is no account of threads; that is no claim that none waited."""
    assert longest_delay_s(None, {"1": 5}) is None
    assert longest_delay_s({"1": 5}, None) is None
    monkeypatch.setattr(interference, "_TASKS", tmp_path / "nothing")
    assert read_delays() is None
    assert longest_delay_s(read_delays(), read_delays()) is None
    assert of_round(Interference(), None, None, 1.0).delay_s is None


def test_what_our_seats_used_is_not_blamed_on_others():
    """CPU time of other processes of ours counts as our own, beside that of this one."""
    before, after = read(), read(7.5)
    assert 7.5 <= after.own_s - before.own_s < 8.5
    used = Reading(100.0, 50.0, 20.0, 0.0), Reading(101.0, 58.0, 28.0, 0.0)
    assert not disturbed(*used)
    assert disturbed(used[0], Reading(101.0, 58.0, 20.5, 0.0))


@pytest.mark.parametrize("error", [OSError(2, "no /proc"), PermissionError(13, "hidden"), ValueError("garbled")])
def test_counters_that_cannot_be_had_claim_nothing(monkeypatch, tmp_path, error):
    """If the system reports nothing, a round is neither called disturbed nor quiet, and nothing raises."""

    def broken(*_):
        raise error

    for owner, name in ((interference.psutil, "cpu_times"), (os, "getloadavg")):
        monkeypatch.setattr(owner, name, broken)
    schedstat = tmp_path / "1" / "schedstat"
    schedstat.parent.mkdir()
    schedstat.touch()
    monkeypatch.setattr(interference, "_TASKS", tmp_path)
    (tmp_path / "frequency").write_text("<unknown>\n")
    monkeypatch.setattr(interference, "_FREQUENCY", tmp_path / "frequency")
    before, after = read(), read()
    assert (before.busy_s, read_delays()) == (None, None)
    assert not disturbed(before, after)
    found = judge(before, after)
    assert (found.why, found.others_share, found.stolen_share) == ("", None, None)
    assert (found.load, found.frequency_mhz) == (None, None)
