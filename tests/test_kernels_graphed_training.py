"""Training of all layers by graphs: what a GPU would replay, on a CPU with stand-ins for kernels, graphs and memory."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import LSTM, dispatch, graphed_layers, graphed_training
from kernels.common.recurrence import loop_backward, loop_forward
from kernels.gpu.graph_cache import SIGHTINGS, Graphs


class Replayed:
    """CUDA's graphs on a CPU: a capture notes the launches with their tensors, and a replay does them there again."""

    def __init__(self) -> None:
        self.nothing = False

    def busy(self) -> None:
        """Return None: it never is."""

    def obstacle(self, tensors: Sequence[Tensor | None]) -> None:
        """Return None: any tensors go."""

    def place(self) -> str:
        """Return the one place there is."""
        return "here"

    def lane(self, others: Sequence[Any]) -> object:
        """Return anything."""
        del others
        return object()

    def capture(self, launch: Callable[[], None], lane: object) -> Callable[[], None]:
        """Return what does the launches on the memory that they had."""
        del lane
        return lambda: None if self.nothing else launch()

    def wait(self) -> None:
        """Return at once."""


@pytest.fixture
def device() -> Replayed:
    """The stand-in for CUDA."""
    return Replayed()


@pytest.fixture
def graphs(monkeypatch, device) -> Iterator[Graphs]:
    """Graphs on the stand-in, and `cell` as the plain loop, offered on a CPU."""
    held = Graphs(device)
    module = SimpleNamespace(
        refuses=lambda *_, **__: None,
        configs=lambda *_, **__: [None],
        forward=lambda args, _: loop_forward(args),
        backward=lambda args, _: loop_backward(args),
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_module", lambda _: module)
    monkeypatch.setattr(graphed_layers.GraphedLayers.__init__, "__defaults__", (held,))
    dispatch.forget()
    yield held
    dispatch.forget()


class Memory:
    """An allocator that gives the same memory at the same allocation of each step, as CUDA's does in a steady loop.

    Attributes:
        moves: whether it gives new memory each time.
    """

    def __init__(self) -> None:
        self._given: dict[tuple[Any, ...], Tensor] = {}
        self._kept: list[Tensor] = []
        self.moves = False
        self._number = itertools.count()
        self._empty = torch.empty

    def begin(self) -> None:
        """Begin the next step."""
        self._number = itertools.count()

    def empty(self, *shape: Any, **options: Any) -> Tensor:
        """Stand in for `torch.empty`."""
        if self.moves:
            self._kept.append(self._empty(*shape, **options))
            return self._kept[-1].detach()
        key = (next(self._number), str(shape), str(options))
        if key not in self._given:
            self._given[key] = self._empty(*shape, **options)
        # Where a kernel leaves something out, the values of the step before would hide it. Bytes of ones are NaN in
        # every type.
        given = self._given[key].detach()
        return given.fill_(float("nan") if given.is_floating_point() else 0xFF)


@pytest.fixture
def memory(monkeypatch) -> Memory:
    """Memory that comes back."""
    found = Memory()
    monkeypatch.setattr(torch, "empty", found.empty)
    return found


SHAPES = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "batch_first": True, "bias": False},
    {"bidirectional": True, "batch_first": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stateful", [False, True])
def test_a_step_is_two_replays(graphs, memory, shape, stateful):
    """Results and gradients are torch's at each step, with weights and inputs that changed in place meanwhile."""
    theirs, ours = nn.LSTM(3, 4, **shape), LSTM(3, 4, **shape, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    states = shape.get("num_layers", 1) * (2 if shape.get("bidirectional") else 1)
    x, batch = torch.zeros(5, 2, 3, requires_grad=True), 5 if shape.get("batch_first") else 2
    hx = [torch.zeros(states, batch, 4, requires_grad=True) for _ in "hc"] if stateful else []
    grads = [torch.zeros_like(v) for v in itertools.chain.from_iterable([(o, *s) for o, s in [theirs(x, hx or None)]])]
    for number in range(SIGHTINGS + 3):
        with torch.no_grad():
            for value in (x, *hx, *grads, *theirs.parameters()):
                value.normal_()
            for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                one.copy_(other)
        found = []
        for lstm in (theirs, ours):
            memory.begin()
            for value in (x, *hx, *lstm.parameters()):
                value.grad = None
            output, state = lstm(x, tuple(hx) or None)
            torch.autograd.backward([output, *state], grads)
            found.append([output, *state, *(value.grad for value in (x, *hx, *lstm.parameters()))])
            found[-1] = [value.clone() for value in found[-1]]
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        # The first call settles what runs, and its way is the same.
        assert graphs.state().replayed == 2 * max(0, number + 1 - SIGHTINGS)
    assert graphs.state().captured == 2


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l1", "bias_ih_l0", "all but one"])
@pytest.mark.parametrize("result", [0, 1, 2])
def test_what_needs_no_gradient_has_none(graphs, frozen, result):
    """With parameters frozen, and one result used alone, the others' gradients are torch's."""
    theirs, ours = nn.LSTM(3, 4, 2), LSTM(3, 4, 2, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(5, 2, 3), []
    for lstm in (theirs, ours):
        for name, value in lstm.named_parameters():
            value.requires_grad_(name == "weight_hh_l0" if frozen == "all but one" else name != frozen)
        output, state = lstm(x)
        (output, *state)[result].sum().backward()
        found.append([value.grad for value in lstm.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert sum(graphs.state().plain.values()) == 2


@pytest.mark.usefixtures("graphs")
def test_autocast_gives_gradients_of_the_parameters_type():
    """Results are in autocast's type; gradients, cast inside the graph, in that of what they are gradients of."""
    theirs, ours = nn.LSTM(3, 4, 2), LSTM(3, 4, 2, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 2, 3, requires_grad=True)
    right, _ = theirs(x)
    expected = torch.autograd.grad(right.sum(), [x, *theirs.parameters()])
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ours(x)
    assert output.dtype == torch.bfloat16
    found = torch.autograd.grad(output.float().sum(), [x, *ours.parameters()])
    assert {value.dtype for value in found} == {torch.float32}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_graph_is_of_one_implementation(graphs, memory, monkeypatch, rebuilt):
    """On the same memory, another implementation, or another module, never replays what the first one captured."""
    ran: list[tuple[str, str]] = []

    def kernel(name: str) -> SimpleNamespace:
        return SimpleNamespace(
            refuses=lambda *_, **__: None,
            configs=lambda *_, **__: [None],
            forward=lambda args, _: ran.append((name, "forward")) or loop_forward(args),
            backward=lambda args, _: ran.append((name, "backward")) or loop_backward(args),
        )

    monkeypatch.setattr(dispatch, "_module", {name: kernel(name) for name in dispatch.MODULES}.__getitem__)
    dispatch.forget()
    lstm, x, grad = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3), torch.ones(5, 2, 4)
    for name in ("cell", "persistent", "cell"):
        if rebuilt:
            old, lstm = lstm, LSTM(3, 4, implementation=name)
            for at, value in old.named_parameters():
                setattr(lstm, at, value)
        else:
            lstm.implementation = name
        for _ in range(SIGHTINGS + 2):
            memory.begin()
            lstm.zero_grad()
            ran.clear()
            lstm(x)[0].backward(grad)
            assert ran == [(name, "forward"), (name, "backward")]
            assert lstm.choices[0].implementation == name
    # The graphs of `cell` are still there the second time.
    assert graphs.state().captured == 4


def test_a_cycle_of_shapes_is_replayed(graphs, memory):
    """Calls on the way to a graph, and those that capture one, are no sign that the memory will not come back."""
    lstm, shapes = LSTM(3, 4, implementation="cell"), range(1, 33)
    given = [(torch.randn(steps, 2, 3), torch.ones(steps, 2, 4)) for steps in shapes]
    for _ in range(SIGHTINGS + 2):
        for x, grad in given:
            memory.begin()
            lstm.zero_grad()
            lstm(x)[0].backward(grad)
    state = graphs.state()
    assert (state.captured, state.replayed) == (2 * len(shapes), 4 * len(shapes))
    assert graphed_layers.PAUSED not in state.plain


def test_memory_that_does_not_come_back_pauses_the_search(graphs, memory, monkeypatch):
    """After many passes on new memory training goes layer by layer, which is counted, and tries again later."""
    monkeypatch.setattr(graphed_layers, "FIRST_PAUSE", 5)
    lstm, x, grad = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3), torch.ones(5, 2, 4)

    def train(steps: int) -> None:
        for _ in range(steps):
            memory.begin()
            lstm.zero_grad()
            lstm(x)[0].backward(grad)

    tried = graphed_layers.MOST_MISSES // 2
    memory.moves = True
    for pause in (5, 10):
        before = graphs.state().plain.get(graphed_layers.PAUSED, 0)
        train(tried + pause)
        assert graphs.state().plain[graphed_layers.PAUSED] == before + pause
    memory.moves = False
    assert graphs.state().replayed == 0
    train(SIGHTINGS + 3)
    state = graphs.state()
    assert (state.captured, state.replayed) == (2, 6)
    assert state.plain == {
        "its memory was not seen often enough": 2 * (2 * tried + SIGHTINGS),
        graphed_layers.PAUSED: 15,
    }


def test_a_long_sequence_has_no_graph(graphs, monkeypatch):
    """Where a GPU takes long, a graph would cost memory for nothing."""
    monkeypatch.setattr(graphed_training, "MOST_BYTES", 5 * 2 * 16 * 4 - 1)
    lstm = LSTM(3, 4, implementation="cell")
    lstm(torch.randn(5, 2, 3))[0].sum().backward()
    assert not graphs.state().plain
    lstm(torch.randn(4, 2, 3))[0].sum().backward()
    assert sum(graphs.state().plain.values()) == 2


def test_saved_memory_in_another_order_is_read_by_another_graph(graphs, memory):
    """A hook that puts what was saved into another order, on the same memory, never meets the graph of the first."""
    theirs, ours = nn.LSTM(3, 4), LSTM(3, 4, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    expected = torch.autograd.grad(theirs(x)[0], list(theirs.parameters()), grad)

    def batch_first(value: Tensor) -> Tensor:
        # The output.
        if value.shape != (5, 2, 4):
            return value
        copy = value.clone()
        other = value.as_strided(value.shape, copy.transpose(0, 1).contiguous().transpose(0, 1).stride())
        assert other.data_ptr() == value.data_ptr()
        assert other.stride() != value.stride()
        return other.copy_(copy)

    for captured, unpack in ((2, lambda value: value), (3, batch_first)):
        for _ in range(SIGHTINGS + 2):
            memory.begin()
            with torch.autograd.graph.saved_tensors_hooks(lambda value: value, unpack):
                output, _ = ours(x)
            found = torch.autograd.grad(output, list(ours.parameters()), grad)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert graphs.state().captured == captured


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("step", [1, 2])
def test_what_is_kept_may_come_back_anywhere(step):
    """A hook may bring the block of bytes back at an odd address, or every other byte of memory."""
    theirs, ours = nn.LSTM(3, 4, 2), LSTM(3, 4, 2, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    x, grad, moved = torch.randn(5, 2, 3), torch.randn(5, 2, 4), []
    expected = torch.autograd.grad(theirs(x)[0], list(theirs.parameters()), grad)

    def elsewhere(value: Tensor) -> Tensor:
        if value.dtype != torch.uint8:
            return value
        moved.append(torch.empty(step * value.numel() + 1, dtype=torch.uint8)[1::step].copy_(value))
        return moved[-1]

    with torch.autograd.graph.saved_tensors_hooks(lambda value: value, elsewhere):
        output, _ = ours(x)
    found = torch.autograd.grad(output, list(ours.parameters()), grad)
    assert len(moved) == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stateful", [False, True])
def test_another_order_or_type_is_another_graph(graphs, memory, stateful):
    """Input and state at the same address, but with other strides or in another type, are captured anew."""
    theirs, ours = nn.LSTM(3, 4), LSTM(3, 4, implementation="cell")
    ours.load_state_dict(theirs.state_dict())
    base, state = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
    orders = [
        (base, state),
        (base.as_strided((5, 2, 3), (3, 15, 1)), state),
        (base, state.as_strided((1, 2, 4), (8, 1, 2))),
    ]
    for number, (x, h) in enumerate(orders if stateful else orders[:2], 1):
        hx = (h, h) if stateful else None
        expected = torch.autograd.grad(theirs(x.contiguous(), hx)[0].sum(), list(theirs.parameters()))
        grad = torch.ones(5, 2, 4)
        for _ in range(SIGHTINGS + 2):
            memory.begin()
            found = torch.autograd.grad(ours(x, hx)[0], list(ours.parameters()), grad)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert graphs.state().captured == 2 * number


@pytest.mark.parametrize("changed", ["x", "state", "output", "weight_ih_l0", "weight_hh_l0"])
def test_a_change_in_place_of_what_was_saved_is_refused(graphs, memory, changed):
    """Between a replayed forward pass and its backward pass, as torch does it everywhere."""
    lstm, x, grad = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3), torch.ones(5, 2, 4)
    hx = (torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    for number in range(SIGHTINGS + 2):
        memory.begin()
        output, _ = lstm(x, hx)
        if number == SIGHTINGS + 1:
            values = {"x": x, "state": hx[0], "output": output} | dict(lstm.named_parameters())
            with torch.no_grad():
                values[changed].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(output, list(lstm.parameters()), grad)
            break
        torch.autograd.grad(output, list(lstm.parameters()), grad)
    assert graphs.state().replayed > 2


@pytest.mark.usefixtures("graphs")
def test_saved_tensors_of_another_form_are_refused():
    """A hook that gives back less memory would have kernels read beyond it."""
    lstm, x = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v[:1]):
        output, _ = lstm(x)
    with pytest.raises(RuntimeError, match="a hook of saved tensors was given"):
        output.sum().backward()


@pytest.mark.usefixtures("graphs")
def test_gradients_of_gradients_are_refused():
    """As everywhere in `kernels.LSTM`."""
    lstm, x = LSTM(3, 4, implementation="cell"), torch.randn(5, 2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


@pytest.mark.usefixtures("graphs")
def test_batched_gradients_are_those_of_each():
    """`is_grads_batched` runs the backward pass once for each."""
    lstm, x = LSTM(3, 4, 2, implementation="cell"), torch.randn(5, 2, 3, requires_grad=True)
    output, _ = lstm(x)
    grads = torch.randn(3, *output.shape)
    (found,) = torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)
    for one, grad in zip(found, grads, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(output, x, grad, retain_graph=True)[0])


def test_a_replayed_step_takes_little_of_the_host(graphs, memory, device):
    """A step makes few calls, which are what its time on the host is made of, and another layer adds few."""
    counts = []
    for layers in (1, 2):
        lstm, x = LSTM(3, 4, layers, implementation="cell"), torch.randn(5, 2, 3)
        grad, made = torch.ones(5, 2, 4), []
        device.nothing = False
        # Once nothing is replayed, what a pass allocates for itself is not either, so the memory after it moves.
        for number in range(2 * SIGHTINGS + 2):
            memory.begin()
            lstm.zero_grad()
            device.nothing, last = number >= SIGHTINGS, number == 2 * SIGHTINGS + 1
            before = graphs.state().replayed
            # What the stand-in replays is the work itself, which a GPU does.
            sys.setprofile((lambda _, event, __, made=made: made.append(event)) if last else None)
            try:
                output, _ = lstm(x)
                output.backward(grad)
            finally:
                sys.setprofile(None)
        assert graphs.state().replayed - before == 2
        counts.append(len(made))
    # Calls and returns, of Python and of C; 419 and 477 with torch 2.13.
    assert counts[0] < 510
    assert counts[1] < counts[0] + 90
