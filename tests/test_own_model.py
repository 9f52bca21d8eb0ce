"""A model of the user's own is a workload: any inputs and outputs, the same gate, and each variant as right."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from own_model_kit import EXAMPLES, FOREIGN, PLAIN, example, foreign, own, verdict, workload, written

from bench.gate.audit import Audit
from bench.gate.own_model import gate_for
from bench.gate.parity import ROUNDOFF, judge
from bench.plan.cases import load_suite
from seq2seq.execution.executable import execute
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model import inputs, leaves, lstms
from seq2seq.own_model.catalogue import workload_of
from seq2seq.own_model.errors import OwnModelError
from seq2seq.own_model.inspection import looked_at
from seq2seq.own_model.model import OwnModel
from seq2seq.own_model.source import Spec
from seq2seq.own_model.workload import OwnWorkload, own_weights, random_weights

WAYS = ("reference", "aten", "loop", "lstmcell", "cpu-fused", "cpu-fused-int8", "int8-dynamic", "amp-bf16-native")
FOREIGNERS = ("infersent", "crnn", "hugging")


@pytest.mark.parametrize("variant", WAYS)
@pytest.mark.parametrize("name", FOREIGNERS)
def test_foreign_models_pass_the_gate_in_every_way(name, variant):
    """Tuples with NumPy arrays, nested modules, output objects with None and infinite scores: compared leaf by leaf."""
    found = verdict(foreign(name), variant)
    assert not foreign(name).narrow
    assert found.passed, found.describe()


@pytest.mark.parametrize("variant", ["reference", "aten", "loop", "cpu-fused", "amp-bf16-native"])
@pytest.mark.parametrize("name", ["crnn", "hugging"])
def test_foreign_models_train_alike_in_every_way(name, variant):
    """The loss and the gradients of all weights and real inputs are the truth's; a loss may be the model's own."""
    problem = foreign(name, "training")
    found = verdict(problem, variant, "training")
    gradients = {check.name for check in found.checks if check.name.startswith("grad ")}
    parameters = {f"grad {n}" for n, _ in problem.own.model.named_parameters()}
    assert found.passed, found.describe()
    assert gradients == parameters | ({"grad inputs.args[0]"} if name == "crnn" else set())


@pytest.mark.parametrize("name", ["crnn", "hugging"])
def test_training_under_autocast_runs_in_our_kernel(name):
    """bf16 products in both passes, the user's loss under the same autocast: right by the limits of bf16."""
    problem, variant = foreign(name, "training"), VARIANTS["cpu-fused-amp"]
    if reason := variant.why_not("cpu", "training", problem):
        assert "AVX512-BF16" in reason or "compiler" in reason
        return
    found = verdict(problem, variant.name, "training")
    assert found.passed, found.describe()
    executable = execute(problem, variant, "training", "cpu", own_weights(problem))
    executable.quantities(executable.prepare(problem.make_batch(0)))
    ran = [choice for module in executable.model.modules() for choice in getattr(module, "choices", ())]
    assert {choice.implementation for choice in ran} == {"cpu-fused"}
    assert max(check.error for check in found.checks) > ROUNDOFF["bf16"] / 100


def test_the_suite_trains_in_bf16_both_ways():
    """Autocast around torch's LSTM and around our kernel; in inference, weights in bf16 take its place."""
    rows = [row for row in load_suite("own-model").select if "cpu" in row.devices]
    names = ("amp-bf16", "cpu-fused-amp", "cpu-fused-bf16")
    modes = {name: sorted({mode for row in rows if name in row.variants for mode in row.modes}) for name in names}
    assert list(modes.values()) == [["inference", "training"], ["training"], ["inference"]]


def test_an_lstm_with_computed_weights_is_left_alone_and_said():
    """No kernel takes the place of an LSTM whose weights come from elsewhere; what needs none runs."""
    problem = foreign("awd_lstm")
    assert problem.refuses(VARIANTS["aten"], "inference") is None
    reason = problem.refuses(VARIANTS["cpu-fused"], "inference")
    assert "rnn.module has weights computed from other parameters" in reason
    assert verdict(problem, "aten").passed


def test_a_prenet_that_drops_by_design_is_refused_with_its_line():
    """Switched off, the model runs; its LSTMCell is noted and left alone."""
    path = FOREIGN / "tacotron.py"
    with pytest.raises(OwnModelError, match=r"in eval mode .* at .*tacotron.py:\d+ draws random numbers"):
        workload(path)
    model = OwnModel(Spec(f"{path}:build_quiet", f"{path}:example_inputs"))
    problem = workload_of(model, "own:tacotron.build_quiet")
    assert lstms.cells(model.model) == ["attention_rnn"]
    assert [stack.name for stack in problem.config.stacks] == ["lstm"]
    for variant in ("aten", "loop", "cpu-fused"):
        found = verdict(problem, variant)
        assert found.passed, (variant, found.describe())


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("variant", ["reference", "cpu-fused", "onnxruntime"])
def test_the_audit_lets_honest_calls_through(variant, mode, tmp_path):
    """The timed call itself, with states handed in and out, is checked as a workload's is."""
    path = written(tmp_path, PLAIN)
    problem = workload(path, loss=f"{path}:loss")
    if VARIANTS[variant].why_not("cpu", mode, problem):
        assert variant == "onnxruntime"
        return
    gate, weights, batch = gate_for(problem, mode, "cpu"), own_weights(problem), problem.make_batch(0)
    executable = execute(problem, VARIANTS[variant], mode, "cpu", weights)
    prepared = executable.prepare(batch)
    before = {name: value.clone() for name, value in prepared.tensors().items()}
    assert Audit(gate, weights, batch).find(executable, prepared, 5, warm=False) == ""
    assert all(torch.equal(value, before[name]) for name, value in prepared.tensors().items())


WRONG = {
    "other results": "lambda model: lambda x: tuple([1.001 * model(x)[0], model(x)[1]])",
    "no state": "lambda model: lambda x: (model(x)[0], None)",
    "another shape": "lambda model: lambda x: (model(x)[0][:, :-1], model(x)[1])",
    "stale weights": "__import__('copy').deepcopy",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_added_variant_is_refused(what, tmp_path):
    """It passes the same gate; what it made of the weights is made again for others, so copying them is right."""
    path = written(tmp_path, PLAIN)
    problem = workload(path)
    make = eval(WRONG[what])  # noqa: S307 - a table of ours
    gate = gate_for(problem, "inference", "cpu")
    executable = execute(problem, Variant("mine", "", make=make), "inference", "cpu", own_weights(problem))
    assert gate.check(executable, 3).passed is (what == "stale weights")


def test_a_model_that_cannot_run_in_float64_has_a_truth_in_float32_with_wider_limits(tmp_path):
    """The limits are stated and still refuse what is wrong."""
    path = written(tmp_path, PLAIN.replace("self.lstm(x, state)", "self.lstm(x + torch.ones(5).float(), state)"))
    narrow = workload(
        written(
            tmp_path,
            PLAIN.replace(
                "def forward(self, x, state=None):",
                "def forward(self, x, state=None):\n        assert x.dtype == torch.float32",
            ),
            "narrow",
        )
    )
    assert "AssertionError" in narrow.narrow
    wide = workload(path)
    assert not wide.narrow
    for variant in ("aten", "cpu-fused", "loop"):
        found = verdict(narrow, variant)
        assert found.passed, found.describe()
    limits = {check.name: check.limit for check in verdict(wide, "aten").checks}
    assert all(check.limit >= 2 * limits[check.name] for check in verdict(narrow, "aten").checks)
    make = Variant("mine", "", make=lambda model: lambda x: (1.001 * model(x)[0], model(x)[1]))
    wrong = execute(narrow, make, "inference", "cpu", own_weights(narrow))
    assert not gate_for(narrow, "inference", "cpu").check(wrong, 3).passed
    assert any("truth in float32" in word for word in wrong.words())


def test_the_gate_s_weights_are_others_and_tied_ones_stay_tied(tmp_path):
    """Zeros are moved too; buffers are not."""
    problem = workload(example(tmp_path, "word_language_model"))
    drawn = random_weights(problem, 1)
    assert drawn["head.weight"] is drawn["embed.weight"]
    built = own_weights(problem)
    assert all(not torch.equal(drawn[name], built[name]) for name in built)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", ["word_language_model", "tagger", "forecaster"])
def test_the_worked_examples_run_and_pass(name, mode, tmp_path):
    """Each in both modes, by our kernel and by a loop; a metric is recorded."""
    path = example(tmp_path, name)
    metric = "" if name == "forecaster" else f"{path}:metric"
    problem = workload(path, loss=f"{path}:loss", metric=metric)
    for variant in ("reference", "cpu-fused", "loop"):
        found = verdict(problem, variant, mode)
        assert found.passed, (variant, found.describe())
    executable = execute(problem, VARIANTS["reference"], mode, "cpu", own_weights(problem))
    with executable.context():
        remarks = executable.remarks(executable.prepare(problem.make_batch(0)))
    assert (remarks.get("metric", -1) >= 0) is bool(metric and mode == "inference")


def test_a_trace_is_a_mix_of_its_shapes(tmp_path):
    """Equal lines are one set; weights are shares of all counts, and each set is a workload of its own."""
    path = example(tmp_path, "tagger")
    found = own(path, trace=str(EXAMPLES / "served.jsonl"))
    assert list(found.names) == [
        f"own:small_tagger/{n}" for n in ("batch=1,steps=12", "batch=1,steps=40", "batch=16,steps=60")
    ]
    assert [inputs.weight for inputs in found.sets] == [0.7, 0.25, 0.05]
    assert workload_of(found, "own:small_tagger/batch=1,steps=40").source_steps == 40


@pytest.mark.parametrize(
    ("code", "names", "weights"),
    [
        ("[(torch.randn(2, 7, 5), 3), (torch.randn(1, 4, 5), 1)]", ["2x7x5", "1x4x5"], [0.75, 0.25]),
        ("[('long', torch.randn(2, 9, 5), 1), ('short', torch.randn(2, 2, 5), 1)]", ["long", "short"], [0.5, 0.5]),
        ("{'a b': (torch.randn(2, 9, 5),), 'c': ((torch.randn(2, 3, 5),), 3)}", ["a-b", "c"], [0.25, 0.75]),
        ("{'x': torch.randn(2, 9, 5)}", [""], [1.0]),
    ],
)
def test_inputs_may_be_a_mix(code, names, weights, tmp_path):
    """A list of sets with weights, or a dict of sets; a dict of arguments is one set."""
    found = own(written(tmp_path, PLAIN.replace("return torch.randn(2, 7, 5)", f"return {code}")))
    assert [inputs.name for inputs in found.sets] == names
    assert [inputs.weight for inputs in found.sets] == weights
    for name in found.names:
        assert workload_of(found, name).batch in {1, 2}


def test_what_the_user_leaves_on_the_cpu_stays_there():
    """Lengths to pack by are read on the CPU: a function that takes the device decides; else everything moves."""

    def placed(device="cpu"):
        return torch.zeros(2, 3, device=device), torch.tensor([3, 2])

    def plain():
        return torch.zeros(2, 3), torch.tensor([3, 2])

    for function, stays in ((placed, {"inputs[1]"}), (plain, set())):
        (found,) = inputs.input_sets(function, "f", "", torch.nn.Identity().forward)
        assert inputs.staying(found, "meta") == stays
        moved = inputs.Given(found.make(0, "cpu"), stays=frozenset(stays)).to("meta", torch.float64)
        assert moved.args[0].dtype == torch.float64
        assert moved.args[1].device.type == ("cpu" if stays else "meta")


def test_variation_leaves_lengths_masks_and_what_the_model_refuses(tmp_path):
    """Real values are scaled, tokens shuffled; whatever the model does not take otherwise is held."""
    code = """
        import torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(10, 4)
                self.lstm = nn.LSTM(4, 4, batch_first=True)

            def forward(self, tokens, lengths, mask, order, scale):
                if not torch.equal(order, torch.arange(6).view(2, 3)):
                    raise ValueError(order)
                return self.lstm(self.embed(tokens))[0] * mask[..., None] * scale

        def build():
            return Model()

        def example_inputs():
            mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
            return torch.arange(6).view(2, 3), torch.tensor([3, 2]), mask, torch.arange(6).view(2, 3), torch.rand(1)
        """
    problem = workload(written(tmp_path, code))
    assert problem.held == {"inputs[1]", "inputs[2]", "inputs[3]"}
    first, other = problem.make_batch(0), problem.make_batch(1)
    differs = [not torch.equal(one, two) for one, two in zip(first.args, other.args, strict=True)]
    assert differs == [True, False, False, False, True]
    assert sorted(first.args[0].flatten()) == sorted(other.args[0].flatten())


def test_the_share_of_the_lstms_grows_with_what_they_do(tmp_path):
    """A model that is one LSTM is nearly all LSTM; beside a heavy product it is little."""
    alone = workload(written(tmp_path, PLAIN.replace("return self.head(y), state", "return y"), "alone"))
    heavy = PLAIN.replace(
        "y, state = self.lstm(x, state)",
        "y, state = self.lstm(x + 0 * (torch.ones(600, 600) @ torch.ones(600, 600))[0, 0], state)",
    )
    beside = workload(written(tmp_path, heavy, "heavy"))
    shares = [looked_at(problem)["inference"].share for problem in (alone, beside)]
    assert shares[0] > 0.5 > shares[1] >= 0
    assert lstms.gain_limit(0.5) == 2


@given(
    st.recursive(
        st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9
    )
)
def test_a_tree_is_rebuilt_as_it_was(tree):
    """Whatever the nesting, leaves keep their places and paths tell them apart."""
    flat = list(leaves.flatten(tree, "x"))
    assert leaves.rebuilt(tree, lambda _, leaf: leaf, "x") == tree
    assert leaves.rebuilt(tree, lambda path, _: path, "x") is not None or not flat
    assert [leaf for _, leaf in flat] == [
        leaf for _, leaf in leaves.flatten(leaves.rebuilt(tree, lambda _, v: v, "x"), "x")
    ]


def test_packed_sequences_go_in_and_out(tmp_path):
    """As an input, varied in its data alone, and as an output."""
    code = """
        import torch
        from torch import nn
        from torch.nn.utils.rnn import pack_sequence

        def build():
            return nn.LSTM(4, 5)

        def example_inputs():
            return pack_sequence([torch.randn(n, 4) for n in (2, 5, 3)], enforce_sorted=False)
        """
    problem = workload(written(tmp_path, code))
    assert (problem.batch, problem.source_steps, problem.valid_steps, problem.has_lengths) == (3, 5, 10, True)
    for variant in ("aten", "loop", "cpu-fused"):
        found = verdict(problem, variant)
        assert found.passed, (variant, found.describe())
        assert {check.name for check in found.checks} == {"output[0].data", "output[1][0]", "output[1][1]"}
    # The places of the sequences are those of the input: the model hands them on.
    assert problem.aliased == {"output[0].batch_sizes"}


def test_what_was_found_is_known_to_other_processes(tmp_path):
    """As JSON, so that a cold start begins without a call of the model."""
    problem = workload(example(tmp_path, "tagger"))
    plain = json.loads(json.dumps(problem.found()))
    assert OwnWorkload.known(problem.name, problem.own, problem.inputs, plain) == problem


@pytest.mark.parametrize("factor", [1.0, 1.02, float("nan")])
def test_a_yardstick_is_asked_for_where_the_floor_is_not_kept_alone(factor, tmp_path, monkeypatch):
    """Whether a variant passes is what `judge` says with every yardstick; it is computed for those past the floor."""
    problem = workload(written(tmp_path, PLAIN))
    gate = gate_for(problem, "inference", "cpu")
    asked = []
    compute = gate.compute
    monkeypatch.setattr(gate, "compute", lambda *args: asked.append(args[2]) or compute(*args))
    make = Variant("scaled", "", make=lambda model: lambda x: (factor * model(x)[0], model(x)[1]))
    executable = execute(problem, make, "inference", "cpu", own_weights(problem))
    found = gate.check(executable, 3)
    assert found.passed == (factor == 1.0)
    assert ("fp32" in asked) == (factor != 1.0)
    kept = gate._found(executable, 3)
    usual = {"usual": gate.usual_norms, "usual_errors": lambda: gate.usual_errors("fp32")}
    fully = judge(kept, gate.quantities(3, "truth"), gate.quantities(3, "fp32"), "fp32", terms=gate.terms, **usual)
    assert fully.passed == found.passed
