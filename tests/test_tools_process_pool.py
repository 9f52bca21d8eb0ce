"""Work in child processes: what hangs, dies or raises costs one item."""

from __future__ import annotations

import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

from kernels.tools import process_pool
from kernels.tools.process_pool import Pool


@pytest.fixture(scope="module", autouse=True)
def _forked_children():
    """Let children be forks of a process that has imported torch; tests of the tools start them afresh."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        yield
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kernels.tools.process_pool"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_pool, "multiprocessing", SimpleNamespace(get_context=lambda _: context))
        yield


def in_parts(item: list[float]) -> str:
    """Sleep for each part."""
    for number, seconds in enumerate(item):
        process_pool.at(f"part {number}")
        time.sleep(seconds)
    return "done"


def misbehave(item: str) -> str:
    """Do what the item says."""
    if item == "hang":
        time.sleep(600)
    if item == "die":
        os._exit(3)
    if item == "raise":
        msg = "two\nlines"
        raise RuntimeError(msg)
    return f"{item} by {os.getpid()}"


@pytest.mark.slow
def test_one_bad_item_costs_one_item():
    """A hang is killed, a death and an exception are told, and what comes after is done all the same."""
    with Pool(misbehave, timeout_s=3) as pool:
        outcomes = list(pool.run(["a", "hang", "b", "die", "c", "raise", "d"]))
    assert [outcome.item for outcome in outcomes] == ["a", "hang", "b", "die", "c", "raise", "d"]
    assert [outcome.status for outcome in outcomes] == ["ok", "hang", "ok", "crash", "ok", "error", "ok"]
    assert "killed" in outcomes[1].reason
    assert "exit code 3" in outcomes[3].reason
    assert outcomes[5].reason.startswith("RuntimeError: two lines (misbehave, line ")
    # After an exception the child still works, and is kept.
    assert outcomes[4].value.split()[-1] == outcomes[6].value.split()[-1]


@pytest.mark.slow
def test_children_work_side_by_side():
    """Every item is done once, by no more children than asked for."""
    with Pool(misbehave, jobs=2) as pool:
        outcomes = list(pool.run(str(number) for number in range(20)))
    assert sorted(int(outcome.item) for outcome in outcomes) == list(range(20))
    assert len({outcome.value.split()[-1] for outcome in outcomes}) == 2


def test_the_limit_is_that_of_a_part_and_a_hang_names_its_part():
    """Parts that together take longer than the limit are fine; one alone that does is named."""
    with Pool(in_parts, timeout_s=0.8) as pool:
        fine, hung = pool.run([[0.4] * 4, [0.1, 60.0]])
    assert (fine.status, fine.value, fine.at) == ("ok", "done", "part 3")
    assert (hung.status, hung.at) == ("hang", "part 1")


def test_a_child_says_that_it_has_started_when_it_can_compute(monkeypatch):
    """A GPU's context takes seconds to make, which are part of no item's time."""
    said, worked = [], []
    connection = SimpleNamespace(send=lambda message: said.append((message[0], len(worked))), recv=_no_more)
    monkeypatch.setattr(process_pool, "_works", lambda: worked.append(True))
    monkeypatch.setattr(process_pool.torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(process_pool, "_TOLD", [])
    process_pool._serve(connection, misbehave)
    assert said == [("ready", 1)]


def _no_more() -> object:
    raise EOFError


def test_who_is_no_child_may_name_parts_too():
    """Nobody listens."""
    process_pool.at("part")


@pytest.mark.parametrize(
    ("cores", "gib", "expected"), [(16, None, 12), (6, None, 4), (2, None, 1), (16, 140, 12), (16, 8, 2), (16, 2, 1)]
)
def test_as_many_children_as_cores_and_a_gpu_have_room_for(monkeypatch, cores, gib, expected):
    """Twelve contexts and their problems fill a small GPU, and what then lacks memory would be taken for wrong."""
    monkeypatch.setattr(process_pool, "usable_cores", lambda: cores)
    monkeypatch.setattr(process_pool.torch.cuda, "is_available", lambda: gib is not None)
    monkeypatch.setattr(process_pool.torch.cuda, "current_device", lambda: 0)
    facts = SimpleNamespace(total_memory=(gib or 0) << 30)
    monkeypatch.setattr(process_pool.torch.cuda, "get_device_properties", lambda _: facts)
    assert process_pool.children() == expected
