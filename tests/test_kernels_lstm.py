"""kernels.LSTM against torch.nn.LSTM: results, gradients, every form of input, errors, and what it says of itself."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import kernels
from kernels import LSTM, dispatch
from kernels.common.recurrence import loop_forward
from kernels.dispatch import MODULES, Choice
from kernels.reference import LoopLSTM

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import Shape, past, shapes

#: Some hundred roundings of float64; a wrong term is larger by ten orders of magnitude.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
SMALL = Shape(batch=3, steps=4, input_size=3, hidden_size=5, num_layers=2, bidirectional=True, seed=1)


def twins(shape: Shape, dtype: torch.dtype = torch.float64, implementation: str = "loop", **options: Any) -> Any:
    """torch.nn.LSTM and ours with the same weights; batch first unless told otherwise."""
    options = shape.options | options
    theirs = nn.LSTM(**options, dtype=dtype)
    ours = LSTM(**options, dtype=dtype, implementation=implementation)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def everything(lstm: nn.Module, result: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, final state and the gradients of a random mix of them, by name."""
    output, (hidden, cell) = result
    output = output.data if isinstance(output, PackedSequence) else output
    generator = torch.Generator().manual_seed(0)
    results = {"output": output, "h": hidden, "c": cell}
    mixed = sum((v * torch.randn(v.shape, generator=generator)).sum() for v in results.values())
    leaves = dict(lstm.named_parameters()) | inputs
    gradients = torch.autograd.grad(mixed, list(leaves.values()))
    return results | {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """All of it close, named where it is not."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda text, name=name: f"{name}: {text}", **(tolerance or CLOSE)
        )


def leaves(shape: Shape, *, batch_first: bool, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Input and state that take gradients."""
    x, (hidden, cell) = shape.tensors(dtype)
    x = x if batch_first else x.transpose(0, 1).contiguous()
    return {name: value.requires_grad_() for name, value in (("x", x), ("h0", hidden), ("c0", cell))}


def state_of(inputs: dict[str, Tensor]) -> Any:
    """The state to hand over, or None where there is none."""
    return (inputs["h0"], inputs["c0"]) if "h0" in inputs else None


@pytest.mark.parametrize("implementation", ["loop", "vendor", "auto"])
@given(shape=shapes(), bias=st.booleans(), batch_first=st.booleans(), stateful=st.booleans())
@example(shape=SMALL, bias=True, batch_first=False, stateful=True)
def test_equals_nn_lstm(implementation, shape, bias, batch_first, stateful):
    """Output, final state and every gradient are those of torch.nn.LSTM, in float64."""
    found = []
    for lstm in twins(shape, implementation=implementation, bias=bias, batch_first=batch_first):
        inputs = leaves(shape, batch_first=batch_first)
        inputs = inputs if stateful else {"x": inputs["x"]}
        found.append(everything(lstm, lstm(inputs["x"], state_of(inputs)), inputs))
    assert_equal(found[1], found[0])


@given(shape=shapes(with_lengths=True), stateful=st.booleans())
def test_close_to_truth_in_float32(shape, stateful):
    """In float32 every result and gradient is as near to the equations in float64 as rounding allows."""
    lstm = LSTM(**shape.options, implementation="loop")
    truth = LoopLSTM(**shape.options).double()
    truth.load_state_dict(lstm.state_dict())
    found = []
    for module, dtype in ((truth, torch.float64), (lstm, torch.float32)):
        inputs = leaves(shape, batch_first=True, dtype=torch.float32)
        inputs = inputs if stateful else {"x": inputs["x"]}
        inputs = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
        result = module(inputs["x"], state_of(inputs), torch.tensor(shape.lengths))
        found.append({name: value.double() for name, value in everything(module, result, inputs).items()})
    assert_equal(found[1], found[0], rtol=1e-5, atol=1e-5)


@given(shape=shapes(with_lengths=True), stateful=st.booleans(), sort=st.booleans(), batch_first=st.booleans())
@example(
    shape=Shape(4, 6, 3, 5, 2, bidirectional=True, seed=0, lengths=(2, 6, 1, 6)),
    stateful=True,
    sort=False,
    batch_first=True,
)
@pytest.mark.parametrize("implementation", ["loop", "vendor"])
def test_packed_equals_nn_lstm(implementation, shape, stateful, sort, batch_first):
    """Packed sequences, sorted beforehand or not, give torch.nn.LSTM's packed result, state and gradients."""
    lengths = torch.tensor(sorted(shape.lengths, reverse=True) if sort else shape.lengths)
    found, packs = [], []
    for lstm in twins(shape, implementation=implementation, batch_first=batch_first):
        inputs = leaves(shape, batch_first=batch_first)
        inputs = inputs if stateful else {"x": inputs["x"]}
        packed = pack_padded_sequence(inputs["x"], lengths, batch_first=batch_first, enforce_sorted=sort)
        result = lstm(packed, state_of(inputs))
        packs.append(result[0])
        found.append(everything(lstm, result, inputs))
    assert_equal(found[1], found[0])
    assert isinstance(packs[1], PackedSequence)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        theirs, ours = (getattr(packed, name) for packed in packs)
        assert (theirs is None and ours is None) or torch.equal(theirs, ours), name


@given(shape=shapes(with_lengths=True), stateful=st.booleans(), batch_first=st.booleans())
@pytest.mark.parametrize("implementation", ["loop", "vendor"])
def test_lengths_equal_packing(implementation, shape, stateful, batch_first):
    """With lengths, padded input gives what torch.nn.LSTM gives for the same sequences packed."""
    lengths, found = torch.tensor(shape.lengths), []
    for lstm in twins(shape, implementation=implementation, batch_first=batch_first):
        inputs = leaves(shape, batch_first=batch_first)
        inputs = inputs if stateful else {"x": inputs["x"]}
        if isinstance(lstm, nn.LSTM):
            packed = pack_padded_sequence(inputs["x"], lengths, batch_first=batch_first, enforce_sorted=False)
            packed_output, state = lstm(packed, state_of(inputs))
            output, _ = pad_packed_sequence(packed_output, batch_first=batch_first, total_length=shape.steps)
            result = output, state
        else:
            result = lstm(inputs["x"], state_of(inputs), lengths)
        found.append(everything(lstm, result, inputs))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("implementation", ["loop", "vendor"])
@pytest.mark.parametrize("stateful", [True, False])
def test_sequence_of_no_steps_keeps_its_state(implementation, stateful):
    """A sequence of length 0 puts out zeros, ends in the state that it began with and leaves the others alone."""
    _, lstm = twins(SMALL, implementation=implementation)
    x, hx = SMALL.tensors()
    x[1] = torch.nan
    x.requires_grad_()
    output, state = lstm(x, hx if stateful else None, torch.tensor([4, 0, 2]))
    assert not output[1].any()
    for value, first in zip(state, hx, strict=True):
        assert torch.equal(value[:, 1], first[:, 1] if stateful else torch.zeros_like(first[:, 1]))
    others = [0, 2]
    alone, _ = lstm(x[others], tuple(v[:, others] for v in hx) if stateful else None, torch.tensor([4, 2]))
    torch.testing.assert_close(output[others], alone, **CLOSE)
    output.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in lstm.parameters())
    assert not x.grad[1].any()


@pytest.mark.parametrize("filler", [1e30, torch.inf, torch.nan])
@pytest.mark.parametrize("implementation", ["loop", "vendor"])
@given(shape=shapes(with_lengths=True), batch_first=st.booleans())
def test_padding_never_counts(implementation, filler, shape, batch_first):
    """Values in the padding change neither a result nor a gradient, not even if they are NaN."""
    _, lstm = twins(shape, implementation=implementation, batch_first=batch_first)
    outside, lengths = past(shape.lengths, shape.steps), torch.tensor(shape.lengths)
    found = []
    for value in (0.0, filler):
        x, hx = shape.tensors()
        x[outside] = value
        x = (x if batch_first else x.transpose(0, 1)).contiguous().requires_grad_()
        found.append(everything(lstm, lstm(x, hx, lengths), {"x": x}))
    assert_equal(found[1], found[0])
    with torch.no_grad():
        assert torch.equal(lstm(x, hx, lengths)[0], found[1]["output"])


@given(shape=shapes(), stateful=st.booleans(), batch_first=st.booleans())
@pytest.mark.parametrize("implementation", ["loop", "vendor"])
def test_unbatched_equals_nn_lstm(implementation, shape, stateful, batch_first):
    """One sequence without a batch dimension gives torch.nn.LSTM's results, in its shapes."""
    x, (hidden, cell) = shape.tensors()
    hx = (hidden[:, 0], cell[:, 0]) if stateful else None
    theirs, ours = (lstm(x[0], hx) for lstm in twins(shape, implementation=implementation, batch_first=batch_first))
    torch.testing.assert_close((ours[0], *ours[1]), (theirs[0], *theirs[1]), **CLOSE)


@given(shape=shapes(with_lengths=True), packed=st.booleans(), data=st.data())
def test_projection_goes_to_torch_and_says_so(shape, packed, data):
    """With proj_size the result is torch.nn.LSTM's, and the record names torch's LSTM and why."""
    if shape.hidden_size == 1:
        shape = Shape(**{**vars(shape), "hidden_size": 2})
    size = data.draw(st.integers(1, shape.hidden_size - 1))
    found = []
    for lstm in twins(shape, implementation="auto", proj_size=size):
        x, _ = shape.tensors()
        x.requires_grad_()
        lengths = torch.tensor(shape.lengths)
        given_x = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if packed else x
        found.append(everything(lstm, lstm(given_x), {"x": x}))
    assert_equal(found[1], found[0])
    assert [choice.implementation for choice in lstm.choices] == ["vendor"] * shape.num_layers
    assert "proj_size" in lstm.choices[0].reason


@pytest.mark.parametrize("implementation", ["loop", "vendor"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradcheck(implementation, bidirectional):
    """Numerical derivatives agree with the backward pass: layers, directions, lengths and states."""
    torch.manual_seed(0)
    lstm = LSTM(
        2, 3, 2, bidirectional=bidirectional, batch_first=True, dtype=torch.float64, implementation=implementation
    )
    states = 4 if bidirectional else 2
    x, h0, c0 = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 2), *[(states, 3, 3)] * 2))
    names = [name for name, _ in lstm.named_parameters()]

    def run(x, h0, c0, *weights):
        parameters = dict(zip(names, weights, strict=True))
        output, state = torch.func.functional_call(lstm, parameters, (x, (h0, c0), torch.tensor([4, 1, 3])))
        return output, *state

    assert torch.autograd.gradcheck(run, (x, h0, c0, *lstm.parameters()), fast_mode=True)


@pytest.mark.parametrize("size", [1, 0])
@pytest.mark.parametrize("implementation", ["loop", "vendor"])
def test_empty_batch_equals_nn_lstm(implementation, size):
    """A batch of no sequences gives torch.nn.LSTM's empty results and zero gradients, as does a slice of it."""
    shape = Shape(**{**vars(SMALL), "batch": size})
    found = []
    for lstm in twins(shape, implementation=implementation):
        inputs = leaves(shape, batch_first=True)
        found.append(everything(lstm, lstm(inputs["x"], state_of(inputs)), inputs))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_between_layers_in_training(training):
    """At probability 1, where nothing is left to chance, dropout acts where torch.nn.LSTM has it."""
    theirs, ours = twins(SMALL, dropout=1.0)
    x, hx = SMALL.tensors()
    (expected, expected_state), (output, state) = theirs.train(training)(x, hx), ours.train(training)(x, hx)
    torch.testing.assert_close((output, *state), (expected, *expected_state), **CLOSE)


def test_dropout_follows_the_seed():
    """One seed gives one result, another seed another; torch.nn.LSTM's own stream of numbers is not promised."""
    _, lstm = twins(SMALL, dropout=0.5)
    x, _ = SMALL.tensors()
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(lstm.train()(x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_dropout_keeps_the_mean():
    """Values that survive dropout are scaled up by one over the probability of surviving."""
    lstm = LSTM(1, 1, 2, dropout=0.25, implementation="loop")
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
        # The first layer puts out a small constant; the second layer's c is the sum of what it reads.
        lstm.bias_ih_l0.copy_(torch.tensor([9.0, -9.0, 0.01, 9.0]))
        lstm.bias_ih_l1.copy_(torch.tensor([9.0, 9.0, 0.0, 9.0]))
        lstm.weight_ih_l1[2] = 1.0
        torch.manual_seed(0)
        x = torch.randn(50, 64, 1)
        (_, (_, dropped)), (_, (_, plain)) = lstm.train()(x), lstm.eval()(x)
    assert not torch.equal(dropped[1], plain[1])
    # 3,200 values survive or not, so the mean is known to 1 %.
    assert float(dropped[1].mean()) == pytest.approx(float(plain[1].mean()), rel=0.05)


@given(shape=shapes(), bias=st.booleans(), batch_first=st.booleans())
def test_checkpoints_go_either_way(shape, bias, batch_first):
    """Names, order and shapes of the parameters are torch.nn.LSTM's, so a checkpoint of one loads into the other."""
    options = shape.options | {"bias": bias, "batch_first": batch_first}
    theirs, ours = nn.LSTM(**options), LSTM(**options)
    assert [(n, p.shape) for n, p in theirs.named_parameters()] == [(n, p.shape) for n, p in ours.named_parameters()]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(nn.LSTM(**options).state_dict(), strict=True)


@pytest.mark.parametrize("proj_size", [0, 2])
def test_initialisation_is_that_of_nn_lstm(proj_size):
    """From one seed both classes draw the same weights and leave the same random state behind."""
    weights, states = [], []
    for lstm in (nn.LSTM, LSTM):
        torch.manual_seed(3)
        weights.append(lstm(3, 5, 2, bidirectional=True, proj_size=proj_size).state_dict())
        states.append(torch.get_rng_state())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert torch.equal(*states)


def test_positional_arguments_are_those_of_nn_lstm():
    """All ten arguments of torch.nn.LSTM are taken by position."""
    arguments = (3, 5, 2, False, True, 0.5, True, 2, "cpu", torch.float64)
    theirs, ours = nn.LSTM(*arguments), LSTM(*arguments)
    assert repr(ours) == repr(theirs)
    assert ours.weight_hr_l1_reverse.shape == theirs.weight_hr_l1_reverse.shape
    assert ours.weight_ih_l0.dtype == torch.float64


def test_repr_shows_what_was_asked_for():
    """An implementation and a precision that were asked for are shown; the defaults are not."""
    assert repr(LSTM(3, 4, 2)) == repr(nn.LSTM(3, 4, 2))
    shown = repr(LSTM(3, 4, implementation="loop", fp32_precision="tf32"))
    assert shown == "LSTM(3, 4, implementation='loop', fp32_precision='tf32')"


BAD_ARGUMENTS = [
    {"dropout": 2.0},
    {"dropout": True},
    {"hidden_size": 0},
    {"input_size": 1.5},
    {"num_layers": 0},
    {"proj_size": 5},
    {"proj_size": -1},
    {"bias": 1},
    {"batch_first": None},
]


@pytest.mark.parametrize("options", BAD_ARGUMENTS, ids=str)
def test_bad_arguments_raise_what_nn_lstm_raises(options):
    """A wrong argument of the constructor raises torch.nn.LSTM's error, word for word."""
    options = {"input_size": 3, "hidden_size": 5} | options
    found = []
    for lstm in (nn.LSTM, LSTM):
        with pytest.raises((TypeError, ValueError)) as caught:
            lstm(**options)
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


def test_dropout_of_one_layer_warns_as_nn_lstm():
    """Dropout without a second layer is warned of."""
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        LSTM(3, 4, dropout=0.5)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


BAD_CALLS = {
    "dimensions": (zeros(1, 2, 4, 3), None),
    "one dimension": (zeros(3), None),
    "features": (zeros(4, 2, 5), None),
    "features unbatched": (zeros(4, 5), None),
    "type": (zeros(4, 2, 3, dtype=torch.float64), None),
    "no steps": (zeros(0, 2, 3), None),
    "state for one sequence": (zeros(4, 2, 3), (zeros(1, 4), zeros(1, 4))),
    "state for a batch": (zeros(4, 3), (zeros(1, 1, 4), zeros(1, 1, 4))),
    "batch of h": (zeros(4, 2, 3), (zeros(1, 3, 4), zeros(1, 2, 4))),
    "size of c": (zeros(4, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 5))),
    "layers of h": (zeros(4, 2, 3), (zeros(2, 2, 4), zeros(2, 2, 4))),
}


@pytest.mark.parametrize("name", BAD_CALLS)
@pytest.mark.parametrize("implementation", ["loop", "vendor"])
def test_bad_calls_raise_what_nn_lstm_raises(implementation, name):
    """Wrong input and wrong state raise torch.nn.LSTM's error, word for word."""
    found = []
    for lstm in (nn.LSTM(3, 4), LSTM(3, 4, implementation=implementation)):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            lstm(*BAD_CALLS[name])
        found.append((caught.type, str(caught.value)))
    assert found[0] == found[1]


BAD_LENGTHS = {
    "shape": (torch.tensor([4]), ValueError, r"shape \(1,\), expected one for each sequence, \(2,\)"),
    "type": (torch.tensor([4.0, 2.0]), TypeError, "expected integers"),
    "list of floats": ([4.0, 2.0], TypeError, "expected integers"),
    "truths": ([True, False], TypeError, "expected integers"),
    "words": (["4", "2"], TypeError, r"lengths are \['4', '2'\], expected integers"),
    "one number": (4, TypeError, "lengths are 4, expected integers, one for each sequence"),
    "array of floats": (np.array([4.0, 2.0]), TypeError, "expected integers"),
    "list too short": ([4], ValueError, r"shape \(1,\), expected one for each sequence, \(2,\)"),
    "list too long": ((5, 2), ValueError, "between 2 and 5, expected 0 to 4, the steps"),
    "too long": (torch.tensor([5, 2]), ValueError, "between 2 and 5, expected 0 to 4, the steps"),
    "negative": (torch.tensor([3, -1]), ValueError, "between -1 and 3, expected 0 to 4, the steps"),
    "parameter": (nn.Parameter(torch.tensor([5, 2]), requires_grad=False), ValueError, "between 2 and 5"),
}


@pytest.mark.parametrize(
    "lengths",
    [
        [4, 2],
        (4, 2),
        range(4, 0, -2),
        np.array([4, 2]),
        np.array([2, 4])[::-1],
        np.array([4, 2], dtype=np.uint16),
        np.array([4, 2], dtype=">i4"),
        np.frombuffer(b"\x04\x02", dtype=np.int8),
        torch.tensor([4, 2], dtype=torch.uint8),
        torch.tensor([4, 2], dtype=torch.uint32),
    ],
)
def test_lengths_may_come_in_any_form(lengths):
    """A list, a tuple, a range, any array and a tensor of other integers count as the tensor of int64 does."""
    lstm, x = LSTM(3, 5, implementation="loop"), torch.randn(4, 2, 3)
    expected = lstm(x, None, torch.tensor([4, 2]))
    torch.testing.assert_close(lstm(x, None, lengths), expected)
    assert not torch.equal(lstm(x)[0], expected[0])


@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_bad_lengths_are_refused(name):
    """Lengths of the wrong shape, type or size are refused with what was expected."""
    lengths, error, text = BAD_LENGTHS[name]
    with pytest.raises(error, match=text):
        LSTM(3, 4, implementation="loop")(zeros(4, 2, 3), None, lengths)


def test_lengths_of_an_array_are_read_once():
    """An array of lengths that is filled anew before the backward pass, as a loader does, changes no gradient."""
    lstm, x, lengths = LSTM(3, 5, bidirectional=True), torch.randn(4, 2, 3), np.array([4, 2], dtype=np.int32)
    found = []
    for later in (lengths, np.array([1, 99], dtype=np.int32)):
        output, _ = lstm(x, None, lengths)
        lengths[:] = later
        found.append(torch.autograd.grad(output.sum(), list(lstm.parameters())))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["auto", "loop", "vendor"])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_a_state_on_another_device_is_refused(implementation, gradients, which):
    """Its memory would be read as if it were the CPU's; the message is torch.nn.LSTM's."""
    state = [zeros(1, 2, 4), zeros(1, 2, 4)]
    state[which] = state[which].to("meta")
    found = []
    for lstm in (nn.LSTM(3, 4), LSTM(3, 4, implementation=implementation)):
        with torch.set_grad_enabled(gradients), pytest.raises(RuntimeError, match="not at the same device") as caught:
            lstm(zeros(5, 2, 3), tuple(state))
        found.append(str(caught.value))
    assert found[0] == found[1]


def test_other_wrong_calls_are_refused():
    """State of another type, lengths beside a packed input, and packed input that does not fit are refused."""
    lstm = LSTM(3, 4, implementation="loop")
    with pytest.raises(ValueError, match=r"hx\[1\] is of torch.float64, expected torch.float32"):
        lstm(zeros(4, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 4, dtype=torch.float64)))
    with pytest.raises(ValueError, match="brings its own lengths"):
        lstm(pack_sequence([zeros(4, 3)]), None, torch.tensor([4]))
    with pytest.raises(RuntimeError, match="must be equal to input_size"):
        lstm(pack_sequence([zeros(4, 5)]))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 1, 4\)"):
        lstm(pack_sequence([zeros(4, 3)]), (zeros(1, 2, 4), zeros(1, 2, 4)))


def test_unknown_options_are_refused():
    """An implementation or precision that does not exist, or a kernel with projections, is refused by name."""
    with pytest.raises(ValueError, match="implementation is 'fast', expected one of auto, triton, cell"):
        LSTM(3, 4, implementation="fast")
    with pytest.raises(ValueError, match="fp32_precision is 'bf16', expected None or one of ieee, tf32"):
        LSTM(3, 4, fp32_precision="bf16")
    with pytest.raises(ValueError, match="proj_size is 2, and 'loop' has no projections"):
        LSTM(3, 4, proj_size=2, implementation="loop")


def test_kernel_without_gpu_says_what_to_do(monkeypatch):
    """A Triton kernel asked for by name on CPU tensors raises and names what serves; `auto` takes the CPU's kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU.*use 'auto' or 'cpu-fused' or 'vendor'"):
        LSTM(3, 4, implementation="sequence")(zeros(4, 2, 3))
    for dtype, expected in ((torch.float32, "cpu-fused"), (torch.bfloat16, "vendor")):
        lstm = LSTM(3, 4, dtype=dtype)
        lstm(zeros(4, 2, 3).to(dtype))
        assert lstm.choices == (lstm.explain(2, 4),)
        assert lstm.choices[0].implementation == expected
        assert lstm.choices[0].reason


def test_choices_are_of_the_last_call():
    """There is none before a call, one per layer after it, and none in a copy that went through pickle."""
    lstm = LSTM(3, 4, 2, implementation="loop")
    assert lstm.choices == ()
    lstm(zeros(4, 2, 3))
    assert [choice.implementation for choice in lstm.choices] == ["loop", "loop"]
    assert all(isinstance(choice, Choice) for choice in lstm.choices)
    assert through_a_file(lstm).choices == ()


def through_a_file(lstm: nn.Module) -> nn.Module:
    """The module, pickled and read again."""
    file = io.BytesIO()
    torch.save(lstm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file])
def test_copies_are_whole(copied):
    """A deep copy or a pickled one computes the same from weights of its own, and keeps its options."""
    _, lstm = twins(SMALL)
    twin = copied(lstm)
    x, hx = SMALL.tensors()
    expected = lstm(x, hx)[0]
    assert repr(twin) == repr(lstm)
    with torch.no_grad():
        lstm.weight_ih_l0.zero_()
    assert torch.equal(twin(x, hx)[0], expected)


def test_weights_may_be_replaced():
    """A call runs what the names stand for now: parametrized weights, functional_call, new Parameter objects."""
    for implementation in ("loop", "vendor"):
        theirs, ours = twins(SMALL, implementation=implementation)
        x, hx = SMALL.tensors()
        other = {name: value * 2 for name, value in ours.state_dict().items()}
        theirs.load_state_dict(other)
        expected = theirs(x, hx)[0]
        torch.testing.assert_close(torch.func.functional_call(ours, other, (x, hx))[0], expected, **CLOSE)
        for name, value in other.items():
            setattr(ours, name, nn.Parameter(value))
        torch.testing.assert_close(ours(x, hx)[0], expected, **CLOSE)


def test_moves_between_types():
    """`.double()` and `.half()` take all of it along; float16 results are float16, c among them."""
    lstm = LSTM(3, 4, implementation="loop").half()
    output, (hidden, cell) = lstm(zeros(4, 2, 3, dtype=torch.float16))
    assert {output.dtype, hidden.dtype, cell.dtype} == {torch.float16}
    assert lstm.double()(zeros(4, 2, 3, dtype=torch.float64))[1][1].dtype == torch.float64


def test_flattening_changes_nothing():
    """`flatten_parameters` exists, as people call it, and leaves the result alone."""
    _, lstm = twins(SMALL)
    x, _ = SMALL.tensors()
    expected = lstm(x)[0]
    lstm.flatten_parameters()
    assert torch.equal(lstm(x)[0], expected)


@pytest.mark.parametrize("name", [*WEIGHTS, "all"])
@pytest.mark.parametrize("order", ["transposed", "strided", "expanded"])
def test_weights_may_lie_in_memory_in_any_order(name, order):
    """A weight that was assigned as a view counts by its values, with and without gradients."""
    torch.manual_seed(4)
    vendor, own = nn.LSTM(6, 5), LSTM(6, 5)
    chosen = WEIGHTS if name == "all" else (name,)
    for key, value in vendor.named_parameters():
        view = {
            "transposed": lambda shape: torch.randn(*reversed(shape)).permute(*reversed(range(len(shape)))),
            "strided": lambda shape: torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2],
            "expanded": lambda shape: torch.randn(*shape[:-1], 1).expand(shape),
        }[order](tuple(value.shape))
        if key in chosen:
            value.data = view
        own.get_parameter(key).data = value.data
    x = torch.randn(7, 3, 6)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(own(x), vendor(x))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("bias_hh_l0", (3,), torch.float32),
        ("weight_ih_l0", (20, 5), torch.float32),
        ("weight_hh_l0", (20, 4), torch.float32),
        ("weight_hh_l0", (100,), torch.float32),
        ("weight_hh_l0", (20, 5), torch.float16),
    ],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_weights_that_do_not_fit_are_refused(name, shape, dtype, gradients):
    """A parameter of another shape or type raises, where a kernel would read memory that is not its own."""
    lstm = LSTM(6, 5)
    lstm.get_parameter(name).data = torch.zeros(shape, dtype=dtype)
    with torch.set_grad_enabled(gradients), pytest.raises((RuntimeError, ValueError)):
        lstm(torch.randn(7, 3, 6))


@pytest.mark.parametrize("implementation", ["auto", "loop", "vendor"])
@pytest.mark.parametrize("gradients", [False, True])
def test_lengths_may_lie_in_memory_in_any_order(implementation, gradients):
    """Lengths that are every second of others count by their values."""
    lstm, x = LSTM(6, 5, implementation=implementation), torch.randn(7, 3, 6)
    lengths = torch.tensor([7, 0, 2, 0, 4, 0], dtype=torch.int32)[::2]
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(lstm(x, lengths=lengths), lstm(x, lengths=torch.tensor([7, 2, 4])))


def test_negated_views_count_by_their_values():
    """A tensor whose memory holds the negative of its values (imaginary parts of a conjugate) is read right."""
    vendor, own = nn.LSTM(6, 5), LSTM(6, 5)
    own.load_state_dict(vendor.state_dict())
    x, state = torch._neg_view(torch.randn(7, 3, 6)), torch._neg_view(torch.randn(1, 3, 5))
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(own(x, (state, state)), vendor(x, (state, state)))


@pytest.mark.parametrize("of", [torch._neg_view, lambda value: torch._efficientzerotensor(value.shape)])
def test_tensors_without_their_values_in_memory_are_read_right(of):
    """Input, state and gradients may be negated views, or zeros that take no memory."""
    vendor, own = nn.LSTM(6, 5), LSTM(6, 5)
    own.load_state_dict(vendor.state_dict())
    with torch.no_grad():
        own(torch.randn(7, 3, 6))  # Prepares the short way.
        x, state = of(torch.randn(7, 3, 6)), of(torch.randn(1, 3, 5))
        # torch's own reads memory that such zeros do not have.
        torch.testing.assert_close(own(x, (state, state)), vendor(x.clone(), (state.clone(), state.clone())))
    x, weights = torch.randn(7, 3, 6), torch.randn(7, 3, 5)
    found = []
    for lstm in (vendor, own):
        output, (h, c) = lstm(x)
        for value in (output, h, c):
            value.register_hook(of)
        loss = (output * weights).sum() + h.sum() + c.square().sum()
        found.append(torch.autograd.grad(loss, list(lstm.parameters())))
    torch.testing.assert_close(*found)


RETURNED = {
    "type": lambda value: value.bfloat16() if value.dtype == torch.float32 else value,
    "type of the largest": lambda value: value.bfloat16() if value.numel() >= 280 else value,
    "shape": torch.flatten,
    "device": lambda value: value.to("meta"),
}


@pytest.mark.parametrize("implementation", ["auto", "loop"])
@pytest.mark.parametrize("change", RETURNED)
def test_saved_tensors_that_come_back_as_others_are_refused(implementation, change):
    """A hook that compresses saved tensors and forgets to undo it ends in an error, not in other memory."""
    lstm = LSTM(3, 5, implementation=implementation)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, RETURNED[change]):
        output, _ = lstm(torch.randn(7, 2, 3))
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        output.sum().backward()


def test_saved_tensors_may_come_back_in_any_memory_order():
    """Tensors that a hook returns count by their values."""
    lstm, x = LSTM(3, 5), torch.randn(7, 2, 3)
    expected = torch.autograd.grad(lstm(x)[0].sum(), list(lstm.parameters()))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda value: torch.stack([value, value], -1)[..., 0]):
        output, _ = lstm(x)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), list(lstm.parameters())), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_no_gradients_in_forward_mode(frozen):
    """A tangent is refused, and not lost on the way."""
    lstm = LSTM(6, 5).requires_grad_(not frozen)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(7, 3, 6), torch.ones(7, 3, 6))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            lstm(x)


def test_no_gradients_of_gradients():
    """Asking for gradients of gradients raises and says where there are some."""
    lstm = LSTM(3, 4, implementation="loop")
    x = torch.randn(4, 2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "weight_ih_l0", "everything"])
def test_frozen_weights(frozen):
    """Weights that take no gradient get none, the others get the right one, and nothing is kept where none is due."""
    theirs, ours = twins(SMALL)
    x, _ = SMALL.tensors()
    for lstm in (theirs, ours):
        for name, parameter in lstm.named_parameters():
            parameter.requires_grad_(frozen not in {name, "everything"})
        output = lstm(x)[0]
        assert output.requires_grad is (frozen != "everything")
        if output.requires_grad:
            output.sum().backward()
    for ours_parameter, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (ours_parameter.grad is None) is (parameter.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(ours_parameter.grad, parameter.grad, **CLOSE)


@pytest.mark.parametrize("result", ["output", "h", "c"])
def test_gradients_of_one_result_alone(result):
    """A loss on one of the three results alone has torch.nn.LSTM's gradients."""
    found = []
    for lstm in twins(SMALL):
        inputs = leaves(SMALL, batch_first=True)
        output, (hidden, cell) = lstm(inputs["x"], state_of(inputs))
        loss = {"output": output, "h": hidden, "c": cell}[result].square().sum()
        found.append(torch.autograd.grad(loss, [*lstm.parameters(), *inputs.values()]))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_threads_do_not_disturb_each_other():
    """One module called from several threads at once gives each its own result."""
    _, lstm = twins(SMALL)
    inputs = [Shape(**{**vars(SMALL), "seed": seed}).tensors()[0] for seed in range(4)]
    expected = [lstm(x)[0].detach() for x in inputs]
    found: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        for _ in range(10):
            found[index].append(lstm(inputs[index])[0].detach())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, value in zip(found, expected, strict=True):
        assert len(results) == 10
        assert all(torch.equal(result, value) for result in results)


@pytest.mark.parametrize("implementation", MODULES)
@pytest.mark.parametrize("with_lengths", [False, True])
def test_kernels_equal_nn_lstm(implementation, with_lengths):
    """Each kernel, through the module, gives torch.nn.LSTM's results and gradients in float32."""
    pytest.importorskip(MODULES[implementation], reason="this kernel does not exist")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(batch=3, steps=3, input_size=3, hidden_size=16, num_layers=2, bidirectional=True, seed=1)
    theirs, ours = twins(shape, torch.float32, implementation, batch_first=with_lengths)
    ours.to(device)
    lengths, found = torch.tensor([2, 3, 1]) if with_lengths else None, []
    for lstm, where in ((theirs, "cpu"), (ours, device)):
        x, hidden, cell = (
            value.detach() for value in leaves(shape, batch_first=with_lengths, dtype=torch.float32).values()
        )
        inputs = {"x": x, "h0": hidden, "c0": cell}
        inputs = {name: value.requires_grad_() for name, value in inputs.items()}
        moved = {name: value.to(where) for name, value in inputs.items()}
        if lstm is theirs and lengths is not None:
            packed = pack_padded_sequence(moved["x"], lengths, batch_first=True, enforce_sorted=False)
            output, state = lstm(packed, state_of(moved))
            output, _ = pad_packed_sequence(output, batch_first=True)
        else:
            output, state = lstm(moved["x"], state_of(moved), *([] if lstm is theirs else [lengths]))
        result = output.cpu(), (state[0].cpu(), state[1].cpu())
        found.append({name: value.cpu() for name, value in everything(lstm, result, inputs).items()})
    assert {choice.implementation for choice in ours.choices} == {implementation}
    assert_equal(found[1], found[0], rtol=1e-4, atol=1e-5)


class SwappedBiases(LSTM):
    """A planted defect: each direction has the other's biases."""

    def _parameters_of(self, layer):
        (*ahead, bias_ih, bias_hh), (*back, bias_ih_back, bias_hh_back) = super()._parameters_of(layer)
        return [(*ahead, bias_ih_back, bias_hh_back), (*back, bias_ih, bias_hh)]


def unturned(args: Any, implementation: str) -> None:
    """A planted defect: the second direction's output is left in the order in which it was computed."""
    del implementation
    loop_forward(args)
    args.output[:, :, 1] = args.output[:, :, 1].flip(0)


@pytest.mark.parametrize("defect", ["biases", "order"])
def test_planted_defects_are_caught(defect, monkeypatch):
    """The comparison with torch.nn.LSTM can fail: mixed-up directions do not pass it."""
    theirs, _ = twins(SMALL)
    ours = (SwappedBiases if defect == "biases" else LSTM)(**SMALL.options, implementation="loop").double()
    ours.load_state_dict(theirs.state_dict())
    if defect == "order":
        monkeypatch.setattr(dispatch, "forward", unturned)
    x, hx = SMALL.tensors()
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(ours(x, hx)[0], theirs(x, hx)[0], **CLOSE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_auto_on_gpu_is_close_to_truth(dtype, autocast):
    """Whatever `auto` chooses on a GPU is within its type's rounding of float64, under autocast too."""
    shape = Shape(5, 9, 24, 48, 2, bidirectional=True, seed=0, lengths=(9, 1, 4, 9, 7))
    lstm = LSTM(**shape.options).cuda().to(torch.float32 if autocast else dtype)
    truth = LoopLSTM(**shape.options).double()
    truth.load_state_dict(lstm.state_dict())
    x, hx = shape.tensors(torch.float32)
    x, hx = x.to(dtype), tuple(value.to(dtype) for value in hx)
    kept = torch.float32 if autocast else dtype
    with torch.autocast("cuda", dtype, enabled=autocast and dtype != torch.float32):
        moved = tuple(value.to("cuda", kept) for value in hx)
        output, state = lstm(x.to("cuda", kept), moved, torch.tensor(shape.lengths))
    expected, expected_state = truth(x.double(), tuple(v.double() for v in hx), torch.tensor(shape.lengths))
    for value, true in zip((output, *state), (expected, *expected_state), strict=True):
        assert value.dtype == dtype
        atol = 64 * torch.finfo(dtype).eps
        torch.testing.assert_close(value.detach().cpu().double(), true, rtol=0, atol=atol)
    assert lstm.choices


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other():
    """Two streams that run one module at the same time get the results of one that runs alone."""
    lstm = LSTM(32, 64, 2, batch_first=True).cuda()
    inputs = [torch.randn(8, 50, 32, device="cuda") for _ in range(2)]
    with torch.no_grad():
        expected = [lstm(x)[0] for x in inputs]
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in inputs], [[], []]
        for _ in range(20):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[index].append(lstm(inputs[index])[0])
        torch.cuda.synchronize()
    for results, value in zip(found, expected, strict=True):
        assert all(torch.equal(result, value) for result in results)


def test_package_names_its_content():
    """The package has LSTM, a head and replace_lstm, and says what it has when asked for anything else."""
    assert kernels.LSTM is LSTM
    assert set(kernels.__all__) == {"LSTM", "ShortlistHead", "replace_lstm"}
    with pytest.raises(AttributeError, match="has no attribute 'GRU'; it has LSTM, ShortlistHead, replace_lstm"):
        _ = kernels.GRU


def test_importing_the_package_is_cheap():
    """`import kernels` loads neither torch nor Triton; `kernels.LSTM` needs torch, but no compiler."""
    program = """
import sys, kernels
assert not {"torch", "triton"} & set(sys.modules)
sys.modules["triton"] = None  # An import of it raises from here on.
lstm = kernels.LSTM(3, 4, implementation="vendor")
assert "kernels.gpu" not in sys.modules
import torch
from torch.nn.utils.rnn import pack_sequence
lstm(torch.zeros(2, 5, 3))
lstm(pack_sequence([torch.zeros(5, 3)]))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
