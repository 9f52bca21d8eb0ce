"""The CPU kernel on bfloat16 and float16: operands converted to float32, where neither it nor torch has that type."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import LSTM, dispatch, torch_lstm
from kernels.common import recurrence
from kernels.cpu import fused, packing

TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def _forward(args: recurrence.Forward, run) -> list[Tensor]:
    """What a forward pass writes, into memory full of NaN."""
    names = ("output", "h_n", "c_n", "gates", "cells")
    written = {name: torch.full_like(getattr(args, name), torch.nan) for name in names}
    run(dataclasses.replace(args, **written))
    return list(written.values())


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 33), st.integers(1, 2))


@TYPES
@given(shape=SHAPES, masked=st.booleans(), resets=st.booleans(), seed=st.integers(0, 99))
def test_both_passes_are_those_of_float64(dtype, shape, masked, resets, seed):
    """Whatever is written is right to the rounding of the type; h is not even rounded between steps."""
    batch, steps, hidden, directions = shape
    torch.manual_seed(seed)
    wide = recurrence.Forward(
        gates_input=torch.randn(steps, batch, directions, 4 * hidden).to(dtype).double(),
        weight_hh=(torch.randn(directions, 4 * hidden, hidden) / hidden**0.5).to(dtype).double(),
        h0=torch.rand(directions, batch, hidden).to(dtype).double(),
        c0=torch.randn(directions, batch, hidden).double(),
        lengths=torch.randint(0, steps + 1, (batch,), dtype=torch.int32) if masked else None,
        output=torch.empty(steps, batch, directions, hidden, dtype=torch.float64),
        h_n=torch.empty(directions, batch, hidden, dtype=torch.float64),
        c_n=torch.empty(directions, batch, hidden, dtype=torch.float64),
        gates=torch.empty(steps, batch, directions, 4 * hidden, dtype=torch.float64),
        cells=torch.empty(steps, batch, directions, hidden, dtype=torch.float64),
        tf32=False,
        resets=torch.rand(directions, steps, batch) < 0.3 if resets else None,
    )
    state = {"c0", "c_n", "cells"}
    fields = {field.name: getattr(wide, field.name) for field in dataclasses.fields(wide)}
    small = {
        name: value.to(torch.float32 if name in state else dtype)
        for name, value in fields.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    narrow = dataclasses.replace(wide, **small)
    expected, found = _forward(wide, recurrence.loop_forward), _forward(narrow, fused.forward)
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32, dtype, torch.float32]
    # Gates and cells past a length may be anything finite.
    inside = torch.ones(steps, batch, dtype=torch.bool)
    if masked:
        inside = torch.arange(steps)[:, None] < wide.lengths
    once = torch.finfo(dtype).eps
    for name, one, other in zip(("output", "h_n", "c_n", "gates", "cells"), found, expected, strict=True):
        assert one.isfinite().all()
        close = {"rtol": 1e-5, "atol": 1e-5} if name in state else {"rtol": once, "atol": 1e-5}
        here, there = (one[inside], other[inside]) if name in {"gates", "cells"} else (one, other)
        torch.testing.assert_close(here.double(), there, **close)

    gates, cells = found[3], found[4]
    grads = [torch.randn(value.shape).to(value.dtype) for value in found[:3]]
    passes = []
    for run, kind, cell in ((fused.backward, dtype, torch.float32), (recurrence.loop_backward, *[torch.float64] * 2)):
        outputs = [torch.full(shape, torch.nan, dtype=kind) for shape in (gates.shape, wide.h0.shape)]
        grad_c0 = torch.full(wide.c0.shape, torch.nan, dtype=cell)
        run(
            recurrence.Backward(
                weight_hh=narrow.weight_hh.to(kind),
                c0=narrow.c0.to(cell),
                lengths=wide.lengths,
                gates=gates.to(kind),
                cells=cells.to(cell),
                grad_output=grads[0].to(kind),
                grad_h_n=grads[1].to(kind),
                grad_c_n=grads[2].to(cell),
                grad_gates=outputs[0],
                grad_h0=outputs[1],
                grad_c0=grad_c0,
                tf32=False,
                resets=wide.resets,
            )
        )
        passes.append((*outputs, grad_c0))
    for one, other in zip(*passes, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=once, atol=1e-4)


@TYPES
def test_a_compiled_call_under_autocast_takes_it(dtype, monkeypatch):
    """Not the loop, which takes a hundred operations of torch a step; and nothing that is asked for by name."""
    lstm = LSTM(3, 5, batch_first=True)
    problem = dispatch.problem_on(torch.device("cpu"), dtype, 2, 4, 5, 1, True, False, False)
    choice = dispatch.choose(problem, compiling=True)
    assert choice.implementation == "cpu-fused"
    assert choice.reason.endswith("computed in float32, on operands converted to it")
    with pytest.raises(ValueError, match="computes in float32"):
        dispatch.choose(problem, "cpu-fused", compiling=True)
    calls = []
    for name in ("forward", "backward"):
        run = getattr(fused, name)
        called = lambda *args, name=name, run=run, **more: (calls.append(name), run(*args, **more))  # noqa: E731
        monkeypatch.setattr(fused, name, called)
    torch._dynamo.reset()
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype):
        output, _ = compiled(torch.randn(2, 4, 3))
    output.float().sum().backward()
    assert {"forward", "backward"} <= set(calls)
    assert output.dtype == dtype
    torch._dynamo.reset()


@pytest.fixture
def no_small_types(monkeypatch):
    """A processor without products of bf16, and oneDNN without LSTMs of small types."""
    monkeypatch.setattr(torch_lstm, "onednn_refusal", lambda *_, **__: "oneDNN has none here")
    monkeypatch.setattr(fused, "storage_hindrance", lambda storage: "no products of bf16" if storage else None)
    dispatch.forget()
    yield
    monkeypatch.undo()
    dispatch.forget()


@TYPES
@pytest.mark.usefixtures("no_small_types")
@pytest.mark.parametrize("training", [False, True])
def test_auto_takes_it_where_torch_s_own_would_raise(dtype, training):
    """Under autocast torch calls oneDNN, also where that has no LSTM of the type: a call would end in its error."""
    torch.manual_seed(1)
    packing.forget()
    lstm = LSTM(3, 20, num_layers=2, bidirectional=True, batch_first=True)
    truth = copy.deepcopy(lstm).double()
    truth.implementation = "loop"
    x = torch.randn(4, 6, 3)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype):
        output, (h_n, c_n) = lstm(x)
        explained = lstm.explain(4, 6, training=training)
    expected, _ = truth(x.double())
    assert {output.dtype, h_n.dtype, c_n.dtype} == {dtype}
    assert {choice.implementation for choice in lstm.choices} == {"cpu-fused"}
    assert lstm.choices[0].reason == explained.reason
    assert lstm.choices[0].refused["vendor"] == "oneDNN has none here"
    why = "for autocast to bfloat16 no products of bf16" if dtype == torch.bfloat16 else "computes in float32"
    assert why in lstm.choices[0].refused["cpu-fused"]
    assert explained.reason.endswith("computed in float32, on operands converted to it")
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
    if training:
        found = torch.autograd.grad(output.float().sum(), list(lstm.parameters()))
        right = torch.autograd.grad(expected.sum(), list(truth.parameters()))
        for one, other in zip(found, right, strict=True):
            assert (one - other).norm() < 16 * torch.finfo(dtype).eps * other.norm()
    # The converted weights are gone, and nothing that was packed of them is kept.
    assert not packing._entries


@TYPES
@pytest.mark.usefixtures("no_small_types")
@pytest.mark.parametrize("lengths", [[6, 2, 0, 5], None])
def test_calls_that_go_past_onednn_stay_torch_s_own(dtype, lengths):
    """Packed and empty batches run there, and their results stay as they are."""
    lstm = LSTM(3, 5, batch_first=True)
    x = torch.randn(4 if lengths else 0, 6, 3)
    with torch.autocast("cpu", dtype):
        lstm(x, lengths=None if lengths is None else torch.tensor(lengths))
    assert {choice.implementation for choice in lstm.choices} == {"vendor"}


def test_the_question_to_onednn_is_the_process_s_own():
    """It is asked in the middle of a user's call, whose hooks, modes and random numbers it has nothing to do with."""

    def refused(value: Tensor) -> Tensor:
        msg = f"saved {value.shape}"
        raise RuntimeError(msg)

    torch_lstm.onednn_refusal.cache_clear()
    before = torch.get_rng_state()
    with (
        warnings.catch_warnings(),
        torch.autograd.graph.saved_tensors_hooks(refused, refused),
        torch.device("meta"),
        torch.no_grad(),
    ):
        warnings.simplefilter("error")
        assert torch_lstm.onednn_refusal(torch.float32, training=True) is None
    assert torch.equal(torch.get_rng_state(), before)
    torch_lstm.onednn_refusal.cache_clear()


@TYPES
def test_the_first_call_may_be_checkpointed(dtype):
    """What is asked once is not among what the first of two equal calls saves."""
    torch_lstm.onednn_refusal.cache_clear()
    dispatch.forget()
    lstm, x = LSTM(3, 4, batch_first=True), torch.randn(2, 5, 3, requires_grad=True)
    with torch.autocast("cpu", dtype):
        output = checkpoint(lambda value: lstm(value)[0], x, use_reentrant=False)
    output.float().sum().backward()
    assert x.grad.isfinite().all()


def test_a_module_of_a_smaller_type_stays_torch_s_own():
    """Without autocast torch computes these itself, so nothing is converted."""
    lstm = LSTM(3, 5).bfloat16()
    lstm(torch.randn(2, 4, 3).bfloat16())
    assert {choice.implementation for choice in lstm.choices} == {"vendor"}
