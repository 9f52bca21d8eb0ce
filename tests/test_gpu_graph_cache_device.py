"""Capturing by torch: its order of calls and its failures on a stand-in, the real thing on a GPU."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
from recurrences import Sizes, assert_close, errors_forward

from kernels.gpu import cell, graph_capture
from kernels.gpu import graph_cache as graphs
from kernels.gpu.graph_cache import SIGHTINGS, Graphs
from kernels.gpu.graph_capture import CaptureError, Cuda

#: Memory that the stand-in's pool has, and an address in it.
SEGMENT = {"address": 4096, "total_size": 1024}


class _Torch:
    """Stand-in for what `Cuda` calls of torch, each call noted; `fails` names one that raises."""

    int8 = "int8"

    def __init__(self, fails: str = "", address: int = 4100) -> None:
        self.calls: list[str] = []
        self.fails, self.address = fails, address
        self.handles = itertools.cycle([5, 6, 7])
        self.cuda = SimpleNamespace(
            CUDAGraph=lambda: self,
            stream=lambda _: contextlib.nullcontext(),
            synchronize=lambda: self._note("wait"),
            memory_snapshot=lambda _, include_traces: [] if include_traces else [SEGMENT],
            graph_pool_handle=lambda: (0, next(self.handles)),
            Stream=lambda priority: SimpleNamespace(
                cuda_stream=next(self.handles), priority=priority, synchronize=lambda: self._note("stream waits")
            ),
        )

    def _note(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails:
            message = f"{name} failed\nand more"
            raise RuntimeError(message)

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert pool
        assert capture_error_mode == "thread_local"
        self._note("begin")

    def capture_end(self) -> None:
        self._note("end")

    def replay(self) -> None:
        self._note("replay")

    def empty(self, size: int, dtype: str, device: str) -> Any:
        del size, dtype, device
        return SimpleNamespace(data_ptr=lambda: self.address)


def _capture(monkeypatch, fake: _Torch) -> Cuda:
    monkeypatch.setattr(graph_capture, "torch", fake)
    device = Cuda()

    def launch() -> None:
        assert not gc.isenabled()
        fake._note("launch")

    try:
        device.capture(launch, device.lane([]))()
    finally:
        assert gc.isenabled()
    return device


def test_a_capture_is_ended_and_replayed(monkeypatch):
    """The device is idle before, launches lie between begin and end, and the generator's writes are done after."""
    fake = _Torch()
    _capture(monkeypatch, fake)
    assert fake.calls == ["wait", "begin", "launch", "end", "stream waits", "replay"]


@pytest.mark.parametrize(("fails", "final"), [("launch", False), ("begin", True), ("end", True)])
def test_a_failed_capture_says_why(fails, final, monkeypatch):
    """The first line of torch's message; final where torch could not begin or end, and such a graph is never freed."""
    fake = _Torch(fails)
    monkeypatch.setattr(graph_capture, "torch", fake)
    device = Cuda()
    with pytest.raises(CaptureError, match=f"^{fails} failed$") as caught:
        device.capture(lambda: fake._note("launch"), device.lane([]))
    assert caught.value.final == final
    assert device._failed == [fake] * {"launch": 0, "begin": 1, "end": 2}[fails]
    assert ("end" in fake.calls) == (fails != "begin")


def test_a_capture_that_another_thread_ended_is_not_the_last(monkeypatch):
    """Who waits for the whole device breaks a capture; where torch then captures again, later ones are tried."""
    fake = _Torch("end")
    monkeypatch.setattr(graph_capture, "torch", fake)
    device = Cuda()

    def end() -> None:
        fails, fake.fails = fake.fails, ""
        fake.calls.append("end")
        if fails:
            message = "operation failed due to a previous error during capture"
            raise RuntimeError(message)

    monkeypatch.setattr(fake, "capture_end", end)
    with pytest.raises(CaptureError, match="previous error") as caught:
        device.capture(lambda: fake._note("launch"), device.lane([]))
    assert not caught.value.final
    assert fake.calls[-2:] == ["begin", "end"]


@pytest.mark.parametrize("address", [4095, 4096 + 1024])
def test_memory_outside_of_the_pool_is_seen(address, monkeypatch):
    """A graph whose temporaries others may be given is thrown away."""
    with pytest.raises(CaptureError, match="own pool"):
        _capture(monkeypatch, _Torch(address=address))


def test_lanes_take_streams_that_no_other_has(monkeypatch):
    """Whatever stream torch hands out next; and none is left to share when all are taken."""
    monkeypatch.setattr(graph_capture, "torch", _Torch())
    device, lanes = Cuda(), []
    for _ in range(3):
        lanes.append(device.lane(lanes))
    assert {lane.stream.cuda_stream for lane in lanes} == {5, 6, 7}
    with pytest.raises(CaptureError, match="no stream"):
        device.lane(lanes)


def _fresh(args: Any, seed: int) -> torch.Tensor:
    """New gates in the same memory; the right output for them, by the kernels without a graph."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    args.gates_input.normal_(generator=generator)
    cell._forward_steps(args, cell.configs(args.problem, backward=False)[0])
    right = args.output.clone()
    args.output.fill_(float("nan"))
    return right


SIZES = Sizes(batch=16, steps=20, hidden=256, directions=2, dtype=torch.float16)


@pytest.fixture
def emptied():
    """No graph from other tests, and none left behind."""
    if torch.cuda.is_available():
        graphs.clear()
    yield
    if torch.cuda.is_available():
        graphs.clear()


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_a_replay_computes_on_what_is_there_now():
    """Fresh numbers in the same memory give fresh results; the same kernels, so the same bits."""
    args = SIZES.forward()
    before = graphs.state()
    for seed in range(6):
        right = _fresh(args, seed)
        cell.forward(args)
        assert torch.equal(args.output, right)
    assert graphs.state().captured == before.captured + 1
    assert graphs.state().replayed == before.replayed + 6 - SIGHTINGS


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_many_sequences_in_one_pool_keep_apart():
    """Several graphs of one stream share temporaries and cuBLAS's workspace, also after some were dropped."""
    held = [Sizes(batch=16, steps=8, hidden=hidden, dtype=torch.float16).forward() for hidden in (64, 128, 1024, 512)]
    own = Graphs(Cuda(), capacity=3)
    for seed in range(12):
        for args in held[: 3 if seed < 6 else 4]:
            right = _fresh(args, seed)
            config = cell.configs(args.problem, backward=False)[0]
            own.run(lambda args=args, config=config: cell._forward_steps(args, config), (), [args.gates_input])
            # What a dropped graph freed would be handed out here.
            junk = torch.full((1 << 24,), float("nan"), device="cuda")
            torch.cuda.empty_cache()
            assert torch.equal(args.output, right)
            del junk
    assert own.state().evicted > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_streams_and_threads_replay_at_the_same_time():
    """Each has its own graphs and temporaries: no interleaving changes a result."""
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            args = Sizes(batch=16, steps=100, hidden=512, dtype=torch.float16, seed=index).forward()
            right = _fresh(args, index)
            for _ in range(50):
                cell.forward(args)
            torch.cuda.current_stream().synchronize()
            if not torch.equal(args.output, right):
                wrong.append(index)

    before = graphs.state().captured
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert graphs.state().captured == before + 4


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_inside_somebody_elses_capture():
    """A caller's own graph takes the launches in, and replays them on fresh data."""
    args = SIZES.forward()
    right = _fresh(args, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cell.forward(args)
    graph.replay()
    assert torch.equal(args.output, right)
    assert graphs.state().plain["the current stream is being captured already"] > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_memory_of_another_pool_is_refused():
    """Under `torch.cuda.use_mem_pool` temporaries would be handed out again: no graph, and the reason is told."""
    args = SIZES.forward()
    right = _fresh(args, 2)
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        for _ in range(SIGHTINGS):
            cell.forward(args)
        with pytest.warns(RuntimeWarning, match="own pool"):
            cell.forward(args)
        cell.forward(args)
    assert torch.equal(args.output, right)


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_a_capture_that_fails_leaves_torch_usable():
    """A launch that fails in a capture alone runs plainly instead; random numbers and later captures still work."""
    own = Graphs(Cuda())
    value = torch.zeros(4, device="cuda")

    def awkward() -> None:
        value.add_(1)
        if torch.cuda.is_current_stream_capturing():
            message = "not in a capture"
            raise RuntimeError(message)

    for _ in range(SIGHTINGS):
        own.run(awkward, ("awkward",), [value])
    with pytest.warns(RuntimeWarning, match="not in a capture"):
        own.run(awkward, ("awkward",), [value])
    own.run(awkward, ("awkward",), [value])
    assert value.tolist() == [SIGHTINGS + 2] * 4
    torch.nn.functional.dropout(torch.ones(8, device="cuda"))
    for _ in range(SIGHTINGS + 2):
        own.run(lambda: value.mul_(2), ("double",), [value])
    assert value.tolist() == [(SIGHTINGS + 2) * 2.0 ** (SIGHTINGS + 2)] * 4
    assert own.state().captured == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("emptied")
def test_a_whole_pass_is_still_right_once_replayed():
    """Lengths, states, two directions: the fourth call on the same memory, against float64."""

    class Often:
        @staticmethod
        def forward(args: Any) -> None:
            for _ in range(SIGHTINGS + 2):
                cell.forward(args)

    sizes = Sizes(batch=5, steps=9, hidden=48, directions=2, lengths=(9, 0, 3, 8, 1))
    before = graphs.state().replayed
    assert_close(errors_forward(sizes, Often), sizes.dtype)
    assert graphs.state().replayed == before + 2
