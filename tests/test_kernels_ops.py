"""The recurrence's operators as torch sees them: schemas, fake tensors, autograd, autocast, and the way past them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import LSTM, ops
from kernels.common.recurrence import LayerOptions
from kernels.reference import LoopLSTM

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from recurrences import Sizes, recurrences
from strategies import Shape, shapes

FORWARD = torch.ops.kernels.lstm_forward
BACKWARD = torch.ops.kernels.lstm_backward
#: Odd sizes, both directions, with lengths and without, in either order in memory, with a state and without.
SIZES = [
    Sizes(batch=3, steps=4, hidden=5, dtype=torch.float64),
    Sizes(batch=1, steps=1, hidden=1, state=False),
    Sizes(batch=2, steps=3, hidden=4, directions=2, lengths=(3, 1), batch_first=True, dtype=torch.float64),
    Sizes(batch=2, steps=3, hidden=4, directions=2, lengths=(0, 2), state=False),
    Sizes(batch=3, steps=4, hidden=2, directions=2, lengths=(0, 4, 2), dtype=torch.float64, resets=True),
    Sizes(batch=4, steps=2, hidden=3, directions=2, batch_first=True, dtype=torch.float16),
]


def arguments(sizes: Sizes, *, save: bool) -> list[Any]:
    """Arguments of `lstm_forward`; finite past the lengths, where the product with weights must be too."""
    args = sizes.forward()
    gates_input = args.gates_input.nan_to_num()
    # As it lies in memory: batch first, where the sizes say so.
    gates_input = gates_input.transpose(0, 1) if sizes.batch_first else gates_input
    return [
        gates_input,
        args.weight_hh,
        args.h0,
        args.c0,
        args.lengths,
        sizes.batch_first,
        save,
        "loop",
        False,
        args.resets,
    ]


def differentiable(values: list[Any]) -> list[Any]:
    """The same, with floating-point tensors that take gradients."""
    return [v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]


@pytest.mark.parametrize("sizes", SIZES)
def test_forward_passes_opcheck(sizes):
    """Schema, autograd registration, fake tensors and tracing with dynamic shapes are as torch wants them."""
    torch.library.opcheck(FORWARD, arguments(sizes, save=False))
    torch.library.opcheck(FORWARD, arguments(sizes, save=True))
    if sizes.dtype == torch.float64:
        torch.library.opcheck(FORWARD, differentiable(arguments(sizes, save=True)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
def test_backward_passes_opcheck(sizes, final):
    """The same of the backward operator, with and without gradients of the final state."""
    values = arguments(sizes, save=True)
    output, h_n, c_n, gates, cells = FORWARD(*values)
    found = [torch.randn_like(value) if value is output or final else None for value in (output, h_n, c_n)]
    torch.library.opcheck(
        BACKWARD, (*found, values[1], values[3], values[4], gates, cells, sizes.batch_first, "loop", False, values[-1])
    )


@given(
    sizes=recurrences(
        hidden=st.integers(1, 5), resets=st.booleans(), dtypes=(torch.float32, torch.float16, torch.float64)
    )
)
def test_fakes_are_like_the_real(sizes):
    """Shapes, types and memory order of results are known before anything is computed."""
    for save in (True, False):
        values = arguments(sizes, save=save)
        real = FORWARD(*values)
        with FakeTensorMode() as mode:
            fake = FORWARD(*(mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values))
        for one, other in zip(real, fake, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def weighted(results: Any) -> Tensor:
    """A number that depends on every element of the first three results, on each in another way."""
    return sum((v * torch.linspace(-1, 2, v.numel(), dtype=v.dtype).view(v.shape)).sum() for v in results[:3])


@given(sizes=recurrences(hidden=st.integers(1, 5), resets=st.booleans(), dtypes=(torch.float32, torch.float64)))
def test_direct_way_equals_the_operator(sizes):
    """Past the dispatcher, results and gradients are bit for bit those of the operator."""
    found = []
    for way in ("operator", "direct"):
        values = differentiable(arguments(sizes, save=True))
        if way == "operator":
            results = FORWARD(*values)[:3]
        else:
            *tensors, batch_first, _, implementation, tf32, resets = values
            options = LayerOptions(sizes.hidden, sizes.directions, batch_first, implementation, sizes.dtype, tf32)
            results = ops.recurrence(*tensors, resets, options)
        takes = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
        found.append([*results, *torch.autograd.grad(weighted(results), takes)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


class Seen(TorchDispatchMode):
    """Notes which of our operators pass the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == ops.NAMESPACE:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Loud(Tensor):
    """A subclass of Tensor that wants to be asked."""


def test_who_listens_sees_the_operator(monkeypatch):
    """A dispatch mode or a subclass of Tensor sees the operator; eager code goes past it, under autocast too."""
    called = []
    real = ops.lstm_forward
    monkeypatch.setattr(ops, "lstm_forward", lambda *args: called.append(1) or real(*args))
    lstm, x = LSTM(3, 4, implementation="loop"), torch.randn(2, 2, 3)

    def calls(function) -> bool:
        called.clear()
        function()
        return bool(called)

    assert not calls(lambda: lstm(x))
    with torch.no_grad():
        assert not calls(lambda: lstm(x))
    with torch.inference_mode():
        assert not calls(lambda: lstm(x))
    assert calls(lambda: lstm(x.as_subclass(Loud)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not calls(lambda: lstm(x))
        assert calls(lambda: lstm(x.as_subclass(Loud)))
    with torch.device("cpu"):
        assert calls(lambda: lstm(x))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert calls(lambda: lstm(x))
    with Seen() as seen:
        lstm(x)[0].sum().backward()
    assert seen.names == ["lstm_forward", "lstm_backward"]


@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sizes.dtype == torch.float64])
def test_make_fx_traces_both_operators(sizes):
    """A traced training step holds both operators and computes the same gradients."""
    values = arguments(sizes, save=True)
    present = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]

    def gradients(*tensors):
        takes = [tensor.detach().requires_grad_() for tensor in tensors]
        rest = iter(takes)
        filled = [next(rest) if isinstance(v, Tensor) and v.is_floating_point() else v for v in values]
        return torch.autograd.grad(weighted(FORWARD(*filled)), takes)

    traced = make_fx(gradients)(*present)
    names = {str(node.target) for node in traced.graph.nodes}
    assert {"kernels.lstm_forward.default", "kernels.lstm_backward.default"} <= names
    other = [v + 1 for v in present]
    torch.testing.assert_close(traced(*other), gradients(*other), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_casts_all_but_the_cell_state(dtype, training):
    """Gates, weights and h come in autocast's type, the cell state in float32, gradients in the parameters' type."""
    values = arguments(Sizes(batch=2, steps=3, hidden=4, directions=2), save=training)
    values = differentiable(values) if training else values
    with torch.autocast("cpu", dtype):
        output, h_n, c_n, gates, cells = FORWARD(*values)
    assert {output.dtype, h_n.dtype, gates.dtype} == {dtype}
    assert {c_n.dtype, cells.dtype} == {torch.float32}
    low = [v.detach().to(dtype) for v in values[:3]]
    expected = FORWARD(*low, *values[3:])
    assert all(torch.equal(one, other) for one, other in zip((output, h_n, c_n), expected, strict=False))
    if training:
        weighted((output, h_n, c_n)).backward()
        assert all(v.grad.dtype == torch.float32 for v in values[:4])
        assert all(v.grad.any() for v in values[:4])


def test_autocast_leaves_float64_alone():
    """As in the rest of torch, autocast does not touch float64."""
    values = arguments(SIZES[0], save=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = FORWARD(*values)
    assert all(torch.equal(one, other) for one, other in zip(found, FORWARD(*values), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(shape=shapes(), stateful=st.booleans())
def test_module_under_autocast(dtype, shape, stateful):
    """Under autocast the module is within the type's rounding of float64, in autocast's type; gradients are float32."""
    lstm = LSTM(**shape.options, implementation="loop")
    truth = LoopLSTM(**shape.options).double()
    truth.load_state_dict(lstm.state_dict())
    x, hx = shape.tensors(torch.float32)
    with torch.autocast("cpu", dtype):
        output, state = lstm(x, hx if stateful else None)
    expected, expected_state = truth(x.double(), tuple(v.double() for v in hx) if stateful else None)
    assert {output.dtype, state[0].dtype, state[1].dtype} == {dtype}
    for value, true in zip((output, *state), (expected, *expected_state), strict=True):
        torch.testing.assert_close(value.double(), true, rtol=0, atol=16 * torch.finfo(dtype).eps)
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in lstm.parameters())


def test_autocast_agrees_with_nn_lstm():
    """In bf16 under autocast, ours and torch.nn.LSTM's oneDNN path return one type and nearly one value."""
    shape = Shape(batch=3, steps=5, input_size=6, hidden_size=8, num_layers=2, bidirectional=True, seed=0)
    theirs, ours = nn.LSTM(**shape.options), LSTM(**shape.options, implementation="loop")
    ours.load_state_dict(theirs.state_dict())
    x, hx = shape.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        try:
            expected, expected_state = theirs(x, hx)
        except RuntimeError as error:
            if "primitive" not in str(error):
                raise
            pytest.skip("oneDNN has no bfloat16 LSTM on this CPU")
        output, state = ours(x, hx)
    for value, other in zip((output, *state), (expected, *expected_state), strict=True):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=0, atol=16 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("index", "wrong", "text"),
    [
        (1, torch.zeros(1, 21, 5, dtype=torch.float64), "weight_hh is .* expected .1, 20, 5."),
        (1, torch.zeros(100, dtype=torch.float64), "weight_hh is .*, expected .directions, 4"),
        (1, torch.zeros(1, 20, 5), "weight_hh is .* expected .* of torch.float64"),
        (2, torch.zeros(1, 2, 5, dtype=torch.float64), r"h0 is \(1, 2, 5\)"),
        (3, torch.zeros(1, 3, 5), "c0 is .* of torch.float32 on cpu, expected .* of torch.float64"),
        (4, torch.zeros(3, dtype=torch.int64), "lengths is .* expected .* of torch.int32"),
        (0, torch.zeros(0, 3, 1, 20, dtype=torch.float64), "expected at least one step"),
    ],
)
def test_wrong_tensors_are_refused(index, wrong, text):
    """A kernel trusts shapes and types, so the operator refuses wrong ones, and says what was expected."""
    values = arguments(SIZES[0], save=False)
    values[index] = wrong
    with pytest.raises((ValueError, RuntimeError), match=text):
        FORWARD(*values)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 6, 7])  # all but the lengths, which there are none of
def test_wrong_tensors_are_refused_by_the_backward_pass(index):
    """So does the operator of the gradients."""
    sizes = SIZES[0]
    values = arguments(sizes, save=True)
    output, h_n, c_n, *kept = FORWARD(*values)
    given = [output, h_n, c_n, values[1], values[3], values[4], *kept]
    given[index] = given[index].bfloat16()
    with pytest.raises(ValueError, match=r"is .* on cpu, expected"):
        BACKWARD(*given, sizes.batch_first, "loop", False)


@pytest.mark.parametrize("implementation", ["loop", "auto"])
def test_vmap_over_lengths(implementation):
    """Lengths may be batched with the input."""
    lstm, x = LSTM(3, 4, implementation=implementation), torch.randn(3, 5, 2, 3)
    lengths = torch.tensor([[5, 1], [0, 4], [2, 2]])
    found = torch.vmap(lambda value, own: lstm(value, None, own)[0])(x, lengths)
    expected = [lstm(value, None, own)[0] for value, own in zip(x, lengths, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected))


def test_gradients_of_lengths_beyond_the_steps():
    """Lengths that nobody checked, being on a GPU, count as all steps where they are more, for gradients too."""
    found = []
    for lengths in ((9, 1), (3, 1)):
        values = differentiable(arguments(SIZES[2], save=True))
        values[4] = torch.tensor(lengths, dtype=torch.int32)
        FORWARD(*values)[0].sum().backward()
        found.append([value.grad for value in values[:4]])
    assert all(map(torch.equal, *found))


def test_backward_needs_what_forward_saved():
    """Without save=True there is nothing to go back on, which is said."""
    values = differentiable(arguments(SIZES[0], save=False))
    with pytest.raises(RuntimeError, match="pass save=True"):
        FORWARD(*values)[0].sum().backward()


def loss_of(lstm: nn.Module):
    """A loss of the module's weights and one sequence."""

    def loss(weights, x):
        output, (hidden, cell) = torch.func.functional_call(lstm, weights, (x,))
        return output.square().sum() + hidden.sum() + cell.square().sum()

    return loss


@pytest.mark.parametrize("implementation", ["loop", "auto"])
def test_vmap_equals_a_loop(implementation):
    """No kernel has a batched form, so each slice is a call, and gives what a loop computes."""
    lstm, x = LSTM(3, 4, bidirectional=True, implementation=implementation), torch.randn(5, 2, 2, 3)
    with torch.no_grad():
        found = torch.vmap(lambda value: lstm(value)[0])(x)
        torch.testing.assert_close(found, torch.stack([lstm(value)[0] for value in x]))


def test_vmap_over_nothing_is_refused():
    """Without a slice there is no result whose shape could be taken."""
    lstm = LSTM(3, 4, implementation="loop")
    with torch.no_grad(), pytest.raises(ValueError, match="vmap over zero elements"):
        torch.vmap(lambda value: lstm(value)[0])(torch.randn(0, 2, 2, 3))


@pytest.mark.parametrize("implementation", ["loop", "auto"])
def test_func_grad_equals_autograd(implementation):
    """torch.func.grad of weights, and one gradient a sample by vmap over it, are those of autograd."""
    lstm, x = LSTM(3, 4, num_layers=2, bidirectional=True, implementation=implementation), torch.randn(5, 4, 2, 3)
    weights, loss = dict(lstm.named_parameters()), loss_of(lstm)
    expected = [torch.autograd.grad(loss(weights, value), list(weights.values())) for value in x]
    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for index, gradients in enumerate(expected):
        one = torch.func.grad(loss)(weights, x[index])
        for name, gradient in zip(weights, gradients, strict=True):
            torch.testing.assert_close(one[name], gradient)
            torch.testing.assert_close(each[name][index], gradient)


def test_jacobians_equal_each_other():
    """torch.func.jacrev and the two ways of torch.autograd.functional.jacobian give one Jacobian."""
    lstm, x = LSTM(3, 4, implementation="loop", dtype=torch.float64), torch.randn(2, 1, 3, dtype=torch.float64)

    def output(value):
        return lstm(value)[0]

    expected = torch.autograd.functional.jacobian(output, x)
    torch.testing.assert_close(torch.func.jacrev(output)(x), expected)
    torch.testing.assert_close(torch.autograd.functional.jacobian(output, x, vectorize=True), expected)


def test_func_grad_under_autocast_is_close():
    """Autocast casts what torch.func sees as it casts what the operator is given."""
    lstm, x = LSTM(3, 4, implementation="loop"), torch.randn(4, 2, 3)
    weights, loss = dict(lstm.named_parameters()), loss_of(lstm)
    expected = torch.func.grad(loss)(weights, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.func.grad(loss)(weights, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0.05, atol=0.05)


def test_transforms_refuse_gradients_of_gradients():
    """A Hessian by torch.func says that there is no double backward."""
    lstm, x = LSTM(3, 4, implementation="loop"), torch.randn(2, 1, 3)
    with pytest.raises(NotImplementedError, match="no double backward"):
        torch.func.jacrev(torch.func.grad(lambda value: lstm(value)[0].square().sum()))(x)


def test_empty_batch_runs_no_kernel():
    """A batch of no sequences asks no kernel: even one that does not exist would do."""
    sizes = dataclasses.replace(SIZES[0], batch=0)
    values = differentiable(arguments(sizes, save=True))
    values[7] = "no such kernel"
    output, h_n, c_n, *_ = FORWARD(*values)
    weighted((output, h_n, c_n)).backward()
    assert not values[1].grad.any()
