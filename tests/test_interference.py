"""Who disturbs a round: a neighbour on another core is noticed, our own work and an idle machine are not blamed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import namedtuple

import psutil
import pytest

from bench import interference
from bench.interference import LEAST_S, SHARE, Reading, disturbed, others_s, read

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
    assert others_s(before, after) <= max(0.0, (after.busy_s - before.busy_s) - 0.1) + after.stolen_s - before.stolen_s


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
    assert others_s(*spent(1.0, others=0.0, stolen=0.5)) == pytest.approx(0.5)
    assert disturbed(*spent(1.0, others=0.0, stolen=0.5))


def test_counters_that_run_apart_give_no_negative_time():
    """Ticks of the system's counter lag behind the process's own: less than nothing is nothing."""
    assert others_s(*spent(1.0, others=-0.03, own=1.0)) == 0.0
    # And stolen time is not offset by it.
    assert others_s(*spent(1.0, others=-0.03, own=1.0, stolen=0.2)) == pytest.approx(0.2)


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
