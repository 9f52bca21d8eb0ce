"""The clock: each call timed by itself, nothing else in between, and the same answer as another instrument's."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from torch.utils.benchmark import Timer

from bench.records.block import Block
from bench.timing.clock import time_block, time_once


def spin(seconds: float) -> None:
    """Keep this core busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture
def collecting():
    """The garbage collector on, and afterwards as it was."""
    before = gc.isenabled()
    gc.enable()
    yield
    (gc.enable if before else gc.disable)()


def test_a_block_times_each_call_it_makes():
    """As many calls as asked for, each by itself, and no other: what goes before a block is its caller's to make."""
    asked_s = (0.004, 0.2, 0.004)
    waits = iter(asked_s)
    block = time_block(lambda: spin(next(waits)), 3, "cpu")
    assert next(waits, None) is None
    assert len(block.calls_s) == 3
    assert all(found >= asked for found, asked in zip(block.calls_s, asked_s, strict=True))
    # The long call's time is its own and in no other.
    assert max(block.calls_s[0], block.calls_s[2]) < 0.2
    assert block.queued_calls == 0


def test_nothing_between_the_calls_is_lost():
    """Calls stand back to back: their times sum to the wall time from the first to the last."""
    marks = []
    block = time_block(lambda: (marks.append(time.perf_counter()), spin(0.001)), 20, "cpu")
    assert sum(block.calls_s[:-1]) == pytest.approx(marks[-1] - marks[0], rel=0.05)


@pytest.mark.usefixtures("collecting")
def test_the_garbage_collector_is_off_in_timed_calls_and_on_again_after():
    """One variant's garbage is not collected on another's time."""
    seen = []
    time_block(lambda: seen.append(gc.isenabled()), 4, "cpu")
    assert seen == [False] * 4
    assert gc.isenabled()


@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("failing", [0, 1, 3])
def test_the_garbage_collector_is_on_again_after_a_call_that_raises(failing):
    """An error in any call comes through and leaves the collector as it was."""
    calls = iter(range(10))

    def call() -> None:
        if next(calls) == failing:
            msg = "planted"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="planted"):
        time_block(call, 5, "cpu")
    assert gc.isenabled()


@pytest.mark.usefixtures("collecting")
def test_a_garbage_collector_that_was_off_stays_off():
    """A caller who switched it off keeps it off."""
    gc.disable()
    time_block(lambda: None, 2, "cpu")
    assert not gc.isenabled()


def test_a_single_call_is_timed_whole():
    """A call of 10 ms takes at least that."""
    assert time_once(lambda: spin(0.01), "cpu") >= 0.01


def test_a_block_says_what_one_call_took():
    """The mean of its calls; on a GPU that of the queued block, in which nothing waits."""
    assert Block((1.0, 2.0, 6.0)).per_call_s == 3.0
    assert Block((1.0, 2.0, 6.0), queued_calls=4, queued_wall_s=2.0, queued_device_s=1.0).per_call_s == 0.5


def test_torch_s_own_timer_says_the_same():
    """Against torch.utils.benchmark.Timer on a product of a few hundred microseconds: within 20 %."""
    threads = torch.get_num_threads()
    a, b = torch.randn(2, 256, 256).unbind()
    timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b}, num_threads=1)
    torch.set_num_threads(1)
    try:
        # Turn by turn, in blocks shorter than a scheduler's slice: each instrument's least disturbed turn is compared.
        turns = [(time_block(lambda: torch.mm(a, b), 3, "cpu").per_call_s, timer.timeit(3).median) for _ in range(200)]
    finally:
        torch.set_num_threads(threads)
    ours, theirs = map(min, zip(*turns, strict=True))
    assert ours == pytest.approx(theirs, rel=0.2)


@pytest.mark.gpu
def test_on_a_gpu_a_block_is_queued_and_then_timed_call_by_call():
    """Both kinds of time are there, and the events agree with the wall clock."""
    a = torch.randn(2048, 2048, device="cuda")
    torch.mm(a, a)
    block = time_block(lambda: torch.mm(a, a), 20, "cuda")
    assert len(block.calls_s) == block.queued_calls == 20
    assert block.queued_device_s == pytest.approx(block.queued_wall_s, rel=0.2)
    timed = Timer("torch.mm(a, a)", globals={"torch": torch, "a": a}).timeit(20).median
    assert block.per_call_s == pytest.approx(timed, rel=0.2)
