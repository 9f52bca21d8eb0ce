"""Replaying launches by address, on a stand-in for CUDA: every call does its work exactly once."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gpu import graph_cache as graphs
from kernels.gpu.graph_cache import SIGHTINGS, Graphs
from kernels.gpu.graph_capture import CaptureError, _segments


class _Stand:
    """A device that notes what ran on it; what is launched while it captures is kept for replay instead."""

    def __init__(self) -> None:
        self.ran: list[object] = []
        self.recording: list[object] | None = None
        self.where: object = "here"
        self.reason: str | None = None
        self.failure: Exception | None = None
        self.lanes: list[object] = []
        self.captures: list[object] = []
        self.waits = 0

    def launch(self, work: object) -> Callable[[], None]:
        return lambda: (self.ran if self.recording is None else self.recording).append(work)

    def busy(self) -> str | None:
        return "the stand-in is capturing" if self.recording is not None else None

    def obstacle(self, tensors: Sequence[Any]) -> str | None:
        del tensors
        return self.reason

    def place(self) -> object:
        return self.where

    def lane(self, others: Sequence[Any]) -> object:
        self.lanes.append(object())
        assert self.lanes[-1] not in others
        return self.lanes[-1]

    def capture(self, launch: Callable[[], None], lane: object) -> Callable[[], None]:
        self.recording = recorded = []
        try:
            launch()
        finally:
            self.recording = None
        if self.failure is not None:
            raise self.failure
        self.captures.append(lane)
        return lambda: self.ran.extend(recorded)

    def wait(self) -> None:
        self.waits += 1


def calls(held: Graphs, stand: _Stand, key: str, count: int) -> None:
    for _ in range(count):
        held.run(stand.launch(key), (key,), [None])


def test_of_known_memory_the_address_counts():
    """Memory elsewhere, or none, is another graph; the same address is the same one, whatever lay there meanwhile."""
    stand = _Stand()
    held = Graphs(stand)
    for known in ([MEMORY[:4]], [MEMORY[4:8]], [None]):
        for number in range(SIGHTINGS + 2):
            seen = held.run(stand.launch("a"), ("key",), [], known)
            assert seen == min(number, SIGHTINGS + 1)
    assert held.run(stand.launch("a"), ("key",), [], [MEMORY[:4].view(2, 2)]) == SIGHTINGS + 1
    assert held.state().captured == 3


def test_the_third_call_is_captured_and_replayed_from_then_on():
    """Two calls launch plainly; each later one replays what the third captured, which itself runs once."""
    stand = _Stand()
    held = Graphs(stand)
    calls(held, stand, "a", 5)
    assert stand.ran == ["a"] * 5
    assert len(stand.captures) == 1
    state = held.state()
    assert (state.captured, state.replayed, sum(state.plain.values()), state.graphs) == (1, 3, SIGHTINGS, 1)


@settings(max_examples=100)
@given(
    work=st.lists(
        st.tuples(
            st.integers(0, 4), st.sampled_from(["one", "two", "three"]),
            st.sampled_from([None, None, None, "busy"]), st.sampled_from([False, False, False, True]),
        ),
        max_size=120,
    ),
    capacity=st.integers(1, 3), places=st.integers(1, 2),
)  # fmt: skip
def test_every_call_does_its_work_once(work, capacity, places):
    """Whatever is captured, dropped, refused or fails, a call runs its launches exactly once, and is counted once."""
    stand = _Stand()
    held = Graphs(stand, capacity=capacity, remembered=4, places=places)
    expected = []
    for key, where, reason, fails in work:
        stand.where, stand.reason, stand.failure = where, reason, CaptureError("no") if fails else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            held.run(stand.launch((key, where)), (key,), [])
        expected.append((key, where))
        assert stand.ran == expected
        state = held.state()
        assert state.replayed + sum(state.plain.values()) == len(expected)
        assert state.graphs == state.captured - state.evicted <= capacity
    assert stand.waits <= held.state().evicted


MEMORY = torch.zeros(64)


@pytest.mark.parametrize(
    "other",
    [
        MEMORY[8:24].view(4, 4),
        MEMORY[:12].view(3, 4),
        MEMORY[:16].view(4, 4).t(),
        MEMORY.view(torch.int32)[:16].view(4, 4),
        None,
    ],
    ids=["address", "shape", "stride", "type", "absent"],
)
def test_a_graph_serves_its_own_memory_alone(other):
    """Another address, shape, stride or type is another graph: the work of that call is done, not that of the first."""
    stand = _Stand()
    held = Graphs(stand)
    for _ in range(SIGHTINGS + 1):
        held.run(stand.launch("first"), ("key",), [MEMORY[:16].view(4, 4)])
    held.run(stand.launch("second"), ("key",), [other])
    assert stand.ran[-1] == "second"
    assert held.state().replayed == 1


def test_a_graph_serves_its_own_place_alone():
    """Another device, stream or thread captures for itself, on a lane that nobody else uses."""
    stand = _Stand()
    held = Graphs(stand)
    for stand.where in ("one", "two"):
        calls(held, stand, "a", SIGHTINGS + 1)
    assert len(set(stand.captures)) == 2


def test_graphs_of_one_place_share_its_lane():
    """They replay one after another, so they need one pool and one stream to be captured on."""
    stand = _Stand()
    held = Graphs(stand)
    for key in "abc":
        calls(held, stand, key, SIGHTINGS + 1)
    assert len(stand.captures) == 3
    assert len(set(stand.captures)) == 1


def test_the_graph_that_rested_longest_goes_first():
    """Past the capacity the least recently replayed is dropped, once the device is idle, and may come back."""
    stand = _Stand()
    held = Graphs(stand, capacity=2)
    for key in "ab":
        calls(held, stand, key, SIGHTINGS + 1)
    calls(held, stand, "a", 1)
    calls(held, stand, "c", SIGHTINGS + 1)
    assert (held.state().evicted, held.state().graphs, stand.waits) == (1, 2, 1)
    before = held.state().replayed
    calls(held, stand, "a", 1)
    assert held.state().replayed == before + 1
    calls(held, stand, "b", 1)
    assert held.state().replayed == before + 1


def test_a_place_without_graphs_begins_a_new_lane():
    """A memory pool whose last graph is gone is not taken up again: torch cannot."""
    stand = _Stand()
    held = Graphs(stand)
    calls(held, stand, "a", SIGHTINGS + 1)
    held.clear()
    calls(held, stand, "a", SIGHTINGS + 1)
    assert len(set(stand.captures)) == 2


def test_a_new_place_drives_out_the_one_that_rested_longest():
    """Places are bounded as well, since each has a stream and cuBLAS's workspace: all graphs of one go."""
    stand = _Stand()
    held = Graphs(stand, places=2)
    for stand.where in ("one", "two"):
        for key in "ab":
            calls(held, stand, key, SIGHTINGS + 1)
    stand.where = "one"
    calls(held, stand, "a", 1)
    stand.where = "three"
    calls(held, stand, "a", SIGHTINGS + 1)
    assert (held.state().evicted, held.state().graphs) == (2, 3)
    before = held.state().replayed
    stand.where = "one"
    calls(held, stand, "b", 1)
    assert held.state().replayed == before + 1


def test_a_capture_that_fails_is_told_and_not_tried_again():
    """The call launches plainly with a warning; later calls of the key launch without one, other keys still capture."""
    stand = _Stand()
    held = Graphs(stand)
    calls(held, stand, "a", SIGHTINGS)
    stand.failure = CaptureError("a reason")
    with pytest.warns(RuntimeWarning, match="a reason"):
        calls(held, stand, "a", 1)
    stand.failure = None
    calls(held, stand, "a", 2)
    calls(held, stand, "b", SIGHTINGS + 1)
    assert stand.ran == ["a"] * 5 + ["b"] * 3
    assert held.state().plain["capturing failed: a reason"] == 3
    assert held.state().captured == 1


def test_a_capture_that_breaks_torch_is_the_last():
    """After one that torch could not end, nothing is captured any more, and the reason stays readable."""
    stand = _Stand()
    held = Graphs(stand)
    calls(held, stand, "a", SIGHTINGS)
    stand.failure = CaptureError("cannot end", final=True)
    with pytest.warns(RuntimeWarning, match="cannot end"):
        calls(held, stand, "a", 1)
    stand.failure = None
    calls(held, stand, "b", SIGHTINGS + 1)
    assert held.state().captured == 0
    assert held.state().plain["an earlier capture failed: cannot end"] == SIGHTINGS + 1


def test_what_a_launch_raises_reaches_the_caller():
    """An error of the work is the caller's, in a plain launch and while capturing, and nothing counts as captured."""
    stand = _Stand()
    held = Graphs(stand)
    calls(held, stand, "a", SIGHTINGS)

    def fails() -> None:
        message = "the work's own"
        raise OSError(message)

    for _ in range(2):
        with pytest.raises(OSError, match="own"):
            held.run(fails, ("a",), [None])
    assert held.state().captured == 0


def test_a_call_inside_a_capture_launches():
    """Launches while something is being captured become part of that."""
    stand = _Stand()
    held = Graphs(stand)
    calls(held, stand, "inner", SIGHTINGS + 1)

    def outer() -> None:
        stand.launch("outer")()
        calls(held, stand, "inner", 1)

    stand.ran.clear()
    for _ in range(SIGHTINGS + 2):
        held.run(outer, ("outer",), [])
    assert stand.ran == ["outer", "inner"] * (SIGHTINGS + 2)
    assert held.state().plain["the stand-in is capturing"] == 1


def test_remembered_keys_are_bounded():
    """Memory that never comes back is forgotten, and does not keep another key from being captured."""
    stand = _Stand()
    held = Graphs(stand, remembered=3)
    for index in range(50):
        calls(held, stand, f"once {index}", 1)
    calls(held, stand, "a", SIGHTINGS + 1)
    assert len(held._seen) <= 3
    assert held.state().captured == 1
    stand.failure = CaptureError("no")
    for index in range(5):
        calls(held, stand, f"failing {index}", SIGHTINGS)
        with pytest.warns(RuntimeWarning, match="no"):
            calls(held, stand, f"failing {index}", 1)
    assert len(held._refused) <= 3


def test_threads_do_not_mix():
    """Many threads at once: every call is done and counted, whichever thread captures."""
    stand = _Stand()
    held = Graphs(stand, capacity=2)
    done: list[str] = []

    def work(name: str) -> None:
        for _ in range(200):
            # A plain launch inside of another thread's capture would be recorded there on this stand-in alone, so
            # these do not go through it.
            held.run(lambda: done.append(name), (name,), [])

    stand.capture = lambda launch, _: launch  # type: ignore[method-assign]
    threads = [threading.Thread(target=work, args=(f"thread {index}",)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == sorted(f"thread {index}" for index in range(6) for _ in range(200))
    state = held.state()
    assert state.replayed + sum(state.plain.values()) == 1200
    assert state.graphs == state.captured - state.evicted


def test_cpu_tensors_are_launched_and_counted():
    """Without a GPU `run` is a call, and says that it was one."""
    reason = "a tensor is not on a CUDA device" if torch.cuda.is_initialized() else "CUDA is not in use"
    before, ran = graphs.state().plain.get(reason, 0), []
    for _ in range(SIGHTINGS + 2):
        graphs.run(lambda: ran.append(1), ("key",), [torch.zeros(2), None])
    assert len(ran) == SIGHTINGS + 2
    assert graphs.state().plain[reason] == before + SIGHTINGS + 2


def test_the_memory_of_a_pool_is_listed_by_any_build_of_torch(monkeypatch):
    """A build that does not take `include_traces` is asked without it; one that lists nothing ends capturing."""
    asked = []

    def older(pool):
        asked.append(pool)
        return ({"address": 1, "total_size": 2},)

    monkeypatch.setattr(torch.cuda, "memory_snapshot", older)
    assert _segments((0, 1)) == [{"address": 1, "total_size": 2}]
    assert asked == [(0, 1)]

    def refuses(*_: object, **__: object):
        message = "mempool_id must be a tuple of 2 integers"
        raise RuntimeError(message)

    monkeypatch.setattr(torch.cuda, "memory_snapshot", refuses)
    with pytest.raises(CaptureError, match=r"does not list the memory.*mempool_id") as caught:
        _segments((0, 1))
    assert caught.value.final
