"""`resets` of `kernels.LSTM`: a sequence that begins anew is what each of its parts is alone."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import interpreted
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from kernels import LSTM
from kernels.common import recurrence

IMPLEMENTATIONS = ("cpu-fused", "loop", "cell")
TYPES = {"cpu-fused": torch.float32, "loop": torch.float64, "cell": torch.float32}
State = tuple[Tensor, Tensor]


def _skip_without_interpreter(implementation: str) -> None:
    if implementation == "cell" and not interpreted():
        pytest.skip("on a CPU Triton's kernels run in its interpreter alone, TRITON_INTERPRET=1")


def _normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _parts(resets: Tensor, steps: int) -> list[tuple[int, int]]:
    """First and last steps of the parts of one sequence; none where it has no steps."""
    begins = sorted({0, *(step for step in range(steps) if resets[step]), steps})
    return list(itertools.pairwise(begins))


def _alone(lstm: Any, x: Tensor, hx: State, lengths: list[int], resets: Tensor) -> tuple[Tensor, State]:
    """Each part of each sequence in a call of its own; batch first. The given state enters where no reset is."""
    directions = 2 if lstm.bidirectional else 1
    outputs, states = [], []
    for row, length in enumerate(lengths):
        given = tuple(value[:, row : row + 1] for value in hx)
        found, last = [x.new_zeros(0, directions * lstm.hidden_size)], [value.clone() for value in given]
        parts = _parts(resets[row], length)
        for start, end in parts:
            first = [torch.zeros_like(value) for value in given]
            for value, own in zip(first, given, strict=True):
                if start == 0 and not resets[row, 0]:
                    value[::directions] = own[::directions]
                if directions == 2 and end == length:
                    value[1::2] = own[1::2]
            output, state = lstm(x[row : row + 1, start:end], tuple(first))
            found.append(output[0])
            for value, own in zip(last, state, strict=True):
                if end == length:
                    value[::directions] = own[::directions]
                if directions == 2 and start == 0:
                    value[1::2] = own[1::2]
        padding = x.new_zeros(x.size(1) - length, directions * lstm.hidden_size)
        outputs.append(torch.cat([*found, padding]))
        states.append(last)
    h, c = (torch.cat(values, 1) for values in zip(*states, strict=True))
    return torch.stack(outputs), (h, c)


@st.composite
def _cases(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, lengths and a mask of a batch that begins anew here and there, also where a sequence has ended."""
    batch, steps = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    mask = st.lists(st.lists(st.booleans(), min_size=steps, max_size=steps), min_size=batch, max_size=batch)
    return {
        "lengths": draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch)),
        "resets": torch.tensor(draw(mask)),
        "hidden": draw(st.sampled_from([1, 5, 17])),
        "layers": draw(st.integers(1, 2)),
        "bidirectional": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def _compared(case: dict[str, Any], implementation: str, *, gradients: bool) -> list[tuple[Tensor, Tensor]]:
    """Results (and gradients) with resets beside those of the parts."""
    torch.manual_seed(case["seed"])
    dtype, directions = TYPES[implementation], 2 if case["bidirectional"] else 1
    options = {"bidirectional": case["bidirectional"], "batch_first": True, "dtype": dtype}
    lstm = LSTM(3, case["hidden"], case["layers"], implementation=implementation, **options)
    batch, steps = case["resets"].shape
    lengths = case["lengths"] or [steps] * batch
    found = []
    for way in ("resets", "parts"):
        x = _normal(batch, steps, 3, dtype=dtype, seed=1).requires_grad_(gradients)
        shape = (case["layers"] * directions, batch, case["hidden"])
        hx = tuple(_normal(*shape, dtype=dtype, seed=seed).requires_grad_(gradients) for seed in (2, 3))
        with torch.set_grad_enabled(gradients):
            if way == "parts":
                output, state = _alone(lstm, x, hx, lengths, case["resets"])
            elif case["batch_first"]:
                output, state = lstm(x, hx, case["lengths"], case["resets"])
            else:
                lstm.batch_first = False
                output, state = lstm(x.transpose(0, 1), hx, case["lengths"], case["resets"].t())
                output, lstm.batch_first = output.transpose(0, 1), True
        values = [output, *state]
        if gradients:
            total = sum((v * _normal(*v.shape, dtype=dtype, seed=7 + i)).sum() for i, v in enumerate(values))
            takes = [x, *hx, *lstm.parameters()]
            # Where every row begins anew, or none has a step, no part touches some of them.
            values += torch.autograd.grad(total, takes, allow_unused=True, materialize_grads=True)
        found.append([value.detach() for value in values])
    return list(zip(*found, strict=True))


def _assert_parts(case: dict[str, Any], implementation: str, *, gradients: bool) -> None:
    tight = TYPES[implementation] == torch.float64
    for value, truth in _compared(case, implementation, gradients=gradients):
        torch.testing.assert_close(value, truth, rtol=1e-9 if tight else 1e-4, atol=1e-11 if tight else 2e-5)


@pytest.mark.parametrize("implementation", ["cpu-fused", "loop"])
@pytest.mark.parametrize("gradients", [False, True])
@settings(max_examples=15)
@given(case=_cases())
def test_each_part_is_what_it_is_alone(implementation, gradients, case):
    """Outputs, states and all gradients are those of one call for each part, in both directions and all layers."""
    _assert_parts(case, implementation, gradients=gradients)


CASE = {
    "lengths": [4, 3], "resets": torch.tensor([[False, True, False, True], [True, False, True, True]]), "hidden": 5,
    "layers": 2, "bidirectional": True, "batch_first": True, "seed": 0,
}  # fmt: skip


def test_each_part_is_what_it_is_alone_by_the_gpu_kernels():
    """The same of one case: `cell` is compared with the loop elsewhere."""
    _skip_without_interpreter("cell")
    _assert_parts(CASE | {"layers": 1}, "cell", gradients=True)


@pytest.mark.parametrize("defect", ["one step late", "both directions alike", "past a length"])
def test_a_misplaced_reset_is_caught(defect, monkeypatch):
    """The comparison with the parts sees a reset at the wrong step, in the wrong direction, or from past a length."""
    right = recurrence.resets_of

    def wrong(resets: Tensor, lengths: Tensor | None, directions: int) -> Tensor:
        if defect == "one step late":
            return right(resets.roll(1, 0), lengths, directions)
        if defect == "both directions alike":
            return right(resets, lengths, 1).expand(directions, -1, -1)
        return right(resets, None, directions)

    monkeypatch.setattr("kernels.layers.resets_of", wrong)
    differences = [(one - other).abs().max() for one, other in _compared(CASE, "cpu-fused", gradients=True)]
    assert max(differences) > 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_passes_a_reset(implementation):
    """NaN before a reset spoils neither the outputs nor the gradients after it, and no gradient goes back past it."""
    _skip_without_interpreter(implementation)
    lstm = LSTM(2, 3, 2, implementation=implementation, dtype=TYPES[implementation])
    x = _normal(4, 1, 2, dtype=TYPES[implementation], seed=0).requires_grad_()
    h, c = (torch.full((2, 1, 3), float("nan"), dtype=x.dtype, requires_grad=True) for _ in range(2))
    output, _ = lstm(x, (h, c), resets=torch.tensor([[True], [False], [True], [False]]))
    *early, weight = torch.autograd.grad(output[2:].sum(), [x, h, c, lstm.weight_hh_l0])
    assert output.isfinite().all()
    assert weight.isfinite().all()
    assert not early[0][:2].any()
    assert early[0][2:].all()
    assert not early[1].any()
    assert not early[2].any()


@pytest.mark.parametrize("implementation", ["cpu-fused", "loop", "vendor", "auto"])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_step_resets_its_rows(implementation, storage):
    """Steps with rows that join equal the whole call with resets, by every implementation, also the copied state."""
    if storage != "fp32" and implementation != "cpu-fused":
        pytest.skip("only cpu-fused stores weights so")
    lstm = LSTM(3, 20, 2, implementation=implementation, weight_storage=storage).requires_grad_(False)
    whole = LSTM(3, 20, 2, implementation="loop", dtype=torch.float64).requires_grad_(False)
    whole.load_state_dict({name: value.double() for name, value in lstm.state_dict().items()})
    x = _normal(6, 9, 3, dtype=torch.float32, seed=0)
    resets = torch.rand(6, 9, generator=torch.Generator().manual_seed(1)) < 0.4
    h, c = (_normal(2, 9, 20, dtype=torch.float32, seed=seed) for seed in (2, 3))
    truth, (h_n, c_n) = whole(x.double(), (h.double(), c.double()), resets=resets)
    with torch.inference_mode():
        outputs = [lstm.step(one, (h, c), anew) for one, anew in zip(x, resets, strict=True)]
    error = 1e-5 if storage == "fp32" else 2e-2
    for value, right in ((torch.stack(outputs), truth), (h, h_n), (c, c_n)):
        torch.testing.assert_close(value.double(), right, rtol=0, atol=error)


def test_a_step_with_resets_is_one_call_of_the_kernel(monkeypatch):
    """Once prepared, a step with resets does not go through forward."""
    lstm = LSTM(3, 4)
    state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    calls = []
    with torch.no_grad():
        lstm.step(torch.ones(2, 3), state)
        monkeypatch.setattr(LSTM, "forward", lambda *_: calls.append(1))
        lstm.step(torch.ones(2, 3), state, torch.tensor([True, False]))
    assert not calls


def test_compiled_code_resets():
    """torch.compile sees the mask as a tensor: one graph, and the results and gradients of eager code."""
    torch._dynamo.reset()
    lstm = LSTM(3, 4, bidirectional=True, implementation="loop")
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3):
        x = _normal(5, batch, 3, dtype=torch.float32, seed=batch)
        resets = torch.rand(5, batch, generator=torch.Generator().manual_seed(batch)) < 0.4
        grads = []
        for run in (lstm, compiled):
            output, _ = run(x, None, None, resets)
            grads.append((output, *torch.autograd.grad(output.square().sum(), list(lstm.parameters()))))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)


def test_an_exported_program_takes_resets():
    """torch.export keeps the mask as an input."""
    lstm = LSTM(3, 4).eval().requires_grad_(False)
    x, resets = _normal(5, 2, 3, dtype=torch.float32, seed=0), torch.zeros(5, 2, dtype=torch.bool)
    program = torch.export.export(lstm, (x,), {"resets": resets})
    resets = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(program.module()(x, resets=resets)[0], lstm(x, resets=resets)[0])


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_hold_resets_refuses_them():
    """A trace and an ONNX file hold torch's own LSTM, which knows none: no file without them is written."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = LSTM(3, 4)

        def forward(self, x: Tensor, resets: Tensor) -> Tensor:
            return self.lstm(x, resets=resets)[0]

    given = torch.zeros(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="has no resets"):
        torch.jit.trace(Wrapped(), given)
    with pytest.raises(RuntimeError, match="has no resets"):
        torch.onnx.export(Wrapped(), given, io.BytesIO(), dynamo=False)


@pytest.mark.parametrize(
    ("options", "call", "error", "text"),
    [
        ({}, {"resets": torch.zeros(5, 2)}, TypeError, "torch.bool"),
        ({}, {"resets": [[True] * 2] * 5}, TypeError, "a list"),
        ({}, {"resets": torch.zeros(2, 5, dtype=torch.bool)}, ValueError, r"expected \(5, 2\)"),
        ({}, {"resets": torch.zeros(5, 2, 1, dtype=torch.bool)}, ValueError, r"squeeze\(-1\)"),
        ({"implementation": "vendor"}, {}, ValueError, "has no resets"),
        ({"proj_size": 2}, {}, ValueError, "no kernel has projections"),
        ({}, {"packed": True}, ValueError, "padded tensor only"),
    ],
)
def test_bad_resets_are_refused(options, call, error, text):
    """Each says what was wrong and what was expected; torch's own LSTM does not run without them in silence."""
    lstm = LSTM(3, 4, **options)
    x = pack_sequence([torch.zeros(5, 3)] * 2) if call.pop("packed", False) else torch.zeros(5, 2, 3)
    with pytest.raises(error, match=text):
        lstm(x, **{"resets": torch.zeros(5, 2, dtype=torch.bool)} | call)


@pytest.mark.parametrize("options", [{"implementation": "vendor"}, {"proj_size": 2}])
def test_compiled_code_refuses_what_has_no_resets(options):
    """Also while a compiler traces, where torch's own LSTM would run without them."""
    torch._dynamo.reset()
    lstm = torch.compile(LSTM(3, 4, **options), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="has no resets"):
        lstm(torch.zeros(5, 2, 3), None, None, torch.zeros(5, 2, dtype=torch.bool))


def test_choices_say_what_served_resets():
    """On a CPU bfloat16 is converted for them and float64 goes to the loop, and the choice says so; `explain` knows."""
    for dtype, served in ((torch.bfloat16, "cpu-fused"), (torch.float64, "loop")):
        lstm = LSTM(3, 4).to(dtype)
        lstm(torch.zeros(5, 2, 3, dtype=dtype), resets=torch.zeros(5, 2, dtype=torch.bool))
        assert lstm.choices[0].implementation == served
        assert "no resets" in lstm.choices[0].refused["vendor"]
        assert lstm.explain(2, 5, resets=True).implementation == served
    assert lstm.explain(2, 5).implementation == "vendor"
    assert LSTM(3, 4).explain(2, 5, resets=True).implementation == "cpu-fused"


def test_one_sequence_takes_a_mask_of_its_steps():
    """Unbatched input has resets of (steps,)."""
    lstm = LSTM(3, 4).requires_grad_(False)
    x, resets = _normal(5, 3, dtype=torch.float32, seed=0), torch.tensor([False, False, True, False, True])
    batched, _ = lstm(x[:, None], resets=resets[:, None])
    assert torch.equal(lstm(x, resets=resets)[0], batched[:, 0])
    assert not torch.equal(lstm(x)[0], batched[:, 0])


def test_checkpointed_code_and_torch_func_reset():
    """Recomputation and torch.func.grad give the gradients of autograd, so both pass the mask on."""
    lstm = LSTM(3, 4)
    x = _normal(5, 2, 3, dtype=torch.float32, seed=0)
    resets = torch.tensor([[False, True], [True, False], [False, False], [True, True], [False, False]])

    def loss(value: Tensor) -> Tensor:
        return lstm(value, resets=resets)[0].square().sum()

    given = x.clone().requires_grad_()
    (truth,) = torch.autograd.grad(loss(given), given)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, given, use_reentrant=False), given)
    torch.testing.assert_close(again, truth)
    torch.testing.assert_close(torch.func.grad(loss)(x), truth)


@pytest.mark.parametrize("implementation", ["cpu-fused", "loop", "vendor"])
@pytest.mark.parametrize("kind", ["int32", "NumPy", "resets", "made in inference mode"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_masks_may_be_changed_before_the_backward_pass(implementation: str, kind: str, batch_first: bool):
    """A caller that fills the same memory for each batch gets the gradients of what the call was given."""
    if kind == "resets" and implementation == "vendor":
        pytest.skip("torch's own LSTM has no resets")
    lstm = LSTM(3, 4, batch_first=batch_first, implementation=implementation)
    x = _normal(4, 4, 3, dtype=torch.float32, seed=0)
    with torch.inference_mode(kind == "made in inference mode"):
        mask = torch.tensor([2, 4, 1, 3], dtype=torch.int32)
    mask = mask[:, None] == mask - 1 if kind == "resets" else mask.numpy() if kind == "NumPy" else mask

    def gradients(changes: bool) -> tuple[Tensor, ...]:
        own = mask.copy() if kind == "NumPy" else mask if "made" in kind else mask.clone()
        output, _ = lstm(x, **{"resets" if kind == "resets" else "lengths": own})
        if changes:
            with torch.inference_mode("made" in kind):
                own[:] = 1
        return torch.autograd.grad(output.square().sum(), list(lstm.parameters()))

    unchanged = gradients(changes=False)
    assert all(map(torch.equal, gradients(changes=True), unchanged))
