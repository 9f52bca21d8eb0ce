"""LoopLSTM is what everything else is compared with, so it is compared here with torch.nn.LSTM, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kernels.reference import LoopLSTM, lstm_cell

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Shape, past, shapes

State = tuple[Tensor, Tensor]
#: Some hundred roundings of float64; a wrong term is larger by ten orders of magnitude.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
SMALLEST = Shape(batch=1, steps=1, input_size=1, hidden_size=1, num_layers=1, bidirectional=False, seed=0)
ONE_STEP = Shape(batch=1, steps=1, input_size=3, hidden_size=5, num_layers=2, bidirectional=True, seed=1)


def twins(shape: Shape, **options: Any) -> tuple[nn.LSTM, LoopLSTM]:
    """The two classes with the same weights."""
    theirs, ours = nn.LSTM(**shape.options, **options).double(), LoopLSTM(**shape.options, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def everything(lstm: nn.RNNBase, output: Tensor, state: State, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Output, final state and the gradients of a random mix of them, by name."""
    generator = torch.Generator().manual_seed(0)
    mixed = sum((v * torch.randn(v.shape, dtype=v.dtype, generator=generator)).sum() for v in (output, *state))
    leaves = dict(lstm.named_parameters()) | {f"input {index}": value for index, value in enumerate(inputs)}
    gradients = torch.autograd.grad(mixed, list(leaves.values()))
    return {"output": output, "h": state[0], "c": state[1]} | {
        f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


def leaves(shape: Shape) -> tuple[Tensor, State]:
    """Input and state that take gradients."""
    x, (hidden, cell) = shape.tensors()
    return x.requires_grad_(), (hidden.requires_grad_(), cell.requires_grad_())


@given(shape=shapes(), stateful=st.booleans())
@example(shape=SMALLEST, stateful=False)
@example(shape=ONE_STEP, stateful=True)
def test_equals_nn_lstm(shape, stateful):
    """Output, final state and every gradient are those of torch.nn.LSTM, with and without a state to start from."""
    found = []
    for lstm in twins(shape):
        x, hx = leaves(shape)
        output, state = lstm(x, hx if stateful else None)
        found.append(everything(lstm, output, state, (x, *hx) if stateful else (x,)))
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@given(shape=shapes(with_lengths=True), stateful=st.booleans())
def test_lengths_equal_packing(shape, stateful):
    """With lengths, output, final state and every gradient are those of torch.nn.LSTM on packed sequences."""
    theirs, ours = twins(shape)
    lengths = torch.tensor(shape.lengths)

    x, hx = leaves(shape)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    packed_output, state = theirs(packed, hx if stateful else None)
    output, _ = pad_packed_sequence(packed_output, batch_first=True, total_length=shape.steps)
    expected = everything(theirs, output, state, (x, *hx) if stateful else (x,))

    x, hx = leaves(shape)
    output, state = ours(x, hx if stateful else None, lengths)
    found = everything(ours, output, state, (x, *hx) if stateful else (x,))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@pytest.mark.parametrize("filler", [1e30, math.inf, math.nan])
@given(shape=shapes(with_lengths=True))
def test_padding_never_counts(filler, shape):
    """Values in the padding change neither a result nor a gradient, not even if they are NaN."""
    _, lstm = twins(shape)
    outside, lengths = past(shape.lengths, shape.steps), torch.tensor(shape.lengths)
    found = []
    for value in (0.0, filler):
        x, hx = shape.tensors()
        x[outside] = value
        x.requires_grad_()
        found.append(everything(lstm, *lstm(x, hx, lengths), (x,)))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@given(shape=shapes())
def test_full_lengths_change_nothing(shape):
    """Lengths that fill all steps give the result of no lengths."""
    _, lstm = twins(shape)
    x, hx = shape.tensors()
    plain, (hidden, cell) = lstm(x, hx)
    output, state = lstm(x, hx, torch.full((shape.batch,), shape.steps))
    torch.testing.assert_close((output, *state), (plain, hidden, cell), **CLOSE)


@given(shape=shapes())
def test_state_dict_serves_both_classes(shape):
    """The two classes' parameters have the same names, order and shapes, so weights go either way."""
    theirs, ours = nn.LSTM(**shape.options), LoopLSTM(**shape.options)
    assert [(n, p.shape) for n, p in theirs.named_parameters()] == [(n, p.shape) for n, p in ours.named_parameters()]
    theirs.load_state_dict(ours.state_dict())
    x, _ = shape.tensors(torch.float32)
    torch.testing.assert_close(theirs(x)[0], ours(x)[0])
    other = nn.LSTM(**shape.options)
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x)[0], other(x)[0])


def test_initialisation_is_that_of_nn_lstm():
    """From one seed both classes draw the same weights."""
    weights = []
    for lstm in (nn.LSTM, LoopLSTM):
        torch.manual_seed(3)
        weights.append(lstm(3, 5, 2, batch_first=True, bidirectional=True).state_dict())
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name


@pytest.mark.parametrize("options", [{"batch_first": False}, {"proj_size": 2}])
def test_refuses_what_it_does_not_take(options):
    """Time-first input and projections are refused with what to use instead."""
    with pytest.raises(ValueError, match=r"batch_first=True and proj_size=0; use torch\.nn\.LSTM"):
        LoopLSTM(3, 4, **options)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_between_layers_in_training(training):
    """Dropout acts where torch.nn.LSTM has it: on what goes from layer to layer, in training alone.

    At probability 1 nothing is left to chance: each layer but the first reads zeros, in training.
    """
    shape = Shape(batch=2, steps=4, input_size=3, hidden_size=5, num_layers=3, bidirectional=True, seed=0)
    theirs, ours = twins(shape, dropout=1.0)
    x, hx = shape.tensors()
    output, state = ours.train(training)(x, hx)
    expected, expected_state = theirs.train(training)(x, hx)
    torch.testing.assert_close((output, *state), (expected, *expected_state), **CLOSE)
    _, plain = twins(shape)
    plain.load_state_dict(theirs.state_dict())
    assert torch.equal(output, plain(x, hx)[0]) is not training


def test_dropout_keeps_the_mean():
    """Values that survive dropout are scaled up by one over the probability of surviving."""
    shape = Shape(batch=64, steps=50, input_size=1, hidden_size=1, num_layers=2, bidirectional=False, seed=0)
    lstm = LoopLSTM(**shape.options, dropout=0.25)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        # The first layer puts out a small constant; the second layer's c is the sum of what it reads.
        lstm.bias_ih_l0.copy_(torch.tensor([9.0, -9.0, 0.01, 9.0]))
        lstm.bias_ih_l1.copy_(torch.tensor([9.0, 9.0, 0.0, 9.0]))
        lstm.weight_ih_l1[2] = 1.0
    torch.manual_seed(0)
    x, _ = shape.tensors(torch.float32)
    with torch.no_grad():
        (_, (_, dropped)), (_, (_, plain)) = lstm.train()(x), lstm.eval()(x)
    assert not torch.equal(dropped[1], plain[1])
    # 3,200 values survive or not, so the mean is known to 1 %.
    assert float(dropped[1].mean()) == pytest.approx(float(plain[1].mean()), rel=0.05)


@given(shape=shapes())
def test_cell_is_that_of_nn_lstm_cell(shape):
    """One step after the input projection is torch.nn.LSTMCell."""
    cell = nn.LSTMCell(shape.input_size, shape.hidden_size).double()
    x, (hidden, state) = shape.tensors()
    projected = nn.functional.linear(x[:, 0], cell.weight_ih, cell.bias_ih)
    found = lstm_cell(projected, hidden[0], state[0], cell.weight_hh, cell.bias_hh)
    torch.testing.assert_close(found, cell(x[:, 0], (hidden[0], state[0])), **CLOSE)


@pytest.mark.parametrize("with_lengths", [False, True])
def test_compiler_sees_one_graph(with_lengths):
    """Dynamo traces the loop whole, with and without lengths: a graph break would raise."""
    lstm = LoopLSTM(3, 4, 2, bidirectional=True)
    x, lengths = torch.randn(2, 3, 3), torch.tensor([3, 1]) if with_lengths else None
    compiled = torch.compile(lstm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, None, lengths), lstm(x, None, lengths))
