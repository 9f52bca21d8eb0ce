"""The native entry to the CPU kernel takes the calls that are like an earlier one, and no other, and leaks nothing."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from recurrences import DEVICE
from torch import Tensor, nn
from watchers import Dispatches, Functions, Subclass

from kernels import LSTM
from kernels.cpu import build, entry, packing

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

BATCH, FEATURES, HIDDEN, LAYERS = 2, 5, 20, 2


@pytest.fixture
def lstm() -> LSTM:
    """A module that has been called before."""
    torch.manual_seed(0)
    found = LSTM(FEATURES, HIDDEN, LAYERS, implementation="cpu-fused").eval()
    with torch.no_grad():
        found(torch.zeros(1, 1, FEATURES))
    return found


@pytest.fixture(params=["no_grad", "inference_mode"])
def _no_gradients(request: pytest.FixtureRequest, lstm: LSTM) -> Iterator[None]:
    del lstm  # made before, so that its parameters are not inference tensors
    with getattr(torch, request.param)():
        yield


def _step_inputs(batch: int = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, FEATURES), *torch.randn(2, LAYERS, batch, HIDDEN).unbind()


def _step(lstm: LSTM, x: Tensor, h: Tensor, c: Tensor, resets: Tensor | None = None) -> Any:
    """Result of the entry's own step, or None."""
    found = lstm.__dict__["_kept"].step(lstm._parameters, x, h, c, resets)
    return None if found is None else found[0]


def _forward(lstm: LSTM, x: Any, hx: Any = None) -> Any:
    """Result of the entry's call of all layers, or None."""
    return lstm.__dict__["_kept"].at_once(lstm._parameters, x, hx, False)


def test_it_can_be_built() -> None:
    """The entry compiles wherever the kernel does: every test below relies on it."""
    assert entry.hindrance() is None


@pytest.mark.usefixtures("_no_gradients")
@pytest.mark.parametrize("batch", [1, 2, 7, 40])
def test_a_plain_step_is_taken_at_any_batch(lstm: LSTM, batch: int) -> None:
    """Nothing is remembered of an earlier call's batch, and the state may be another one each time."""
    truth = nn.LSTM(FEATURES, HIDDEN, LAYERS)
    truth.load_state_dict(lstm.state_dict())
    for _ in range(2):
        x, h, c = _step_inputs(batch)
        output, (h_n, c_n) = truth(x[None], (h, c))
        found = _step(lstm, x, h, c)
        torch.testing.assert_close((found, h, c), (output[0], h_n, c_n), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_no_gradients")
def test_a_step_takes_resets(lstm: LSTM) -> None:
    """A row that begins anew is what it is from a state of zeros, up to a roundoff: resets may have another walk."""
    x, h, c = _step_inputs()
    zeros = torch.zeros(LAYERS, BATCH, HIDDEN)
    expected = _step(lstm, x, zeros.clone(), zeros.clone())
    found = _step(lstm, x, h, c, torch.tensor([False, True]))
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-7)
    assert (found[0] - expected[0]).abs().max() > 1e-3


WATCHERS = {
    "functions": Functions,
    "dispatches": Dispatches,
    "autocast": lambda: torch.autocast("cpu"),
    "gradients": torch.enable_grad,
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=WATCHERS)
def test_a_call_that_others_watch_is_not_taken(lstm: LSTM, watcher: Any) -> None:
    """Modes, autocast, gradients and forward mode see calls; the state is left as it was."""
    x, h, c = _step_inputs()
    before = h.clone(), c.clone()
    with torch.no_grad(), watcher():
        assert _step(lstm, x, h, c) is None
        assert _forward(lstm, x[None]) is None
    assert torch.equal(h, before[0])
    assert torch.equal(c, before[1])
    with torch.no_grad():
        assert _step(lstm, x, h, c) is not None


def test_a_transform_sees_the_step(lstm: LSTM) -> None:
    """Under torch.func.vmap nothing is taken."""
    x, h, c = _step_inputs()
    taken = []
    with torch.no_grad():
        torch.func.vmap(lambda value: (taken.append(_step(lstm, value, h, c)), value + 1)[1])(x[None])
        torch.func.vmap(lambda value: (taken.append(_step(lstm, x, h, c)), value + 1)[1])(x[None])
    assert taken == [None, None]


def _unallocated() -> Tensor:
    x = torch.randn(BATCH, FEATURES)
    x.untyped_storage().resize_(0)
    return x


STRANGE = {
    "a subclass": lambda: torch.randn(BATCH, FEATURES).as_subclass(Subclass),
    "a parameter": lambda: nn.Parameter(torch.randn(BATCH, FEATURES)),
    "no tensor": lambda: [[0.0] * FEATURES] * BATCH,
    "None": lambda: None,
    "float64": lambda: torch.randn(BATCH, FEATURES, dtype=torch.float64),
    "integers": lambda: torch.ones(BATCH, FEATURES, dtype=torch.int32),
    "features": lambda: torch.randn(BATCH, FEATURES + 1),
    "dimensions": lambda: torch.randn(FEATURES),
    "no rows": lambda: torch.randn(0, FEATURES),
    "meta": lambda: torch.randn(BATCH, FEATURES, device="meta"),
    "sparse": lambda: torch.randn(BATCH, FEATURES).to_sparse(),
    "oneDNN's": lambda: torch.randn(BATCH, FEATURES).to_mkldnn(),
    "transposed": lambda: torch.randn(FEATURES, BATCH).t(),
    "negated": lambda: torch._neg_view(torch.randn(BATCH, FEATURES)),
    "zeros without memory": lambda: torch._efficientzerotensor(BATCH, FEATURES),
    "no memory": _unallocated,
}


@pytest.mark.parametrize("strange", STRANGE.values(), ids=STRANGE)
def test_input_that_is_not_plain_is_not_taken(lstm: LSTM, strange: Any) -> None:
    """Other types, layouts, sizes and kinds of tensors go the long way."""
    _, h, c = _step_inputs()
    x = strange()
    with torch.no_grad():
        assert _step(lstm, x, h, c) is None
        # A view of a parameter is a plain tensor, and of no memory there is none.
        if type(x) is not nn.Parameter and strange is not _unallocated:
            assert _forward(lstm, x[None] if isinstance(x, Tensor) and x.layout is torch.strided else x) is None


@pytest.mark.parametrize("which", [0, 1])
def test_a_state_that_is_not_plain_is_not_taken(lstm: LSTM, which: int) -> None:
    """Nor is a state of another shape, type or order, that shares its memory, or that is no pair."""
    x, *state = _step_inputs()
    right = state[which]
    for wrong in (
        right[:, :1], right[:1], right.double(), torch.randn(LAYERS, HIDDEN, BATCH).transpose(1, 2),
        right[:1].expand(LAYERS, -1, -1), state[1 - which], right.as_subclass(Subclass), None,
    ):  # fmt: skip
        given = list(state)
        given[which] = wrong
        with torch.no_grad():
            assert _step(lstm, x, *given) is None
            if wrong is not state[1 - which]:
                assert _forward(lstm, x[None], tuple(given)) is None
    with torch.no_grad():
        assert _forward(lstm, x[None], (state[0],)) is None
        assert _forward(lstm, x[None], 3) is None
        assert _step(lstm, x, *state, torch.zeros(BATCH)) is None
        assert _step(lstm, x, *state, torch.zeros(BATCH + 1, dtype=torch.bool)) is None


def test_a_state_of_inference_mode_is_not_written_outside_of_it(lstm: LSTM) -> None:
    """Torch refuses to change such tensors there, and so does a step, before it has written anything."""
    x, h, c = _step_inputs()
    with torch.inference_mode():
        h, c = h.clone(), c.clone()
    before = h.clone()
    with torch.no_grad():
        assert _step(lstm, x, h, c) is None
        assert torch.equal(h, before)
        with pytest.raises(RuntimeError, match="inference"):
            lstm.step(x, (h, c))


def test_results_are_such_as_torch_makes_in_that_mode(lstm: LSTM) -> None:
    """Outputs have a version counter outside of inference mode and none inside, and need no gradients."""
    x, h, c = _step_inputs()
    with torch.no_grad():
        outside = _step(lstm, x, h, c)
    with torch.inference_mode():
        inside = _step(lstm, x, h, c)
    assert not outside.is_inference()
    assert inside.is_inference()
    assert not outside.requires_grad
    (outside * torch.ones(HIDDEN, requires_grad=True)).sum().backward()


def test_a_tensor_that_was_swapped_into_a_parameter_is_noticed(lstm: LSTM) -> None:
    """`torch.utils.swap_tensors` exchanges what a parameter is made of by this call; the object stays the same."""
    truth = nn.LSTM(FEATURES, HIDDEN, LAYERS)
    truth.load_state_dict(lstm.state_dict())
    x, h, c = _step_inputs()
    for module in (lstm, truth):
        torch.manual_seed(1)
        torch._C._swap_tensor_impl(module.weight_hh_l1, nn.Parameter(torch.randn(4 * HIDDEN, HIDDEN)))
    with torch.no_grad():
        assert _step(lstm, x, h.clone(), c.clone()) is None
        expected, _ = truth(x[None], (h, c))
        torch.testing.assert_close(lstm.step(x, (h, c)), expected[0], rtol=1e-4, atol=1e-5)


def test_memory_that_torch_shares_until_it_is_written_is_copied_first(lstm: LSTM) -> None:
    """A lazy copy of the state keeps its values."""
    x, h, c = _step_inputs()
    lazy = torch._lazy_clone(h)
    before = h.clone()
    with torch.no_grad():
        assert _step(lstm, x, h, c) is not None
    assert torch.equal(lazy, before)
    assert not torch.equal(h, before)


def test_another_order_of_the_parameters_is_served(lstm: LSTM) -> None:
    """A parameter that was taken out and put in again comes last in the module's dict."""
    x, h, c = _step_inputs()
    weight = lstm.weight_ih_l0
    with torch.no_grad():
        expected = lstm.step(x, (h.clone(), c.clone()))
        del lstm.weight_ih_l0
        lstm.weight_ih_l0 = weight
        for _ in range(2):
            torch.testing.assert_close(lstm.step(x, (h.clone(), c.clone())), expected)


def test_forgotten_weights_are_not_read(lstm: LSTM) -> None:
    """Weights packed before `packing.forget` are not used after it."""
    x, h, c = _step_inputs()
    packing.forget()
    with torch.no_grad():
        assert _step(lstm, x, h, c) is None
        assert _forward(lstm, x[None]) is None


def test_nothing_is_leaked(lstm: LSTM) -> None:
    """Calls that are taken, and calls that are not, leave all counts of references where they were."""
    x, h, c = _step_inputs()
    values = (x, h, c, lstm.choices, lstm._parameters, *lstm.parameters(), None, torch.Tensor, lstm._kept)
    kept = lstm._kept
    with torch.no_grad():
        for _ in range(3):
            counts = [sys.getrefcount(value) for value in values]
            for _ in range(100):
                kept.step(lstm._parameters, x, h, c, None)
                kept.step(lstm._parameters, x, h, None, None)
                kept.at_once(lstm._parameters, x[None], (h, c), False)
                kept.at_once(lstm._parameters, x[None], None, False)
                kept.at_once(lstm._parameters, x, (h, c), False)
            after = [sys.getrefcount(value) for value in values]
    assert [b - a for a, b in zip(counts, after, strict=True) if b != a and a < 2**30] == []


def test_a_module_that_is_gone_frees_what_was_packed() -> None:
    """The functions hold what the kernel reads, and nothing holds them."""
    import gc
    import weakref

    lstm = LSTM(FEATURES, HIDDEN, implementation="cpu-fused")
    with torch.no_grad():
        lstm(torch.zeros(1, 1, FEATURES))
    step = lstm.__dict__["_kept"].step
    weight, prepared = weakref.ref(lstm.weight_hh_l0), weakref.ref(lstm.__dict__["_kept"])
    del lstm
    gc.collect()
    assert prepared() is None
    assert weight() is not None, "a function that is kept keeps alive what it reads"
    del step
    gc.collect()
    assert weight() is None


def test_failures_of_the_kernel_are_raised(lstm: LSTM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A team that cannot be chosen is an error of the call."""
    from kernels.cpu import teams

    def broken(*_: object) -> None:
        msg = "no team"
        raise RuntimeError(msg)

    monkeypatch.setattr(teams, "threads_for", broken)
    x = torch.randn(64, 200, FEATURES)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no team"):
        _forward(lstm, x)


def test_without_the_entry_calls_go_the_long_way_and_say_so() -> None:
    """Results are the same without torch's headers, and `explain` names the reason."""
    x, h, c = _step_inputs()
    lstm = LSTM(FEATURES, HIDDEN, LAYERS, implementation="cpu-fused")
    with torch.no_grad():
        expected = lstm.step(x, (h.clone(), c.clone()))
        assert "copies the state" not in lstm.explain(1, 1, step=True).reason
        entry._library.cache_clear()
        try:
            with mock.patch.object(entry, "SOURCE", "missing.cpp"):
                packing.forget()
                lstm.step(x, (h.clone(), c.clone()))
                assert _step(lstm, x, h, c) is None
                assert torch.equal(lstm.step(x, (h.clone(), c.clone())), expected)
                assert "missing.cpp" in lstm.explain(1, 1, step=True).reason
                assert "missing.cpp" in lstm.explain(1, 1, training=False).detour
                lstm(x.unsqueeze(0))
                assert all("missing.cpp" in choice.detour for choice in lstm.choices)
                # These never take the entry.
                assert not lstm.explain(1, 1, training=True).detour
                autocast = LSTM(FEATURES, HIDDEN)  # chooses what this processor can run
                assert not autocast.explain(1, 1, training=False, dtype=torch.bfloat16).detour
                assert not LSTM(FEATURES, HIDDEN, implementation="loop").eval().explain(1, 1).detour
        finally:
            entry._library.cache_clear()
    assert not lstm.explain(1, 1, training=False).detour


def _compiler_without(folder: Path, *standards: str) -> str:
    """A command that compiles as the compiler of this machine, but knows fewer standards of C++."""
    script = folder / "old-compiler"
    cases = "".join(
        f' *" -std={name} "*) echo "error: unrecognized option -std={name}" >&2; exit 1;;' for name in standards
    )
    script.write_text(f'#!/bin/sh\ncase " $* " in{cases} esac\nexec {shlex.join(build.compiler())} "$@"\n')
    script.chmod(0o755)
    return str(script)


#: From release 2.14 on torch's headers are C++20.
HEADERS_IN_CPP17 = torch.torch_version.TorchVersion(torch.__version__) < (2, 14)


@pytest.mark.parametrize("standards", [["c++20"], ["c++20", "c++17"]])
def test_an_older_compiler_builds_it_or_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, standards: list[str]
) -> None:
    """C++17 does where C++20 is unknown and torch's headers take it; otherwise the reason is the compiler's."""
    monkeypatch.setenv("CXX", _compiler_without(tmp_path, *standards))
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path))
    entry._library.cache_clear()
    try:
        reason = entry.hindrance()
        if standards != ["c++20"]:
            assert "unrecognized option -std=c++17" in str(reason)
        elif HEADERS_IN_CPP17:
            assert reason is None
        else:
            assert "could not compile entry.cpp" in str(reason)
    finally:
        entry._library.cache_clear()


def test_a_copy_leaves_the_original_prepared(lstm: LSTM) -> None:
    """And its choices as they were."""
    kept, choices = lstm.__dict__["_kept"], lstm.choices
    other = copy.deepcopy(lstm)
    assert lstm.__dict__["_kept"] is kept
    assert lstm.choices == choices != ()
    assert "_kept" not in other.__dict__
