"""What a seat checks in the first seating of a group and in a further one, and what they keep for each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gate.parity import Gate
from bench.gate.planted_defects import DEFECTS
from bench.plan.cases import Case
from bench.timing import seat
from bench.worker import server
from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS
from seq2seq.runtimes import export


@pytest.fixture
def seated(tmp_path, monkeypatch):
    """Seats one variant and gates it again, as a process does; returns the events."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def seating(variant: str, mode: str, *, first: bool) -> list[dict[str, object]]:
        monkeypatch.setattr(server, "_checks", {})
        monkeypatch.setattr(seat, "READY", {})
        events = []

        def emit(event: str, **fields: object) -> None:
            events.append({"event": event} | fields)

        case = dataclasses.asdict(Case("seed@batch=2,length=3", variant, mode, "cpu", 1))
        server.sit({"cases": [case], "seed": 10, "audit": first, "truth": str(tmp_path / "kept")}, emit)
        server.stand({"seed": 11}, emit)
        return events

    yield seating
    export.EXPORTS.folder = None
    torch.set_num_threads(threads)


def gates(events: list[dict[str, object]]) -> list[tuple[object, object]]:
    """When it was gated, and whether it passed."""
    return [(event["when"], event["passed"]) for event in events if event["event"] == "gate"]


def test_every_seating_gates_before_and_after_the_rounds(seated, monkeypatch):
    """The first one whole, a further one without the gradients of inputs and the audit."""
    looked = []
    check = Gate.check
    monkeypatch.setattr(
        Gate, "check", lambda self, *given, **named: looked.append(named["of_inputs"]) or check(self, *given, **named)
    )
    audited = []
    find = server.Audit.find
    monkeypatch.setattr(
        server.Audit, "find", lambda self, *given, **named: audited.append(1) or find(self, *given, **named)
    )
    for first in (True, False):
        assert gates(seated("loop", "training", first=first)) == [("before", True), ("after", True)]
    assert looked == [True, True, False, False]
    assert len(audited) == 2


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("first", [True, False])
def test_a_planted_defect_gets_no_turn_in_any_seating(seated, monkeypatch, mode, first):
    """With the truth that an honest process kept."""
    seated("loop", mode, first=True)
    monkeypatch.setitem(LSTMS, "loop", next(iter(DEFECTS.values())))
    assert LSTMS["loop"] is not LoopLSTM
    assert gates(seated("loop", mode, first=first)) == [("before", False)]


def test_what_the_first_seating_computed_is_not_computed_again(seated, monkeypatch):
    """Neither truth nor an export, before the rounds and after them."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    seated("onnxruntime", "inference", first=True)

    def unwanted(*_: object) -> None:
        msg = "done again"
        raise AssertionError(msg)

    monkeypatch.setattr(Gate, "compute", unwanted)
    monkeypatch.setattr(export, "_export", unwanted)
    monkeypatch.setattr(export.EXPORTS, "_newest", {})
    assert gates(seated("onnxruntime", "inference", first=False)) == [("before", True), ("after", True)]
