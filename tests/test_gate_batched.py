"""The gate of batched serving: what a query gets in a batch equals what it gets alone, and planted leaks are caught."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gate import batched
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

LIMIT = 4e-6
FIXED, LENGTHS, LABELS = (
    "seed@batch=4,length=5",
    "translation-small-scaled@batch=4,length=6,hidden=16",
    "speech-ctc-scaled@batch=2,length=12,hidden=16",
)


def served(name: str):
    """A reference that runs batches, and the queries of a workload."""
    workload = find_workload(name)
    executable = Executable(
        VARIANTS["reference"], workload.config, "inference", "cpu", initial_weights(workload.config, 1)
    )

    def run(batch):
        with executable.context():
            return executable.named(executable.call(executable.prepare(batch)))

    return run, batched.QueryLibrary.of([workload.make_batch(seed) for seed in range(3)])


@pytest.mark.parametrize("name", [FIXED, LENGTHS, LABELS])
def test_a_query_gets_in_a_batch_what_it_gets_alone(name):
    """With and without different lengths, and where labels are not along the source."""
    run, library = served(name)
    found = batched.check(run, library, 5, LIMIT, seed=3)
    assert found.passed, found.reason
    assert found.error > 0
    assert found.limit == 2 * LIMIT


def test_a_batch_is_as_long_as_its_longest_query():
    """Shorter queries are padded to that, and no further."""
    _, library = served(LENGTHS)
    assert len({steps for steps, _ in library.lengths}) > 1
    for samples in ([0], [1, 2], [0, 3, 5]):
        batch = library.gather(samples)
        assert batch.source.size(1) == max(library.lengths[sample][0] for sample in samples)
        assert batch.target.size(1) == batch.expected.size(1) == max(library.lengths[sample][1] for sample in samples)


def leaking_padding(run):
    """Take every query for as long as the longest of its batch."""

    def planted(batch):
        full = torch.full_like(batch.source_lengths, batch.source.size(1))
        return run(dataclasses.replace(batch, source_lengths=full))

    return planted


def swapping(run):
    """Give each query its neighbour's result."""
    return lambda batch: {name: value.roll(1, 0 if name == "outputs" else 1) for name, value in run(batch).items()}


def scaled_by_the_batch(run):
    """Round outputs to a scale that is taken over the whole batch, as dynamic quantisation does."""

    def planted(batch):
        found = dict(run(batch))
        scale = found["outputs"].abs().amax() / 127
        return found | {"outputs": (found["outputs"] / scale).round() * scale}

    return planted


def last_alone(run):
    """Leave the last query of a batch out."""

    def planted(batch):
        found = {name: value.clone() for name, value in run(batch).items()}
        if batch.size > 1:
            found["outputs"][-1] = float("nan")
        return found

    return planted


@pytest.mark.parametrize("defect", [leaking_padding, swapping, scaled_by_the_batch, last_alone])
def test_planted_defects_are_caught(defect):
    """Queries that touch each other are told, with the query and the limit."""
    run, library = served(LENGTHS)
    found = batched.check(defect(run), library, 5, LIMIT, seed=3)
    assert not found.passed
    assert "another result in a batch than alone" in found.reason
    assert "limit 8.00e-06" in found.reason
