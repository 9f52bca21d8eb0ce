"""Workloads of checkpoints: sizes and weights are those that were saved, and what is none is refused in a line."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch
from tiny_transformers import ARCHITECTURES, SHARED, save, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import main
from bench.analysis.run_summary import sweep_base
from bench.arguments import parser
from bench.gate.parity import Gate, judge
from bench.plan.cases import CHECKPOINT, load_suite, match, split_name
from bench.run.worker_process import ROOT
from bench.worker import server as worker
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models import cost as costs
from seq2seq.models import huggingface as pretrained_model
from seq2seq.models.base import Extent
from seq2seq.models.checkpoint import save_pretrained
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.huggingface_config import PretrainedConfig, marian
from seq2seq.models.keep_float64 import Unrounded
from seq2seq.models.transformer import TransformerConfig
from seq2seq.workloads import registry as workloads
from seq2seq.workloads.checkpoint import PREFIX, starting_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import UnknownWorkloadError

OWN = Seq2SeqConfig(3, 4, 1, num_layers=2, dropout=0.5)
TASK = {"name": "forecasting", "state": {"history": 7, "horizon": 3}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each architecture of the library."""
    return {name: save(name, tmp_path_factory.mktemp(name)) for name in ARCHITECTURES}


@pytest.fixture(params=ARCHITECTURES)
def theirs(request, folders):
    """Name of an architecture, and its workload, small."""
    return request.param, find_workload(f"checkpoint:{folders[request.param]}@batch=3,length=6")


@pytest.fixture
def run_folder(tmp_path):
    """Write what a training run leaves, as far as a workload reads it, and its model."""
    model = OWN.build(nn.LSTM)
    save_pretrained(model, tmp_path / "run" / "model", TASK)
    (tmp_path / "run" / "run.json").write_text("{}")
    return tmp_path / "run", model


def test_a_run_and_its_model_are_one_workload(run_folder):
    """Of either folder: the sizes and steps that it was trained at, values that it can read, no dropout."""
    folder, _ = run_folder
    whole, model = (find_workload(f"checkpoint:{path}") for path in (folder, folder / "model"))
    assert whole.config == model.config == dataclasses.replace(OWN, dropout=0.0)
    assert (whole.batch, whole.source_steps, whole.target_steps) == (16, 7, 3)
    assert whole.make_batch(0).source.shape == (16, 7, 3)
    assert whole.data.startswith("synthetic: ")
    assert "steps are those of its task" in whole.source


def test_weights_are_those_that_were_saved(run_folder):
    """In fp32, whatever the seed; a workload without a checkpoint draws them."""
    folder, model = run_folder
    found = starting_weights(find_workload(f"checkpoint:{folder}"), 1)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in model.state_dict().items())
    one, other = (starting_weights(find_workload("seed"), seed) for seed in (1, 2))
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_weights_kept_in_half_precision_are_widened(tmp_path):
    save_pretrained(OWN.build(nn.LSTM).half(), tmp_path / "model")
    found = starting_weights(find_workload(f"checkpoint:{tmp_path / 'model'}"), 1)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_tokens_have_lengths_of_wmt(tmp_path):
    """A model of tokens is given tokens of its own vocabularies, and lengths that differ."""
    config = TransformerConfig(8, 11, 1, 2, source_vocabulary=7, target_vocabulary=11)
    save_pretrained(config.build(), tmp_path / "model")
    workload = find_workload(f"checkpoint:{tmp_path / 'model'}")
    batch = workload.make_batch(0)
    assert (int(batch.source.max()), int(batch.target.max())) == (6, 10)
    assert batch.source_lengths.unique().numel() > 3
    assert "WMT" in workload.data


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bias_that_is_left_out_is_refused(folders, monkeypatch, precision):
    """Marian's bias of the outputs, (1, vocabulary) and zeros where a model is made: the gate draws it like any."""
    workload = find_workload(f"checkpoint:{folders['marian']}@batch=3,length=6")
    variant = VARIANTS["reference" if precision == "fp32" else "amp-bf16"]
    executable = Executable(variant, workload.config, "inference", "cpu", starting_weights(workload, 0))
    gate, load = Gate(workload, "inference", "cpu"), executable.load
    assert gate.check(executable, 1).passed

    def forgetful(weights):
        load(weights)
        executable.model.model.final_logits_bias.zero_()

    monkeypatch.setattr(executable, "load", forgetful)
    assert not gate.check(executable, 1).passed


def test_outputs_are_those_of_the_library(theirs, folders):
    """From the folder, by the harness: what the library's own loading and forward pass give, its biases included."""
    name, workload = theirs
    library = pytest.importorskip("transformers")
    model = library.AutoModelForSeq2SeqLM.from_pretrained(folders[name]).eval()
    executable = Executable(VARIANTS["reference"], workload.config, "inference", "cpu", starting_weights(workload, 0))
    batch = workload.make_batch(0)
    with executable.context():
        found = executable.forward(batch).outputs
        for place, (source, target) in enumerate(zip(batch.source_lengths, batch.target_lengths, strict=True)):
            own = {"input_ids": batch.source, "decoder_input_ids": batch.target}
            lengths = {"input_ids": source, "decoder_input_ids": target}
            alone = model(**{key: value[place : place + 1, : int(lengths[key])] for key, value in own.items()})
            torch.testing.assert_close(found[place, : int(target)], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_nothing_is_dropped_in_training(theirs):
    """Two passes in training are equal, though the library's configuration drops a tenth."""
    _, workload = theirs
    assert workload.config.dropout == 0
    executable = Executable(VARIANTS["reference"], workload.config, "training", "cpu", starting_weights(workload, 0))
    one, other = (executable.forward(workload.make_batch(0)).outputs for _ in range(2))
    assert torch.equal(one, other)


def test_parameters_are_those_of_the_library(theirs):
    """Each that trains, once; Marian's positions are computed."""
    name, workload = theirs
    fixed = sum(value.numel() for key, value in tiny(name).named_parameters() if "embed_positions" in key)
    expected = sum(value.numel() for value in tiny(name).parameters()) - fixed
    assert costs.parameters(workload.config) == expected
    with torch.device("meta"):
        assert sum(value.numel() for value in workload.config.build().parameters()) == expected


def test_flops_are_a_lower_bound_and_near(theirs):
    """Torch counts as many products, forward and backward, but for those that the causal mask spares."""
    _, workload = theirs
    workload = dataclasses.replace(workload, source_lengths=None, target_lengths=None)
    model, batch = workload.config.build(), workload.make_batch(0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        outputs, *_ = model.run(batch.source, batch.target)
    with FlopCounterMode(display=False) as backward:
        model.loss(outputs, batch.expected).backward()
    extent = Extent.of(batch)
    for counter, count in ((forward, costs.forward_products), (backward, costs.backward_products)):
        ours = count(workload.config, extent)
        assert ours <= counter.get_total_flops() <= 1.03 * ours


def test_a_matrix_of_both_sides_is_counted_once():
    """Shared by both sides alone it is beside the head's, and the same rows may serve both."""
    alone = marian(8, 1, 2, 12, 20)
    beside = dataclasses.replace(alone, others=json.dumps(json.loads(alone.others) | {"tie_word_embeddings": False}))
    assert costs.parameters(beside) - costs.parameters(alone) == 8 * 20
    extent = Extent(1, 5, 4, source_rows=5, target_rows=4)
    read = [costs.cost(config, extent, "inference").least_bytes for config in (alone, beside)]
    assert read[1] - read[0] == 4 * 8 * 5


class Narrowed(TorchDispatchMode):
    """Names of the operators that made float32 of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        del types
        result = func(*args, **(kwargs or {}))
        wide = any(isinstance(each, torch.Tensor) and each.dtype == torch.float64 for each in args)
        if wide and isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.found.add(str(func))
        return result


def narrowed(workload) -> set[str]:
    model, batch = workload.config.build().double(), workload.make_batch(0)
    with torch.no_grad(), Narrowed() as seen:
        model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
        model.step(batch.target[:, 0], model.encode(batch.source, batch.source_lengths))
    return seen.found


def test_truth_is_float64_throughout(theirs):
    """Nothing on the way is rounded to float32."""
    assert not narrowed(theirs[1])


@pytest.mark.parametrize(
    "cast",
    [
        lambda value, _: value.float(),
        lambda value, _: value.to(torch.float32),
        lambda value, _: value.to("cpu", dtype=torch.float32),
        lambda value, _: value.type(torch.float32),
        lambda value, other: value.to(other),
        lambda value, other: value.type_as(other),
        lambda value, _: value.softmax(-1, dtype=torch.float32),
        lambda value, _: torch.nn.functional.log_softmax(value, -1, dtype=torch.float32),
    ],
)
def test_a_cast_leaves_float64_as_it_is(cast):
    """While it is switched on; what comes from integers and what goes to other types is cast as it is written."""
    value, other = torch.ones(2, dtype=torch.float64), torch.ones(2)
    assert cast(value, other).dtype == torch.float32
    with Unrounded():
        assert cast(value, other).dtype == torch.float64
        assert torch.ones(2, dtype=torch.int64).to(other).dtype == torch.float32
        assert value.to(torch.int64).dtype == torch.int64


def test_the_library_itself_rounds_what_is_float64(folders, monkeypatch):
    """T5's norm does, so that truth needs what keeps it from that."""
    import contextlib

    monkeypatch.setattr(pretrained_model, "Unrounded", contextlib.nullcontext)
    assert narrowed(find_workload(f"checkpoint:{folders['t5']}@batch=2,length=4"))


@pytest.mark.parametrize(("mode", "beam"), [("inference", 1), ("training", 1), ("decode", 1), ("decode", 3)])
@pytest.mark.parametrize("variant", ["reference", "amp-bf16"])
def test_variants_pass_the_gate(theirs, variant, mode, beam):
    """Every mode, greedy and with a beam; the ReLUs of T5 are not judged in bf16 training, with the reason."""
    name, workload = theirs
    workload = dataclasses.replace(workload, beam=beam)
    reason = VARIANTS[variant].why_not("cpu", mode, workload)
    if (name, variant, mode) == ("t5", "amp-bf16", "training"):
        assert "ReLUs, whose gradient is discontinuous" in reason
        return
    assert reason is None
    gate = Gate(workload, mode, "cpu")
    weights = starting_weights(workload, 0)
    verdict = gate.check(Executable(VARIANTS[variant], workload.config, mode, "cpu", weights, beam=beam), 1)
    assert verdict.passed, verdict.describe()


@pytest.mark.parametrize("mode", ["inference", "decode"])
def test_the_gate_refuses_a_source_that_is_not_masked(theirs, monkeypatch, mode):
    """Attention to the padding of short sources is found, in float32 and with autocast to bf16."""
    _, workload = theirs
    gate, weights = Gate(workload, mode, "cpu"), starting_weights(workload, 0)
    for name in ("reference", "amp-bf16"):
        executable = Executable(VARIANTS[name], workload.config, mode, "cpu", weights)
        assert gate.check(executable, 1).passed
        with monkeypatch.context() as patch:
            patch.setattr(executable.model, "_valid", lambda *given: torch.ones_like(given[1]).bool())
            assert not gate.check(executable, 1).passed


def test_a_gradient_that_is_none_by_nature_is_judged_by_its_matrix():
    """A key's bias: rounding passes, a gradient that is really there is refused."""
    truth = {"grad k.weight": torch.ones(4, 4).double(), "grad k.bias": torch.full((4,), 1e-17).double()}
    rounded = {"grad k.weight": torch.ones(4, 4), "grad k.bias": torch.full((4,), 1e-8)}
    assert judge(rounded, truth, rounded, "fp32").passed
    wrong = rounded | {"grad k.bias": torch.full((4,), 1e-3)}
    assert not judge(wrong, truth, rounded, "fp32").passed
    assert not judge(rounded | {"grad k.bias": torch.full((4,), torch.nan)}, truth, rounded, "fp32").passed
    assert not judge(rounded | {"grad k.bias": torch.zeros(3)}, truth, rounded, "fp32").passed


def test_such_a_gradient_may_err_as_the_reference_usually_does():
    """On one problem the reference may be right by luck; what errs more than usual stays refused."""
    truth = {"grad k.weight": torch.ones(4, 4).double(), "grad k.bias": torch.zeros(4).double()}
    lucky = {"grad k.weight": torch.ones(4, 4), "grad k.bias": torch.full((4,), 1e-9)}
    found = lucky | {"grad k.bias": torch.full((4,), 2e-5)}
    usual = {"grad k.bias": 2e-5}.copy
    assert not judge(found, truth, lucky, "fp32").passed
    assert judge(found, truth, lucky, "fp32", usual_errors=usual).passed
    assert not judge(lucky | {"grad k.bias": torch.full((4,), 2e-4)}, truth, lucky, "fp32", usual_errors=usual).passed


def test_only_what_its_code_allows_runs(theirs):
    """TorchScript is refused with the reason, and what is about LSTMs as for any Transformer."""
    _, workload = theirs
    assert "TorchScript does not compile" in VARIANTS["torchscript"].why_not("cpu", "inference", workload)
    assert "no LSTM" in VARIANTS["loop"].why_not("cpu", "inference", workload)


def test_the_model_s_own_sizes_cannot_be_changed(run_folder):
    folder, _ = run_folder
    for override in ("hidden=8", "layers=1"):
        with pytest.raises(UnknownWorkloadError, match="weights of its own sizes; change batch, length, beam"):
            find_workload(f"checkpoint:{folder}@{override}")
    assert find_workload(f"checkpoint:{folder}@batch=2,length=14").make_batch(0).target.shape[:2] == (2, 6)


def test_more_steps_than_positions_are_refused(folders):
    with pytest.raises(UnknownWorkloadError, match="has 32 positions"):
        find_workload(f"checkpoint:{folders['marian']}@length=33")
    assert find_workload(f"checkpoint:{folders['marian']}").source_steps == 32
    assert find_workload(f"checkpoint:{folders['t5']}").source_steps == 50


#: What makes a Marian's configuration one that no model has.
CHANGED = {
    "no padding": {"pad_token_id": None},
    "encoder heads": {"encoder_attention_heads": 3},
    "decoder heads": {"encoder_attention_heads": 2, "decoder_attention_heads": 3},
}


def broken(kind: str, folder) -> None:
    """Make what is no checkpoint, of a kind."""
    if kind == "missing":
        return
    folder.mkdir()
    if kind == "corrupt":
        (folder / "config.json").write_text("{")
    if kind == "a list":
        (folder / "config.json").write_text("[]")
    if kind == "encoder":
        pytest.importorskip("transformers").BertConfig(hidden_size=8).save_pretrained(folder)
    if kind == "bart":
        pytest.importorskip("transformers").BartConfig(d_model=8).save_pretrained(folder)
    if kind == "of two":
        library = pytest.importorskip("transformers")
        sides = {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "bert", "is_decoder": True}}
        library.EncoderDecoderConfig(**sides).save_pretrained(folder)
    if kind in CHANGED:
        pytest.importorskip("transformers").MarianConfig(**(SHARED | CHANGED[kind])).save_pretrained(folder)
    if kind == "sides":
        config = pytest.importorskip("transformers").MarianConfig(**SHARED, share_encoder_decoder_embeddings=False)
        config.save_pretrained(folder)
    if kind == "unfinished":
        (folder / "run.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "is not a folder; expected a training run"),
        ("empty", "has no config.json of a checkpoint"),
        ("corrupt", "is not JSON"),
        ("a list", "has no config.json of a checkpoint"),
        ("encoder", "is a bert model, which is not an encoder-decoder"),
        ("bart", "the architecture 'bart' is not counted, expected marian or t5"),
        ("sides", "vocabularies of their own"),
        ("of two", "has no attribute"),
        ("no padding", "pad is None, expected an integer"),
        ("encoder heads", "expected a multiple of the 3 encoder_attention_heads"),
        ("decoder heads", "expected a multiple of the 3 decoder_attention_heads"),
        ("unfinished", "has saved no model yet"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_a_line(tmp_path, kind, words):
    broken(kind, tmp_path / "place")
    with pytest.raises(UnknownWorkloadError, match=words) as caught:
        find_workload(f"checkpoint:{tmp_path / 'place'}")
    assert "\n" not in str(caught.value)


def test_without_transformers_it_says_what_to_install(folders, monkeypatch):
    """A folder of the library is refused; our own workload of its sizes is listed, unavailable, with its size."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UnknownWorkloadError, match="pip install transformers"):
        find_workload(f"checkpoint:{folders['t5']}/")
    facts = worker._facts_of("translation-marian")
    assert "pip install transformers" in facts["unavailable"]
    assert facts["hidden_size"] == 512


def test_marian_has_the_published_size():
    """73.9 million weights without the computed positions; scaled down, as many as the LSTM's twin."""
    assert costs.parameters(find_workload("translation-marian").config) == 73_886_208
    ours, lstm = (find_workload(f"translation-{name}-scaled").config for name in ("marian", "small"))
    assert costs.parameters(ours) == pytest.approx(costs.parameters(lstm), rel=0.02)


def test_sizes_go_through_the_library_s_configuration_and_back():
    """A model built of a configuration has that configuration."""
    config = marian(16, 2, 4, 24, 30)
    built = config.build().config
    assert isinstance(built, PretrainedConfig)
    assert built == dataclasses.replace(config, others=built.others, decoder_layers=2, decoder_feedforward=24)
    assert json.loads(built.others).items() >= json.loads(config.others).items()


def test_the_suite_of_all_models_has_the_rivals():
    named = {workload for part in load_suite("models").select for workload in part.workloads}
    assert {"translation-marian-scaled", "translation-transformer-scaled"} <= named


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seed", ("seed", "")),
        ("seed@batch=2", ("seed", "batch=2")),
        ("checkpoint:a/b", ("checkpoint:a/b", "")),
        ("checkpoint:a/b@batch=2,length=3", ("checkpoint:a/b", "batch=2,length=3")),
        ("checkpoint:a@2/b", ("checkpoint:a@2/b", "")),
        ("checkpoint:a@2/", ("checkpoint:a@2/", "")),
        ("checkpoint:a@2/@batch=3", ("checkpoint:a@2/", "batch=3")),
    ],
)
def test_overrides_of_a_path_follow_its_end(name, expected):
    """A path may have an @ of its own; sweeps add to and take from the overrides alone."""
    assert split_name(name) == expected
    assert sweep_base(f"{name}{',' if expected[1] else '@'}hidden=3", "hidden") == name


@pytest.mark.parametrize("end", ["", "/", "@2/", "@2", "/b@2", "/b@2/", "/b"])
@pytest.mark.parametrize("overrides", ["", "@batch=2", "@batch=2,length=3"])
def test_the_harness_and_the_catalogue_divide_a_name_alike(monkeypatch, end, overrides):
    """They may not import each other, so each has the rule: the same path, the same overrides."""
    found = []
    workload = find_workload("seed")
    monkeypatch.setattr(workloads, "checkpoint_workload", lambda path: found.append(path) or workload)
    monkeypatch.setattr(workloads, "overridden", lambda given, changes: found.append(changes) or given)
    name = f"checkpoint:a{end}{overrides}"
    find_workload(name)
    path, changes = split_name(name)
    assert PREFIX == CHECKPOINT
    assert found == [path.removeprefix(CHECKPOINT), *([changes] if changes else [])]


def test_a_path_is_a_name_whatever_is_in_it():
    """No pattern of names: commas, brackets and # stay, and it need not be in the catalogue."""
    name = "checkpoint:/tmp/a,b [x]#1*/@batch=2"
    assert match([name], ["seed"], "workload") == [name]


def test_a_path_is_meant_from_where_the_user_is(tmp_path, monkeypatch):
    """Workers run in the project's folder: a path is made absolute, or relative to that folder where it is inside."""
    (tmp_path / "a@b").mkdir()
    monkeypatch.chdir(tmp_path)

    def given(word: str) -> str:
        return parser().parse_args(["run", "--workload", word]).workload[0]

    assert given("checkpoint:a@b/@batch=2") == f"checkpoint:{tmp_path / 'a@b'}@batch=2"
    assert given("checkpoint:a@b/") == f"checkpoint:{tmp_path / 'a@b'}/"
    assert given("checkpoint:user/model@batch=2") == "checkpoint:user/model@batch=2"
    assert given("seed@batch=2") == "seed@batch=2"
    monkeypatch.chdir(ROOT / "tests")
    assert given("checkpoint:../bench") == "checkpoint:bench"


@pytest.mark.slow
def test_a_compiled_pass_is_one_graph_and_right(folders):
    """Nothing of ours breaks the graph of the library's model, and a compiled decoding step is right too.

    The graphs run as they were captured: code that Inductor generates takes 15 s more, and is
    held against float64 in `test_gate_audit.py`.
    """
    workload = find_workload(f"checkpoint:{folders['marian']}@batch=2,length=4")
    weights, batch = starting_weights(workload, 0), workload.make_batch(0)
    found = torch._dynamo.explain(workload.config.build().eval().run)(
        batch.source, batch.target, batch.source_lengths, batch.target_lengths
    )
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    torch._dynamo.reset()
    gate = Gate(workload, "decode", "cpu")
    traced = dataclasses.replace(VARIANTS["compile"], compile_options={"backend": "eager"})
    verdict = gate.check(Executable(traced, workload.config, "decode", "cpu", weights), 1)
    assert verdict.passed, verdict.describe()


@pytest.mark.usefixtures("warm")
@pytest.mark.slow
def test_a_checkpoint_is_measured_end_to_end(run_folder, tmp_path, capsys):
    """A run's folder is timed under its name, and a report written; a missing one ends with 2 and makes nothing."""
    folder, _ = run_folder
    out = tmp_path / "out"
    options = ["--mode", "inference", "--variant", "reference", "--threads", "1", "--budget", "1", "--out", str(out)]
    assert main(["run", "--workload", f"checkpoint:{folder}-none", *options]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not out.exists()
    assert main(["run", "--workload", f"checkpoint:{folder}@batch=2", *options]) == 0
    assert f"checkpoint:{folder}@batch=2" in (out / "records.csv").read_text()
    assert (out / "report.html").is_file()
