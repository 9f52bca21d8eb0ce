"""The audit: no cheat gets through, whatever the gate says of it, and no honest variant is refused."""

from __future__ import annotations

import dataclasses
import gc
import json
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.gate import audit as honesty
from bench.gate import parity
from bench.gate import repeated_inputs as seen
from bench.gate.audit import Audit
from bench.gate.parity import Gate, judge
from bench.machine import interference
from bench.timing import clock, seat
from bench.worker.gating import gated
from bench.worker.server import load_plugins
from kernels.reference import LoopLSTM
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.checkpoint import save_pretrained
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugins" / "cheating_variants.py"
MODES = ("inference", "training")
#: Cheats in inference, and what their records must say.
REFUSED = {
    "memo-address": "gave the results of the call before",
    "memo-version": "the result depends on where the input lies",
    "memo-content": "faster on inputs it has seen before",
    "constant": "the weights were changed and the results stayed the same",
    "late": "the results were not complete when the call returned",
    "lazy": "outputs is a Lazy, not a plain tensor",
    "aliased": "outputs shares memory with source",
    "spoils-input": "a call changed its input source",
    "spoils-weights": "a call in inference changed the weights: fc.weight",
    "first-weights": "the weights were changed and the results stayed the same",
    "one-buffer": "of a call was overwritten by the next call",
    "slow-clock": "replaced time.perf_counter_ns, bench.timing.clock._now_ns, which measures time",
}
REFUSED_STEPS = {
    "no-backward": "is wrong: grad ",
    "no-step": "a training step did not move ",
    "first-weights": "is wrong: grad ",
}
#: What the gate itself lets through, in inference: the reason for the audit.
GATE_PASSES = set(REFUSED) - {"spoils-weights"}
SMALL = (
    "seed@batch=3,length=4",
    "speech-las-scaled@batch=2,length=10,hidden=16",
    "translation-small-scaled@batch=2,length=6",
)
#: Of a loss with kinks.
QUANTILES = "forecast-tft-scaled@batch=17,length=14,hidden=8"
SUITE = """
name = "cheats"
summary = "every cheat beside honest variants"
budget_s = 4
processes = 1
[[select]]
workloads = ["seed"]
variants = ["reference", "loop", {inference}]
modes = ["inference"]
[[select]]
workloads = ["seed"]
variants = ["reference", "loop", {training}]
modes = ["training"]
[[select]]
workloads = ["seed@batch=8"]
variants = ["reference", "forged-samples"]
modes = ["inference"]
"""
EAGER = ("reference", "loop", "onednn", "amp-bf16", "amp-bf16-native", "torchscript")


@pytest.fixture(scope="module")
def cheats():
    """The cheating variants, and everything as it was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Executable, "_compile", Executable._compile)
        patch.setattr(Executable, "__init__", Executable.__init__)
        before = dict(VARIANTS)
        load_plugins([str(PLUGIN)])
        yield
        VARIANTS.clear()
        VARIANTS.update(before)


@pytest.fixture(autouse=True)
def one_thread():
    """As many threads as a small problem needs, and the clocks put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    honesty.restore_timekeepers()


class Subject:
    """A variant ready to be judged on a workload, in the worker's way."""

    def __init__(self, name: str, mode: str, workload: str = "seed", device: str = "cpu") -> None:
        self.workload = find_workload(workload)
        self.weights, self.batch = initial_weights(self.workload.config, 1), self.workload.make_batch(0)
        self.gate = Gate(self.workload, mode, device)
        self.audit = Audit(self.gate, self.weights, self.batch)
        self.executable = Executable(VARIANTS[name], self.workload.config, mode, device, self.weights)
        self.prepared = self.executable.prepare(self.batch)

    def judged(self) -> str:
        """The reason why it is refused before the rounds or after them; nothing otherwise."""
        before = gated(self.gate, self.audit, self.executable, self.prepared, 100, warm=False)
        if not before["passed"]:
            return before["reason"]
        with self.executable.context():
            for _ in range(5):
                self.executable.call(self.prepared)
        return gated(self.gate, self.audit, self.executable, self.prepared, 101, warm=True)["reason"]


@pytest.mark.usefixtures("cheats")
@pytest.mark.parametrize("name", REFUSED)
def test_a_cheat_is_refused_in_words(name):
    """The finding stands in the reason."""
    reason = Subject(name, "inference").judged()
    # On a busy machine late results come so late that the gate itself, which looks later than the audit, sees zeros.
    assert REFUSED[name] in reason or (name == "late" and "outputs: error 1.00e+00" in reason)


@pytest.mark.usefixtures("cheats")
@pytest.mark.parametrize("name", REFUSED_STEPS)
def test_a_cheating_training_step_is_refused_in_words(name):
    """A step without its backward pass, without its optimizer, or with other weights than the model's."""
    assert REFUSED_STEPS[name] in Subject(name, "training").judged()


@pytest.mark.usefixtures("cheats")
@pytest.mark.parametrize("name", sorted(GATE_PASSES))
def test_the_gate_alone_lets_the_cheat_through(name):
    """Its first look, on memory of its own, finds nothing: without the audit these would be timed."""
    subject = Subject(name, "inference")
    assert subject.gate.check(subject.executable, 100).passed


@pytest.mark.parametrize("workload", SMALL)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", EAGER)
def test_an_honest_variant_is_not_refused(name, mode, workload):
    """Values and tokens, with lengths and without, fp32 and bf16: nothing is held against them."""
    if VARIANTS[name].why_not("cpu", mode, find_workload(workload)):
        pytest.skip(f"{name} cannot run here")
    assert Subject(name, mode, workload).judged() == ""


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["compile", "compile-loop"])
def test_an_honest_compiled_variant_is_not_refused(name, mode):
    """Code that a compiler made is held to the same; of a few steps, since each is compiled on its own.

    Nowhere else is the loop's generated code held against float64: without lengths in inference, with them in training.
    """
    problem = {"inference": "seed", "training": "translation-small-scaled"}[mode]
    workload = f"{problem}@batch=2,length=2,hidden=4"
    if VARIANTS[name].why_not("cpu", mode, find_workload(workload)):
        pytest.skip(f"{name} cannot run here")
    assert Subject(name, mode, workload).judged() == ""


@pytest.mark.parametrize("workload", [SMALL[2], QUANTILES])
@pytest.mark.parametrize("mode", MODES)
def test_an_audit_leaves_batch_and_weights_as_timing_starts_from_them(mode, workload):
    """Bit for bit, also where what is judged was moved away from a kink; in training the optimizer starts anew."""
    subject = Subject("reference", mode, workload)
    moved = not torch.equal(subject.audit._timed.batch.expected, subject.batch.expected)
    assert moved == (workload == QUANTILES and mode == "training")
    before = subject.batch.copy()
    assert subject.judged() == ""
    for name, value in subject.prepared.tensors().items():
        assert torch.equal(value, before.tensors()[name])
    assert all(torch.equal(value, subject.weights[name]) for name, value in subject.executable.weights().items())
    assert subject.executable._optimizer is None


#: A variant in bf16 that every CPU can run, its LSTM planted.
LOW = Variant("planted", "", lstm="planted", precision="bf16", autocast=True)


class Flushed(LoopLSTM):
    """The loop, whose backward pass takes small gradients for none."""

    def forward(self, *arguments: object) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Run the loop; its gradient goes on where it is of a common size."""
        output, state = super().forward(*arguments)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * (gradient.norm() > 0.01))
        return output, state


@pytest.fixture
def converged(tmp_path):
    """The workload of a checkpoint whose gradients are a thousandth of those that random weights have."""
    model = Seq2SeqConfig(3, 8, 1).build(nn.LSTM)
    with torch.no_grad():
        model.fc.weight *= 1e-3
    save_pretrained(model, tmp_path / "model")
    return find_workload(f"checkpoint:{tmp_path / 'model'}@batch=4,length=5")


@pytest.mark.parametrize(("lstm", "words"), [(LoopLSTM, ""), (Flushed, "is wrong: grad ")])
def test_a_small_gradient_of_a_checkpoint_is_held_against_its_own_size(converged, monkeypatch, lstm, words):
    """In bf16, where it is missing: beside those of the gate's random weights it would be none at all."""
    monkeypatch.setitem(LSTMS, "planted", lstm)
    weights, batch, gate = starting_weights(converged, 0), converged.make_batch(0), Gate(converged, "training", "cpu")
    executable = Executable(LOW, converged.config, "training", "cpu", weights)
    assert gate.check(executable, 100).passed
    reason = Audit(gate, weights, batch).find(executable, executable.prepare(batch), 100, warm=False)
    assert words in reason
    assert bool(reason) == bool(words)


def test_the_audit_knows_usual_errors_as_the_gate_does(converged, monkeypatch):
    """The reference's on a few other problems, of a checkpoint those at its own weights; norms likewise."""
    asked = []

    def spy(found, truth, expected, precision, usual, usual_errors, **limits):
        asked.append((usual(), usual_errors()))
        return judge(found, truth, expected, precision, usual, usual_errors, **limits)

    monkeypatch.setattr(parity, "judge", spy)
    weights, batch, gate = starting_weights(converged, 0), converged.make_batch(0), Gate(converged, "training", "cpu")
    executable = Executable(dataclasses.replace(LOW, lstm="loop"), converged.config, "training", "cpu", weights)
    assert Audit(gate, weights, batch).find(executable, executable.prepare(batch), 100, warm=False) == ""
    assert asked == [(gate.usual_norms(at), gate.usual_errors("bf16", at)) for at in (weights, None)]
    assert max(asked[0][0].values()) > 0


def test_reused_outputs_are_allowed_to_a_variant_that_says_so(cheats, monkeypatch):
    """CUDA graphs give the same memory each time; the variant's data says it, and so does its evidence."""
    del cheats
    monkeypatch.setitem(VARIANTS, "one-buffer", dataclasses.replace(VARIANTS["one-buffer"], reuses_outputs=True))
    assert Subject("one-buffer", "inference").judged() == ""


def test_a_first_step_is_that_of_torch_s_adam():
    """Weights moved by torch.optim.Adam from zero, gradients of all sizes down to nothing."""
    weight = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    weight.grad = torch.tensor([0.0, 1e-12, -1e-8, 1e-4, -1.0, 1e6], dtype=torch.float64)
    torch.optim.Adam([weight], lr=honesty.LEARNING_RATE).step()
    assert torch.allclose(weight.detach(), honesty.first_step(weight.grad), rtol=1e-9, atol=0)


@pytest.mark.parametrize("workload", ["seed@batch=1,length=1", *SMALL])
def test_a_varied_batch_is_new_and_as_long(workload):
    """Same shapes, types and lengths; other values, real tokens, and never the same twice."""
    batch, generator = find_workload(workload).make_batch(0), torch.Generator().manual_seed(0)
    found = [batch.varied(generator) for _ in range(3)]
    for new in found:
        for name, value in new.tensors().items():
            assert value.shape == batch.tensors()[name].shape
            assert value.dtype == batch.tensors()[name].dtype
            assert name in {"source", "target"} or value is batch.tensors()[name]
        if not batch.source.is_floating_point():
            assert 0 <= int(new.source.min()) <= int(new.source.max()) <= int(batch.source.max())
    assert len({value.source.numpy().tobytes() for value in [batch, *found]}) == 4


def test_a_batch_is_overwritten_past_the_version_counters():
    """New content, the same memory, the same version: what a cache keyed by version takes for the same."""
    batch, other = (find_workload(SMALL[2]).make_batch(seed) for seed in (0, 1))
    before = {name: (value.data_ptr(), value._version) for name, value in batch.tensors().items()}
    batch.overwrite(other)
    assert {name: (value.data_ptr(), value._version) for name, value in batch.tensors().items()} == before
    assert all(torch.equal(value, other.tensors()[name]) for name, value in batch.tensors().items())


@pytest.mark.parametrize("waking", [0, 3])
def test_a_device_that_idled_is_woken_before_a_new_input(waking, monkeypatch):
    """Drawing inputs takes the CPU long; untimed calls follow it before a timed one, on a new or a seen input."""
    seed, calls = find_workload("seed"), []
    executable = Executable(VARIANTS["reference"], seed.config, "inference", "cpu", starting_weights(seed, 0))
    batch = seed.make_batch(0)
    monkeypatch.setattr(seen, "WAKING_CALLS", {"cpu": waking})
    monkeypatch.setattr(clock, "time_once", lambda *arguments: calls.append(arguments) or 1.0)
    assert seen.compare(executable, executable.prepare(batch), batch, 0).ratio == 1.0
    assert len(calls) == 1 + waking + 1 + 1 + waking + 1


@pytest.mark.parametrize("call_s", [0.001, 1.0])
def test_a_call_that_is_slow_after_a_pause_is_not_refused(call_s, monkeypatch):
    """Threads fall asleep while an input is drawn, and the next call wakes them: it is as slow on a seen input."""
    seed, paused = find_workload("seed"), []
    executable = Executable(VARIANTS["reference"], seed.config, "inference", "cpu", starting_weights(seed, 0))
    batch, draw = seed.make_batch(0), Batch.varied

    def time_once(*_: object) -> float:
        slow = bool(paused)
        # A brief call is preceded by an untimed one, which does not wake all threads yet.
        paused[:1] = []
        return call_s * (1.8 if slow else 1)

    monkeypatch.setattr(Batch, "varied", lambda self, generator: paused.append(1) or draw(self, generator))
    monkeypatch.setattr(clock, "time_once", time_once)
    assert seen.compare(executable, executable.prepare(batch), batch, 0).ratio == 1.0


def test_few_noisy_pairs_refuse_nobody():
    """The lower bound of the ratio counts, and one slow call moves neither it nor the median."""
    assert seen._seen([1.0, 1.1, 40.0]).passed
    assert not seen._seen([3.0] * 9).passed
    assert seen._seen([1.0, 1.2, 1.3, 1.4, 9.0, 9.0, 9.0, 9.0, 9.0]).passed


def test_a_slowed_clock_of_python_s_changes_no_timing(monkeypatch):
    """The timing code was bound before any variant: replaced names count half, the clock counts right."""
    right = time.perf_counter_ns
    monkeypatch.setattr(time, "perf_counter_ns", lambda: right() // 2)
    monkeypatch.setattr(time, "perf_counter", lambda: right() / 2e9)
    assert clock.time_once(lambda: time.sleep(0.02), "cpu") >= 0.02
    assert min(clock.time_block(lambda: time.sleep(0.02), 2, "cpu").calls_s) >= 0.02


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (time, "perf_counter_ns"),
        (torch.cuda, "synchronize"),
        (clock, "time_block"),
        (clock, "Block"),
        (seat, "take_turn"),
        (seat, "time_block"),
        (seat, "now_s"),
        (seat, "_cpu_s"),
        (seat, "Turn"),
        (seat.Ready, "turn"),
        (interference, "read_delays"),
        (interference, "longest_delay_s"),
        (gc, "disable"),
    ],
)
def test_a_replaced_timekeeper_is_named_and_put_back(monkeypatch, owner, name):
    """Whatever tells the time or times."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *_: None)
    assert honesty.restore_timekeepers() == [f"{owner.__name__}.{name}"]
    assert getattr(owner, name) is right
    assert honesty.restore_timekeepers() == []


@pytest.fixture(scope="module")
def records(warm_workers, tmp_path_factory) -> dict[tuple[str, str, str], dict[str, object]]:
    """Records of a real run by workload, mode and variant, which ended with 1.

    Three groups: the cheats of either mode with honest variants beside them, and the forged samples apart from those.
    """
    folder = tmp_path_factory.mktemp("cheats")
    suite = folder / "cheats.toml"
    listed = {mode: json.dumps(list(names))[1:-1] for mode, names in zip(MODES, (REFUSED, REFUSED_STEPS), strict=True)}
    suite.write_text(SUITE.format(**listed), encoding="utf-8")
    words = ["--suite", str(suite), "--plugin", str(PLUGIN), "--threads", "1", "--out", str(folder / "run")]
    done = warm_workers.run("run", *words)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = (folder / "run" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["workload"], record["mode"], record["variant"]): record for record in map(json.loads, lines)}


def assert_refused(record: dict[str, object], words: str) -> None:
    """Refused for that reason, with no time."""
    assert record["status"] == "parity-failed", record["reason"]
    assert words in record["reason"]
    assert [record[name] for name in ("latency_p50_s", "speedup", "throughput_seq_per_s")] == [None] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "refused"), [("inference", REFUSED), ("training", REFUSED_STEPS)])
def test_a_run_refuses_every_cheat_and_measures_the_rest(records, mode, refused):
    """The cheats share a process with honest variants, which have their times all the same."""
    for name, words in refused.items():
        assert_refused(records["seed", mode, name], words)
    for name in ("reference", "loop"):
        record = records["seed", mode, name]
        assert (record["status"], record["reason"]) == ("ok", "")
        # Percentiles are left out where a busy machine's few calls cannot bound them.
        assert record["samples"] >= 2
        assert record["throughput_seq_per_s"] > 0


@pytest.mark.slow
def test_a_run_believes_no_samples_that_were_forged(records):
    """The recorded times of blocks are halved: the parent's clock notices, and no case has a time."""
    for name in ("reference", "forged-samples"):
        assert_refused(records["seed@batch=8", "inference", name], "the samples cannot be true: they add up to")


@pytest.mark.gpu
@pytest.mark.usefixtures("cheats")
def test_work_on_a_stream_that_nobody_waits_for_is_refused():
    """Results are copied on the caller's stream before anything is waited for."""
    assert (
        "the results were not complete when the call returned"
        in Subject("side-stream", "inference", device="cuda").judged()
    )


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_no_honest_variant_is_refused_on_a_gpu(mode):
    """All that run there."""
    workload = find_workload("seed")
    names = [name for name, variant in VARIANTS.items() if not variant.why_not("cuda", mode, workload)]
    assert {name: Subject(name, mode, device="cuda").judged() for name in names} == dict.fromkeys(names, "")
