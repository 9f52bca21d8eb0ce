"""replace_lstm swaps what it can, shares what it swaps with the old module, and names what it leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from kernels import LSTM, replace_lstm
from seq2seq.models.encoder_decoder import Seq2Seq, Seq2SeqConfig


class Tagger(nn.Module):
    """Somebody's model: two LSTMs in places of their own, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, dropout=0.1)
        self.stack = nn.ModuleList([nn.Linear(8, 4), nn.LSTM(4, 4, batch_first=True)])
        self.tied = self.stack[1]

    def forward(self, x):
        """Tags of (batch, steps, 3)."""
        x = self.stack[0](self.encoder(x)[0])
        return self.tied(self.stack[1](x)[0])[0]


def test_result_stays_and_names_are_told():
    """The model computes the same after as before, and the report names every swapped module by all its names."""
    torch.manual_seed(0)
    model = Tagger().eval()
    x = torch.randn(2, 5, 3)
    before = model(x)
    report = replace_lstm(model, "loop")
    assert report.model is model
    assert report.swapped == ("encoder", "stack.1", "tied")
    assert not report.kept
    assert model.tied is model.stack[1]
    assert not any(type(module) is nn.LSTM for module in model.modules())
    torch.testing.assert_close(model(x), before)
    assert [c.implementation for c in model.encoder.choices] == ["loop", "loop"]


def test_parameters_are_the_same_objects():
    """An optimizer made before goes on training the model; state_dict, names and order stay."""
    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names, parameters = zip(*model.named_parameters(), strict=True)
    state = copy.deepcopy(model.state_dict())
    replace_lstm(model, "loop")
    assert tuple(name for name, _ in model.named_parameters()) == names
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    model(torch.randn(2, 5, 3)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == set(state)
    model.load_state_dict(state, strict=True)


def test_options_modes_and_hooks_are_carried_over():
    """Options, training mode, requires_grad, type, random state and hooks stay; a handle still removes its hook."""
    lstm = nn.LSTM(3, 4, 2, bias=False, dropout=0.25, bidirectional=True, dtype=torch.float64).eval()
    lstm.weight_hh_l0.requires_grad_(False)
    lstm.note = "mine"
    called = []
    handle = lstm.register_forward_hook(lambda *_: called.append(1))
    model = nn.Sequential(lstm)
    random = torch.get_rng_state()
    replace_lstm(model, "loop", fp32_precision="ieee")
    new = model[0]
    assert isinstance(new, LSTM)
    assert torch.equal(random, torch.get_rng_state())
    assert repr(new) == repr(lstm)[:-1] + ", implementation='loop', fp32_precision='ieee')"
    assert not new.training
    assert not new.weight_hh_l0.requires_grad
    assert new.note == "mine"
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(new(x)[0], lstm(x)[0])
    assert called == [1, 1]
    handle.remove()
    new(x)
    assert called == [1, 1]


def test_old_and_new_are_moved_apart():
    """Moving the new module to another type leaves nothing of it behind, whatever happens to the old one."""
    lstm = nn.LSTM(3, 4)
    new = replace_lstm(nn.Sequential(lstm), "loop").model[0]
    new.double()
    assert new(torch.zeros(4, 2, 3, dtype=torch.float64))[0].dtype == torch.float64
    assert {value.dtype for value in new._flat_weights} == {torch.float64}
    new.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3, dtype=torch.float64))
    assert lstm.weight_ih_l0 is not new.weight_ih_l0


def test_model_that_is_an_lstm():
    """An nn.LSTM itself has no place to be swapped in, so the new module is handed back; its text says so."""
    lstm = nn.LSTM(3, 4)
    report = replace_lstm(lstm)
    assert isinstance(report.model, LSTM)
    assert report.model.weight_ih_l0 is lstm.weight_ih_l0
    assert str(report) == "(the model itself)  now kernels.LSTM"


class Peephole(nn.LSTM):
    """Somebody's subclass."""


class Quantized(nn.Module):
    """Another library's LSTM."""


Quantized.__name__ = Quantized.__qualname__ = "LSTM"


def test_what_is_kept_is_named_with_the_reason():
    """Whatever may compute something else than nn.LSTM with its own weights is left alone and named."""
    model = nn.ModuleDict({
        "subclass": Peephole(3, 4),
        "parametrized": nn.LSTM(3, 4),
        "pruned": nn.LSTM(3, 4),
        "scripted": torch.jit.script(nn.LSTM(3, 4)),
        "other": Quantized(),
        "ours": LSTM(3, 4),
        "own_forward": nn.LSTM(3, 4),
        "projected": nn.LSTM(3, 4, proj_size=2),
        "plain": nn.LSTM(3, 4),
        "gru": nn.GRU(3, 4),
    })  # fmt: skip
    parametrize.register_parametrization(model["parametrized"], "weight_hh_l0", nn.Identity())
    prune.l1_unstructured(model["pruned"], "weight_hh_l0", amount=0.5)
    model["own_forward"].forward = lambda x: x
    before = dict(model.named_modules())
    report = replace_lstm(model, "loop")
    assert report.swapped == ("plain",)
    expected = {
        "subclass": "subclass of torch.nn.LSTM",
        "parametrized": "parametrized",
        "pruned": "pruning",
        "scripted": "TorchScript",
        "other": "another LSTM",
        "ours": "already",
        "own_forward": "forward of its own",
        "projected": "proj_size=2",
    }
    assert report.kept.keys() == expected.keys()
    for name, text in expected.items():
        assert text in report.kept[name]
        assert model[name] is before[name]
    lines = str(report).splitlines()
    assert lines[0] == "plain         now kernels.LSTM"
    assert len(lines) == 1 + len(expected)
    assert len({line.index(text) for line, text in zip(lines[1:], report.kept.values(), strict=True)}) == 1


def test_projections_are_left_alone():
    """No kernel has projections, so nothing would be gained, which the report says; `vendor` may be asked for."""
    model = nn.Sequential(nn.LSTM(3, 4, proj_size=2))
    x = torch.randn(4, 2, 3)
    before = model(x)[0]
    report = replace_lstm(model)
    assert report.swapped == ()
    assert str(report) == "0  has proj_size=2, which no kernel has, so nothing would be gained"
    assert replace_lstm(model, "vendor").swapped == ("0",)
    torch.testing.assert_close(model(x)[0], before)
    assert model[0].choices[0].implementation == "vendor"


def test_weights_may_be_kept_in_fewer_bits():
    """A storage of weights is handed on to every module, and refused together with what cannot have it."""
    model = Tagger()
    with pytest.raises(ValueError, match="needs implementation='cpu-fused'"):
        replace_lstm(model, weight_storage="int8")
    assert type(model.encoder) is nn.LSTM
    replace_lstm(model, "cpu-fused", weight_storage="int8")
    assert model.encoder.weight_storage == model.tied.weight_storage == "int8"


def test_nothing_to_swap():
    """A model without an LSTM is told to have none, and an unknown implementation is refused before anything."""
    assert str(replace_lstm(nn.Linear(2, 2))) == "the model has no LSTM"
    model = Tagger()
    with pytest.raises(ValueError, match="expected one of auto"):
        replace_lstm(model, "fast")
    assert type(model.encoder) is nn.LSTM


def test_seq2seq_is_the_same_either_way():
    """Seq2Seq with packing computes the same after the swap, and built on kernels.LSTM it hands over lengths."""
    config = Seq2SeqConfig(input_size=3, hidden_size=4, output_size=2, num_layers=2, bidirectional=True)
    model, ours = Seq2Seq(config).double(), Seq2Seq(config, LSTM).double()
    ours.load_state_dict(model.state_dict())
    assert ours.padded
    source, lengths = torch.randn(3, 5, 3, dtype=torch.float64), torch.tensor([2, 5, 3])
    expected = model(source, None, lengths)
    torch.testing.assert_close(ours(source, None, lengths), expected)
    assert replace_lstm(model, "loop").swapped == ("encoder", "decoder")
    torch.testing.assert_close(model(source, None, lengths), expected)
