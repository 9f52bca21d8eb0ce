"""The mode decode: what generates rightly passes, what does not is refused, and its work is counted."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from bench.analysis.figures import figures
from bench.analysis.run_summary import groups
from bench.errors import UsageError
from bench.gate import audit as honesty
from bench.gate import decoding
from bench.gate.audit import Audit
from bench.gate.decoding import Truth
from bench.gate.parity import Gate, random_weights
from bench.plan.cases import SUITES, Case, Filters, expand, load_suite
from bench.records.folder import RunFolder
from bench.records.reader import read_records
from bench.records.schema import COLUMNS, LACKING, Record, Status
from bench.report.tables import decoding as decoding_table
from bench.worker.gating import gated
from bench.worker.server import _decoded
from kernels.cpu import shortlist
from seq2seq.decoding import search as decode
from seq2seq.decoding.fixed_length import Steps, forced, free_running
from seq2seq.decoding.search import first_token
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.base import Extent, select
from seq2seq.models.cost import cost, forward_products
from seq2seq.models.cost import decoding as decoding_extent
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import WORKLOADS, find_workload

GREEDY = "translation-small-scaled@batch=3,length=7,hidden=16"
BEAM = f"{GREEDY},beam=4"
VALUES = "forecast-deepar@batch=3,length=56"
TOKENS = (GREEDY, BEAM)
ALL = (*TOKENS, VALUES)
#: Other families, which have the same gate.
FAMILIES = ("speech-las-scaled@batch=2,length=10,beam=3", "translation-gnmt-scaled@batch=2,length=6,beam=3")
EAGER = (
    "reference",
    "loop",
    "onednn",
    "lstmcell",
    "cpu-fused",
    "cpu-fused-int8",
    "cpu-fused-head",
    "cpu-fused-int8-head",
    "amp-bf16",
    "amp-bf16-native",
)
EVERY = pytest.mark.parametrize("workload", ALL)


class Subject:
    """A variant ready to be judged on a workload, in the worker's way."""

    def __init__(self, workload: str, name: str = "reference") -> None:
        self.workload = find_workload(workload)
        self.weights, self.batch = initial_weights(self.workload.config, 1), self.workload.make_batch(0)
        self.gate = Gate(self.workload, "decode", "cpu")
        self.executable = Executable(
            VARIANTS[name], self.workload.config, "decode", "cpu", self.weights, beam=self.workload.beam
        )
        self.prepared = self.executable.prepare(self.batch)

    def audited(self, *, warm: bool = False) -> str:
        """The reason why it is refused; nothing otherwise."""
        audit = Audit(self.gate, self.weights, self.batch)
        return gated(self.gate, audit, self.executable, self.prepared, 100, warm=warm)["reason"]


@pytest.fixture(autouse=True)
def one_thread():
    """As many threads as a small problem needs, and the clocks put back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    honesty.restore_timekeepers()


@EVERY
@pytest.mark.parametrize("name", EAGER)
def test_an_honest_variant_is_not_refused(name, workload):
    """Greedy, beams and values, fp32 and below: neither the gate nor the audit holds anything against them."""
    if reason := VARIANTS[name].why_not("cpu", "decode", find_workload(workload)):
        pytest.skip(reason)
    assert Subject(workload, name).audited() == ""


@pytest.mark.parametrize("workload", FAMILIES)
@pytest.mark.parametrize("name", ["reference", "onednn", "lstmcell", "cpu-fused", "cpu-fused-head"])
def test_an_honest_variant_of_another_family_is_not_refused(name, workload):
    """With attention, and the deep model with residuals."""
    if reason := VARIANTS[name].why_not("cpu", "decode", find_workload(workload)):
        pytest.skip(reason)
    assert Subject(workload, name).audited() == ""


@EVERY
def test_a_scripted_variant_decodes_too(workload):
    """TorchScript runs encoder and step."""
    assert Subject(workload, "torchscript").audited() == ""


@pytest.mark.parametrize("name", ["reference", "cpu-fused-int8", "cpu-fused-head", "cpu-fused-int8-head"])
def test_honest_problems_pass_whatever_their_seed(name):
    """Beams of ten problems each; in int8 choices differ from truth's and are still as good."""
    subject = Subject(BEAM, name)
    if reason := VARIANTS[name].why_not("cpu", "decode", subject.workload):
        pytest.skip(reason)
    assert [subject.gate.check(subject.executable, seed).describe() for seed in range(10)] == [""] * 10


def test_a_head_that_rounds_what_it_chooses_by_is_refused(monkeypatch):
    """Greedy choices by rounded outputs, which the limit of outputs lets through, are worse than fp32 allows."""
    name = "translation-small@batch=8,length=12,hidden=64"
    if reason := VARIANTS["cpu-fused-head"].why_not("cpu", "decode", find_workload(name)):
        pytest.skip(reason)
    subject = Subject(name, "cpu-fused-head")
    assert all(subject.gate.check(subject.executable, seed).passed for seed in range(3))
    real = shortlist.run

    def rounded(h, weight, bias, packed, exact):
        packed.rows[1:] = 0.0  # no bound on any error
        return real(h, weight, bias, packed, exact)

    monkeypatch.setattr(shortlist, "run", rounded)
    refused = [subject.gate.check(subject.executable, seed) for seed in range(3)]
    assert "choices" in {check.name for verdict in refused for check in verdict.checks if not check.passed}
    assert all(check.passed for verdict in refused for check in verdict.checks if check.name == "outputs")


class Broken(Steps):
    """A decoder with one defect in its steps."""

    def __init__(self, model, defect: str) -> None:
        super().__init__(model.config, model.encode, model.step)
        self.defect, self.steps = defect, 0
        self.own: dict[str, Tensor] = {}
        self.last: Tensor = torch.empty(0)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Starts anew."""
        self.steps, self.own = 0, {}
        return super().encode(source, lengths)

    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The right step, but for the defect."""
        self.steps += 1
        if self.defect == "skips" and self.steps == 4:
            return self.last, state
        in_place = self.own and next(iter(self.own.values())).shape == next(iter(state.values())).shape
        if self.defect == "keeps its state in place" and in_place:
            state = self.own
        self.last, self.own = super().step(value, state)
        return self.last, state if self.defect == "never goes on" and self.steps > 2 else self.own


@pytest.mark.parametrize(
    ("workload", "defect"),
    [(name, defect) for name in ALL for defect in ("skips", "never goes on")] + [(BEAM, "keeps its state in place")],
)
def test_a_planted_defect_in_the_steps_is_refused(workload, defect):
    """A step left out, a state that is stale, one that was not reordered with its beams."""
    subject = Subject(workload)
    subject.executable._steps = Broken(subject.executable.model, defect)
    verdict = subject.gate.check(subject.executable, 0)
    assert not verdict.passed
    assert verdict.worst.error > 10 * verdict.worst.limit


def test_a_search_that_leaves_its_states_in_place_is_refused(monkeypatch):
    """Even where the yardstick has the same defect, since both search by the same code: limits have caps."""
    monkeypatch.setattr(decode, "select", lambda state, index: select(state, torch.arange(index.size(0)) % 3))
    subject = Subject(BEAM)
    assert not subject.gate.check(subject.executable, 0).passed


def judged(workload: str, change, precision: str = "fp32") -> decoding.Verdict:
    """The verdict on what an honest variant found, changed."""
    subject = Subject(workload)
    gate, weights, batch = subject.gate, random_weights(subject.workload.config, 0), subject.workload.make_batch(0)
    subject.executable.load(weights)
    found = subject.executable.quantities(subject.executable.prepare(batch))
    found |= change(found, subject.executable, batch)
    return gate.judge_decoded(found, gate.quantities(0, precision), precision, weights, batch)


def _scaled_scores(found, _executable, _batch):
    """Claims a thousandth too much."""
    return {"scores": found["scores"] * 0.999}


def _other_tokens(found, _executable, _batch):
    """Claims other tokens than those that were scored."""
    tokens = found["tokens"].clone()
    tokens[0, -1] = (tokens[0, -1] + 1) % 1000
    return {"tokens": tokens}


def _drawn_tokens(_found, executable, batch):
    """Chooses by chance, and scores rightly."""
    model, generator = executable.model, torch.Generator().manual_seed(0)
    state = model.encode(batch.source, batch.source_lengths)
    token, scores, tokens = torch.full((batch.source.size(0),), first_token(model.config)), 0.0, []
    for _ in range(batch.target.size(1)):
        outputs, state = model.step(token, state)
        logarithms = outputs.double().log_softmax(-1)
        token = torch.multinomial(logarithms.exp(), 1, generator=generator).squeeze(1)
        scores = scores + logarithms.gather(1, token[:, None]).squeeze(1)
        tokens.append(token)
    return {"tokens": torch.stack(tokens, 1), "scores": scores}


def _values_of_the_step_before(found, _executable, _batch):
    """Gives each value a step late."""
    return {"values": found["values"].roll(1, 1)}


def _no_number(found, _executable, _batch):
    """One score or value that is none."""
    name = "values" if "values" in found else "scores"
    spoiled = found[name].clone()
    spoiled.view(-1)[-1] = math.nan
    return {name: spoiled}


def _out_of_range(found, _executable, _batch):
    """A token that there is not."""
    name = "chosen" if "chosen" in found else "tokens"
    spoiled = found[name].clone()
    spoiled[0, 0] = 10**6
    return {name: spoiled}


def _twice_the_same(found, _executable, _batch):
    """Two places of a beam for one hypothesis."""
    parents, chosen = found["parents"].clone(), found["chosen"].clone()
    parents[1, 1], chosen[1, 1] = parents[1, 0], chosen[1, 0]
    return {"parents": parents, "chosen": chosen}


def _from_another_sequence(found, _executable, _batch):
    """A hypothesis that goes on from another sequence's."""
    parents = found["parents"].clone()
    parents[2, 0] = 11
    return {"parents": parents}


def _path_cut_off(found, _executable, _batch):
    """A path without its last step."""
    return {"parents": found["parents"][:-1], "chosen": found["chosen"][:-1]}


def _path_too_long(found, _executable, _batch):
    """A path with one step more than there are."""
    return {name: torch.cat([found[name], found[name][-1:]]) for name in ("parents", "chosen")}


def _second_best(found, executable, batch):
    """Gives the second best hypothesis, with its own score."""
    narrowed = free_running(executable._steps, batch, 4)
    parents, chosen = found["parents"], found["chosen"]
    place = torch.arange(batch.size) * 4 + 1
    tokens = []
    for step in range(len(chosen) - 1, -1, -1):
        tokens.append(chosen[step, place])
        place = parents[step, place]
    path = torch.stack(tokens[::-1], 1)
    fed = torch.cat([torch.full((batch.size, 1), 2), path[:, :-1]], 1)
    outputs = executable.model.run(batch.source, fed, batch.source_lengths)[0].log_softmax(-1)
    assert torch.equal(narrowed["tokens"], found["tokens"])
    return {"tokens": path, "scores": outputs.gather(2, path[..., None]).sum((1, 2)).detach()}


@pytest.mark.parametrize(
    ("workload", "change", "named"),
    [
        (GREEDY, _scaled_scores, "scores"),
        (BEAM, _scaled_scores, "scores"),
        (GREEDY, _other_tokens, "choices"),
        (BEAM, _other_tokens, "choices"),
        (GREEDY, _drawn_tokens, "choices"),
        (GREEDY, _no_number, "scores"),
        (BEAM, _no_number, "scores"),
        (GREEDY, _out_of_range, "choices"),
        (BEAM, _out_of_range, "choices"),
        (BEAM, _twice_the_same, "choices"),
        (BEAM, _from_another_sequence, "choices"),
        (BEAM, _path_cut_off, "choices"),
        (BEAM, _path_too_long, "choices"),
        (BEAM, _second_best, "choices"),
        (VALUES, _values_of_the_step_before, "values"),
        (VALUES, _no_number, "values"),
    ],
)
def test_a_wrong_result_is_refused_by_what_is_wrong_with_it(workload, change, named):
    """The very quantity is refused; where nothing is changed, nothing is."""
    assert judged(workload, lambda *_: {}).passed
    assert named in {check.name for check in judged(workload, change).checks if not check.passed}


def test_a_wrong_choice_alone_leaves_the_scores_right():
    """Tokens drawn by chance with their own scores are refused for the choice alone."""
    assert {check.name for check in judged(GREEDY, _drawn_tokens).checks if not check.passed} == {"choices"}


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_wrong_choice_is_refused_in_low_precision(precision):
    """A token drawn by chance is worse than rounding explains."""
    assert not judged(GREEDY, _drawn_tokens, precision).passed


@pytest.mark.parametrize("workload", TOKENS)
def test_truth_s_own_choices_have_no_regret(workload):
    """The result of the loop in float64 is best by its own account, and its scores are exact."""
    subject = Subject(workload)
    weights = random_weights(subject.workload.config, 3)
    truth = Truth(subject.workload.config, "cpu", weights, subject.batch, subject.workload.beam)
    with torch.inference_mode():
        found = free_running(truth._model, truth._batch, subject.workload.beam)
        errors = truth.errors(found | {"outputs": forced(truth._model, truth._batch, subject.workload.beam)})
    assert errors["choices"] <= 1e-12
    assert max(errors["scores"], errors["outputs"]) <= 1e-12


def memoised(call):
    """Keeps a result for the address of the source."""
    kept = {}

    def cheating(batch):
        if batch.source.data_ptr() not in kept:
            kept[batch.source.data_ptr()] = call(batch)
        return {name: value.clone() for name, value in kept[batch.source.data_ptr()].items()}

    return cheating


def constant(call):
    """Gives its first result for ever."""
    kept = []

    def cheating(batch):
        kept.append(kept[0] if kept else call(batch))
        return {name: value.clone() for name, value in kept[0].items()}

    return cheating


@EVERY
@pytest.mark.parametrize("cheat", [memoised, constant])
def test_a_kept_result_is_refused(workload, cheat):
    """By the audit, which is about the timed call itself."""
    subject = Subject(workload)
    subject.executable.call = cheat(subject.executable.call)
    audit = Audit(subject.gate, subject.weights, subject.batch)
    found = audit.find(subject.executable, subject.prepared, 100, warm=False)
    assert "gave the results of the call before" in found


def test_a_result_kept_for_its_content_is_refused():
    """Right each time, and faster on inputs it has seen."""
    subject, kept = Subject(BEAM), {}
    call = subject.executable.call

    def cheating(batch):
        key = batch.source.numpy().tobytes()
        if key not in kept:
            kept[key] = call(batch)
        return {name: value.clone() for name, value in kept[key].items()}

    subject.executable.call = cheating
    assert not honesty.seen.compare(subject.executable, subject.prepared, subject.batch, 0).passed


CANNOT = {
    "seed": ("reference", "cannot be fed its own output: its decoder reads the source"),
    "deepbench": ("reference", "cannot be fed its own output: it has no decoder"),
    "forecast-deepar@beam=2": ("reference", "beam=2 is for tokens, and this model gives values"),
    "scaling": ("reference", ""),
    "speech-las-scaled@beam=33": ("reference", "beam=33 is more than the 32 tokens there are"),
    GREEDY: ("onnxruntime", "onnxruntime runs whole passes here: its model has no single step"),
}


@pytest.mark.parametrize("workload", CANNOT)
def test_what_cannot_decode_says_why(workload):
    """A reason in one line, before anything is built; and what can has none."""
    variant, reason = CANNOT[workload]
    found = VARIANTS[variant].why_not("cpu", "decode", find_workload(workload)) or ""
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_what_is_of_decoding_alone_is_nothing_else():
    """A beam, and a step that is captured."""
    problem = find_workload(BEAM)
    assert "means something only in the mode decode" in (VARIANTS["reference"].why_not("cpu", "inference", problem))
    captured = Variant("planted", "", captures_step=True)
    assert "only for the mode decode" in captured.why_not("cpu", "training", find_workload(GREEDY))


@EVERY
def test_the_timed_call_decodes_every_step_of_every_sequence(workload):
    """As many tokens or values as the targets have steps, whatever they are."""
    subject = Subject(workload)
    with subject.executable.context():
        found = subject.executable.call(subject.prepared)
    shape = tuple(subject.batch.target.shape[:2])
    assert (found["values"].shape[:2] if workload == VALUES else found["tokens"].shape) == shape


@EVERY
def test_the_work_of_greedy_decoding_is_that_of_teacher_forcing_on_full_targets(workload):
    """The same products, one hypothesis a sequence; more of them with a beam, and fewer bytes than with outputs."""
    problem = dataclasses.replace(find_workload(workload), target_lengths=None)
    extent, steps = Extent.of(problem.make_batch(0)), problem.target_steps
    config = problem.config
    assert forward_products(config, decoding_extent(extent, steps, 1)) == forward_products(config, extent)
    one, four = (cost(config, decoding_extent(extent, steps, beam), "decode") for beam in (1, 4))
    assert one.flops < four.flops < 4 * one.flops
    assert one.least_bytes <= cost(config, extent, "inference").least_bytes
    more = _decoded(problem, extent)[1]
    assert more == {"beam": problem.beam, "valid_steps": extent.source_steps + extent.sequences * steps}


def test_a_token_s_figures_are_a_call_s_over_its_steps():
    """Tokens a second of the best hypothesis, and latencies by the same percentiles."""
    import numpy as np
    from run_folders import Recipe, _process

    from bench.records.rounds import Samples

    made = Recipe(rounds=60)
    samples = Samples([_process(made, np.random.default_rng(n)) for n in range(3)])
    facts = {"batch": 8, "valid_steps": 100, "target_steps": 20}
    found = figures(Case("w", "loop", "decode", "cpu", 1), samples, "reference", 0.05, facts)
    assert found["tokens_per_s"] == pytest.approx(20 * found["throughput_seq_per_s"])
    assert found["token_latency_p50_s"] == found["latency_p50_s"] / 20
    assert ("token_latency_p99_s" in found) == ("latency_p99_s" in found)
    assert "tokens_per_s" not in figures(Case("w", "loop", "inference", "cpu", 1), samples, "reference", 0.05, facts)


def test_the_report_has_a_table_of_decoded_cases_alone():
    """Tokens a second and what one takes; nothing where nothing decodes."""
    common = {"workload": "w", "variant": "reference", "device": "cpu", "threads": 1, "status": Status.OK}
    plain = Record(**common, mode="inference", latency_p50_s=0.1)
    decoded = Record(**common, mode="decode", latency_p50_s=0.1, tokens_per_s=800.0, token_latency_p50_s=0.005, beam=4,
                     batch=8, target_steps=10)  # fmt: skip
    assert decoding_table(groups([plain])) is None
    (row,) = decoding_table(groups([plain, decoded])).rows
    assert [cell.text for cell in row.cells[2:]] == ["8", "4", "10", "800", "5.00 ms", ""]


def test_records_of_the_version_before_are_read(tmp_path):
    """Their tables and lines lack the new columns, which are empty; what lacks another column is none of ours."""
    old = {name: value for name, value in Record(workload="w").as_dict().items() if name not in LACKING[2]}
    old["schema_version"] = 2
    (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    (values,) = RunFolder(tmp_path).records()
    assert set(values) == set(COLUMNS)
    assert values["tokens_per_s"] is None
    (record,) = read_records(tmp_path)
    assert (record.workload, record.beam, record.schema_version) == ("w", None, 2)
    del old["speedup"]
    (tmp_path / "records.jsonl").write_text(json.dumps(old) + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match="other columns"):
        read_records(tmp_path)


def test_the_suite_decode_holds_batches_beams_and_values():
    """Both devices, every case with a name that exists."""
    catalogue = {"workloads": [{"name": n} for n in WORKLOADS], "variants": [{"name": n} for n in VARIANTS]}
    assert (SUITES / "decode.toml").is_file()
    for device in ("cpu", "cuda"):
        cases = [c for g in expand(load_suite("decode"), catalogue, Filters(device=device)) for c in g.cases]
        assert {case.mode for case in cases} == {"decode"}
        problems = [find_workload(case.workload) for case in cases]
        assert {(p.batch, p.beam) for p in problems} >= {(b, k) for b in (1, 8, 32) for k in (1, 4)}


@pytest.mark.gpu
@pytest.mark.parametrize("workload", TOKENS)
def test_a_captured_step_is_the_step(workload):
    """The same tokens and scores through one graph per step."""
    problem = find_workload(workload)
    weights = initial_weights(problem.config, 1)
    found = []
    for name in ("cudnn", "cudnn-step-graph"):
        executable = Executable(VARIANTS[name], problem.config, "decode", "cuda", weights, beam=problem.beam)
        with executable.context():
            found.append(executable.call(executable.prepare(problem.make_batch(0))))
    assert torch.equal(found[0]["tokens"], found[1]["tokens"])
    assert torch.allclose(found[0]["scores"], found[1]["scores"], rtol=1e-5)
