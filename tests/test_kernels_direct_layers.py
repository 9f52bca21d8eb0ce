"""Layers past the dispatcher: what a GPU would run, on a CPU with a stand-in for kernels and for CUDA's graphs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import Shape, shapes

from kernels import LSTM, dispatch, graphed_layers
from kernels.common.recurrence import Backward, Forward, loop_backward, loop_forward
from kernels.gpu.graph_cache import SIGHTINGS, Graphs
from kernels.gpu.product_settings import product_settings

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def weighted(results: Sequence[torch.Tensor]) -> torch.Tensor:
    """A number that depends on every element, on each in another way."""
    return sum(
        ((v.double() * torch.linspace(-1, 2, v.numel(), dtype=torch.float64).view(v.shape)).sum() for v in results),
        torch.zeros((), dtype=torch.float64),
    )


@given(shape=shapes(), stateful=st.booleans(), bias=st.booleans())
@example(shape=Shape(3, 4, 2, 5, 2, bidirectional=True, seed=0), stateful=True, bias=True)
@settings(max_examples=20)
def test_a_layer_is_torchs(shape, stateful, bias):
    """Results and the gradient of every parameter, of the input and of the state, in float64."""
    theirs = nn.LSTM(**shape.options, bias=bias).double()
    ours = LSTM(**shape.options, bias=bias, implementation="loop").double()
    ours.load_state_dict(theirs.state_dict())
    found = []
    for lstm in (ours, theirs):
        x, hx = shape.tensors()
        inputs = (x, *hx) if stateful else (x,)
        for value in inputs:
            value.requires_grad_()
        output, state = lstm(x, hx if stateful else None)
        results = (output, *state)
        found.append([*results, *torch.autograd.grad(weighted(results), [*lstm.parameters(), *inputs])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_autocast_casts_as_the_operator_does(bidirectional):
    """Under autocast results are in its type, gradients in that of their tensors, and equal to the operator's."""
    lstm = LSTM(3, 4, 2, bidirectional=bidirectional, implementation="loop")
    found = []
    for way in (torch.Tensor, Loud):
        x = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1)).as_subclass(way).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output, state = lstm(x)
        assert output.dtype == torch.bfloat16
        gradients = torch.autograd.grad(weighted([output, *state]), [x, *lstm.parameters()])
        assert {value.dtype for value in gradients} == {torch.float32}
        found.append([output, *state, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one.as_subclass(torch.Tensor).float(), other.as_subclass(torch.Tensor).float(), rtol=0.05, atol=0.05
        )


class Loud(torch.Tensor):
    """A subclass of Tensor, which sees the operators."""


class _Stand:
    """CUDA's graphs on a CPU: a capture notes the launches, and a replay does them on the same memory."""

    def __init__(self) -> None:
        self.inside = False

    def busy(self) -> str | None:
        return "capturing" if self.inside else None

    def obstacle(self, tensors: Sequence[Any]) -> str | None:
        del tensors

    def place(self) -> str:
        return "here"

    def lane(self, others: Sequence[Any]) -> object:
        del others
        return object()

    def capture(self, launch: Callable[[], None], lane: object) -> Callable[[], None]:
        del lane
        return launch

    def wait(self) -> None:
        pass


class _Graphs(Graphs):
    """Graphs that look at what is allocated for a call as at all else."""

    def run(self, launch, key, tensors, known=()) -> int:
        return super().run(launch, key, [*tensors, *known])


@pytest.fixture
def graphs(monkeypatch) -> Iterator[Graphs]:
    """Graphs on the stand-in, and `cell` as the plain loop, offered on a CPU."""
    held = _Graphs(_Stand())
    module = SimpleNamespace(
        refuses=lambda *_, **__: None,
        configs=lambda *_, **__: [None],
        forward=lambda args, _: loop_forward(args),
        backward=lambda args, _: loop_backward(args),
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_module", lambda _: module)
    defaults = (held,)
    monkeypatch.setattr(graphed_layers.GraphedLayers.__init__, "__defaults__", defaults)
    # Memory on a CPU comes back in another order: found again by shape alone.
    monkeypatch.setattr("kernels.gpu.graph_cache._address", lambda value: None if value is None else value.shape)
    dispatch.forget()
    yield held
    dispatch.forget()


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inference_is_one_graph(graphs, stateful, batch_first):
    """From the third call on a whole forward pass is one replay, whose results are those of torch's own LSTM."""
    shape = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    theirs, ours = nn.LSTM(3, 4, **shape), LSTM(3, 4, **shape, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    batch = 5 if batch_first else 2
    x = torch.randn(5, 2, 3)
    hx = (torch.randn(4, batch, 4), torch.randn(4, batch, 4)) if stateful else None
    with torch.no_grad():
        for number in range(SIGHTINGS + 3):
            (output, state), (right, right_state) = ours(x, hx), theirs(x, hx)
            assert graphs.state().replayed == max(0, number + 1 - SIGHTINGS)
            if number <= SIGHTINGS:
                torch.testing.assert_close((output, *state), (right, *right_state))
    assert graphs.state().captured == 1
    assert [choice.implementation for choice in ours.choices] == ["cell", "cell"]


@pytest.fixture
def choices(monkeypatch) -> list[str]:
    """Calls of a module in which it was settled anew what runs."""
    made, choose = [], LSTM._choose

    def spy(self, *arguments: Any, **options: Any) -> str:
        made.append(choose(self, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(LSTM, "_choose", spy)
    return made


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_later_training_step_settles_nothing_anew(choices, stateful, batch_first):
    """Results and gradients of each step are torch's, with weights that an optimizer changes in between."""
    shape = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    theirs, ours = nn.LSTM(3, 4, **shape), LSTM(3, 4, **shape, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    steps = [torch.optim.SGD(lstm.parameters(), lr=0.1) for lstm in (theirs, ours)]
    for _ in range(3):
        x, batch, found = torch.randn(5, 2, 3), 5 if batch_first else 2, []
        hx = (torch.randn(4, batch, 4), torch.randn(4, batch, 4)) if stateful else None
        for lstm, optimizer in zip((theirs, ours), steps, strict=True):
            inputs = [value.clone().requires_grad_() for value in (x, *(hx or ()))]
            output, state = lstm(inputs[0], tuple(inputs[1:]) or None)
            lstm.zero_grad()
            weighted([output, *state]).backward()
            found.append([output, *state, *(value.grad for value in (*inputs, *lstm.parameters()))])
            optimizer.step()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert choices == ["cell"]
    assert [choice.implementation for choice in ours.choices] == ["cell", "cell"]


@pytest.mark.usefixtures("graphs")
def test_what_was_settled_holds_for_parameters_that_learn_alike(choices):
    """A parameter that is frozen or thawed changes what the kernels must keep."""
    lstm, x = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3)
    for _ in range(2):
        lstm(x)
    assert len(choices) == 1
    lstm.requires_grad_(False)
    assert not lstm(x)[0].requires_grad
    assert lstm(x.clone().requires_grad_())[0].requires_grad
    lstm.weight_hh_l0.requires_grad_()
    lstm(x)[0].sum().backward()
    assert lstm.weight_hh_l0.grad is not None
    assert lstm.weight_ih_l0.grad is None


@pytest.mark.usefixtures("graphs")
def test_the_history_of_a_parametrized_weight_is_not_kept():
    """A weight that is computed at each call has a history of its own, which ends with the call."""
    lstm = nn.utils.parametrizations.weight_norm(LSTM(3, 4, implementation="cell"), "weight_hh_l0")
    for _ in range(2):
        lstm(torch.randn(5, 2, 3))[0].sum().backward()
    assert "_kept" not in lstm.__dict__


def test_a_step_runs_beside_a_graph(graphs):
    """A step has no graph: after a forward pass that has one it goes through forward, and updates the state."""
    theirs, ours, x = nn.LSTM(3, 4), LSTM(3, 4, implementation="cell"), torch.randn(1, 2, 3)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        ours(x)
        state = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
        expected, final = theirs(x, tuple(value.clone() for value in state))
        torch.testing.assert_close(ours.step(x[0], state), expected[0])
    torch.testing.assert_close(state, final)
    assert isinstance(ours.__dict__["_kept"], graphed_layers.GraphedLayers)
    assert graphs.state().captured == 0


def _launched(graphs: Graphs) -> int:
    state = graphs.state()
    return state.replayed + sum(state.plain.values())


@pytest.mark.parametrize("change", ["gradients", "autocast", "weights", "option", "shape", "table"])
def test_what_changes_the_launches_is_not_replayed(graphs, change):
    """Gradients, autocast, other weights' memory, options, shapes and tables: each is looked at before a graph is."""
    lstm, x = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3)
    with torch.no_grad():
        for _ in range(SIGHTINGS + 1):
            lstm(x)
    before, count = graphs.state(), _launched(graphs)
    if change == "weights":
        lstm.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4))
    if change == "option":
        lstm.implementation = "loop"
    if change == "table":
        # Another configuration may have been measured to be the fastest.
        dispatch.forget()
    with torch.set_grad_enabled(change == "gradients"), torch.autocast("cpu", enabled=change == "autocast"):
        output, _ = lstm(torch.randn(6, 2, 3) if change == "shape" else x)
    assert graphs.state().replayed == before.replayed
    assert (_launched(graphs) > count) == (change != "option")
    assert output.requires_grad == (change == "gradients")


#: Attributes of torch.backends.cuda.matmul that decide products of a type, each with two values.
SETTINGS = [
    (torch.float32, "fp32_precision", "ieee", "tf32"),
    (torch.float16, "allow_fp16_reduced_precision_reduction", True, False),
    (torch.float16, "allow_fp16_reduced_precision_reduction", False, (False, False)),
    (torch.float16, "allow_fp16_accumulation", False, True),
    (torch.bfloat16, "allow_bf16_reduced_precision_reduction", True, False),
    (torch.bfloat16, "allow_bf16_reduced_precision_reduction", False, (False, False)),
]


@pytest.mark.parametrize(("dtype", "name", "value", "other"), SETTINGS)
def test_every_setting_of_torch_s_products_is_in_the_key(dtype, name, value, other):
    """A product that torch would compute otherwise from now on is not replayed; set back, the key is as before."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, name)
    keys = []
    try:
        for one in (value, other, value):
            setattr(matmul, name, one)
            keys.append(product_settings(dtype))
    finally:
        setattr(matmul, name, before)
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_weights_changed_in_place_are_read(graphs):
    """A graph holds addresses: what an optimizer or load_state_dict writes there counts at the next replay."""
    theirs, ours, x = nn.LSTM(3, 4), LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3)
    with torch.no_grad():
        for _ in range(SIGHTINGS):
            ours(x)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    assert graphs.state().replayed == 1


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("saves", [False, True])
def test_kernels_are_given_all_they_read(monkeypatch, saves):
    """Tensors of a recurrence: contiguous last dimensions, time first, gates kept only where a gradient will follow."""
    seen: list[Forward | Backward] = []
    module: Any = dispatch._module("cell")
    monkeypatch.setattr(module, "forward", lambda args, _: seen.append(args) or loop_forward(args))
    lstm = LSTM(3, 4, batch_first=True, implementation="cell")
    with torch.set_grad_enabled(saves):
        lstm(torch.randn(2, 5, 3))
    (args,) = seen
    assert args.gates_input.shape == (5, 2, 1, 16)
    assert (args.gates is not None) == saves
    assert args.problem.saves == saves


def test_orders_in_memory_are_not_mixed(graphs):
    """A packed batch runs with its steps first, whatever the module's order: the same shape is another call."""
    lstm = LSTM(3, 4, batch_first=True, implementation="cell")
    plain = nn.LSTM(3, 4, batch_first=True)
    plain.load_state_dict(lstm.state_dict())
    x = torch.randn(4, 4, 3)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4] * 4), batch_first=True)
    with torch.no_grad():
        lstm(packed)
        torch.testing.assert_close(lstm(x)[0], plain(x)[0])
    assert graphs.state().captured == 0


def test_a_replay_takes_little_of_the_host(graphs):
    """A replayed forward pass makes few calls, which are what its time is made of, and more layers add few."""
    counts = []
    for layers in (1, 4):
        lstm, x = LSTM(3, 4, layers, implementation="cell"), torch.randn(5, 2, 3)
        with torch.no_grad():
            for _ in range(SIGHTINGS + 1):
                lstm(x)
            # What the stand-in replays is the work itself, which a GPU does.
            for held in graphs._graphs.values():
                held.replay = lambda: None
            made = []
            sys.setprofile(lambda _, event, __, made=made: made.append(event))
            try:
                lstm(x)
            finally:
                sys.setprofile(None)
        counts.append(len(made))
    # Calls and returns, of Python and of C; 117 and 165 with torch 2.13.
    assert counts[0] < 150
    assert counts[1] < counts[0] + 70
