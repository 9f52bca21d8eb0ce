"""Seats with real processes: whoever has not the turn stands still, and whatever ends one is laid at the right door."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
import pytest

from bench.plan.cases import Case, Group
from bench.records.schema import Status
from bench.run.forks import ForkServer, fork_servers
from bench.run.group import Measurement
from bench.run.planning import Described
from bench.run.seating import Place, Seating
from bench.run.worker_process import Event, Settings, Worker, WorkerError
from bench.timing.rounds import rounds

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's account of threads")

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugins" / "seated_variants.py"
SETTINGS = Settings(1, plugins=(PLUGIN,))
LIMIT_S = 60.0


def place(*variants: str, environment: dict[str, str] | None = None) -> Place:
    """A process for these variants."""
    return Place(
        tuple(Case("seed@batch=2,length=3", name, "inference", "cpu", 1) for name in variants), environment or {}
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ForkServer]:
    """What forks the seats, so that they are up at once."""
    with fork_servers(SETTINGS, tmp_path_factory.mktemp("forks") / "log", [()]) as (found,):
        yield found


@pytest.fixture
def log(tmp_path) -> Path:
    """What the seats print."""
    return tmp_path / "log"


@pytest.fixture
def seating(server, log, tmp_path) -> Callable[..., Seating]:
    """Makes a seating; what is told is kept in `told`, and `turns` are fields of what makes variants ready."""

    def make(*places: Place, told: Callable[[Event], object] = str, **turns: float) -> Seating:
        start = functools.partial(Worker, log=log, cache=tmp_path, forks=server)
        return Seating(places, start, SETTINGS, LIMIT_S, told, turns=turns)

    return make


def gone(pid: int) -> bool:
    """Return whether a process ends within a while."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.02)
                continue
        return True
    return False


def pid_of(seats: Seating, number: int) -> int:
    """The process of a seat."""
    return seats.seats[number].worker._child.pid


def states(pid: int) -> set[str]:
    """States of all threads of a process; source: third field of /proc/PID/task/TID/stat."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found.add((task / "stat").read_text().rpartition(")")[2].split()[0])
    return found


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process so far, to the nanosecond; source: /proc/PID/task/TID/schedstat."""
    return sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())


def spinning_ns(pid: int) -> int:
    """CPU time of its threads but for the first one, which makes the calls; there are some."""
    first = Path(f"/proc/{pid}/task/{pid}/schedstat")
    assert len(list(first.parent.parent.iterdir())) >= 3
    return cpu_ns(pid) - int(first.read_text().split()[0])


def stands_still(pid: int) -> bool:
    """Return whether all threads of a process are stopped within a while: a signal takes a moment to reach them."""
    end = time.monotonic() + 5
    while states(pid) != {"T"}:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


@dataclass
class Watched:
    """States of threads of processes, looked at again and again while something goes on."""

    pids: list[int]

    def __enter__(self) -> Self:
        self.seen: list[tuple[int, frozenset[str]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.is_set():
            self.seen += [(pid, frozenset(states(pid))) for pid in self.pids]
            time.sleep(0.001)


def test_while_one_has_its_turn_all_others_stand_still(seating):
    """Every thread of every other process is stopped at every look, and none of them gets a nanosecond of a core."""
    with seating(place("reference", "loop"), place("spinning"), place("lstmcell")) as seats:
        seats.sit(1)
        pids = [pid_of(seats, number) for number in range(3)]
        assert {name: player.seat for name, player in seats.players.items()} == {
            "reference": 0,
            "loop": 0,
            "spinning": 1,
            "lstmcell": 2,
        }
        assert all(stands_still(pid) for pid in pids)
        for name, player in seats.players.items():
            others = [pid for number, pid in enumerate(pids) if number != player.seat]
            before, own = {pid: cpu_ns(pid) for pid in others}, cpu_ns(pids[player.seat])
            with Watched(others) as watched:
                turn = player.turn()
            assert len(watched.seen) > len(others), name
            assert {found for _, found in watched.seen} == {frozenset("T")}, name
            assert {pid: cpu_ns(pid) for pid in others} == before, name
            assert cpu_ns(pids[player.seat]) - own > 0.5e9 * (turn.cpu_to_s - turn.cpu_from_s)
            assert stands_still(pids[player.seat])


def test_threads_that_spin_after_a_call_spin_in_their_own_turn_alone(seating):
    """In another's turn they get nothing of a core; let go on, as in a seat that is not stopped, they would."""
    with seating(place("reference"), place("spinning")) as seats:
        seats.sit(1)
        pid = pid_of(seats, 1)
        assert stands_still(pid)
        before = spinning_ns(pid)
        seats.players["spinning"].turn()
        assert spinning_ns(pid) > before
        assert stands_still(pid)
        before = cpu_ns(pid)
        for _ in range(5):
            seats.players["reference"].turn()
        assert cpu_ns(pid) == before
        with seats.seats[1].going():
            for _ in range(5):
                seats.players["reference"].turn()
        assert cpu_ns(pid) > before


def test_rounds_over_seats_count_the_seats_work_as_our_own(seating):
    """Each round has everybody, in this order; what the seats used is no disturbance by others."""
    with seating(place("reference", "loop"), place("spinning")) as seats:
        seats.sit(1)
        found = list(rounds(seats.players, "cpu", 0.6, 3))
        assert seats.doubts() == {}
        seats.stand(2)
    assert len(found) >= 2
    for each in found:
        assert sorted(each.order) == ["loop", "reference", "spinning"]
        assert each.beside.delay_s is not None
        assert each.beside.switches is not None
        assert each.wall_s > sum(sum(block.calls_s) for block in each.blocks.values())


def test_variants_with_threads_or_an_environment_of_their_own_have_processes_of_their_own():
    """All others share one; where there are no others, none is started for them."""

    def places(*described: Described) -> list[tuple[str, ...]]:
        group = Group("g", tuple(found.case for found in described))
        measured = Measurement(None, group, Path(), list(described), 1.0)
        return [tuple(case.variant for case in found.cases) for found in measured.places()]

    def one(name: str, *, alone: bool = False) -> Described:
        return Described(Case("seed", name, "inference", "cpu", 1), {}, None, alone=alone, environment={"X": name})

    assert places(one("a"), one("b", alone=True), one("c"), one("d", alone=True)) == [("a", "c"), ("b",), ("d",)]
    assert places(one("b", alone=True)) == [("b",)]
    assert places(one("a"), one("c")) == [("a", "c")]


def test_the_environment_of_a_place_is_that_of_its_process_alone(seating):
    """Set before anything is loaded, and in no other seat."""
    with seating(place("reference"), place("loop", environment={"SEATED_IN": "süd"})) as seats:
        seats.sit(1)
        found = [Path(f"/proc/{pid_of(seats, number)}/environ").read_bytes().split(b"\0") for number in (0, 1)]
        assert [seats.players[name].seat for name in ("reference", "loop")] == [0, 1]
        assert "SEATED_IN=süd".encode() in found[1]
        assert not any(variable.startswith(b"SEATED_IN") for variable in found[0])


#: How a variant ends: what its record is to say.
ENDINGS = {
    "exits": (Status.CRASHED, "ended with exit code 7"),
    "segfaults": (Status.CRASHED, "died of signal 11 (SIGSEGV)"),
    "hangs": (Status.TIMEOUT, "not ended within the limit of 0.5 s"),
    "out-of-memory": (Status.OOM, "MemoryError: planted"),
}


def failure(ask: Callable[[], object]) -> WorkerError:
    """The error with which it ends."""
    with pytest.raises(WorkerError) as error:
        ask()
    return error.value


@pytest.mark.parametrize("ending", ENDINGS)
def test_whoever_fails_in_its_turn_is_named(seating, ending):
    """Beside healthy variants in its process and in another, which it does not disturb before."""
    bad = f"{ending}-in-turn"
    with seating(place("reference", bad, "loop"), place("lstmcell")) as seats:
        seats.sit(1)
        assert set(seats.players) == {"reference", bad, "loop", "lstmcell"}
        for name in ("reference", "loop", "lstmcell"):
            seats.players[name].turn()
        seats.seats[0].limit_s = 0.5
        found = failure(seats.players[bad].turn)
        pids = [pid_of(seats, number) for number in (0, 1)]
        seats.players["lstmcell"].turn()
    status, reason = ENDINGS[ending]
    assert (found.status, found.variant) == (status, bad)
    assert reason in found.reason
    assert all(gone(pid) for pid in pids)


@pytest.mark.parametrize("ending", ENDINGS)
def test_whoever_fails_in_the_gate_after_the_rounds_is_named(seating, ending):
    """Those that were gated before it were told of; the one being gated is to blame."""
    bad, told = f"{ending}-when-gated-again", []
    with seating(place("reference", bad, "loop"), told=told.append) as seats:
        seats.sit(1)
        for player in seats.players.values():
            player.turn()
        seats._limit_s = 0.5 if ending == "hangs" else LIMIT_S
        told.clear()
        found = failure(lambda: seats.stand(2))
    status, reason = ENDINGS[ending]
    assert (found.status, found.variant) == (status, bad)
    assert reason in found.reason
    assert [event["variant"] for event in told if event["event"] == "gate"] == ["reference"]


def test_a_seat_that_dies_between_turns_is_told_at_the_next(seating):
    """A process that stands still can be killed; the one whose turn it would be gets the record."""
    with seating(place("reference"), place("loop")) as seats:
        seats.sit(1)
        os.kill(pid_of(seats, 1), signal.SIGKILL)
        seats.players["reference"].turn()
        found = failure(seats.players["loop"].turn)
    assert (found.status, found.variant) == (Status.CRASHED, "loop")
    assert "died of signal 9 (SIGKILL)" in found.reason


@pytest.mark.parametrize(
    ("liar", "words"),
    [("slow-clock", "the worker's clock is wrong: it counted"), ("forged-samples", "the samples cannot be true")],
)
def test_a_seat_that_lies_about_its_turns_is_refused_and_the_others_are_not(seating, liar, words):
    """All that share its process, whose clock they share; a seat beside it keeps its samples.

    Turns are long beside what a busy machine keeps a request or a call waiting, which is forgiven.
    """
    with seating(place("reference", liar), place("loop"), block_s=0.1) as seats:
        seats.sit(1)
        for _ in range(6):
            for player in seats.players.values():
                player.turn()
        doubts = seats.doubts()
    assert set(doubts) == {"reference", liar}
    assert all(words in reason for reason in doubts.values())


def test_a_seat_that_waits_for_a_process_of_its_own_is_refused(seating):
    """The kernel counts that wait, and it is left out of the turns' own time: the parent does not wait as long."""
    with seating(place("bought-waits"), place("loop"), block_s=0.3) as seats:
        seats.sit(1)
        late = {name: [player.turn().late_s for _ in range(6)] for name, player in seats.players.items()}
        doubts = seats.doubts()
    assert set(doubts) == {"bought-waits"}
    assert "the worker's clock is wrong: it counted" in doubts["bought-waits"]
    assert all(late_s > 0.05 for late_s in late["bought-waits"][1:])


def test_whoever_fails_the_gate_gets_no_turns(seating):
    """The others do; what the gate said is told."""
    told = []
    with seating(place("reference", "wrong"), told=told.append) as seats:
        seats.sit(1)
        assert list(seats.players) == ["reference"]
    assert [(event["variant"], event["passed"]) for event in told if event["event"] == "gate"] == [
        ("reference", True),
        ("wrong", False),
    ]


def test_every_process_is_gone_when_a_seating_ends(seating):
    """Stopped ones with threads that spin too, however it ends, and also where it failed while it was starting."""
    with seating(place("reference"), place("spinning")) as seats:
        seats.sit(1)
        pids = [pid_of(seats, number) for number in (0, 1)]
    assert all(gone(pid) for pid in pids)
    with contextlib.suppress(KeyboardInterrupt), seating(place("reference"), place("spinning")) as seats:
        seats.sit(1)
        pids = [pid_of(seats, number) for number in (0, 1)]
        seats.players["spinning"].turn()
        assert all(psutil.pid_exists(pid) for pid in pids)
        raise KeyboardInterrupt
    assert all(gone(pid) for pid in pids)
    with seating(place("reference"), place("no such variant")) as seats:
        failure(lambda: seats.sit(1))
        pids = [pid_of(seats, number) for number in (0, 1)]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert all(gone(pid) for pid in pids)


#: A parent with two seats, one of which has its turn for a minute, and the other stands still.
PARENT = """
import sys
from pathlib import Path
sys.path[:0] = ["tests"]
from bench.run.forks import fork_servers
from bench.run.worker_process import Worker
from bench.run.seating import Seating
import test_run_seating as seated

log = Path(sys.argv[1])
with fork_servers(seated.SETTINGS, log, [()]) as (server,):
    start = lambda settings: Worker(settings, log, log.parent, server)
    places = [seated.place("spinning"), seated.place("hangs-in-turn")]
    with Seating(places, start, seated.SETTINGS, 60.0, str) as seats:
        seats.sit(1)
        print(server._child.pid, *(seated.pid_of(seats, number) for number in (0, 1)), flush=True)
        seats.players["hangs-in-turn"].turn()
"""


def test_every_process_ends_with_the_parent(tmp_path):
    """Killed: those that are stopped, the one that has its turn, and what forked them."""
    line = [sys.executable, "-c", PARENT, str(tmp_path / "log")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 3
        time.sleep(0.2)
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
        parent.wait()
        assert all(gone(pid) for pid in pids)
