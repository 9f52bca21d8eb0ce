"""`vendor-padded`: torch's own LSTM on sizes rounded up with zeros is exact, and says what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

from kernels import LSTM, padded_vendor
from kernels.padded_vendor import padded_sizes

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Shape, shapes

#: Some hundred roundings of float64; a wrong term is larger by ten orders of magnitude.
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


@given(features=st.integers(1, 3000), hidden=st.integers(1, 3000), batch=st.integers(1, 2000))
def test_sizes_are_those_of_the_persistent_algorithm(features, hidden, batch):
    """Up to 1024 units: multiples of 128 and 8, at most 128 rows a call, and at most 7 rows more in each."""
    wide, units, rows = padded_sizes(features, hidden, batch)
    assert 0 <= wide - features < 128
    assert 0 <= units - hidden < 128
    if units > 1024:
        assert (wide % 8, units % 8, rows) == (0, 0, -(-batch // 8) * 8)
        return
    calls = -(-batch // rows)
    assert (wide % 128, units % 128, rows % 8, rows <= 128) == (0, 0, 0, True)
    assert calls == -(-batch // 128)


def everything(lstm: nn.RNNBase, shape: Shape, *, stateful: bool) -> list[Any]:
    """Output, final state and the gradients of a random mix of them."""
    x, hx = shape.tensors()
    inputs = (x, *hx) if stateful else (x,)
    for value in inputs:
        value.requires_grad_()
    output, state = lstm(x, hx if stateful else None)
    generator = torch.Generator().manual_seed(0)
    mixed = sum((v * torch.randn(v.shape, dtype=v.dtype, generator=generator)).sum() for v in (output, *state))
    return [output, *state, *torch.autograd.grad(mixed, [*lstm.parameters(), *inputs])]


@given(shape=shapes(), stateful=st.booleans(), bias=st.booleans())
@example(shape=Shape(131, 2, 3, 5, 1, bidirectional=True, seed=0), stateful=True, bias=True)
@example(shape=Shape(8, 2, 128, 128, 1, bidirectional=False, seed=0), stateful=True, bias=True)
@example(shape=Shape(3, 2, 3, 1030, 1, bidirectional=False, seed=0), stateful=False, bias=True)
@settings(max_examples=15)
def test_equals_nn_lstm(shape, stateful, bias):
    """Output, final state and every gradient are those of torch.nn.LSTM in float64, whatever is padded and cut."""
    theirs = nn.LSTM(**shape.options, bias=bias).double()
    ours = LSTM(**shape.options, bias=bias, implementation="vendor-padded").double()
    ours.load_state_dict(theirs.state_dict())
    found, expected = (everything(lstm, shape, stateful=stateful) for lstm in (ours, theirs))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    assert {choice.implementation for choice in ours.choices} == {"vendor-padded"}


def test_padded_units_stay_zero(monkeypatch):
    """What cuDNN would be given has zero weights for each added unit, whose h and c come out as zero."""
    seen, call = [], torch._VF.lstm

    def spy(*arguments: Any) -> Any:
        results = call(*arguments)
        seen.append((arguments[2], results))
        return results

    monkeypatch.setattr(torch._VF, "lstm", spy)
    lstm = LSTM(3, 5, implementation="vendor-padded")
    with torch.no_grad():
        lstm(torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5)))
    ((weights, results),) = seen
    assert [tuple(value.shape) for value in weights] == [(512, 128), (512, 128), (512,), (512,)]
    assert all(value[..., 5:].abs().sum() == 0 for value in results)
    chunk = weights[0].untyped_storage().data_ptr()
    assert all(value.untyped_storage().data_ptr() == chunk for value in weights)


def test_weights_that_change_are_padded_again():
    """Padded copies are kept between calls without gradients, until a parameter is overwritten or replaced."""
    lstm = LSTM(3, 5, implementation="vendor-padded")
    plain = nn.LSTM(3, 5)
    x = torch.randn(4, 2, 3)
    for change in (
        lambda: None,
        lambda: None,
        lambda: lstm.weight_hh_l0.add_(0.5),
        lambda: setattr(lstm, "bias_ih_l0", nn.Parameter(torch.ones(20))),
    ):
        with torch.no_grad():
            change()
            plain.load_state_dict(lstm.state_dict())
            torch.testing.assert_close(lstm(x)[0], plain(x)[0])


def test_lengths_are_refused():
    """It takes no packed sequences: sequences of several lengths raise with what to use instead."""
    lstm = LSTM(3, 5, implementation="vendor-padded")
    with pytest.raises(ValueError, match=r"vendor-padded.*lengths.*'vendor'"):
        lstm(torch.randn(4, 2, 3), lengths=[4, 2])
    with pytest.raises(ValueError, match="lengths"):
        lstm(pack_sequence([torch.randn(3, 3), torch.randn(2, 3)]))


def test_packed_sequences_of_one_length_run():
    """A packed batch in which nothing is missing is a padded one."""
    lstm, plain = LSTM(3, 5, implementation="vendor-padded"), nn.LSTM(3, 5)
    plain.load_state_dict(lstm.state_dict())
    packed = pack_sequence([torch.randn(3, 3), torch.randn(3, 3)])
    torch.testing.assert_close(lstm(packed)[0].data, plain(packed)[0].data)


def test_projections_are_refused():
    """proj_size is torch's own alone."""
    with pytest.raises(ValueError, match="proj_size"):
        LSTM(3, 5, proj_size=2, implementation="vendor-padded")


@pytest.mark.parametrize(("batch", "hidden", "expected"), [(128, 128, False), (129, 128, True), (128, 130, True)])
def test_it_says_where_it_is_torchs_own(batch, hidden, expected):
    """At sizes that cuDNN likes already there is nothing to do."""
    assert padded_vendor.changes(128, hidden, batch) == expected


def test_changes_that_torch_does_not_count_are_seen():
    """As in nn.LSTM, what is written through `.data` holds from the next call on."""
    lstm, plain, x = LSTM(3, 5, implementation="vendor-padded"), nn.LSTM(3, 5), torch.randn(4, 2, 3)
    with torch.no_grad():
        lstm(x)
        for parameter in lstm.parameters():
            parameter.data.mul_(2)
        plain.load_state_dict(lstm.state_dict())
        torch.testing.assert_close(lstm(x)[0], plain(x)[0])


def test_an_empty_batch_has_gradients():
    """They are zero, as in nn.LSTM."""
    lstm = LSTM(3, 5, implementation="vendor-padded")
    lstm(torch.zeros(6, 0, 3))[0].sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in lstm.parameters())


def test_lengths_are_refused_under_compile_too():
    """The choice is made before anything runs, so it must be refused there."""
    lstm = torch.compile(LSTM(3, 5, batch_first=True, implementation="vendor-padded"), backend="eager")
    with pytest.raises(Exception, match="takes no lengths"), torch.no_grad():
        lstm(torch.randn(3, 4, 3), lengths=torch.tensor([4, 2, 1]))
