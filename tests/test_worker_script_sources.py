"""Source code is looked up once while a model is scripted, and what is scripted is the same."""

from __future__ import annotations

import inspect

import torch

from bench.worker.script_sources import sources_read_once
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

WORKLOAD = find_workload("seed@batch=2,length=3")


def scripted() -> Executable:
    """A scripted model that has run."""
    executable = Executable(
        VARIANTS["torchscript"], WORKLOAD.config, "inference", "cpu", initial_weights(WORKLOAD.config, 1)
    )
    with executable.context():
        executable.call(WORKLOAD.make_batch(0))
    return executable


def test_each_source_is_looked_up_once(monkeypatch):
    """Without it the same class is asked for again and again; afterwards `inspect` is as it was."""
    asked = []
    real = inspect.getsourcelines

    def counted(thing):
        asked.append(thing)
        return real(thing)

    monkeypatch.setattr(inspect, "getsourcelines", counted)
    with sources_read_once():
        once = scripted()
    assert len(asked) == len(set(asked)) > 0
    asked.clear()
    plain = scripted()
    assert len(asked) > len(set(asked))
    assert inspect.getsourcelines is counted
    batch = WORKLOAD.make_batch(1)
    with once.context():
        assert torch.equal(once.call(batch).outputs, plain.call(batch).outputs)


def test_who_changes_the_lines_changes_them_for_itself():
    """A caller gets a list of its own."""
    with sources_read_once():
        first, number = inspect.getsourcelines(Executable)
        first.clear()
        again, same = inspect.getsourcelines(Executable)
    assert again
    assert number == same
