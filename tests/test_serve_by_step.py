"""Serving by step: a query gets in a row that others used before what it gets alone, and planted leaks are caught."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.__main__ import main
from bench.gate import batched
from bench.gate.decoded_rows import check_decoded
from bench.plan.cases import Case
from bench.records import serving
from bench.records.schema import Status
from bench.worker.batching_queue import BatchCounts
from bench.worker.step_server import JoiningQueue, StepServer
from seq2seq.decoding import rows as rows_module
from seq2seq.decoding.rows import DecodingRows, StepRows
from seq2seq.decoding.search import greedy
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

LIMIT = 4e-6
#: Served by LoadGen, in four rows.
SERVED = "translation-small-scaled@batch=4,length=5,hidden=16"
#: The source again as target, tokens of different lengths, a target of its own, and an LSTM alone.
WORKLOADS = (
    "seed@batch=4,length=5",
    "translation-small-scaled@batch=4,length=6,hidden=16",
    "forecast-tft-scaled@batch=3,length=4,hidden=8",
    "deepbench@hidden=8,batch=4,length=3",
)


class Served:
    """A variant with rows, and the queries of a workload."""

    def __init__(self, name: str, variant: str = "cpu-fused") -> None:
        workload = find_workload(name)
        weights = initial_weights(workload.config, 1)
        self.executable = Executable(VARIANTS[variant], workload.config, "inference", "cpu", weights)
        self.library = batched.QueryLibrary.of([workload.make_batch(seed) for seed in range(3)])

    def run(self, batch):
        """Results of a whole batch by name."""
        return self.executable.named(self.executable.call(self.executable.prepare(batch)))

    def rows(self, count: int) -> StepRows:
        """Free rows over all queries."""
        prepared = self.executable.prepare(self.library.batch)
        return StepRows(self.executable.model, prepared, self.library.lengths, count)

    def check(self, count: int, seed: int) -> batched.Batched:
        """The gate."""
        with self.executable.context():
            return batched.check_rows(self.rows(count), self.run, self.library, LIMIT, seed)


@pytest.mark.parametrize("variant", ["reference", "cpu-fused"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_query_gets_step_by_step_what_it_gets_alone(name, variant):
    """By an LSTM with a step of its own and one without, in rows that are used several times."""
    served = Served(name, variant)
    for count in (1, 3):
        found = served.check(count, seed=3)
        assert found.passed, found.reason
        assert 0 < found.error < found.limit == 2 * LIMIT


def no_reset(lstm, x, state, resets, right=rows_module._stepped):
    """Leave in a row what the query before it left there."""
    return right(lstm, x, state, torch.zeros_like(resets))


def neighbours(lstm, x, state, resets, right=rows_module._stepped):
    """Hand every row the state of the row beside it."""
    outputs = right(lstm, x, state, resets)
    for value in state:
        value.copy_(value.roll(1, 1))
    return outputs


def stale(_, stage, queries):
    """Start the next LSTM from where it is."""
    for _, holder in queries:
        holder.stage, holder.step = stage, 0


@pytest.mark.parametrize("variant", ["reference", "cpu-fused"])
@pytest.mark.parametrize(("place", "defect"), [("_stepped", no_reset), ("_stepped", neighbours), ("_enter", stale)])
def test_a_planted_leak_between_rows_is_caught(place, defect, variant, monkeypatch):
    """A state that is not reset, that goes to another row, or that the decoder is not given."""
    monkeypatch.setattr(StepRows if place == "_enter" else rows_module, place, defect)
    found = Served(WORKLOADS[1], variant).check(3, seed=3)
    assert not found.passed
    assert "step by step" in found.reason


@settings(max_examples=10)
@given(count=st.integers(1, 4), joins=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_each_query_leaves_once_after_its_steps(count, joins):
    """A query takes as many steps as its source and target have, whoever joins meanwhile, and frees its row."""
    served = Served(WORKLOADS[1])
    lengths = served.library.lengths
    with served.executable.context():
        rows = served.rows(count)
        due, query, step = {}, 0, 0
        while joins or rows.active:
            for _ in range(min(rows.free, joins.pop(0) if joins else 0)):
                rows.join(query, query % len(lengths))
                due[query] = step + sum(lengths[query % len(lengths)])
                query += 1
            step += 1
            assert {finished.query for finished in rows.advance()} == {q for q, when in due.items() if when == step}
        assert rows.free == count
        assert rows.valid == sum(sum(lengths[q % len(lengths)]) for q in range(query))


class Decoded:
    """A variant whose rows decode, and queries about sentences in a language of nine words, so that some end early."""

    def __init__(self, variant: str = "cpu-fused") -> None:
        workload = find_workload("translation-small-scaled@batch=8,length=9,hidden=16")
        words = {"output_size": 9, "source_vocabulary": 9, "target_vocabulary": 9}
        workload = dataclasses.replace(workload, config=dataclasses.replace(workload.config, **words))
        weights = {name: 4 * value for name, value in initial_weights(workload.config, 2).items()}
        self.executable = Executable(VARIANTS[variant], workload.config, "decode", "cpu", weights)
        self.library = batched.QueryLibrary.of([workload.make_batch(seed) for seed in range(3)])

    def rows(self, count: int) -> DecodingRows:
        """Free rows over all queries."""
        prepared = self.executable.prepare(self.library.batch)
        return DecodingRows(self.executable.model, prepared, self.library.lengths, count)

    def check(self, count: int, seed: int) -> batched.Batched:
        """The gate."""
        with self.executable.context():
            config = self.executable.model.config
            return check_decoded(self.rows(count), self.forced, config, self.library, (LIMIT, LIMIT), seed)

    def forced(self, batch):
        """Outputs along a given target."""
        return self.executable.forward(self.executable.prepare(batch)).outputs


@pytest.mark.parametrize("variant", ["reference", "cpu-fused"])
def test_a_query_decodes_in_a_row_what_it_decodes_alone(variant):
    """Token for token until its end token or its last step, whoever joins and leaves beside it; the score too."""
    served = Decoded(variant)
    with served.executable.context():
        samples, found = batched.stepped(served.rows(3), served.library, seed=3)
        early = 0
        for query, sample in enumerate(samples):
            batch, most = served.library.gather([sample]), served.library.lengths[sample][-1]
            alone = greedy(served.executable.model, batch.source, batch.source_lengths, max_steps=most)
            assert found[query]["tokens"].tolist() == alone.tokens.tolist()
            assert found[query]["scores"].tolist() == pytest.approx(alone.scores.tolist(), rel=1e-4)
            early += alone.tokens.size(1) < most
    assert 0 < early < len(samples)


@pytest.mark.parametrize("variant", ["reference", "cpu-fused"])
def test_the_gate_lets_decoding_rows_pass(variant):
    """In one row, and in three that are used several times."""
    for count in (1, 3):
        found = Decoded(variant).check(count, seed=3)
        assert found.passed, found.reason


def fed_by_a_neighbour(rows, stage, samples, steps, right=DecodingRows._read):
    """Read the token that the row beside chose."""
    value = right(rows, stage, samples, steps)
    return value.roll(1) if stage == len(rows.streams) - 1 else value


@pytest.mark.parametrize(
    ("holder", "place", "defect"),
    [
        (rows_module, "_stepped", no_reset),
        (rows_module, "_stepped", neighbours),
        (StepRows, "_enter", stale),
        (DecodingRows, "_read", fed_by_a_neighbour),
        (rows_module, "END", -1),
    ],
)
def test_planted_leaks_between_decoding_rows_are_caught(holder, place, defect, monkeypatch):
    """Of states, of what the decoder is fed with, and an end token that ends nothing."""
    monkeypatch.setattr(holder, place, defect)
    found = Decoded().check(3, seed=3)
    assert not found.passed
    assert "step by step" in found.reason


def test_what_rows_cannot_decode_is_refused():
    """A decoder of values, by the rows and by the server; and a beam, of which a row holds one hypothesis."""
    served = Served(WORKLOADS[0])
    with pytest.raises(ValueError, match="no end token ends a query"):
        DecodingRows(served.executable.model, served.library.batch, served.library.lengths, 1)
    server = StepServer.__new__(StepServer)
    server.executable, server.case = served.executable, Case("seed", "reference", "decode", "cpu", 1)
    assert "no tokens" in server.refuses_model()
    server.case = Case("seed", "reference", "inference", "cpu", 1)
    assert server.refuses_model() is None
    server.executable, server.case = Decoded().executable, Case("x", "reference", "decode", "cpu", 1)
    assert server.refuses_model() is None
    server.executable.beam = 4
    assert "a beam of 4" in server.refuses_model()


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_decoding_is_served_by_step(tmp_path):
    """LoadGen's queries join and leave rows, each fed with what it generates; the search finds a load that holds."""
    pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
    out = tmp_path / "out"
    words = ["serve", "--mode", "decode", "--batching", "step", "--workload", SERVED, "--variant", "reference"]
    words += ["--bound", "p90=25ms", "--budget", "1", "--repeats", "1", "--threads", "1", "--seed", "1"]
    assert main([*words, "--out", str(out)]) == 0
    (record,) = serving.read(out)
    assert (record.status, record.mode, record.batching) == (Status.OK, "decode", "step")
    assert record.batched_error <= record.batched_limit
    assert record.offline_qps > 0
    assert record.qps is None or record.qps <= serving.RESOLUTION * record.offline_qps_hi
    tests = serving.read_tests(out)
    assert {test.verdict for test in tests if test.phase == "search"} >= {"held"}
    # Offline all rows are taken.
    assert max(test.batch_mean for test in tests if test.phase == "offline") > 3


def test_a_full_house_takes_no_query():
    """Nobody is put out of a row."""
    served = Served(WORKLOADS[0])
    with served.executable.context():
        rows = served.rows(1)
        rows.join(0, 0)
        with pytest.raises(ValueError, match="no row is free"):
            rows.join(1, 1)


def test_a_queue_hands_out_the_oldest_and_ends():
    """At most as many as there are rows, in order; who waits is woken by a query or by the end."""
    queue = JoiningQueue()
    queue.put([(1, 10), (2, 20), (3, 30)])
    assert queue.take(2, wait=True) == [(1, 10), (2, 20)]
    assert queue.take(0, wait=False) == []
    assert queue.take(5, wait=False) == [(3, 30)]
    assert queue.take(5, wait=False) == []
    timer = threading.Timer(0.05, queue.put, [[(4, 40)]])
    timer.start()
    assert queue.take(5, wait=True) == [(4, 40)]
    threading.Timer(0.05, queue.close).start()
    assert queue.take(5, wait=True) == []
    timer.join()


def test_steps_count_their_rows():
    """Queries in a step are what a batch's queries are; a query counts once, when it is done."""
    counts = BatchCounts()
    counts.add_step(3, 0, 0.5)
    counts.add_step(2, 2, 0.25)
    assert (counts.batches, counts.together, counts.queries, counts.busy_s) == (2, 5, 2, 0.75)


@pytest.mark.parametrize(("variant", "text"), [("onnxruntime", "whole sequences"), ("torchscript", "torchscript")])
def test_variants_without_steps_are_refused(variant, text):
    """What runs whole sequences would not be what its name says."""
    assert text in StepServer.refuses(Case("seed", variant, "inference", "cpu", 1))
    assert StepServer.refuses(Case("seed", "reference", "inference", "cpu", 1)) is None


@pytest.mark.parametrize("name", ["speech-ctc-scaled@batch=2,length=12,hidden=16", "translation-iwslt-scaled"])
def test_models_that_are_no_chain_have_no_streams(name):
    """Both directions, or attention: no query can go through them a step at a time."""
    model = find_workload(name).config.build(torch.nn.LSTM)
    assert model.streams() == ()
    with pytest.raises(ValueError, match="step by step"):
        StepRows(model, None, (), 1)


@pytest.mark.parametrize("option", [["--longest-wait", "2ms"], ["--lengths", "padded"]])
def test_options_of_a_queue_are_refused(option, capsys):
    """They would have no effect."""
    pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
    assert main(["serve", "--bound", "p99=20ms", "--batching", "step", *option]) == 2
    assert f"leave {option[0]} out" in capsys.readouterr().err
