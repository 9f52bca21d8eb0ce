"""kernels.LSTM under a caller's circumstances: default types and devices, modes, layouts, hooks and changes in place.

Sizes are in test_kernels_lstm.py. Here every call runs twice, by torch.nn.LSTM and by ours, with all around it
the same.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import CheckpointError, checkpoint

from kernels import LSTM, dispatch

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SEEDS

IMPLEMENTATIONS = ("auto", "loop")
#: Some hundred roundings of float32, of values near one.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
#: Of bfloat16, which keeps 8 bits.
ROUGH = {"rtol": 0.05, "atol": 0.05}


class Loud(Tensor):
    """A subclass of Tensor that changes nothing."""


LAYOUTS = ("plain", "transposed", "expanded", "sliced", "overlapping", "subclass", "parameter")
FORMS = ("padded", "list", "tuple", "numpy", "int32", "uint8", "packed", "unbatched")
WEIGHTS = ("plain", "tied biases", "tied layers", "parametrized", "pruned", "transposed")
NEEDS = ("all", "input", "state", "some weights", "no_grad", "inference_mode")
AROUND = ("nothing", "forward hook", "gradient hooks", "saved tensors hooks", "checkpoint", "anomaly")
IN_PLACE = ("nothing", "h", "c", "part of h", "output")
BACKWARD = ("grad", "clipped", "accumulated", "batched", "retained")


@dataclass(frozen=True)
class Call:
    """A call and what surrounds it; sizes, and one of each list above."""

    batch: int
    steps: int
    hidden: int
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    seed: int
    layout: str = "plain"
    form: str = "padded"
    stateful: str = "none"
    weights: str = "plain"
    needs: str = "all"
    around: str = "nothing"
    in_place: str = "nothing"
    backward: str = "grad"
    dtype: torch.dtype = torch.float32
    device: str | None = None
    autocast: bool = False
    #: Whether a plain call with gradients came before, after which calls like it may take a shorter way.
    repeated: bool = False

    @property
    def features(self) -> int:
        """The hidden size where layers share weights, which must then have one shape."""
        return self.hidden * (2 if self.bidirectional else 1) if self.weights == "tied layers" else 3


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Calls that torch.nn.LSTM serves or refuses."""
    call = Call(
        batch=draw(st.integers(0, 4)),
        steps=draw(st.integers(1, 5)),
        hidden=draw(st.integers(1, 9)),
        layers=draw(st.integers(1, 2)),
        bidirectional=draw(st.booleans()),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        seed=draw(SEEDS),
        layout=draw(st.sampled_from(LAYOUTS)),
        form=draw(st.sampled_from(FORMS)),
        stateful=draw(st.sampled_from(("none", "plain", "expanded", "sliced", "list"))),
        weights=draw(st.sampled_from(WEIGHTS)),
        needs=draw(st.sampled_from(NEEDS)),
        around=draw(st.sampled_from(AROUND)),
        in_place=draw(st.sampled_from(IN_PLACE)),
        backward=draw(st.sampled_from(BACKWARD)),
        dtype=draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16))),
        device=draw(st.sampled_from((None, "cpu", "meta"))),
        autocast=draw(st.booleans()),
        repeated=draw(st.booleans()),
    )
    # torch 2.13 may die of a hook on a tensor that was changed through a view of it, nn.LSTM's too.
    deadly = call.in_place == "part of h" and call.around == "gradient hooks"
    return replace(call, around="nothing") if deadly else call


SIMPLE = Call(
    batch=2, steps=3, hidden=4, layers=1, bidirectional=False, bias=True, batch_first=False, seed=0, stateful="plain"
)


def laid(value: Tensor, layout: str) -> Tensor:
    """The same shape in other memory; new values where the layout repeats or overlaps them."""
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return value[:, :1].expand_as(value)
    if layout == "sliced":
        return torch.stack([value, value], -1).flatten(-2)[..., ::2]
    if layout == "overlapping":
        return value.flatten().as_strided(value.shape, [1 if size > 1 else 0 for size in value.shape])
    if layout == "subclass":
        return value.as_subclass(Loud)
    return nn.Parameter(value) if layout == "parameter" else value


def prepare(lstm: Any, weights: str) -> None:
    """Give the module weights that are shared, computed or laid out in another way."""
    if weights == "tied biases" and lstm.bias:
        lstm.bias_hh_l0 = lstm.bias_ih_l0
    elif weights == "tied layers" and lstm.num_layers > 1:
        lstm.weight_hh_l1, lstm.weight_ih_l1 = lstm.weight_hh_l0, lstm.weight_ih_l0
    elif weights == "parametrized":
        parametrizations.weight_norm(lstm, "weight_hh_l0")
    elif weights == "pruned":
        prune.l1_unstructured(lstm, "weight_ih_l0", 0.5)
    elif weights == "transposed":
        lstm.weight_hh_l0 = nn.Parameter(lstm.weight_hh_l0.detach().t().contiguous().t())


@contextlib.contextmanager
def surrounded(call: Call) -> Iterator[None]:
    """The default type and device, the mode and what watches, as the caller set them."""
    with contextlib.ExitStack() as stack:
        torch.set_default_dtype(call.dtype)
        stack.callback(torch.set_default_dtype, torch.float32)
        if call.device is not None:
            stack.enter_context(torch.device(call.device))
        if call.needs in {"no_grad", "inference_mode"}:
            stack.enter_context(torch.no_grad() if call.needs == "no_grad" else torch.inference_mode())
        if call.around == "saved tensors hooks":
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone))
        if call.around == "anomaly":
            stack.enter_context(torch.autograd.detect_anomaly())
        if call.autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        yield


def run(lstm: Any, call: Call) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Results and gradients by name, and what must not share memory with them."""
    generator = torch.Generator().manual_seed(call.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    shape = (call.batch, call.steps) if call.batch_first else (call.steps, call.batch)
    x = laid(draw(*shape, call.features), call.layout)
    states = call.layers * (2 if call.bidirectional else 1)
    state = [draw(states, call.batch, call.hidden) for _ in range(2)]
    if call.stateful in {"expanded", "sliced"}:
        state = [laid(value, call.stateful) for value in state]
    lengths = torch.randint(1, call.steps + 1, (call.batch,), generator=generator, device="cpu")
    lengths[: min(call.batch, 1)] = call.steps
    leaves = {f"parameter {name}": value for name, value in lstm.named_parameters()}
    for name, value in leaves.items():
        value.requires_grad_(call.needs == "all" or (call.needs == "some weights" and "hh" in name))
    inputs = {"x": x}
    if call.stateful != "none":
        inputs |= {"h0": state[0], "c0": state[1]}
    # Not where gradients would be of tensors that lie over each other.
    wanted = {"input": {"x"}, "state": {"h0", "c0"}}.get(call.needs, set())
    for name, value in inputs.items():
        if name in wanted and value.is_leaf:
            leaves[name] = value.requires_grad_()

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        output, (h_n, c_n) = called(lstm, call, x, state, lengths)
        return output, h_n, c_n

    with surrounded(call):
        if call.around == "checkpoint":
            output, h_n, c_n = checkpoint(forward, use_reentrant=False)
        else:
            output, h_n, c_n = forward()
        results = {"output": output, "h_n": h_n, "c_n": c_n}
        before = {name: value.detach().clone() for name, value in results.items()}
        change(results, call.in_place)
        gradients: dict[str, Tensor | None] = {}
        needing = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if needing and h_n.requires_grad:
            gradients = backward(call, list(results.values()), needing, generator)
    found = results | {f"{name} before": value for name, value in before.items()} | gradients
    return found, inputs | dict(lstm.named_parameters())


def called(lstm: Any, call: Call, x: Tensor, state: list[Tensor], lengths: Tensor) -> Any:
    """The module's results for the input in its form; torch.nn.LSTM takes lengths packed."""
    hx: Any = None if call.stateful == "none" else state if call.stateful == "list" else tuple(state)
    if call.form == "unbatched":
        x = x.select(0 if call.batch_first else 1, 0)
        hx = None if hx is None else tuple(value[:, 0] for value in hx)
    if call.form in {"padded", "unbatched"}:
        return lstm(x, hx)
    if call.form != "packed" and isinstance(lstm, LSTM):
        given: Any = {
            "list": lengths.tolist(),
            "tuple": tuple(lengths.tolist()),
            "numpy": np.array(lengths.tolist(), dtype=np.int64),
            "int32": lengths.int(),
            "uint8": lengths.byte(),
        }[call.form]
        return lstm(x, hx, given)
    packed, state_n = lstm(pack_padded_sequence(x, lengths, call.batch_first, enforce_sorted=False), hx)
    if call.form == "packed":
        return packed.data, state_n
    return unpacked(packed, x.shape[:2], call.batch_first), state_n


def unpacked(packed: PackedSequence, shape: torch.Size, batch_first: bool) -> Tensor:
    """As pad_packed_sequence, which takes no default device."""
    steps, batch = reversed(shape) if batch_first else shape
    rows = torch.zeros(steps, batch, packed.data.size(1), dtype=packed.data.dtype, device="cpu")
    valid = torch.arange(batch, device="cpu") < packed.batch_sizes[:, None]
    rows = rows.index_put(tuple(valid.nonzero().t()), packed.data)
    rows = rows if packed.unsorted_indices is None else rows.index_select(1, packed.unsorted_indices)
    return rows.transpose(0, 1) if batch_first else rows


def change(results: dict[str, Tensor], in_place: str) -> None:
    """Change a result in place, as truncated backpropagation resets a state."""
    if in_place == "h":
        results["h_n"].mul_(0.5)
    elif in_place == "c":
        results["c_n"].zero_()
    elif in_place == "part of h":
        results["h_n"][..., ::2] = 0
    elif in_place == "output":
        results["output"].add_(1.0)


def backward(
    call: Call, results: list[Tensor], leaves: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor | None]:
    """Gradients of the leaves, as a caller takes them and goes on with them."""
    if call.around == "gradient hooks":
        for value in results:
            value.register_hook(lambda gradient: gradient * 2)
    size = (3,) if call.backward == "batched" else ()
    given = [
        torch.randn(*size, *value.shape, generator=generator, dtype=torch.float32, device="cpu").to(value.dtype)
        for value in results
    ]
    values = list(leaves.values())
    options: dict[str, Any] = {"allow_unused": True, "is_grads_batched": call.backward == "batched"}
    found = torch.autograd.grad(results, values, given, retain_graph=call.backward == "retained", **options)
    if call.backward == "retained":
        found = torch.autograd.grad(results, values, given, **options)
    if call.backward == "clipped":
        for value, gradient in zip(values, found, strict=True):
            value.grad = gradient
        nn.utils.clip_grad_norm_(values, 0.1)
    elif call.backward == "accumulated":
        for gradient in found:
            if gradient is not None:
                gradient.add_(1.0)
    return {f"grad {name}": gradient for name, gradient in zip(leaves, found, strict=True)}


def outcome(lstm: Any, call: Call) -> Any:
    """Return what a call gives, or the error that it raises."""
    try:
        return run(lstm, call)
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as error:
        return error


def addresses(value: Tensor) -> set[int]:
    """Address at which a tensor's elements begin."""
    value = value.as_subclass(Tensor).detach()
    steps = zip(value.shape, value.stride(), strict=True)
    offsets = [(size, stride * value.element_size()) for size, stride in steps]
    found = {value.data_ptr()} if value.numel() else set()
    for size, stride in offsets:
        found = {at + index * stride for at in found for index in range(size)}
    return found


def assert_apart(found: dict[str, Tensor | None], given: dict[str, Tensor]) -> None:
    """No result shares memory with another, nor with what was given."""
    results = {name: addresses(value) for name, value in found.items() if value is not None}
    others = results | {f"given {name}": addresses(value) for name, value in given.items()}
    for (name, one), (other, two) in itertools.product(results.items(), others.items()):
        assert name == other or one.isdisjoint(two), (name, other)


def twins(call: Call, implementation: str) -> tuple[Any, Any]:
    """torch.nn.LSTM and ours with the same weights."""
    torch.manual_seed(call.seed)
    options = (call.features, call.hidden, call.layers, call.bias, call.batch_first, 0.0, call.bidirectional)
    theirs, ours = nn.LSTM(*options), LSTM(*options, implementation=implementation)
    ours.load_state_dict(theirs.state_dict())
    for lstm in (theirs, ours):
        prepare(lstm, call.weights)
        if call.around == "forward hook":
            lstm.register_forward_hook(lambda _module, _args, result: (result[0], (result[1][0] * 2, result[1][1])))
    if call.repeated:
        ours(torch.randn(2, 3, call.features))
    return theirs, ours


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=100)
@given(call=calls())
@example(call=replace(SIMPLE, dtype=torch.bfloat16, hidden=256))
@example(call=replace(SIMPLE, dtype=torch.float64, device="meta", form="packed"))
@example(call=replace(SIMPLE, in_place="c", bidirectional=True))
@example(call=replace(SIMPLE, in_place="part of h"))
@example(call=replace(SIMPLE, backward="clipped"))
@example(call=replace(SIMPLE, backward="accumulated", weights="tied biases"))
@example(call=replace(SIMPLE, backward="batched", layers=2, bidirectional=True))
@example(call=replace(SIMPLE, form="numpy", needs="state"))
@example(call=replace(SIMPLE, repeated=True, in_place="c", layers=2, bidirectional=True))
@example(call=replace(SIMPLE, repeated=True, backward="accumulated", batch_first=True))
@example(call=replace(SIMPLE, repeated=True, backward="batched"))
@example(call=replace(SIMPLE, repeated=True, around="saved tensors hooks", backward="retained"))
@example(call=replace(SIMPLE, layout="overlapping", weights="pruned", around="checkpoint"))
def test_as_nn_lstm_whatever_is_around(implementation, call):
    """Results and gradients are those of torch.nn.LSTM and memory of their own; what it refuses may be refused."""
    theirs, ours = twins(call, implementation)
    expected, found = outcome(theirs, call), outcome(ours, call)
    if isinstance(expected, Exception):
        return
    if call.in_place == "output" and "modified by an inplace operation" in str(found):
        return  # As torch.nn.LSTM in oneDNN, the output is kept for the backward pass; ATen's own keeps copies.
    recomputed = (call.layout, call.around) == ("subclass", "checkpoint") and call.form in {"packed", "unbatched"}
    if recomputed and isinstance(found, CheckpointError):
        # A checkpoint recomputes inside the gradient's __torch_function__, where what is made of a subclass is a plain
        # tensor, which takes another way. torch refuses that and gives no wrong gradient.
        return
    assert not isinstance(found, Exception), found
    results, given_ = found
    assert results.keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert (value is None) == (results[name] is None), name
        if value is not None:
            close = ROUGH if call.autocast else CLOSE
            torch.testing.assert_close(
                results[name].float(), value.float(), msg=lambda text, name=name: f"{name}: {text}", **close
            )
    assert_apart(results, given_)


def test_a_replica_of_data_parallel_is_chosen_for_as_its_module(monkeypatch):
    """Its weights are no parameters, yet a backward pass comes: what cannot serve that is refused beforehand."""
    module, asked = LSTM(3, 5, implementation="loop"), []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda problem, *names: asked.append(problem) or choose(problem, *names))
    # As torch.nn.parallel.replicate does it, which takes GPUs alone.
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = OrderedDict()
    for name, value in module.named_parameters():
        replica._former_parameters[name] = value.clone()
        setattr(replica, name, replica._former_parameters[name])
    x = torch.randn(4, 2, 3)
    replica(x)[0].sum().backward()
    with torch.no_grad():
        replica(x)
    assert [problem.saves for problem in asked] == [True, False]
    assert all(value.grad is not None for value in module.parameters())
