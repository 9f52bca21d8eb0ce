"""Calls with gradients like an earlier one take the short way to the CPU kernel and are right; no others take it."""

from __future__ import annotations

import copy
import functools
import gc
import sys
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from recurrences import DEVICE
from torch import Tensor, nn
from watchers import Dispatches, Functions, Subclass

from kernels import LSTM
from kernels.cpu import entry, layer

pytest.importorskip("hypothesis")
from hypothesis import example, given
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

BATCH, STEPS, FEATURES, HIDDEN, LAYERS = 2, 4, 5, 20, 2


@pytest.fixture
def lstm() -> LSTM:
    """A module that has been called with gradients before."""
    torch.manual_seed(0)
    found = LSTM(FEATURES, HIDDEN, LAYERS, implementation="cpu-fused")
    found(torch.zeros(1, 1, FEATURES))
    return found


def _input() -> Tensor:
    return torch.randn(STEPS, BATCH, FEATURES)


def _same(_: object, gradient: Tensor) -> Tensor:
    return gradient


def _short(lstm: LSTM, x: Any, hx: Any = None) -> Any:
    """Result of the short way, or None."""
    return lstm.__dict__["_kept_training"].at_once(lstm._parameters, x, hx, lstm.batch_first)


def _gradients(lstm: Any, x: Tensor, hx: Any, by: Tensor) -> list[Tensor]:
    """Results and all gradients, each result having its own part in the loss."""
    leaves = [x, *(hx or ())]
    output, (h_n, c_n) = lstm(x, hx)
    total = (output * by).sum() + h_n.sin().sum() + c_n.square().sum()
    found = torch.autograd.grad(total, [*leaves, *lstm.parameters()])
    return [output.detach(), h_n.detach(), c_n.detach(), *found]


@given(
    batch=st.integers(1, 20), steps=st.integers(1, 6), features=st.integers(1, 40), hidden=st.integers(1, 80),
    layers=st.integers(1, 3), bidirectional=st.booleans(), bias=st.booleans(), batch_first=st.booleans(),
    state=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@example(
    batch=16, steps=10, features=5, hidden=16, layers=1, bidirectional=False, bias=True, batch_first=True, state=True,
    seed=0,
)  # fmt: skip
def test_results_and_gradients_are_the_loop_s(  # noqa: PLR0913 - what hypothesis draws
    *, batch: int, steps: int, features: int, hidden: int, layers: int, bidirectional: bool, bias: bool,
    batch_first: bool, state: bool, seed: int,
) -> None:  # fmt: skip
    """On the short way all results and gradients are those of the equations in float64, whatever the weights become."""
    torch.manual_seed(seed)
    options = {"bidirectional": bidirectional, "bias": bias, "batch_first": batch_first}
    truth = LSTM(features, hidden, layers, **options, implementation="loop").double()
    ours = LSTM(features, hidden, layers, **options, implementation="cpu-fused")
    ours(torch.zeros(1, 1, features))
    for _ in range(2):
        with torch.no_grad():
            for value, own in zip(truth.parameters(), ours.parameters(), strict=True):
                own.add_(torch.randn_like(own), alpha=0.1)
                value.copy_(own)
        x = torch.randn(*((batch, steps) if batch_first else (steps, batch)), features)
        directions = 2 if bidirectional else 1
        hx = [torch.randn(layers * directions, batch, hidden) for _ in range(2)] if state else []
        by = torch.randn(*x.shape[:2], directions * hidden)
        found = []
        for lstm, dtype in ((truth, torch.float64), (ours, torch.float32)):
            leaves = [value.to(dtype).requires_grad_() for value in (x, *hx)]
            given_state = tuple(leaves[1:]) if state else None
            if lstm is ours:
                assert _short(ours, leaves[0], given_state) is not None
            found.append(_gradients(lstm, leaves[0], given_state, by.to(dtype)))
        for right, value in zip(*found, strict=True):
            error = (value.double() - right).norm() / max(float(right.norm()), 0.1 * right.numel() ** 0.5)
            assert error < 1e-4


@pytest.mark.parametrize("hidden", [20, 80])
def test_weights_changed_behind_torch_s_back_count(hidden: int) -> None:
    """What was written through `.data`, or is other memory now, is read, whoever packs a matrix of that size."""
    torch.manual_seed(0)
    truth = LSTM(FEATURES, hidden, implementation="loop").double()
    ours = LSTM(FEATURES, hidden, implementation="cpu-fused")
    x, by = _input().requires_grad_(), torch.randn(STEPS, BATCH, hidden)
    ours(x)
    assert (4 * hidden * hidden > layer.PACKED_IN_CALL) is (hidden > 64)
    for change in (lambda own: own.data.mul_(0.5), lambda own: setattr(own, "data", torch.randn_like(own))):
        for own in ours.parameters():
            change(own)
        truth.load_state_dict(ours.state_dict())
        assert _short(ours, x) is not None
        found, right = (
            _gradients(ours, x, None, by),
            _gradients(truth, x.detach().double().requires_grad_(), None, by.double()),
        )
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4, check_dtype=False)


WATCHERS = {
    "functions": Functions,
    "dispatches": Dispatches,
    "autocast": lambda: torch.autocast("cpu"),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=WATCHERS)
def test_a_call_that_others_watch_is_not_taken(lstm: LSTM, watcher: Any) -> None:
    """Modes, autocast and forward mode see calls, and without gradients there is a shorter way."""
    x = _input()
    with watcher():
        assert _short(lstm, x) is None
    assert _short(lstm, x) is not None


def test_a_transform_sees_the_call(lstm: LSTM) -> None:
    """Under torch.func.vmap nothing is taken."""
    x, taken = _input(), []
    torch.func.vmap(lambda value: (taken.append(_short(lstm, value)), value + 1)[1])(x[None])
    torch.func.vmap(lambda value: (taken.append(_short(lstm, x)), value + 1)[1])(x[None])
    assert taken == [None, None]


STRANGE = {
    "a subclass": lambda: _input().as_subclass(Subclass),
    "a parameter": lambda: nn.Parameter(_input()),
    "None": lambda: None,
    "float64": lambda: _input().double(),
    "features": lambda: torch.randn(STEPS, BATCH, FEATURES + 1),
    "dimensions": lambda: torch.randn(STEPS, FEATURES),
    "no rows": lambda: torch.randn(STEPS, 0, FEATURES),
    "no steps": lambda: torch.randn(0, BATCH, FEATURES),
    "meta": lambda: _input().to("meta"),
    "sparse": lambda: _input().to_sparse(),
    "transposed": lambda: torch.randn(BATCH, STEPS, FEATURES).transpose(0, 1),
    "negated": lambda: torch._neg_view(_input()),
    "zeros without memory": lambda: torch._efficientzerotensor(STEPS, BATCH, FEATURES),
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_input_that_is_not_plain_is_not_taken(lstm: LSTM, strange: Any) -> None:
    """Other types, layouts, sizes and kinds of tensors go the long way."""
    assert _short(lstm, strange()) is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_state_that_is_not_plain_is_not_taken(lstm: LSTM, which: int) -> None:
    """Nor is a state of another shape, type or order, or that is no pair."""
    x, state = _input(), list(torch.randn(2, LAYERS, BATCH, HIDDEN).unbind())
    right = state[which]
    for wrong in (
        right[:, :1], right[:1], right.double(), torch.randn(LAYERS, HIDDEN, BATCH).transpose(1, 2),
        right[:1].expand(LAYERS, -1, -1), right.as_subclass(Subclass), None,
    ):  # fmt: skip
        given_state = list(state)
        given_state[which] = wrong
        assert _short(lstm, x, tuple(given_state)) is None
    assert _short(lstm, x, (state[0],)) is None
    assert _short(lstm, x, 3) is None
    assert _short(lstm, x, tuple(state)) is not None


def _transposed(lstm: LSTM) -> None:
    lstm.weight_hh_l1.data = torch.randn(HIDDEN, 4 * HIDDEN).t()


def _replaced(lstm: LSTM) -> None:
    lstm._parameters["weight_hh_l1"] = nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN))


def _smaller(lstm: LSTM) -> None:
    lstm.weight_hh_l1.data = torch.randn(4 * HIDDEN, HIDDEN - 1)


def _without_one(lstm: LSTM) -> None:
    del lstm._parameters["bias_hh_l1"]


CHANGES = {
    "transposed": _transposed,
    "replaced": _replaced,
    "smaller": _smaller,
    "one is gone": _without_one,
    "one more": lambda lstm: lstm._parameters.update(other=nn.Parameter(torch.zeros(3))),
    "another type": lambda lstm: setattr(lstm.weight_hh_l1, "data", lstm.weight_hh_l1.data.double()),
    "frozen": lambda lstm: lstm.requires_grad_(requires_grad=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_that_are_others_are_not_taken(lstm: LSTM, change: Any) -> None:
    """Parameters of another size, type or memory order, other ones, and a call that needs no gradient at all."""
    change(lstm)
    assert _short(lstm, _input()) is None


def test_an_input_s_gradient_is_enough(lstm: LSTM) -> None:
    """With frozen weights the gradient of x or of the state still makes a node."""
    lstm.requires_grad_(requires_grad=False)
    assert _short(lstm, _input().requires_grad_()) is not None
    state = torch.randn(2, LAYERS, BATCH, HIDDEN).requires_grad_().unbind()
    (output, _), _ = _short(lstm, _input(), state)
    output.sum().backward()


ATTRIBUTES = {"training": False, "batch_first": True, "implementation": "vendor", "dropout": 0.5, "hidden_size": 3}


@pytest.mark.parametrize(("name", "value"), ATTRIBUTES.items(), ids=ATTRIBUTES)
def test_an_attribute_that_changes_ends_it(lstm: LSTM, name: str, value: Any) -> None:
    """What a call depends on beside tensors is settled anew after any of it was set."""
    setattr(lstm, name, value)
    assert "_kept_training" not in lstm.__dict__


def test_dropout_between_layers_is_never_taken() -> None:
    """Dropout that acts goes the long way at each call, and dropout that does not act may not."""
    lstm = LSTM(FEATURES, HIDDEN, LAYERS, dropout=0.5, implementation="cpu-fused")
    lstm(_input())
    assert "_kept_training" not in lstm.__dict__
    lstm.eval()(_input())
    assert _short(lstm, _input()) is not None


def test_a_copy_and_a_pickled_module_settle_their_own(lstm: LSTM) -> None:
    """What was settled for a module's parameters does not go along."""
    assert "_kept_training" not in copy.deepcopy(lstm).__dict__


def test_calls_in_turns_with_inference_keep_both_ways(lstm: LSTM) -> None:
    """A call without gradients between two with them settles its own way beside theirs."""
    x = _input()
    for _ in range(2):
        with torch.no_grad():
            expected = lstm(x)[0]
        torch.testing.assert_close(lstm(x)[0], expected)
    assert {"_kept", "_kept_training"} <= lstm.__dict__.keys()
    assert lstm(x)[0].requires_grad
    assert [choice.implementation for choice in lstm.choices] == ["cpu-fused"] * LAYERS


def test_parameters_that_were_computed_are_not_kept(lstm: LSTM) -> None:
    """Fast weights of an inner loop would hold its whole graph until the next call."""
    computed = {name: value * 1.0 for name, value in lstm.named_parameters()}
    held = weakref.ref(computed["weight_hh_l0"])
    torch.func.functional_call(lstm, computed, (_input(),))
    del computed
    gc.collect()
    assert held() is None
    assert _short(lstm, _input()) is not None


def test_a_module_that_its_parameter_refers_to_is_freed() -> None:
    """By a hook or an attribute; a function of the entry, which Python's collector does not see into, holds neither."""
    lstm = LSTM(FEATURES, HIDDEN, implementation="cpu-fused")
    freed = weakref.ref(lstm)
    lstm.weight_hh_l0.register_hook(functools.partial(_same, lstm))
    lstm.weight_ih_l0.owner = lstm
    lstm(_input())[0].sum().backward()
    assert _short(lstm, _input()) is not None
    del lstm
    gc.collect()
    assert freed() is None


def test_without_the_entry_calls_go_the_long_way() -> None:
    """Results are the same where there are no headers of torch."""
    torch.manual_seed(0)
    lstm, x, by = LSTM(FEATURES, HIDDEN, implementation="cpu-fused"), _input().requires_grad_(), torch.randn(())
    expected = _gradients(lstm, x, None, by)
    entry._library.cache_clear()
    try:
        with mock.patch.object(entry, "SOURCE", "missing.cpp"):
            lstm = copy.deepcopy(lstm)
            for _ in range(2):
                torch.testing.assert_close(_gradients(lstm, x, None, by), expected)
            assert _short(lstm, x) is None
    finally:
        entry._library.cache_clear()


def test_nothing_is_leaked(lstm: LSTM) -> None:
    """Calls that are taken, and calls that are not, leave all counts of references where they were."""
    x, state = _input(), torch.randn(2, LAYERS, BATCH, HIDDEN).unbind()
    values = (x, *state, lstm._parameters, *lstm.parameters(), None, True, torch.Tensor, lstm._kept_training)
    trains = lstm._kept_training._trains
    for _ in range(3):
        counts = [sys.getrefcount(value) for value in values]
        for _ in range(100):
            assert trains(lstm._parameters, x, state, False) is True
            assert trains(lstm._parameters, x, (state[0], None), False) is None
            lstm(x, state)[0].sum().backward()
            lstm.zero_grad()
        after = [sys.getrefcount(value) for value in values]
    assert [b - a for a, b in zip(counts, after, strict=True) if b != a and a < 2**30] == []


def test_a_defect_in_what_a_call_packs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails where a call is told to pack the other of two equal matrices."""
    torch.manual_seed(0)
    lstm, x, by = LSTM(HIDDEN, HIDDEN, implementation="cpu-fused"), torch.randn(STEPS, BATCH, HIDDEN), torch.randn(())
    expected = _gradients(lstm, x.requires_grad_(), None, by)
    other = lstm.weight_ih_l0.detach()
    monkeypatch.setattr(layer, "_packed", lambda *_, **__: (0, other.data_ptr(), other))
    found = _gradients(lstm, x, None, by)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found, expected, strict=True))
