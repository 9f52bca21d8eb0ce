"""The CPU kernel under autocast to bf16: both passes compute what their arithmetic says, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import NO_TILES, PARTS, QUICK, TILES, built_for, run_by
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_defects import PAIRS
from planted_kernels import NOTHING, KernelPrograms
from recurrences import DEVICE
from torch import Tensor, nn

from kernels import LSTM
from kernels.cpu import build, fused, packing
from kernels.cpu.packing import KEPT, TRAINED
from kernels.layers import KEPT_FOR_TRAINING

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs"),
    pytest.mark.skipif("avx512_bf16" not in build.cpu_flags().split(), reason="no AVX512-BF16 here"),
]

#: What multiplies where the processor has tiles, and where it has none.
HERE = "amx-bf16" if "amx_bf16" in build.cpu_flags().split() else "avx512-bf16"
#: Error by norm: that of rounding to bf16 once, since sums in another order may round a number to its other neighbour.
ONCE = 2.0**-8
#: Largest gradient error of a right implementation in bf16: `GRADIENT_ERROR` of `kernels.tools.problems`.
BF16 = 8e-2


def bf16(value: Tensor) -> Tensor:
    """Numbers rounded to bf16, whose gradient passes as it is."""
    return value + (value.detach().float().bfloat16().double() - value.detach())


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        del ctx
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        del ctx
        return gradient.float().bfloat16().double()


def by_the_equations(
    x: Tensor, weights: list[Tensor], state: list[Tensor], lengths: Tensor, resets: Tensor, *, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction in float64, the factors of all products rounded to bf16; x is (steps, batch, features)."""
    weight_ih, weight_hh, *biases = weights
    h, c = state
    outputs: list[Tensor] = [h] * len(x)
    for step in range(len(x) - 1, -1, -1) if backward else range(len(x)):
        anew, inside = resets[step][:, None], (step < lengths)[:, None]
        h_before, c_before = torch.where(anew & inside, 0.0, h), torch.where(anew & inside, 0.0, c)
        gates = bf16(torch.where(inside, x[step], 0.0)) @ bf16(weight_ih).T + bf16(h_before) @ bf16(weight_hh).T
        i, f, g, o = _RoundedGradient.apply(gates + sum(biases)).chunk(4, 1)
        c_new = f.sigmoid() * c_before + i.sigmoid() * g.tanh()
        h_new = o.sigmoid() * c_new.tanh()
        outputs[step] = torch.where(inside, h_new, 0.0)
        h, c = torch.where(inside, h_new, h), torch.where(inside, c_new, c)
    return torch.stack(outputs), h, c


def error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm, which counts as at least 0.1 an element."""
    value, expected = value.detach(), expected.detach()
    difference = (value.double() - expected.double()).norm()
    return float(difference / max(float(expected.norm()), 0.1 * max(expected.numel(), 1) ** 0.5))


@pytest.mark.parametrize(
    ("target", "threads", "instructions"),
    [(build.NATIVE, 1, HERE), (build.NATIVE, 3, HERE), (PARTS, 2, "avx512-bf16"), (TILES, 2, "amx-bf16")],
)
@settings(max_examples=25)
@given(
    batch=st.integers(1, 40), steps=st.integers(1, 6), features=st.sampled_from([1, 5, 16, 33, 70]),
    hidden=st.sampled_from([1, 3, 8, 15, 16, 17, 33, 64, 70]), backward=st.booleans(), batch_first=st.booleans(),
    bias=st.booleans(), masked=st.booleans(), begins=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_both_passes_are_their_arithmetic(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str, threads: int, instructions: str, batch: int, steps: int, features: int, hidden: int, backward: bool,
    batch_first: bool, bias: bool, masked: bool, begins: bool, seed: int,
) -> None:  # fmt: skip
    """Results and every gradient are those of the equations with factors rounded to bf16, whatever the call."""
    torch.manual_seed(seed)
    directions = 2 if backward else 1
    lstm = LSTM(
        features, hidden, bias=bias, batch_first=batch_first, bidirectional=backward, implementation="cpu-fused"
    )
    x, state = torch.randn(steps, batch, features), torch.randn(2, directions, batch, hidden)
    lengths = torch.randint(0, steps + 1, (batch,)) if masked else torch.full((batch,), steps)
    resets = torch.rand(steps, batch) < (0.3 if begins else 0.0)
    by = [torch.randn(*shape).bfloat16() for shape in ((steps, batch, directions * hidden), *[state[0].shape] * 2)]
    given_x = x.masked_fill((torch.arange(steps)[:, None] >= lengths)[:, :, None], float("nan"))

    leaves = [value.clone().requires_grad_() for value in (given_x, *state)]
    with built_for(target, threads), torch.autocast("cpu", torch.bfloat16):
        # Not what `choices` has, which may be kept from another build.
        assert fused.instructions(TRAINED) == instructions
        fed = leaves[0].transpose(0, 1) if batch_first else leaves[0]
        begun = (resets.T if batch_first else resets) if begins else None
        output, (h_n, c_n) = lstm(fed, (leaves[1], leaves[2]), lengths if masked else None, begun)
        found = [output.transpose(0, 1) if batch_first else output, h_n, c_n]
        assert {value.dtype for value in found} == {torch.bfloat16}
        total = sum((value.float() * weight.float()).sum() for value, weight in zip(found, by, strict=True))
        found += torch.autograd.grad(total, [*leaves, *lstm.parameters()])

    wide = [value.double().requires_grad_() for value in (x, *state)]
    weights = [value.detach().double().requires_grad_() for value in lstm.parameters()]
    each = len(weights) // directions
    inside = torch.arange(steps)[:, None] < lengths
    # The direction that walks backward leaves a sequence at its first step.
    after = torch.cat([(resets & inside)[1:], torch.zeros(1, batch, dtype=torch.bool)])
    parts = [
        by_the_equations(
            wide[0], weights[d * each : (d + 1) * each], [wide[1][d], wide[2][d]], lengths, after if d else resets,
            backward=d == 1,
        )
        for d in range(directions)
    ]  # fmt: skip
    expected = [torch.cat([part[0] for part in parts], 2), *(torch.stack([p[n] for p in parts]) for n in (1, 2))]
    total = sum((value * weight.double()).sum() for value, weight in zip(expected, by, strict=True))
    expected += torch.autograd.grad(total, [*wide, *weights])
    for number, (value, right) in enumerate(zip(found, expected, strict=True)):
        assert error(value, right) < ONCE, number


def _twins(**options: object) -> tuple[nn.LSTM, LSTM, Tensor]:
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(6, 20, 2, bidirectional=True), LSTM(6, 20, 2, bidirectional=True, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, torch.randn(7, 3, 6)


def test_training_is_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of two layers are within bf16's limits of float32's, and memory is written before it is read."""
    theirs, ours, x = _twins(implementation="cpu-fused")
    expected = torch.autograd.grad(theirs(x)[0].square().sum(), list(theirs.parameters()))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            output = ours(x)[0]
        found = torch.autograd.grad(output.float().square().sum(), list(ours.parameters()))
    finally:
        torch.use_deterministic_algorithms(False)
    assert max(map(error, found, expected)) < BF16


def test_auto_takes_it_where_it_multiplies_bf16_itself() -> None:
    """`auto` says what multiplies, in both modes."""
    _, lstm, x = _twins()
    with torch.autocast("cpu", torch.bfloat16):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                lstm(x)
            kinds = {(choice.implementation, choice.instructions) for choice in lstm.choices}
            assert kinds == {("cpu-fused", HERE)}


def test_without_the_instruction_it_is_refused_by_name() -> None:
    """A build without products of bf16 says so, and what serves instead."""
    _, lstm, x = _twins(implementation="cpu-fused")
    with (
        built_for(f"{QUICK} -DWIDEN", 1),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"no products of bf16 \(AVX512-BF16\).*use .*'vendor'"),
    ):
        # Another size than in other tests, whose answer would be kept.
        lstm(x[:5])


def test_other_types_of_autocast_stay_torch_s_own() -> None:
    """The kernel has no float16, so a call by name is refused as before."""
    _, lstm, x = _twins(implementation="cpu-fused")
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="computes in float32, these are float16"),
    ):
        lstm(x)


def test_inference_is_that_of_weights_kept_in_bf16() -> None:
    """Without gradients the results are those of bf16 weights, rounded, and calls without autocast stay in float32."""
    _, lstm, x = _twins(implementation="cpu-fused")
    _, kept, _ = _twins(implementation="cpu-fused", weight_storage="bf16")
    with torch.inference_mode():
        before, expected = lstm(x), kept(x)
        for _ in range(2):  # the second by what the first prepared
            with torch.autocast("cpu", torch.bfloat16):
                output, (h_n, c_n) = lstm(x.bfloat16().float())
                rounded, _ = lstm(x.bfloat16())
            after = lstm(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = lstm(x)
    assert torch.equal(found[0], expected[0].bfloat16())
    assert torch.equal(found[1][1], expected[1][1].bfloat16())
    assert torch.equal(rounded, output)
    assert h_n.dtype == c_n.dtype == torch.bfloat16
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize(("threads", "batch"), [(1, 3), (3, 1), (3, 3), (3, 40)])
@pytest.mark.parametrize("kinds", ["", "x", "h", "c", "xhc"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inference_like_an_earlier_call_takes_the_short_way(
    threads: int, batch: int, kinds: str, batch_first: bool
) -> None:
    """It gives rounded what bf16 weights give, whichever of x, h and c are bf16 too, in a team of any size."""
    torch.manual_seed(1)
    lstm = LSTM(6, 20, 2, bidirectional=True, batch_first=batch_first, implementation="cpu-fused")
    kept = LSTM(
        6, 20, 2, bidirectional=True, batch_first=batch_first, implementation="cpu-fused", weight_storage="bf16"
    )
    kept.load_state_dict(lstm.state_dict())
    shape = (batch, 7, 6) if batch_first else (7, batch, 6)
    wide = [value.bfloat16().float() for value in (torch.randn(shape), *torch.randn(2, 4, batch, 20).unbind())]
    broken = wide[0][0] if batch_first else wide[0][:, 0]
    broken[:] = float("nan") if batch > 1 else 0.0
    x, *state = (v.bfloat16() if kind in kinds else v for kind, v in zip("xhc", wide, strict=True))
    with built_for(build.NATIVE, threads), torch.no_grad():
        for hx, given in ((None, None), (tuple(state), tuple(wide[1:]))):
            expected = kept(wide[0], given)
            with torch.autocast("cpu", torch.bfloat16):
                found = lstm(x, hx)
                taken, choices = lstm.__dict__["_kept_cast"].at_once(lstm._parameters, x, hx, batch_first)
            assert choices is lstm.choices
            for results in (found, taken):
                for value, right in zip((results[0], *results[1]), (expected[0], *expected[1]), strict=True):
                    assert value.dtype == torch.bfloat16
                    torch.testing.assert_close(value, right.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert 0 < expected[0].isfinite().sum() <= expected[0].numel() * (1 - 1 / batch if batch > 1 else 1)


def test_the_short_way_of_inference_takes_no_other_call() -> None:
    """Without autocast, with another type, switched off inside, with gradients, or with weights dropped or changed."""
    _, lstm, x = _twins(implementation="cpu-fused")

    def taken(value: Any = x, hx: Any = None) -> bool:
        return lstm.__dict__["_kept_cast"].at_once(lstm._parameters, value, hx, False) is not None

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lstm(x)
        assert taken()
        with torch.autocast("cpu", enabled=False):
            assert not taken()
            assert lstm(x)[0].dtype == torch.float32
        assert not taken(x.half())
        assert not taken(x.double())
        assert not taken(x, (torch.zeros(4, 3, 20).half(), torch.zeros(4, 3, 20)))
        assert lstm.__dict__["_kept_cast"].step(lstm._parameters, x[0], *torch.zeros(2, 4, 3, 20), None) is None
        changes = {
            "counted": lambda: lstm.weight_hh_l0.mul_(2.0),
            "behind torch": lambda: lstm.weight_ih_l1.data.mul_(2.0),
            "a bias, read where it lies": lambda: lstm.bias_ih_l1.data.fill_(1.0),
            "nothing": packing.forget,
        }
        for name, change in changes.items():
            before, _ = lstm(x)
            change()
            assert taken() is name.startswith("a bias"), name
            assert torch.equal(lstm(x)[0], before) is (name == "nothing"), name
        with torch.enable_grad():
            assert not taken()
    with torch.no_grad():
        assert not taken()
        with torch.autocast("cpu", torch.float16):
            assert not taken()


def test_changed_weights_are_packed_anew() -> None:
    """A step of an optimizer, or a change behind torch's counter, is in the next call's results and gradients."""
    _, lstm, x = _twins(implementation="cpu-fused")
    found = []
    for change in ("nothing", "counted", "data"):
        with torch.no_grad():
            if change == "counted":
                lstm.weight_hh_l0.mul_(2.0)
            elif change == "data":
                lstm.weight_hh_l0.data.mul_(2.0)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = lstm(leaf)[0]
        found.append((output.detach(), *torch.autograd.grad(output.float().sum(), leaf)))
    for earlier, later in itertools.pairwise(found):
        assert not any(map(torch.equal, earlier, later))


def test_calls_like_an_earlier_one_take_the_short_way() -> None:
    """They are bit for bit those of the long way, and no call under another autocast or on another type is taken."""
    _, lstm, x = _twins(implementation="cpu-fused")
    state = (torch.randn(4, 3, 20).requires_grad_(), torch.randn(4, 3, 20))
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        for way in ("long", "short"):
            leaf = x.clone().requires_grad_()
            kept = lstm.__dict__.get("_kept_training_cast")
            taken = kept and kept.at_once(lstm._parameters, leaf, state, False)
            assert bool(taken) is (way == "short")
            output, (h_n, c_n) = taken[0] if taken else lstm(leaf, state)
            total = output.float().sin().sum() + h_n.float().sum() + c_n.float().square().sum()
            gradients = torch.autograd.grad(total, [leaf, state[0], *lstm.parameters()])
            found.append((output.detach(), h_n.detach(), c_n.detach(), *gradients))
        assert kept.at_once(lstm._parameters, x.bfloat16(), None, False) is None
    assert all(map(torch.equal, *found))
    assert kept.at_once(lstm._parameters, x, None, False) is None
    with torch.autocast("cpu", torch.float16):
        assert kept.at_once(lstm._parameters, x, None, False) is None


def test_training_with_and_without_autocast_in_turns_is_each_its_own() -> None:
    """Each takes only what it settled itself, in its later calls too."""
    theirs, lstm, x = _twins(implementation="cpu-fused")
    settled = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert lstm(x)[0].dtype == torch.bfloat16
        torch.testing.assert_close(lstm(x)[0], theirs(x)[0])
        settled.append([lstm.__dict__[name] for name in KEPT_FOR_TRAINING])
    assert all(one is other for one, other in zip(*settled, strict=True))


@pytest.mark.parametrize("frozen", ["_l0", "_l1"])
def test_a_frozen_layer_needs_no_other_part(frozen: str) -> None:
    """Training compiles one part of the kernel, and a layer that does not train gives the same in all calls."""
    _, lstm, x = _twins(implementation="cpu-fused")
    for name, value in lstm.named_parameters():
        value.requires_grad_(frozen not in name)
    asked = set()

    def asking(*, kept: int | None = None) -> Any:
        asked.add(kept)
        return build.library(kept=kept)

    with run_by(asking, 1), torch.autocast("cpu", torch.bfloat16):
        outputs = [lstm(x)[0] for _ in range(2)]
    assert torch.equal(*outputs)
    assert asked - {None} == {KEPT[TRAINED][0]}
    assert all(
        (torch.autograd.grad(outputs[1].sum(), value, retain_graph=True)[0] != 0).any()
        for value in lstm.parameters()
        if value.requires_grad
    )


#: Gradients of a layer under autocast, from a given state: of a batch of enough rows for several parts, whose input is
#: projected in each step, and of one whose input is projected before.
_LAYER = """
import torch
from torch import nn
from kernels.lstm import LSTM
torch.manual_seed(0)
theirs = nn.LSTM(5, 21, bidirectional=True)
ours = LSTM(5, 21, bidirectional=True, implementation="cpu-fused")
ours.load_state_dict(theirs.state_dict())
worst = 0.0
for batch, steps in ((9, 60), (4, 7)):
    x, state = torch.randn(steps, batch, 5).requires_grad_(), torch.randn(2, 2, batch, 21).unbind()
    found = []
    for lstm in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16, enabled=lstm is ours):
            output = lstm(x, state)[0]
        found.append(torch.autograd.grad(output.float().sin().sum(), [x, *lstm.parameters()]))
    worst = max(worst, *(float((value - right).norm() / right.norm()) for right, value in zip(*found)))
sys.exit(0 if worst < 8e-2 else 7)
"""


@pytest.mark.parametrize("name", [NOTHING, *PAIRS])
def test_a_planted_defect_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip in the products of pairs makes an error beyond bf16's limit."""
    code = programs.run_planted(_LAYER, tmp_path, "pairs", name, NO_TILES)
    assert code == 0 if name == NOTHING else code not in (0, 1)


def test_a_weight_that_autocast_rounds_goes_to_torchs_own() -> None:
    """A parametrization's products are bfloat16 under autocast, and the kernel reads float32."""
    lstm, x = LSTM(8, 8), torch.randn(3, 2, 8)
    nn.utils.parametrize.register_parametrization(lstm, "weight_hh_l0", _LowRank())
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = lstm(x)
    assert [choice.implementation for choice in lstm.choices] == ["vendor"]
    assert output.dtype == torch.bfloat16
    assert torch.isfinite(output).all()


class _LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, left: Tensor) -> Tensor:
        return left @ self.right


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_explain_says_what_runs(autocast: bool, gradients: bool) -> None:
    """Inside autocast without a type, and outside with the type that it would be."""
    lstm, x = LSTM(5, 6), torch.randn(3, 2, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(gradients):
        lstm(x)
        inside = lstm.explain(2, 3, training=gradients)
    outside = lstm.explain(2, 3, training=gradients, dtype=torch.bfloat16 if autocast else None)
    assert lstm.choices == (inside,) == (outside,)


def test_a_single_weight_changed_behind_torch_is_seen_under_autocast() -> None:
    """In a long call all weights are looked at, as in float32, and not 128 samples of them."""
    lstm, x = LSTM(300, 300, implementation="cpu-fused"), torch.randn(100 * torch.get_num_threads(), 1, 300)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before, _ = lstm(x)
        lstm.weight_hh_l0.data[37, 41] = 50.0
        after, _ = lstm(x)
    assert not torch.equal(before, after)
