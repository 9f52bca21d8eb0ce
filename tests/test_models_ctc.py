"""CTC: the loss is the sum over all alignments, padding has no part in it, and the gate refuses defects in it."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch
from torch import Tensor, nn

from bench.gate.parity import Gate, Verdict
from kernels.reference import LoopLSTM
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import REFERENCE
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.models.ctc import CTCConfig, CTCModel, ctc_loss, steps_needed
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Problem, labelled, past

SMALL = "speech-ctc-scaled@batch=3,length=12,hidden=8"


def model_of(problem: Problem, lstm: type[nn.RNNBase] = nn.LSTM) -> CTCModel:
    """A model in float64, its weights by the problem's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(problem.seed)
        return problem.config.build(lstm).double()


def collapsed(path: tuple[int, ...], blank: int) -> tuple[int, ...]:
    """Labels of an alignment: without repeats, then without blanks."""
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def likelihoods(outputs: Tensor, blank: int) -> dict[tuple[int, ...], float]:
    """Probability of all labels that a sequence's outputs (steps, labels) can say, alignment by alignment."""
    probabilities = outputs.double().softmax(-1).tolist()
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(outputs.size(1)), repeat=outputs.size(0)):
        share = math.prod(step[label] for step, label in zip(probabilities, path, strict=True))
        found[collapsed(path, blank)] = found.get(collapsed(path, blank), 0.0) + share
    return found


@given(problem=labelled())
def test_loss_is_the_sum_over_all_alignments(problem):
    """Minus the logarithm of the labels' probability, all sequences together, over the number of labels."""
    batch = problem.make_batch()
    with torch.no_grad():
        outputs = model_of(problem)(batch.source, None, batch.source_lengths)
        loss = model_of(problem).loss(outputs, batch.expected, batch.decoded_lengths)
    total = 0.0
    for row, steps in enumerate(problem.decoded_lengths):
        labels = tuple(label for label in batch.expected[row].tolist() if label != IGNORE_TOKEN)
        total -= math.log(likelihoods(outputs[row, :steps], problem.config.blank)[labels])
    count = int((batch.expected != IGNORE_TOKEN).sum())
    assert float(loss) == pytest.approx(total / max(count, 1))


@given(problem=labelled(with_lengths=True))
def test_padding_changes_nothing(problem):
    """Whatever stands past a sequence's end, its outputs, the loss and all gradients are the same."""
    batch, results = problem.make_batch(), []
    for filling in (0.0, 1e3, math.nan):
        model = model_of(problem)
        source = batch.source.masked_fill(past(problem.decoded_lengths, problem.source_steps)[..., None], filling)
        outputs = model(source, None, batch.source_lengths)
        loss = model.loss(outputs, batch.expected, batch.decoded_lengths)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append([outputs, loss, *gradients])
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@given(problem=labelled(with_lengths=True))
def test_outputs_past_the_end_have_no_part_in_the_loss(problem):
    """They need not even be numbers, and no gradient goes into them."""
    batch = problem.make_batch()
    outputs = model_of(problem)(batch.source, None, batch.source_lengths).detach()
    outside = past(problem.decoded_lengths, problem.source_steps)
    spoilt = outputs.masked_fill(outside[..., None], math.nan).requires_grad_()
    loss = ctc_loss(spoilt, batch.expected, batch.decoded_lengths, problem.config.blank)
    (gradient,) = torch.autograd.grad(loss, spoilt)
    assert torch.equal(loss, ctc_loss(outputs, batch.expected, batch.decoded_lengths, problem.config.blank))
    assert not gradient[outside].any()
    assert gradient.isfinite().all()


@given(problem=labelled())
def test_a_sequence_is_the_same_alone_and_in_a_batch(problem):
    """Outputs and final state of a sequence are those that it has without the others, by nn.LSTM and by the loop."""
    batch = problem.make_batch()
    for lstm in (nn.LSTM, LoopLSTM):
        model = model_of(problem, lstm)
        with torch.no_grad():
            outputs, hidden, cell = model.run(batch.source, None, batch.source_lengths)
            for row, steps in enumerate(problem.decoded_lengths):
                alone = model.run(batch.source[row : row + 1, :steps])
                torch.testing.assert_close(outputs[row : row + 1, :steps], alone[0])
                torch.testing.assert_close(hidden[:, row : row + 1], alone[1])
                torch.testing.assert_close(cell[:, row : row + 1], alone[2])


@settings(max_examples=10)
@given(problem=labelled(with_lengths=True))
def test_gradients_are_those_of_differences(problem):
    """The loss's gradient into the outputs is what finite differences say."""
    batch = problem.make_batch()
    outputs = model_of(problem)(batch.source, None, batch.source_lengths).detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ctc_loss(x, batch.expected, batch.decoded_lengths, problem.config.blank), outputs
    )


def test_gradients_are_exact_over_many_steps():
    """At 800 steps float32 outputs have gradients within rounding of float64's, as the gate needs; torch's have not."""
    generator = torch.Generator().manual_seed(0)
    outputs = 0.3 * torch.randn(2, 800, 60, generator=generator)
    expected = torch.randint(1, 60, (2, 150), generator=generator)

    def gradient(values: Tensor, loss) -> Tensor:
        values = values.clone().requires_grad_()
        return torch.autograd.grad(loss(values), values)[0].double()

    def torchs(values: Tensor) -> Tensor:
        steps, labels = torch.tensor([800, 800]), torch.tensor([150, 150])
        logarithms = values.log_softmax(-1).transpose(0, 1)
        return nn.functional.ctc_loss(logarithms, expected, steps, labels, reduction="sum") / 300

    true = gradient(outputs.double(), lambda x: ctc_loss(x, expected))

    def error(loss) -> float:
        return float((gradient(outputs, loss) - true).norm() / true.norm())

    assert error(lambda x: ctc_loss(x, expected)) < 1e-6
    assert error(torchs) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_never_below_float32(dtype):
    """Outputs of any precision have a loss in float32 at least."""
    loss = ctc_loss(torch.randn(1, 3, 4, dtype=dtype), torch.tensor([[1]]))
    assert loss.dtype == torch.float32
    assert ctc_loss(torch.randn(1, 3, 4).double(), torch.tensor([[1]])).dtype == torch.float64


@given(labels=st.lists(st.integers(1, 2), max_size=6))
def test_steps_needed_are_the_fewest_with_a_probability(labels):
    """With one step less no alignment says the labels, with so many one does."""
    expected = torch.tensor([labels], dtype=torch.int64).view(1, -1)
    steps = int(steps_needed(expected))
    assert steps >= len(labels)
    for given_steps, possible in ((steps - 1, False), (steps, True)):
        paths = itertools.product(range(3), repeat=max(given_steps, 0))
        assert any(collapsed(path, 0) == tuple(labels) for path in paths) is (possible or not labels)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[1, 2], [1, 1]], "sequence 1 has 2 steps, but its labels need 3"),
        ([[1, 0], [1, IGNORE_TOKEN]], r"labels of sequence 0 are \[1, 0\]; expected labels below 4 but the blank, 0"),
        ([[1, 2], [4, 1]], r"labels of sequence 1 are \[4, 1\]"),
        ([[1, 2], [IGNORE_TOKEN, 1]], "labels of sequence 1 are .*, and -100 only past their end"),
        ([[1, 2]], r"expected has shape \(1, 2\); expected \(2, most labels\)"),
    ],
)
def test_labels_that_cannot_be_are_refused(labels, message):
    """Too many for their steps, the blank itself, unknown ones, gaps: an error, no infinite loss and no nan."""
    with pytest.raises(ValueError, match=message):
        ctc_loss(torch.randn(2, 4, 4), torch.tensor(labels), torch.tensor([4, 2]))


def test_a_sequence_without_labels_is_all_blanks():
    """It has a loss too, and where no sequence has a label that is the loss."""
    outputs = torch.randn(2, 3, 4).double()
    loss = ctc_loss(outputs, torch.full((2, 1), IGNORE_TOKEN))
    assert float(loss) == pytest.approx(-float(outputs.log_softmax(-1)[..., 0].sum()))


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"output_size": 1}, ValueError, "output_size is 1, expected at least 2"),
        ({"blank": 5}, ValueError, "blank is 5, expected one of the 5 labels"),
        ({"blank": -1}, ValueError, "blank is -1"),
        ({"hidden_size": 0}, ValueError, "hidden_size is 0"),
        ({"bidirectional": 1}, TypeError, "bidirectional is 1"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0"),
    ],
)
def test_bad_sizes_are_refused(sizes, error, message):
    """By name, with what was expected."""
    with pytest.raises(error, match=message):
        CTCConfig(**({"input_size": 3, "hidden_size": 4, "output_size": 5} | sizes))


def test_a_target_is_refused():
    """Nothing is fed with it, so whoever gives one means another model."""
    model = CTCConfig(3, 4, 5).build(nn.LSTM)
    with pytest.raises(ValueError, match="no target"):
        model(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


def test_dropout_acts_between_layers():
    """In training outputs differ from call to call, in evaluation not."""
    model, source = CTCConfig(3, 8, 5, 2, dropout=0.5).build(nn.LSTM), torch.randn(1, 4, 3)
    assert not torch.equal(model(source), model(source))
    model.eval()
    assert torch.equal(model(source), model(source))


def verdict_of(mode: str, spoil=None, lstm: type[nn.RNNBase] = LoopLSTM, seed: int = 0) -> Verdict:
    """The gate's verdict on the loop, its loss spoilt: `spoil` changes what is handed to `ctc_loss`."""
    workload = find_workload(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LSTMS, "planted", lstm)
        variant = Variant("planted", "", lstm="planted")
        executable = Executable(variant, workload.config, mode, "cpu", initial_weights(workload.config, 1))
    if spoil is not None:

        def loss(_: CTCModel, outputs: Tensor, expected: Tensor, lengths: Tensor | None = None) -> Tensor:
            return ctc_loss(*spoil(outputs, expected, lengths))

        executable.model.loss = types.MethodType(loss, executable.model)  # type: ignore[method-assign]
    return Gate(workload, mode, "cpu").check(executable, seed)


def shifted(expected: Tensor) -> Tensor:
    """Every label one up, the last to the first."""
    return torch.where(expected == IGNORE_TOKEN, expected, expected % 31 + 1)


#: By what is wrong with them: the loss's arguments as they should be, to what they are.
DEFECTS = {
    "wrong blank": lambda outputs, expected, lengths: (outputs[..., [31, *range(1, 31), 0]], expected, lengths, 0),
    "shifted label": lambda outputs, expected, lengths: (outputs, shifted(expected), lengths, 0),
    "dropped length": lambda outputs, expected, lengths: (outputs, expected, lengths.clamp(min=outputs.size(1)), 0),
    "lost label": lambda outputs, expected, lengths: (outputs, expected[:, 1:], lengths, 0),
}


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_unchanged_loss_passes(mode):
    """The tests below refuse the defect, not the way of planting it."""
    assert verdict_of(mode, lambda *arguments: (*arguments, 0)).passed
    assert verdict_of(mode).passed


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_the_loss_is_refused(defect, mode):
    """Wrong blank, shifted label, dropped length, lost label: the loss says it, in training the gradients too."""
    verdict = verdict_of(mode, DEFECTS[defect])
    refused = {check.name for check in verdict.checks if not check.passed}
    assert "loss" in refused
    assert ("grad fc.weight" in refused) is (mode == "training")


def test_an_encoder_that_ignores_lengths_is_refused():
    """Reading backward from the padding changes outputs inside the sequence."""

    class Whole(LoopLSTM):
        """Reads the padding too."""

        def forward(self, x: Tensor, hx=None, lengths: Tensor | None = None):
            """As the loop, without lengths."""
            del lengths
            return super().forward(x, hx)

    assert not verdict_of("inference", lstm=Whole).passed


def test_labels_that_do_not_fit_end_a_training_step():
    """A batch with fewer steps than its labels need raises in training; no gradient that is none gets into weights."""
    workload = find_workload(SMALL)
    batch = workload.make_batch(0)
    executable = Executable(REFERENCE, workload.config, "training", "cpu", initial_weights(workload.config, 0))
    broken = type(batch)(batch.source, None, torch.ones_like(batch.source_lengths), None, batch.expected)
    with executable.context(), pytest.raises(ValueError, match="sequence 1 has 1 steps, but its labels need 2"):
        executable.call(executable.prepare(broken))
    assert all(value.isfinite().all() for value in executable.model.parameters())
