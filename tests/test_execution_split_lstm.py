"""SplitLSTM is torch.nn.LSTM, one call per layer and direction on padded sizes: the same results, the same weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from kernels.padded_vendor import padded_sizes
from seq2seq.execution.split_lstm import SplitLSTM

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Shape, shapes

#: Some hundred roundings of float64; a wrong term is larger by ten orders of magnitude.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def twins(shape: Shape, **options: Any) -> tuple[nn.LSTM, SplitLSTM]:
    """The two classes with the same weights."""
    theirs, ours = nn.LSTM(**shape.options, **options).double(), SplitLSTM(**shape.options, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def everything(lstm: nn.LSTM, shape: Shape, *, stateful: bool) -> dict[str, Tensor]:
    """Output, final state and the gradients of a random mix of them, by name."""
    x, (hidden, cell) = shape.tensors()
    inputs = (x, hidden, cell) if stateful else (x,)
    for value in inputs:
        value.requires_grad_()
    output, state = lstm(x, (hidden, cell) if stateful else None)
    generator = torch.Generator().manual_seed(0)
    mixed = sum((v * torch.randn(v.shape, dtype=v.dtype, generator=generator)).sum() for v in (output, *state))
    leaves = dict(lstm.named_parameters()) | {f"input {index}": value for index, value in enumerate(inputs)}
    gradients = torch.autograd.grad(mixed, list(leaves.values()))
    return {"output": output, "h": state[0], "c": state[1]} | {
        f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


@given(shape=shapes(), stateful=st.booleans(), bias=st.booleans())
@example(shape=Shape(8, 3, 2, 4, 2, bidirectional=True, seed=0), stateful=True, bias=True)
@example(shape=Shape(9, 3, 2, 4, 2, bidirectional=True, seed=0), stateful=True, bias=True)
@example(shape=Shape(1, 1, 1, 1, 1, bidirectional=False, seed=0), stateful=False, bias=True)
def test_equals_nn_lstm(shape, stateful, bias):
    """Output, final state and every gradient are those of torch.nn.LSTM, whatever the batch is a multiple of."""
    theirs, ours = (everything(lstm, shape, stateful=stateful) for lstm in twins(shape, bias=bias))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


@given(shape=shapes())
def test_each_call_is_one_layer_on_padded_sizes(shape):
    """One call to torch a layer and direction: a multiple of 8 sequences, of 128 features and of 128 units."""
    _, lstm = twins(shape)
    called, call = [], torch._VF.lstm

    def spy(x: Tensor, state: list[Tensor], weights: list[Tensor], *options: Any) -> Any:
        called.append((x.size(0), state[0].shape, len(weights), options[1], options[4]))
        assert x.size(2) % 128 == 0
        return call(x, state, weights, *options)

    torch._VF.lstm = spy
    try:
        lstm(shape.tensors()[0])
    finally:
        torch._VF.lstm = call
    rows = padded_sizes(shape.input_size, shape.hidden_size, shape.batch)[2]
    assert called == [(rows, (1, rows, 128), 4, 1, False)] * shape.num_layers * shape.directions


@given(shape=shapes())
def test_state_dict_goes_both_ways(shape):
    """Weights of torch.nn.LSTM load into it and its weights into torch.nn.LSTM, with the same outputs."""
    theirs, ours = nn.LSTM(**shape.options), SplitLSTM(**shape.options)
    x, _ = shape.tensors(torch.float32)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(theirs(x)[0], ours(x)[0])
    other = nn.LSTM(**shape.options)
    ours.load_state_dict(other.state_dict())
    torch.testing.assert_close(ours(x)[0], other(x)[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_between_layers_in_training(training):
    """Dropout acts where torch.nn.LSTM has it; at probability 1 nothing is left to chance."""
    shape = Shape(batch=3, steps=4, input_size=3, hidden_size=5, num_layers=3, bidirectional=True, seed=0)
    theirs, ours = twins(shape, dropout=1.0)
    x, hx = shape.tensors()
    output, state = ours.train(training)(x, hx)
    expected, expected_state = theirs.train(training)(x, hx)
    torch.testing.assert_close((output, *state), (expected, *expected_state), **CLOSE)


def test_inputs_are_left_alone():
    """Padding makes copies: what is handed in keeps its values and size."""
    shape = Shape(batch=3, steps=4, input_size=3, hidden_size=5, num_layers=2, bidirectional=False, seed=0)
    (x, hx), (same_x, same_hx) = shape.tensors(), shape.tensors()
    twins(shape)[1](x, hx)
    torch.testing.assert_close((x, *hx), (same_x, *same_hx), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"batch_first": False}, {"batch_first": True, "proj_size": 2}])
def test_refuses_what_it_does_not_take(options):
    """Time-first input and projections are refused: padding would add time steps to the one and misshape the other."""
    with pytest.raises(ValueError, match=r"batch_first=True and proj_size=0; use torch\.nn\.LSTM"):
        SplitLSTM(3, 4, **options)


def test_refuses_packed_sequences():
    """A packed sequence is refused in words, with what to give instead."""
    lstm = SplitLSTM(3, 4, batch_first=True)
    with pytest.raises(TypeError, match="PackedSequence"):
        lstm(pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)]))


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [8, 13])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equals_nn_lstm_on_a_gpu(batch, bidirectional):
    """Through cuDNN too, output, final state and gradients are those of torch.nn.LSTM."""
    options = {"num_layers": 2, "batch_first": True, "bidirectional": bidirectional}
    theirs, ours = nn.LSTM(16, 32, **options).cuda().double(), SplitLSTM(16, 32, **options).cuda().double()
    ours.load_state_dict(theirs.state_dict())
    ours.flatten_parameters()
    x = torch.randn(batch, 12, 16, dtype=torch.float64, device="cuda")
    found = []
    for lstm in (theirs, ours):
        output, state = lstm(x)
        (output.sum() + state[1].square().sum()).backward()
        found.append((output, *state, *(parameter.grad for parameter in lstm.parameters())))
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-9)


def test_kept_weights_are_not_saved():
    """What is padded once is in no file, and a copy makes its own."""
    lstm = SplitLSTM(3, 5, batch_first=True)
    before = len(pickle.dumps(lstm))
    with torch.no_grad():
        lstm(torch.randn(2, 4, 3))
    assert len(pickle.dumps(lstm)) == before
    assert lstm._padded_weights
    assert not copy.deepcopy(lstm)._padded_weights


def test_an_empty_batch_has_gradients():
    """They are zero, as in nn.LSTM."""
    lstm = SplitLSTM(3, 5, batch_first=True)
    lstm(torch.zeros(0, 6, 3))[0].sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in lstm.parameters())
