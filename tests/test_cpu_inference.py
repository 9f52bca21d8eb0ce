"""Calls without gradients through what an earlier call prepared: as right as any other, and never of old weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import TARGETS, built_for
from hypothesis import given
from hypothesis import strategies as st
from recurrences import DEVICE
from strategies import Shape, shapes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from kernels import LSTM
from kernels.cpu import build, packing

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

HIDDEN = st.sampled_from([1, 5, 16, 17, 33, 70])
State = tuple[Tensor, Tensor]


def _twins(shape: Shape, **options: object) -> tuple[LSTM, nn.LSTM]:
    """A kernels.LSTM that has been called before, and torch's own with the same weights."""
    torch.manual_seed(shape.seed)
    truth = nn.LSTM(**shape.options | options).eval()
    ours = LSTM(**shape.options | options, implementation="cpu-fused").eval()
    ours.load_state_dict(truth.state_dict())
    with torch.no_grad():
        ours(torch.zeros(1, 1, shape.input_size))
    return ours, truth


def _at_once(lstm: LSTM, x: Tensor, hx: State | None) -> Any:
    """Output and state by what the module's earlier call prepared, and its choices, or None."""
    return lstm.__dict__["_kept"].at_once(lstm._parameters, x, hx, lstm.batch_first)


def _close(found: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


SMALL = Shape(batch=2, steps=3, input_size=5, hidden_size=20, num_layers=2, bidirectional=False, seed=3)
#: Weights that a short call looks at in samples alone.
LARGE = Shape(batch=1, steps=1, input_size=8, hidden_size=160, num_layers=1, bidirectional=False, seed=4)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(shape=shapes(), hidden=HIDDEN, batch_first=st.booleans(), stateful=st.booleans(), bias=st.booleans())
def test_a_kept_call_is_torch_s(
    target: str, threads: int, shape: Shape, hidden: int, batch_first: bool, stateful: bool, bias: bool
) -> None:
    """All layers and directions in one native call give what torch.nn.LSTM gives."""
    x, _ = shape.tensors(torch.float32)
    state = torch.randn(2, shape.num_layers * shape.directions, shape.batch, hidden)
    hx = (state[0], state[1]) if stateful else None
    x = x if batch_first else x.transpose(0, 1).contiguous()
    with built_for(target, threads), torch.no_grad():
        ours, truth = _twins(shape, hidden_size=hidden, batch_first=batch_first, bias=bias)
        found = _at_once(ours, x, hx)
    assert found is not None
    with torch.no_grad():
        output, (h_n, c_n) = truth(x, hx)
    results, choices = found
    # Not what multiplies, which is that of another number of rows: test_cpu_sums.py.
    told = [[(choice.implementation, choice.reason) for choice in each] for each in (choices, ours.choices)]
    assert told[0] == told[1]
    for value, right in zip((results[0], *results[1]), (output, h_n, c_n), strict=True):
        _close(value, right)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@given(shape=shapes(), hidden=HIDDEN, batch_first=st.booleans())
def test_steps_are_the_sequence(target: str, threads: int, shape: Shape, hidden: int, batch_first: bool) -> None:
    """Step by step, the state in place, is what torch.nn.LSTM gives for the whole sequence."""
    x, _ = shape.tensors(torch.float32)
    h, c = torch.randn(2, shape.num_layers, shape.batch, hidden).unbind()
    with built_for(target, threads), torch.no_grad():
        ours, truth = _twins(shape, hidden_size=hidden, bidirectional=False, batch_first=batch_first)
        output, (h_n, c_n) = truth(x if batch_first else x.transpose(0, 1), (h, c))
        h, c = h.clone(), c.clone()
        found = [ours.step(x[:, step].contiguous(), (h, c)) for step in range(shape.steps)]
    _close(torch.stack(found, 1 if batch_first else 0), output)
    _close(h, h_n)
    _close(c, c_n)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_steps_with_weights_in_fewer_bits_are_the_call_s(storage: str) -> None:
    """Weights kept in fewer bits make the same error in a step as in a call of one step."""
    ours = LSTM(5, 40, 2, implementation="cpu-fused", weight_storage=storage)
    x, h, c = torch.randn(3, 5), torch.randn(2, 3, 40), torch.randn(2, 3, 40)
    with torch.inference_mode():
        output, (h_n, c_n) = ours(x.unsqueeze(0), (h, c))
        found = ours.step(x, (h, c))
    assert torch.equal(found, output[0])
    assert torch.equal(h, h_n)
    assert torch.equal(c, c_n)


@pytest.mark.parametrize("implementation", ["cpu-fused", "auto", "loop", "vendor"])
def test_steps_by_any_implementation_are_the_same(implementation: str) -> None:
    """A call without a step of its own goes through forward, and a state in any memory order is still updated."""
    lstm = LSTM(5, 8, 2, implementation=implementation)
    x = torch.randn(3, 5)
    h, c = torch.randn(2, 3, 8), torch.randn(2, 8, 3).transpose(1, 2)
    with torch.no_grad():
        output, (h_n, c_n) = lstm(x.unsqueeze(0), (h, c))
        found = lstm.step(x, (h, c))
    for value, truth in ((found, output[0]), (h, h_n), (c, c_n)):
        _close(value, truth)


def test_explain_tells_how_a_step_runs() -> None:
    """A step that copies its state says so, and the kernel's own does not."""
    lstm = LSTM(5, 8, implementation="loop")
    assert "copies the state" in lstm.explain(1, 1, step=True).reason
    assert "copies the state" not in lstm.explain(1, 1).reason
    lstm.implementation = "cpu-fused"
    assert "copies the state" not in lstm.explain(1, 1, step=True).reason


def _replace(lstm: nn.RNNBase) -> None:
    lstm.weight_hh_l0 = nn.Parameter(lstm.weight_hh_l0.detach() * 1.5)


def _exchange_memory(lstm: nn.RNNBase) -> None:
    lstm.weight_hh_l0.data = lstm.weight_hh_l0.data * 1.5


def _turn(lstm: nn.RNNBase) -> None:
    """The same memory in another order; of the same shape, so that nothing else tells."""
    weight = lstm.weight_ih_l0.data
    weight.copy_(torch.arange(float(weight.numel())).view(weight.shape) / weight.numel())
    lstm(torch.zeros(1, 1, lstm.input_size))
    rows, columns = weight.shape
    lstm.weight_ih_l0.data = weight.as_strided((rows, columns), (1, rows))


def _by_numpy(lstm: nn.RNNBase) -> None:
    values = lstm.weight_hh_l0.detach().numpy()
    values *= 1.5


def _one_value(lstm: nn.RNNBase) -> None:
    lstm.weight_ih_l0.detach().numpy()[1, 2] += 1.0


def _in_place(lstm: nn.RNNBase) -> None:
    lstm.weight_hh_l0.mul_(1.5)


def _bias(lstm: nn.RNNBase) -> None:
    lstm.bias_hh_l0.data.add_(1.0)


def _load(lstm: nn.RNNBase) -> None:
    lstm.load_state_dict({name: value * 1.5 for name, value in lstm.state_dict().items()})


def _flatten(lstm: nn.RNNBase) -> None:
    lstm.flatten_parameters()


CHANGES = [_replace, _exchange_memory, _turn, _by_numpy, _one_value, _in_place, _bias, _load, _flatten]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_changed_weights_are_noticed(change: Callable[[nn.RNNBase], None], shape: Shape) -> None:
    """Whatever is done to the weights between two calls, and by whatever way, the second is of the new ones."""
    ours, truth = _twins(shape)
    x, state = shape.tensors(torch.float32)
    with torch.no_grad():
        assert _at_once(ours, x, state) is not None
        change(ours)
        change(truth)
        _close(ours(x, state)[0], truth(x, state)[0])
        change(ours)
        change(truth)
        expected, (h_n, _) = truth(x[:, :1], state)
        _close(ours.step(x[:, 0], state), expected[:, 0])
        _close(state[0], h_n)


def test_it_is_the_look_at_the_values_that_notices() -> None:
    """Told not to look, the kernel computes with what was packed: the test above can fail."""
    ours, _ = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    with torch.no_grad():
        before = ours(x)[0]
        _by_numpy(ours)
        prepared = ours.__dict__["_kept"]
        blind = prepared.run(x, None, None, batch_first=True, fresh=True)
        assert blind is not None
        assert torch.equal(blind[0], before)
        assert prepared.run(x, None, None, batch_first=True) is None


@pytest.mark.parametrize(
    ("name", "value"), [("implementation", "loop"), ("batch_first", False), ("bias", False), ("weight_storage", "bf16")]
)
def test_changed_options_are_noticed(name: str, value: object) -> None:
    """An option set on the module holds from the next call on."""
    ours, _ = _twins(SMALL)
    fresh = LSTM(**SMALL.options, implementation="cpu-fused")
    fresh.load_state_dict(ours.state_dict())
    x, _ = SMALL.tensors(torch.float32)
    setattr(ours, name, value)
    setattr(fresh, name, value)
    with torch.no_grad():
        for _ in range(2):
            _close(ours(x)[0], fresh(x)[0])
    assert ours.choices == fresh.choices


def test_functional_call_uses_its_own_weights() -> None:
    """Weights that torch.func puts in for one call are used in that call, and no longer."""
    ours, truth = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    others = {name: value.detach() * 0.5 for name, value in truth.named_parameters()}
    with torch.no_grad():
        _close(functional_call(ours, others, (x,))[0], functional_call(truth, others, (x,))[0])
        _close(ours(x)[0], truth(x)[0])


class _Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_a_parametrized_weight_is_computed_in_each_call() -> None:
    """A weight that is computed from another parameter follows that one."""
    ours, truth = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    parametrize.register_parametrization(ours, "weight_hh_l0", _Halved())
    for factor in (0.5, 2.0):
        with torch.no_grad():
            ours.parametrizations.weight_hh_l0.original.mul_(factor)
            truth.weight_hh_l0.copy_(ours.weight_hh_l0)
            _close(ours(x)[0], truth(x)[0])


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("watcher", ["autocast", "gradients", "subclass", "dtype", "2-D", "trace", "negated"])
def test_it_is_not_taken_where_somebody_else_must_see_the_call(watcher: str) -> None:
    """Autocast, autograd, tracers and subclasses of Tensor, and input that is not as it was, take the long way."""
    ours, _ = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    inputs = {
        "subclass": x.as_subclass(_Subclass),
        "dtype": x.double(),
        "2-D": x[0],
        "negated": torch.randn(2, 3, 5, dtype=torch.complex64).conj().imag,
    }
    taken = []
    with torch.set_grad_enabled(watcher == "gradients"), torch.autocast("cpu", enabled=watcher == "autocast"):
        if watcher == "trace":
            torch.jit.trace(
                lambda value: (taken.append(_at_once(ours, value, None)), value + 1)[1], x, check_trace=False
            )
        else:
            taken.append(_at_once(ours, inputs.get(watcher, x), None))
    assert taken
    assert all(value is None for value in taken)


def test_transforms_see_the_call() -> None:
    """Under torch.func.vmap a call is that of each, and not one on the memory behind."""
    ours, truth = _twins(SMALL)
    x = torch.randn(4, *SMALL.tensors(torch.float32)[0].shape)
    try:
        with torch.no_grad():
            found = torch.func.vmap(lambda value: ours(value)[0])(x)
    except (RuntimeError, NotImplementedError):
        return  # refused aloud
    _close(found, torch.stack([truth(value)[0] for value in x]))


def test_compiled_code_does_not_keep_the_short_way() -> None:
    """A module that was called before it is compiled is traced whole."""
    ours, truth = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        _close(compiled(x)[0], truth(x)[0])


def test_a_copy_has_weights_of_its_own() -> None:
    """A copy of a module that was called does not go on using the weights of the first."""
    ours, truth = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.weight_hh_l0.mul_(2)
        _close(ours(x)[0], truth(x)[0])
        truth.weight_hh_l0.mul_(2)
        _close(other(x)[0], truth(x)[0])


def test_results_are_memory_of_their_own() -> None:
    """The next call does not overwrite what a call returned, nor the state that it was given."""
    ours, _ = _twins(SMALL)
    x, state = SMALL.tensors(torch.float32)
    given = [value.clone() for value in state]
    with torch.no_grad():
        output, (h_n, c_n) = ours(x, state)
        copies = [value.clone() for value in (output, h_n, c_n)]
        ours(x + 1, (h_n + 1, c_n + 1))
    assert all(torch.equal(a, b) for a, b in zip((output, h_n, c_n, *state), (*copies, *given), strict=True))


def test_two_threads_may_run_one_module() -> None:
    """Concurrent calls and steps of the same module give what each gives alone, also while it is prepared."""
    ours, truth = _twins(SMALL)
    ours.batch_first = True  # drops what was prepared
    inputs = [torch.randn(2, 30, SMALL.input_size) for _ in range(4)]
    errors: list[float] = []

    @torch.inference_mode()
    def work(x: Tensor) -> None:
        expected = truth(x)[0]
        for _ in range(20):
            h, c = torch.zeros(2, 2, 2, SMALL.hidden_size).unbind()
            steps = torch.stack([ours.step(x[:, t].contiguous(), (h, c)) for t in range(5)], 1)
            errors.append(float((ours(x)[0] - expected).abs().max()))
            errors.append(float((steps - expected[:, :5]).abs().max()))

    team = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert len(errors) == 160
    assert max(errors) < 1e-5


def test_a_step_is_seen_by_autograd() -> None:
    """A state that a backward pass needs and a step overwrote is an error there, not a wrong gradient."""
    ours, _ = _twins(SMALL)
    h, c = torch.randn(2, 2, 2, SMALL.hidden_size).unbind()
    weight = torch.randn(SMALL.hidden_size, requires_grad=True)
    loss = (h * weight).sum()
    with torch.no_grad():
        ours.step(torch.randn(2, SMALL.input_size), (h, c))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("prepared", [False, True])
def test_a_step_that_cannot_be_is_refused(prepared: bool) -> None:
    """Both directions, gradients, one memory for h and c, and wrong shapes are errors that say what to do."""
    lstm = LSTM(5, 8, implementation="cpu-fused")
    both = LSTM(5, 8, bidirectional=True, implementation="cpu-fused")
    x, h, c = torch.randn(3, 5), torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)
    both_in = torch.zeros(1, 4, 8)
    if prepared:
        with torch.no_grad():
            lstm(x.unsqueeze(0))
            both(x.unsqueeze(0))
    with pytest.raises(RuntimeError, match="no_grad"):
        lstm.step(x, (h, c))
    with torch.no_grad():
        with pytest.raises(ValueError, match="one direction"):
            both.step(x, (torch.zeros(2, 3, 8), torch.zeros(2, 3, 8)))
        with pytest.raises(ValueError, match="same memory"):
            lstm.step(x, (h, h))
        with pytest.raises(ValueError, match="same memory"):
            lstm.step(x, (h, h.view(1, 3, 8)))
        with pytest.raises(ValueError, match="same memory"):
            lstm.step(x, (both_in[:, :3], both_in[:, 1:]))
        with pytest.raises(ValueError, match="one step of a batch"):
            lstm.step(x.unsqueeze(0), (h, c))
        with pytest.raises(RuntimeError, match="hidden"):
            lstm.step(x, (h[:, :2], c))
    assert not h.any()


def test_a_step_takes_a_state_whose_h_and_c_alternate() -> None:
    """Layers of one tensor, h and c of each side by side, share no element and are right."""
    lstm, x, kept = LSTM(5, 8, 2, implementation="cpu-fused"), torch.randn(3, 5), torch.randn(2, 2, 3, 8)
    with torch.no_grad():
        _, (h, c) = lstm(x.unsqueeze(0), (kept[:, 0].clone(), kept[:, 1].clone()))
        lstm.step(x, (kept[:, 0], kept[:, 1]))
    assert torch.equal(kept, torch.stack([h, c], 1))


@pytest.mark.parametrize("which", [0, 1])
def test_a_step_may_read_its_input_from_the_state(which: int) -> None:
    """Input that lies in the memory of h or c is read before that is written."""
    lstm = LSTM(40, 40, implementation="cpu-fused")
    state = torch.randn(2, 1, 32, 40).unbind()
    with torch.no_grad():
        expected, final = lstm(state[which].clone(), [value.clone() for value in state])
        torch.testing.assert_close(lstm.step(state[which][0], state), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-6)


def test_the_look_is_not_taken_for_granted_after_forgetting() -> None:
    """Weights packed for other vectors are not read by a kernel with these."""
    if len(TARGETS) == 1:
        pytest.skip("this machine runs one build alone")
    ours, truth = _twins(SMALL)
    x, _ = SMALL.tensors(torch.float32)
    for target in (TARGETS[-1], build.NATIVE):
        with built_for(target, 1), torch.no_grad():
            _close(ours(x)[0], truth(x)[0])


@pytest.mark.parametrize("more", [-1, 0, 5])
def test_weights_that_fill_a_large_page_begin_at_one(more: int) -> None:
    """Memory of packed weights holds all of them, and from a large page on it begins at the boundary of one."""
    count = packing.LARGE_PAGE // 4 + more
    found = packing._memory(count, torch.float32, lasting=True)
    assert found.shape == (count,)
    assert more < 0 or found.data_ptr() % packing.LARGE_PAGE == 0
