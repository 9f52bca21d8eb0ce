"""The head whose largest outputs are exact: right at any size, whatever its rounding, and never of old weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("hypothesis")

import numpy as np
import torch
from cpu_builds import HEADS, head_built_for
from hypothesis import assume, given
from hypothesis import strategies as st
from recurrences import DEVICE
from torch import Tensor, nn

from kernels import ShortlistHead
from kernels.cpu import build, shortlist, teams

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the head is for CPUs"),
    pytest.mark.skipif(bool(shortlist.hindrance()), reason=str(shortlist.hindrance())),
]


@pytest.fixture(params=HEADS, scope="module", autouse=True)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to multiply that can run here."""
    with head_built_for(request.param):
        yield request.param


def _head(depth: int, outputs: int, exact: int, *, bias: bool = True, spread: float = 1.0) -> ShortlistHead:
    """A head whose rows of weights differ in size by up to e ** spread."""
    head = ShortlistHead(depth, outputs, bias, exact=exact).eval()
    with torch.no_grad():
        head.weight.mul_(torch.exp(spread * torch.randn(outputs, 1)))
    return head


def true_outputs(head: ShortlistHead, h: Tensor) -> Tensor:
    bias = None if head.bias is None else head.bias.double()
    return nn.functional.linear(h.double(), head.weight.double(), bias)


def check(head: ShortlistHead, h: Tensor) -> None:
    """The largest are float32's and in their place, the others below them, and all of them near."""
    with torch.no_grad():
        found, truth = head(h), true_outputs(head, h)
        size = h.double().norm(dim=-1, keepdim=True) * head.weight.double().norm(dim=1)
    rounding = 2e-6 * (size + truth.abs())
    k = min(head.exact, truth.size(-1))
    best, index = found.topk(k, -1)
    assert torch.all((best - truth.gather(-1, index)).abs() <= rounding.gather(-1, index))
    # Sorted by truth instead they are the same, but for what float32 cannot tell apart.
    assert torch.all((best - truth.topk(k, -1).values).abs() <= rounding.amax(-1, keepdim=True))
    assert torch.all((found - truth).abs() <= 0.05 * size + rounding)


@pytest.mark.parametrize("threads", [1, 3])
@given(
    rows=st.integers(1, 19),
    depth=st.sampled_from([1, 3, 4, 16, 17, 63, 130]),
    outputs=st.sampled_from([1, 2, 15, 16, 17, 31, 33, 64, 100, 257]),
    exact=st.integers(1, 12),
    bias=st.booleans(),
    scale=st.sampled_from([1e-20, 0.3, 1.0, 40.0]),
    seed=st.integers(0, 10_000),
)
def test_the_largest_are_exact(  # noqa: PLR0913, PLR0917 - what a head can be
    threads: int, rows: int, depth: int, outputs: int, exact: int, bias: bool, scale: float, seed: int
) -> None:
    """At any size, for inputs of any size, by a team of any size."""
    torch.manual_seed(seed)
    head = _head(depth, outputs, exact, bias=bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teams, "threads_for", lambda _: threads)
        check(head, scale * torch.randn(rows, depth))


@given(
    depth=st.sampled_from([1, 7, 64, 130, 1024]),
    exact=st.integers(1, 4),
    input_exponent=st.floats(-38, 38.4),
    output_exponent=st.floats(-20, 38.4),
    bias_exponent=st.floats(-20, 38.4),
    seed=st.integers(0, 10_000),
)
def test_numbers_of_any_size(
    depth: int, exact: int, input_exponent: float, output_exponent: float, bias_exponent: float, seed: int
) -> None:
    """Inputs, weights and biases up to what float32 holds, as long as no true output and no sum overflows."""
    torch.manual_seed(seed)
    assume(-25 < output_exponent - input_exponent < 38.4)
    head = ShortlistHead(depth, 100, exact=exact)
    with torch.no_grad():
        head.weight.copy_(
            10 ** (output_exponent - input_exponent) * (2 * torch.rand(100, depth, dtype=torch.float64) - 1)
        )
        head.bias.copy_(10**bias_exponent * (2 * torch.rand(100, dtype=torch.float64) - 1))
        h = (10**input_exponent * (2 * torch.rand(2, depth, dtype=torch.float64) - 1)).float()
        sums = nn.functional.linear(h.double().abs(), head.weight.double().abs(), head.bias.double().abs())
        assume(sums.max() < torch.finfo(torch.float32).max)
        check(head, h)
        bound = head.error_bound(h).double()
        error = (head(h) - true_outputs(head, h)).abs().amax(-1)
    assert torch.all(~bound.isfinite() | (error <= bound))


@given(
    rows=st.integers(1, 5),
    depth=st.sampled_from([1, 7, 64, 130]),
    outputs=st.sampled_from([1, 16, 33, 257]),
    bias=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_errors_stay_below_their_bound(rows: int, depth: int, outputs: int, bias: bool, seed: int) -> None:
    """Those of all outputs and of their logsumexp; and the bound is not far more than rounding explains."""
    torch.manual_seed(seed)
    head, h = _head(depth, outputs, 1, bias=bias), torch.randn(rows, depth)
    with torch.no_grad():
        found, truth, bound = head(h).double(), true_outputs(head, h), head.error_bound(h).double()
        size = h.double().norm(dim=-1) * head.weight.double().norm(dim=1).max()
    assert torch.all((found - truth).abs().amax(-1) <= bound)
    assert torch.all((found.logsumexp(-1) - truth.logsumexp(-1)).abs() <= bound)
    assert torch.all(bound <= 0.1 * size + 1e-4)


def test_a_row_without_a_bound_says_so() -> None:
    """One with a NaN; the others have theirs."""
    head, h = ShortlistHead(20, 100), torch.randn(2, 3, 20)
    h[1, 2, 5] = torch.nan
    with torch.no_grad():
        bound = head.error_bound(h)
    assert bound.shape == (2, 3)
    assert bound.isnan().nonzero().tolist() == [[1, 2]]


def test_close_outputs_are_told_apart() -> None:
    """Rows that differ by less than 8 bits hold are ranked as float32 ranks them, and few others are computed again."""
    torch.manual_seed(0)
    head = ShortlistHead(512, 8000, exact=4)
    with torch.no_grad():
        head.weight[4000:4100] = head.weight[0] * (1 + 1e-4 * torch.rand(100, 1))
        h = torch.tanh(torch.randn(8, 512)) + 2 * head.weight[0].sign()
        found, truth = head(h), true_outputs(head, h)
    assert torch.equal(found.topk(4).indices, truth.topk(4).indices)
    assert 8 * 100 <= head.refined <= 8 * 300


def test_it_is_the_bound_that_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the test above fails: outputs in 8 bits alone rank otherwise."""
    real = shortlist.run

    def without(h: Tensor, weight: Tensor, bias: Tensor | None, packed: shortlist.PackedHead, exact: int) -> object:
        packed.rows[1:] = 0.0
        return real(h, weight, bias, packed, exact)

    monkeypatch.setattr(shortlist, "run", without)
    with pytest.raises(AssertionError):
        test_close_outputs_are_told_apart()


def test_equal_outputs_are_all_computed() -> None:
    """Where all weights are alike every output may be the largest, and all are exact."""
    head = ShortlistHead(20, 100)
    with torch.no_grad():
        head.weight.fill_(0.25)
        head.bias.zero_()
        h = torch.randn(2, 20)
        torch.testing.assert_close(head(h), nn.functional.linear(h, head.weight))
    assert head.refined == 200


def test_zeros_give_the_bias() -> None:
    """Of an input of zeros, and of weights of zeros."""
    head = ShortlistHead(20, 100, exact=3)
    with torch.no_grad():
        assert torch.equal(head(torch.zeros(2, 20)), head.bias.expand(2, -1))
        head.weight.zero_()
        assert torch.equal(head(torch.randn(2, 20)), head.bias.expand(2, -1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_not_hidden(value: float) -> None:
    """In an input, weight or bias, it is where torch.nn.Linear has it, and other rows are as before."""
    h = torch.randn(3, 20)
    for place in ("input", "weight", "bias"):
        head, given_h = ShortlistHead(20, 100, exact=2), h.clone()
        with torch.no_grad():
            if place == "input":
                given_h[1, 4] = value
            elif place == "weight":
                head.weight[7, 3] = value
            else:
                head.bias[7] = value
            found, truth = head(given_h), nn.functional.linear(given_h, head.weight, head.bias)
        torch.testing.assert_close(found, truth, rtol=0.05, atol=0.05, equal_nan=True)


def _in_place(head: ShortlistHead) -> None:
    head.weight.mul_(-2.0)


def _replaced(head: ShortlistHead) -> None:
    head.weight = nn.Parameter(-2.0 * head.weight)


def _by_numpy(head: ShortlistHead) -> None:
    values = head.weight.detach().numpy()
    values *= -2.0


def _exchanged(head: ShortlistHead) -> None:
    head.weight.data = -2.0 * head.weight.data


def _bias(head: ShortlistHead) -> None:
    head.bias.detach().numpy()[:] = torch.randn(100).numpy()


@pytest.mark.parametrize("change", [_in_place, _replaced, _by_numpy, _exchanged, _bias])
def test_changed_parameters_are_noticed(change: object) -> None:
    """Whatever way they were changed between two calls."""
    head, h = _head(20, 100, 3), torch.randn(4, 20)
    with torch.no_grad():
        check(head, h)
        before = head(h)
        change(head)  # type: ignore[operator]
        assert not torch.equal(head(h), before)
    check(head, h)


#: An element that is none of the 128 samples of (200, 64) weights.
UNSAMPLED = (137, 7)


def _plant(weight: Tensor) -> None:
    """Make one output the largest for an input of ones, unseen by the samples."""
    before = _mark(weight)
    weight.detach()[UNSAMPLED] = 1000.0
    assert _mark(weight) == before


def _mark(weight: Tensor) -> int:
    values = weight.contiguous()
    return int(build.library().mark(values.data_ptr(), values.numel()))


def _element(head: ShortlistHead, _: Tensor) -> None:
    _plant(head.weight)


def _in_reused_memory(head: ShortlistHead, memory: Tensor) -> None:
    """As if the old parameter had died and another come to lie where it lay, at the same version."""
    version = head.weight._version
    del head.weight
    _plant(memory)
    head.weight = nn.Parameter(torch.from_numpy(memory.numpy()))
    assert (head.weight.data_ptr(), head.weight._version) == (memory.data_ptr(), version)


def _with_living_memory(head: ShortlistHead, memory: Tensor) -> None:
    """Another parameter over the same memory, changed as often as the first."""
    old = head.weight
    head.weight = nn.Parameter(old.data)
    _plant(memory)
    while head.weight._version < old._version:
        head.weight.mul_(1.0)
    assert (head.weight.data_ptr(), head.weight._version) == (memory.data_ptr(), old._version)


def _exchanged_for_reused_memory(head: ShortlistHead, memory: Tensor) -> None:
    """The same parameter with other memory at the old one's place."""
    version = head.weight._version
    head.weight.data = torch.zeros(1)
    _plant(memory)
    head.weight.data = torch.from_numpy(memory.numpy())
    assert (head.weight.data_ptr(), head.weight._version) == (memory.data_ptr(), version)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("change", [_element, _in_reused_memory, _with_living_memory, _exchanged_for_reused_memory])
def test_a_change_that_misses_the_samples_is_noticed(
    change: Callable[[ShortlistHead, Tensor], None], contiguous: bool
) -> None:
    """By torch's counter, or because the tensor or its memory is another one; in either memory order."""
    memory = torch.from_numpy(np.zeros((200, 64) if contiguous else (64, 200), np.float32))
    memory = memory if contiguous else memory.T
    memory.copy_(torch.rand(200, 64) * 0.1)
    head, h = ShortlistHead(64, 200, exact=1, bias=False), torch.ones(2, 64)
    head.weight = nn.Parameter(torch.from_numpy(memory.numpy()))
    with torch.no_grad():
        for _ in range(2):
            assert head(h).argmax(-1).ne(UNSAMPLED[0]).all()
        change(head, memory)
        assert head(h).argmax(-1).eq(UNSAMPLED[0]).all()
    check(head, h)


@pytest.mark.parametrize("contiguous", [True, False])
def test_weights_that_stand_are_not_packed_again(contiguous: bool) -> None:
    """In either memory order."""
    head, h = _head(20, 100, 3), torch.randn(4, 20)
    if not contiguous:
        head.weight = nn.Parameter(head.weight.detach().T.contiguous().T)
    with torch.no_grad():
        head(h)
        packed = head.__dict__["_packed"]
        head(h)
        assert head.__dict__["_packed"] is packed


def test_a_copy_leaves_the_original_packed() -> None:
    """Deep copies, pickles and torch.save while serving cost the next call nothing."""
    head, h = _head(20, 100, 3), torch.randn(4, 20)
    with torch.no_grad():
        head(h)
    packed = head.__dict__["_packed"]
    copies = (copy.deepcopy(head), pickle.loads(pickle.dumps(head)))  # noqa: S301 - our own
    torch.save(head, io.BytesIO())
    assert head.__dict__["_packed"] is packed
    assert not any("_packed" in other.__dict__ for other in copies)


def test_defaults_of_the_caller_change_nothing() -> None:
    """Another default type is of no effect on what is packed."""
    head, h = _head(20, 100, 3), torch.randn(4, 20)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        check(head, h)
    finally:
        torch.set_default_dtype(before)


def test_a_copy_packs_its_own_weights() -> None:
    """Copied and pickled heads give the same and follow their own weights."""
    head, h = _head(20, 100, 3), torch.randn(4, 20)
    with torch.no_grad():
        expected = head(h)
        for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):  # noqa: S301 - our own
            assert torch.equal(other(h), expected)
            other.weight.mul_(2.0)
            check(other, h)
        assert torch.equal(head(h), expected)


def test_it_shares_the_parameters_of_a_linear_layer() -> None:
    """Made of one, it has its parameters themselves, with the names that a state_dict has."""
    linear = nn.Linear(20, 100).eval()
    head = ShortlistHead.of(linear, exact=5)
    assert head.weight is linear.weight
    assert head.bias is linear.bias
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert not head.training
    assert "exact=5" in repr(head)
    assert ShortlistHead.of(nn.Linear(20, 100, bias=False)).bias is None


@pytest.mark.parametrize("shape", [(20,), (0, 20), (3, 0, 20), (2, 3, 20)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    """As torch.nn.Linear, empty batches too."""
    head, h = _head(20, 100, 1), torch.randn(shape)
    with torch.no_grad():
        assert head(h).shape == (*shape[:-1], 100)
        if h.numel():
            check(head, h)
            strided = h.new_empty(*shape, 2)[..., 0].copy_(h)
            assert torch.equal(head(strided), head(h))


def test_calls_that_it_does_not_serve_are_refused() -> None:
    """Gradients, other types, autocast, vmap and compilers get an error that says what to use."""
    head, h = ShortlistHead(20, 100), torch.randn(3, 20)
    with pytest.raises(RuntimeError, match=r"torch.nn.Linear"):
        head(h)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"torch.nn.Linear"):
            head(h.double())
        with torch.autocast("cpu"), pytest.raises(RuntimeError, match=r"torch.nn.Linear"):
            head(h)
        with pytest.raises(RuntimeError, match=r"torch.nn.Linear"):
            torch.func.vmap(head)(h)
        with pytest.raises(RuntimeError, match="19 features, expected 20"):
            head(h[:, :19])
        with pytest.raises(RuntimeError, match="0 features, expected 20"):
            head(torch.tensor(1.0))
        with pytest.raises(RuntimeError, match=r"torch.nn.Linear"):
            torch.compile(head, backend="eager")(h)
    with torch.inference_mode():
        assert head(h).shape == (3, 100)


def test_another_layer_than_a_linear_one_is_refused() -> None:
    """It says what it was given, and not which attribute that lacks."""
    with pytest.raises(TypeError, match=r"^the head is a Sequential, expected a torch\.nn\.Linear$"):
        ShortlistHead.of(nn.Sequential(nn.Linear(4, 8)))
