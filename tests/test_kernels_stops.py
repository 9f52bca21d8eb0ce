"""The way of a tensor from `LSTM.forward` to the CPU kernel is short: at most 8 functions of ours are handed it.

kernels/README.md names them. A stop is such a function, called before native code is: it is given the memory of the
tensor, alone, in a list or in a dataclass.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import LSTM
from kernels.cpu.build import library

OURS = str(Path(sys.modules["kernels"].__file__ or "").parent)
MOST = 8
#: Of a call like an earlier one.
MOST_AT_ONCE = 3


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of an argument, in it, and in what it holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif dataclasses.is_dataclass(value):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


class Watch:
    """Notes the functions of ours that are called until native code is."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stops: list[str] = []
        self.at: int | None = None
        self.arrived = False

    def __call__(self, frame: FrameType, event: str, called: object) -> None:
        """Note a call; for `sys.setprofile`."""
        code = frame.f_code
        if event == "c_call" and getattr(called, "__name__", "") in {"at_once", "step"}:  # of entry.cpp
            self.arrived = True
        if event != "call" or self.arrived or not code.co_filename.startswith(OURS) or code.co_name[0] == "<":
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)]
        given = [value.data_ptr() for name in names for value in _tensors(frame.f_locals[name])]
        # The way begins with the first tensor: the input of the module, or of the operator in a compiled graph.
        self.at = given[0] if self.at is None and given else self.at
        self.calls.append(code.co_qualname)
        if self.at in given:
            self.stops.append(code.co_qualname)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Watch]:
    """Call something, and give what was called on its way to native code."""
    watch = Watch()
    for name in ("lstm_forward", "lstm_layers"):
        real = getattr(library(kept=0), name)

        def arrive(*args: object, real: Any = real) -> Any:
            watch.arrived = True
            return real(*args)

        monkeypatch.setattr(library(kept=0), name, arrive)

    def run(call: Callable[[], object]) -> Watch:
        watch.arrived = False  # as what was called before may have
        sys.setprofile(watch)
        try:
            call()
        finally:
            sys.setprofile(None)
        assert watch.arrived
        return watch

    return run


def _called(lstm: LSTM, x: Tensor) -> None:
    with torch.no_grad():
        lstm(x)


@pytest.mark.parametrize("stateful", [False, True])
def test_inference_makes_few_calls_at_all(watched: Callable[..., Watch], stateful: bool) -> None:
    """A call like an earlier one is checked and handed over: not only its stops are few, but all calls."""
    lstm, x = LSTM(3, 4, implementation="cpu-fused"), torch.randn(2, 1, 3)
    _called(lstm, x)
    hx = (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)) if stateful else None
    with torch.no_grad():
        watch = watched(lambda: lstm.forward(x, hx))
    assert watch.stops[0] == "LSTM.forward"
    assert len(watch.stops) <= len(watch.calls) <= MOST_AT_ONCE, watch.calls


@pytest.mark.parametrize("stateful", [False, True])
def test_training_like_an_earlier_call_stops_rarely(watched: Callable[..., Watch], stateful: bool) -> None:
    """With gradients too, a call like an earlier one is checked and handed over."""
    lstm, x = LSTM(3, 4, implementation="cpu-fused"), torch.randn(2, 1, 3)
    lstm(x)
    hx = (torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)) if stateful else None
    watch = watched(lambda: lstm.forward(x, hx))
    assert watch.stops == ["LSTM.forward", "PreparedTraining.at_once", "DifferentiableLayer.forward"]


def test_a_step_makes_few_calls_at_all(watched: Callable[..., Watch]) -> None:
    """So does a step."""
    lstm, x, state = LSTM(3, 4, implementation="cpu-fused"), torch.randn(1, 3), torch.zeros(2, 1, 1, 4).unbind()
    _called(lstm, x[None])
    with torch.no_grad():
        watch = watched(lambda: lstm.step(x, state))
    assert len(watch.calls) <= MOST_AT_ONCE, watch.calls


@pytest.mark.parametrize("gradients", [False, True], ids=["the first call", "training"])
def test_other_calls_stop_rarely(watched: Callable[..., Watch], gradients: bool) -> None:
    """Training, and inference that has to prepare, stop at most so often."""
    lstm, x = LSTM(3, 4, implementation="cpu-fused"), torch.randn(2, 1, 3)
    with torch.set_grad_enabled(gradients):
        watch = watched(lambda: lstm.forward(x))
    assert watch.stops[0] == "LSTM.forward"
    assert len(watch.stops) <= MOST, watch.stops


def test_a_compiled_graph_stops_rarely(watched: Callable[..., Watch]) -> None:
    """From the operator in an exported program on."""
    lstm, x = LSTM(3, 4, implementation="cpu-fused"), torch.randn(2, 1, 3)
    with torch.no_grad():
        program = torch.export.export(lstm, (x,)).module()
        watch = watched(lambda: program(x))
    assert len(watch.stops) <= MOST, watch.stops
