"""The gate: what is right passes on any problem, what is wrong is refused on every one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from bench.gate import parity
from bench.gate.parity import FACTOR, GRADIENT, TOLERANCES, USUAL_SEEDS, Check, Gate, Verdict, judge, relative_error
from bench.gate.planted_defects import DEFECTS
from kernels.reference import LoopLSTM
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import Workload

pytest.importorskip("hypothesis")
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

MODES = ("inference", "training")
#: One whose sequences all fill their steps, and one with lengths, tokens and two layers.
SMALL = ("seed@batch=3,length=4", "translation-small-scaled@batch=3,length=5,hidden=16")
SEEDS = st.integers(0, 2**20)
#: The families beside the LSTM's, each in a form of its own.
ATTENTIVE = ("speech-las-scaled", "summarize-pg-scaled", "translation-iwslt-scaled", "translation-gnmt-scaled")


def built(variant: Variant, workload: Workload, mode: str) -> Executable:
    """A variant on the CPU, with weights of torch's own."""
    return Executable(variant, workload.config, mode, "cpu", initial_weights(workload.config, 1))


def verdict_on(
    lstm: type[nn.RNNBase], workload_name: str, mode: str, seeds: tuple[int, ...] = (0,), **fields
) -> Verdict:
    """The gate's verdict on an LSTM of one's own, over several seeds."""
    workload = find_workload(workload_name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LSTMS, "planted", lstm)
        executable = built(Variant("planted", "", lstm="planted", **fields), workload, mode)
    gate = Gate(workload, mode, "cpu")
    return Verdict(tuple(check for seed in seeds for check in gate.check(executable, seed).checks))


def lstm_that(change) -> type[LoopLSTM]:
    """A loop whose output and states go through `change(output, h, c)`."""

    class Changed(LoopLSTM):
        """The loop, changed."""

        def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            """Run the loop, change what it gives."""
            output, (h, c) = super().forward(*arguments)
            return change(output, h, c)

    return Changed


def test_the_unchanged_loop_passes():
    """The other tests refuse what they plant, not the way of planting it."""
    for workload in SMALL:
        for mode in MODES:
            assert verdict_on(lstm_that(lambda output, h, c: (output, (h, c))), workload, mode).passed


@pytest.mark.parametrize("workload", SMALL)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_refused(defect, mode, workload):
    """Each of the six mistakes that a kernel's author makes is refused in fp32, by far."""
    verdict = verdict_on(DEFECTS[defect], workload, mode)
    assert not verdict.passed
    assert verdict.worst.error > 10 * verdict.worst.limit
    assert verdict.describe().startswith(f"{verdict.worst.name}: error ")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_refused_in_low_precision(defect, mode, precision):
    """Rounding hides none of them: under autocast each is refused on both kinds of workload."""
    for workload in SMALL:
        assert not verdict_on(DEFECTS[defect], workload, mode, precision=precision, autocast=True).passed


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Base workloads of every kind in odd sizes."""
    base = draw(st.sampled_from(("seed", "translation-small-scaled", "scaling", "speech-ctc-scaled", *ATTENTIVE)))
    sizes = {
        "batch": draw(st.sampled_from((1, 2, 5, 17))),
        "hidden": draw(st.sampled_from((1, 5, 16, 33))),
        "length": draw(st.sampled_from((1, 2, 9))),
    }
    if "gnmt" in base:
        # Of a few units, the gradients of its attention nearly cancel in whatever is left of them: 1 in 12 is refused.
        sizes["hidden"] = max(sizes["hidden"], 16)
    return find_workload(f"{base}@" + ",".join(f"{axis}={value}" for axis, value in sizes.items()))


@settings(max_examples=8, derandomize=True, phases=[Phase.generate])
@given(workload=workloads(), mode=st.sampled_from(MODES), seed=SEEDS)
def test_every_variant_that_runs_here_passes(workload, mode, seed):
    """No right way of executing is refused, whatever the sizes (those that compile for minutes left out).

    The same problems on every run: of others about 1 in 100 has a gradient that is refused by a little, in models of a
    few units that have attention, and a run of the tests is not where such are to be found. One is kept below.
    """
    gate = Gate(workload, mode, "cpu")
    for variant in VARIANTS.values():
        if workload.config.family == "gnmt" and (variant.runtime == "openvino" or variant.precision == "bf16"):
            # OpenVINO 2026.4 gets a residual connection around an LSTM wrong. In bf16 little is left of the gradient
            # of the attention's query, whose terms nearly cancel; the cap then refuses it at some sizes.
            continue
        if variant.compiler != "dynamo" and variant.why_not("cpu", mode, workload) is None:
            verdict = gate.check(built(variant, workload, mode), seed)
            assert verdict.passed, f"{variant.name} on {workload.name}: {verdict.describe()}"


@pytest.mark.xfail(reason="the gate refuses a right gradient now and then, where models of a few units have attention")
def test_a_right_gradient_of_a_model_of_few_units_passes():
    """A problem on which it does not, see "What the gate cannot do": `cpu-fused` erred by 1.1 times the limit."""
    gate = Gate(find_workload("speech-las-scaled@batch=2,hidden=1,length=2"), "training", "cpu")
    truth, name = gate.quantities(833_238, "truth"), f"{GRADIENT}encoder.lstm.weight_ih_l0"
    # Errors of the reference and of the kernel as they were found, so that all machines judge the same.
    expected, found = (truth | {name: truth[name] * (1 + error)} for error in (3.43e-7, 4.40e-6))
    verdict = judge(found, truth, expected, "fp32", gate.usual_norms, terms=gate.terms)
    assert verdict.passed, verdict.describe()


def test_the_yardstick_of_bf16_weights_rounds_what_is_kept_so():
    """One output is a sum that may cancel: the yardstick errs by it as the variant does, head and all."""
    workload = find_workload("seed@batch=1,hidden=16,length=1")
    variant = VARIANTS["cpu-fused-bf16"]
    if reason := variant.why_not("cpu", "inference", workload):
        pytest.skip(reason)
    gate = Gate(workload, "inference", "cpu")
    executable = built(variant, workload, "inference")
    for seed in range(15, 25):
        assert gate.check(executable, seed).passed, seed


def test_split_numbers_are_judged_far_below_bf16():
    """What rounds to bf16 alone is refused where numbers are split in two; float32 passes, and split numbers do."""
    workload = find_workload("deepbench@batch=3,hidden=33,length=9")
    gate = Gate(workload, "inference", "cpu")
    for name, passes in (("cpu-fused-bf16", False), ("cpu-fused", True), ("cpu-fused-split", True)):
        variant = dataclasses.replace(VARIANTS[name], precision="bf16-split")
        if not variant.why_not("cpu", "inference", workload):
            assert gate.check(built(variant, workload, "inference"), 3).passed is passes, name


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_refused_among_split_numbers(defect):
    """Each of the six mistakes is above the limit for numbers split in two."""
    for workload in SMALL:
        assert not verdict_on(DEFECTS[defect], workload, "inference", precision="bf16-split").passed


def test_a_gradient_whose_terms_cancel_is_judged_by_the_terms():
    """An error that is large beside what is left of them and small beside them passes; beside them it is refused."""
    truth = {"grad attention.query.bias": torch.full((4,), 1e-3), "grad attention.key.weight": torch.ones(4, 4)}
    for shift, passes in ((1e-6, True), (1e-3, False)):
        found = {name: value + shift for name, value in truth.items() if "query" in name} | {
            name: value for name, value in truth.items() if "key" in name
        }
        exact = {name: value.double() for name, value in truth.items()}
        assert judge(found, exact, truth, "fp32").passed is passes


@pytest.mark.parametrize("planted", [0.0, 2.0, -1.0])
@pytest.mark.parametrize("workload", ["summarize-pg-scaled@batch=3,length=5,hidden=16", *ATTENTIVE[3:]])
def test_a_wrong_gradient_does_not_hide_behind_terms_that_cancel(workload, planted):
    """Missing, doubled or of wrong sign, the gradient of attention's query is refused in every precision."""
    found = find_workload(workload + ("" if "@" in workload else "@batch=5,length=9,hidden=32"))
    gate, name = Gate(found, "training", "cpu"), f"{GRADIENT}attention.query.weight"
    truth = gate.quantities(1, "truth")
    for precision in ("fp32", "fp16", "bf16"):
        expected = gate.quantities(1, precision)
        changed = expected | {name: planted * expected[name]}
        for quantities, passes in ((expected, True), (changed, False)):
            verdict = judge(quantities, truth, expected, precision, gate.usual_norms, terms=gate.terms)
            assert {check.name: check.passed for check in verdict.checks}[name] is passes


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_one_element_that_is_no_number_is_refused(value, mode):
    """One wrong place in the last output of the last sequence is enough."""

    def spoil(output: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        spoiled = output.clone()
        spoiled[-1, -1, -1] = value
        return spoiled, (h, c)

    verdict = verdict_on(lstm_that(spoil), SMALL[0], mode)
    assert not verdict.passed
    assert next(check for check in verdict.checks if check.name == "outputs").error == math.inf


@pytest.mark.parametrize(
    "change",
    [
        lambda output, h, c: (output, (h, c * (1 + 1e-3))),
        lambda output, h, c: (output, (h * (1 - 1e-3), c)),
        lambda output, h, c: (output + 1e-3, (h, c)),
    ],
    ids=["cell", "hidden", "outputs"],
)
def test_a_thousandth_is_too_much_in_fp32(change):
    """Every result is looked at, final states too, and small errors are refused where the precision is high."""
    assert not verdict_on(lstm_that(change), SMALL[0], "inference").passed


def test_a_wrong_gradient_is_refused_in_training():
    """A forward pass that is right does not excuse a backward pass that is not."""

    def double(output: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return output.detach() + 1.01 * (output - output.detach()), (h, c)

    assert verdict_on(lstm_that(double), SMALL[0], "inference").passed
    verdict = verdict_on(lstm_that(double), SMALL[0], "training")
    assert not verdict.passed
    assert verdict.worst.name.startswith("grad ")
    assert verdict.worst_of(gradients=False).error <= verdict.worst_of(gradients=False).limit


def test_a_gradient_that_is_missing_is_refused():
    """A weight that gets no gradient would never learn."""

    class Detached(LoopLSTM):
        """The loop, whose recurrent weight is cut off."""

        def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            """Run the loop with a copy of the weight."""
            self.weight_hh_l0.requires_grad_(False)
            return super().forward(*arguments)

    verdict = verdict_on(Detached, SMALL[0], "training")
    refused = {check.name for check in verdict.checks if not check.passed}
    assert refused == {"grad encoder.weight_hh_l0", "grad decoder.weight_hh_l0"}


class FirstResultKept(LoopLSTM):
    """Computes once, then gives the same again."""

    def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the loop the first time."""
        if not hasattr(self, "kept"):
            self.kept = super().forward(*arguments)
        return self.kept


class FirstWeightsKept(LoopLSTM):
    """Packs its weights at the first call and never looks at them again, as a kernel with its own layout may."""

    def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the loop on the packed weights."""
        if not hasattr(self, "packed"):
            self.packed = {name: value.detach().clone() for name, value in self.named_parameters()}
        return torch.func.functional_call(_Plain(self), {f"loop.{n}": v for n, v in self.packed.items()}, arguments)


class _Plain(nn.Module):
    """Calls the loop's own forward pass, past the subclass's."""

    def __init__(self, loop: LoopLSTM) -> None:
        super().__init__()
        self.loop = loop

    def forward(self, *arguments: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the loop."""
        return LoopLSTM.forward(self.loop, *arguments)


@pytest.mark.parametrize("lstm", [FirstResultKept, FirstWeightsKept])
def test_a_variant_that_ignores_new_weights_is_refused(lstm):
    """The gate runs twice on other weights and inputs: what is kept from the first time is wrong the second."""
    assert verdict_on(lstm, SMALL[0], "inference", seeds=(0,)).passed
    assert not verdict_on(lstm, SMALL[0], "inference", seeds=(0, 1)).passed


@pytest.mark.parametrize("name", ["reference", "loop", "torchscript", "amp-bf16-native"])
@pytest.mark.parametrize("mode", MODES)
def test_a_check_leaves_the_weights_as_they_were(name, mode):
    """Bit by bit: what is timed after the gate is what was built."""
    workload = find_workload(SMALL[0])
    executable = built(VARIANTS[name], workload, mode)
    before = executable.weights()
    Gate(workload, mode, "cpu").check(executable, 7)
    after = executable.weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_check_that_raises_leaves_the_weights_as_they_were(monkeypatch):
    """Whatever the variant raises comes through, after the weights were put back."""
    workload = find_workload(SMALL[0])
    executable = built(VARIANTS["loop"], workload, "inference")
    before = executable.weights()

    def fail(_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(executable, "quantities", fail)
    with pytest.raises(ZeroDivisionError):
        Gate(workload, "inference", "cpu").check(executable, 7)
    assert all(torch.equal(before[key], value) for key, value in executable.weights().items())


def test_a_check_trains_nothing():
    """A gate between two training steps leaves the optimizer and its weights to the steps."""
    workload = find_workload(SMALL[0])
    gate = Gate(workload, "training", "cpu")
    checked, plain = (built(VARIANTS["loop"], workload, "training") for _ in range(2))
    for executable in (checked, plain):
        batch = executable.prepare(workload.make_batch(0))
        with executable.context():
            executable.call(batch)
            if executable is checked:
                gate.check(executable, 3)
            executable.call(batch)
    expected = plain.weights()
    assert all(torch.equal(value, expected[key]) for key, value in checked.weights().items())


def test_training_looks_at_every_gradient():
    """Of each parameter and of the real-valued inputs; inference at none."""
    workload = find_workload(SMALL[0])
    names = {check.name for check in verdict_on(LoopLSTM, SMALL[0], "training").checks}
    parameters = {f"grad {name}" for name in initial_weights(workload.config, 1)}
    assert names == {"outputs", "hidden", "cell", "loss", "grad source"} | parameters
    assert {c.name for c in verdict_on(LoopLSTM, SMALL[0], "inference").checks} == {"outputs", "hidden", "cell", "loss"}


@pytest.mark.parametrize("change", ["weights", "inputs"])
def test_a_shorter_check_leaves_out_the_gradients_of_inputs_alone(change):
    """A wrong gradient of a weight is refused as ever; one of an input is what only the whole check sees."""
    workload = find_workload(SMALL[0])

    class Wrong(LoopLSTM):
        """The loop, with one kind of gradient a hundredth too large."""

        def forward(self, x: Tensor, *arguments: object) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            """Run the loop on what gives a wrong gradient."""
            if change == "inputs":
                return super().forward(1.01 * x - 0.01 * x.detach(), *arguments)
            output, state = super().forward(x, *arguments)
            return output.detach() + 1.01 * (output - output.detach()), state

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LSTMS, "planted", Wrong)
        executable = built(Variant("planted", "", lstm="planted"), workload, "training")
    gate = Gate(workload, "training", "cpu")
    whole, shorter = gate.check(executable, 0), gate.check(executable, 0, of_inputs=False)
    names = {check.name for check in whole.checks}
    assert {check.name for check in shorter.checks} == names - {"grad source"}
    assert not whole.passed
    assert shorter.passed is (change == "inputs")


def test_a_shorter_check_makes_one_pass(monkeypatch):
    """Half the calls of the whole one."""
    executable = built(VARIANTS["loop"], find_workload(SMALL[0]), "training")
    gate = Gate(find_workload(SMALL[0]), "training", "cpu")
    gate.check(executable, 0)
    passes = []
    forward = Executable.forward
    monkeypatch.setattr(Executable, "forward", lambda self, batch: passes.append(1) or forward(self, batch))
    gate.check(executable, 0)
    gate.check(executable, 0, of_inputs=False)
    assert len(passes) == 3


def tensors(*values: float) -> dict[str, Tensor]:
    """One quantity with these values."""
    return {"outputs": torch.tensor(values, dtype=torch.float64)}


def judged(error: float, yardstick: float, precision: str = "fp32") -> Check:
    """The check of a quantity with this error, where the reference has that one."""
    (check,) = judge(tensors(1 + error), tensors(1.0), tensors(1 + yardstick), precision).checks
    return check


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_limit_is_a_multiple_of_the_reference_s_error_between_floor_and_cap(precision):
    """Below the floor it is the floor, above the cap the cap, in between FACTOR times the yardstick."""
    floor, cap = dataclasses.astuple(TOLERANCES[precision])
    middle = math.sqrt(floor * cap) / FACTOR
    assert judged(0, 0, precision).limit == floor
    assert judged(0, floor / FACTOR / 2, precision).limit == floor
    assert judged(0, middle, precision).limit == pytest.approx(FACTOR * middle)
    assert judged(0, cap, precision).limit == cap
    assert judged(0, math.nan, precision).limit == floor


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(list(TOLERANCES)))
def test_a_quantity_passes_up_to_its_limit(error, yardstick, precision):
    """Passed and strain tell the same: the limit itself is still fine."""
    check = judged(error, yardstick, precision)
    assert check.passed == (check.error <= check.limit) == (check.strain <= 1)
    assert TOLERANCES[precision].floor <= check.limit <= TOLERANCES[precision].cap


def test_a_missing_quantity_is_refused():
    """A quantity that a variant does not give is not right."""
    verdict = judge({}, tensors(1.0), tensors(1.0), "fp32")
    assert not verdict.passed
    assert verdict.worst.error == math.inf


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 1), torch.ones(()), torch.ones(1, 2)])
def test_a_wrong_shape_is_refused(value):
    """Nothing is broadcast: the right values in another shape are an infinite error."""
    assert relative_error(value, torch.ones(2, dtype=torch.float64)) == math.inf


def test_an_error_is_relative_to_the_truth():
    """Norm of the difference over the norm of truth, by hand: |(3, 4) - (3, 4.5)| / 5."""
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]).double()) == pytest.approx(0.1)


def test_where_truth_is_zero_only_zero_is_right():
    """Nothing can be divided by, so any other value is an infinite error."""
    truth = torch.zeros(2, dtype=torch.float64)
    assert relative_error(torch.zeros(2), truth) == 0.0
    assert relative_error(torch.tensor([0.0, 1e-30]), truth) == math.inf


def test_a_verdict_tells_the_worst_first():
    """At most four quantities with error and limit, and how many more there are."""
    verdict = Verdict((*(Check(f"q{n}", 10.0**n, 0.5) for n in range(6)), Check("fine", 0.1, 0.5)))
    told = verdict.describe()
    assert told.startswith("q5: error 1.00e+05, limit 5.00e-01; q4: ")
    assert told.endswith("; and 2 more")
    assert "fine" not in told
    assert verdict.worst.name == "q5"


def test_gradients_are_told_apart():
    """The worst of either kind, and None where there is none."""
    verdict = Verdict((Check("outputs", 0.1, 1), Check("loss", 0.3, 1), Check("grad fc.bias", 0.2, 1)))
    assert verdict.worst_of(gradients=False).name == "loss"
    assert verdict.worst_of(gradients=True).name == "grad fc.bias"
    assert Verdict(verdict.checks[:2]).worst_of(gradients=True) is None


def test_the_gate_s_biases_are_large_at_any_size():
    """Torch draws them below 1/sqrt(hidden size), where a lost one would drown in the rounding of bf16."""
    weights = parity.random_weights(find_workload("scaling@hidden=512").config, 3)
    biases = [value for name, value in weights.items() if "bias" in name]
    assert all(value.abs().max() > 0.3 for value in biases if value.numel() > 8)
    again = parity.random_weights(find_workload("scaling@hidden=512").config, 3)
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def nearly_cancelled(error: float) -> dict[str, dict[str, torch.Tensor]]:
    """A gradient of one number that is a hundredth of its usual 1, and a variant that is off by `error`."""
    true, name = torch.tensor([0.01], dtype=torch.float64), "grad fc.bias"
    return {"found": {name: true + error}, "truth": {name: true}, "expected": {name: true + 1e-5}}


def test_a_gradient_that_nearly_cancels_is_judged_by_its_usual_size():
    """Its rounding is that of its terms, not of what is left of their sum."""
    usual = {"grad fc.bias": 1.0}
    assert not judge(**nearly_cancelled(0.005), precision="bf16").passed
    assert judge(**nearly_cancelled(0.005), precision="bf16", usual=lambda: usual).passed
    # What is large against its usual size is still wrong, and so is fp32 that errs like bf16.
    assert not judge(**nearly_cancelled(0.05), precision="bf16", usual=lambda: usual).passed
    assert not judge(**nearly_cancelled(0.005), precision="fp32", usual=lambda: usual).passed


def test_a_gradient_that_cancels_exactly_is_judged_by_its_usual_size():
    """One that is 0 in float64 has no relative error: its terms' rounding passes, what is wrong is told by how much.

    Without a usual size only 0 is right, and what is no number or missing is always wrong.
    """

    def verdict(value: float, precision: str, usual: float = 1.0, expected: float = 0.0) -> Verdict:
        found, right = ({"grad fc.bias": torch.tensor([v], dtype=torch.float64)} for v in (value, expected))
        truth = {"grad fc.bias": torch.zeros(1, dtype=torch.float64)}
        return judge(found, truth, right, precision, usual=lambda: {"grad fc.bias": usual})

    assert verdict(0.005, "bf16").passed
    assert verdict(0.005, "bf16", expected=0.004).passed
    assert not verdict(0.05, "bf16").passed
    assert verdict(0.05, "bf16").describe() == "grad fc.bias: error 5.00e-02, limit 1.56e-02"
    assert not verdict(0.005, "fp32").passed
    assert verdict(1e-6, "fp32").passed
    assert not verdict(1e-6, "fp32", usual=0.0).passed
    assert verdict(0.0, "fp32", usual=0.0).passed
    for wrong in (math.nan, math.inf):
        assert not verdict(wrong, "bf16").passed
        assert "error inf" in verdict(wrong, "bf16").describe()
    assert not judge({}, {"grad fc.bias": torch.zeros(1)}, {"grad fc.bias": torch.zeros(1)}, "bf16").passed


def test_the_usual_size_makes_no_limit_narrower_and_no_output_wider():
    """A gradient that is larger than usual keeps its own norm, and what is no gradient has no other."""
    assert not judge(**nearly_cancelled(0.005), precision="bf16", usual=lambda: {"grad fc.bias": 1e-6}).passed
    outputs = {kind: {"outputs": value["grad fc.bias"]} for kind, value in nearly_cancelled(0.005).items()}
    assert not judge(**outputs, precision="bf16", usual=lambda: {"outputs": 1.0}).passed


def test_the_usual_size_is_that_of_other_problems():
    """Root mean square of the norms in truth; nothing but gradients has one."""
    gate = Gate(find_workload("seed@batch=2,length=3"), "training", "cpu")
    found = gate.usual_norms()
    assert set(found) == {name for name in gate.quantities(0, "truth") if name.startswith(GRADIENT)}
    norms = [float(gate.quantities(seed, "truth")["grad fc.bias"].norm()) for seed in USUAL_SEEDS]
    assert found["grad fc.bias"] == pytest.approx(math.sqrt(sum(n * n for n in norms) / len(norms)))


def test_no_honest_problem_is_refused_where_a_gradient_nearly_cancels(monkeypatch):
    """Of 600 problems these three were refused by the gradient's own norm; an honest variant passes them."""
    workload = find_workload("seed@batch=2,length=3")
    executable = built(VARIANTS["amp-bf16-native"], workload, "training")
    seeds = (214, 228, 493)
    gate = Gate(workload, "training", "cpu")
    assert [gate.check(executable, seed).describe() for seed in seeds] == ["", "", ""]
    monkeypatch.setattr(Gate, "usual_norms", lambda _: {})
    assert not all(gate.check(executable, seed).passed for seed in seeds)
