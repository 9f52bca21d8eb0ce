"""Products of float32 by sums: right at every size, as precise as products, and left alone where they would not be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import FLAGS, QUICK, built_for
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_defects import SUMMED
from planted_kernels import BESIDE, NOTHING, KernelPrograms
from recurrences import DEVICE, Sizes, assert_close, errors_backward, errors_forward, recurrences

from bench.analysis import roofline
from kernels import LSTM, dispatch
from kernels.cpu import build, fused

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs"),
    pytest.mark.skipif("avx512f" not in FLAGS, reason="sums are for AVX-512"),
]

#: Products by sums wherever there are three rows or more, on any processor; and nowhere.
SUMS, PRODUCTS = f"{QUICK} -DBY_SUMS=1", f"{QUICK} -DBY_SUMS=0"
#: What multiplies by products, and by sums; a run allows the faster rate by that name.
NAMES = ("avx512-fma", roofline.SUMS)


@pytest.mark.parametrize("threads", [1, 2])
@settings(max_examples=60)
@given(
    sizes=recurrences(
        hidden=st.sampled_from([1, 7, 8, 16, 21, 24, 48, 70]),
        dtypes=(torch.float32,),
        batch=st.sampled_from([3, 4, 5, 6, 7, 11, 17]),
        resets=st.booleans(),
    )
)
def test_a_recurrence_by_sums_is_the_loop_s(threads: int, sizes: Sizes) -> None:
    """Outputs, states and gradients are those of the equations, also where rows or units are no whole groups."""
    with built_for(SUMS, threads):
        assert_close(errors_forward(sizes, fused), torch.float32)
        assert_close(errors_backward(sizes, fused), torch.float32)


@pytest.mark.parametrize("extra", ["", " -DNEAR_BYTES=0"])
@settings(max_examples=40)
@given(
    batch=st.integers(3, 13), features=st.integers(1, 40), hidden=st.integers(1, 40), steps=st.integers(1, 5),
    threads=st.integers(1, 2), seed=st.integers(0, 999),
)  # fmt: skip
def test_a_layer_by_sums_is_the_loop_s(
    extra: str, batch: int, features: int, hidden: int, steps: int, threads: int, seed: int
) -> None:
    """Layers in both directions, projected in the step or before it, with the next block asked for and without."""
    torch.manual_seed(seed)
    truth = LSTM(features, hidden, 2, bidirectional=True, implementation="loop").double()
    ours = LSTM(features, hidden, 2, bidirectional=True, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    x = torch.randn(steps, batch, features)
    with built_for(SUMS + extra, threads), torch.inference_mode():
        found, state = ours(x)
        expected, expected_state = truth(x.double())
    for value, right in zip((found, *state), (expected, *expected_state), strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=2e-6)


def _errors(target: str, features: int, hidden: int, x: torch.Tensor, by: torch.Tensor | None = None) -> float:
    """Root mean square of the error of 8 sequences of so many features, whose weights are multiplied by `by`."""
    torch.manual_seed(1)
    truth = LSTM(features, hidden, implementation="loop").double()
    if by is not None:
        with torch.no_grad():
            truth.weight_ih_l0 *= by
    ours = LSTM(features, hidden, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    for own, other in zip(truth.parameters(), ours.parameters(), strict=True):
        own.data.copy_(other.data)
    with built_for(target, 1), torch.inference_mode():
        found = ours(x)[0].double()
        assert bool(found.isfinite().all())
        return float((found - truth(x.double())[0]).square().mean().sqrt())


#: Inputs by name, and what the weights of each feature are multiplied with.
FEATURES = 256
INPUTS = {
    "normal": (lambda x: x, None),
    "positive": (lambda x: 1 + 0.1 * x, None),
    "tiny": (lambda x: 1e-9 * x, None),
    "huge": (lambda x: 1e15 * x, torch.full((FEATURES,), 1e-15)),
    # Whose quotient of squares is below all floats.
    "far apart": (lambda x: 3e10 * x, torch.full((FEATURES,), 1e-11)),
    # Signs that take turns as those of sums do, so that what is taken off grows with each run.
    "in step": (
        lambda x: (1 + 0.1 * x) * torch.where(torch.arange(FEATURES) % 32 < 16, 1, (-1) ** torch.arange(FEATURES)),
        None,
    ),
    "one of many": (lambda x: (x == x.amax(-1, keepdim=True)).float(), None),
    # A few features with large values and small weights: by sums they would cost all others their digits.
    "scaled": (
        lambda x: x.clamp(-2, 2) * torch.where(torch.arange(FEATURES) % 4 == 0, 1e4, 1.0),
        torch.where(torch.arange(FEATURES) % 4 == 0, 1e-4, 1.0),
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_sums_are_as_precise_as_products(name: str) -> None:
    """The error is at most 2.5 times that of products, which the estimate allows, and mostly less than twice."""
    change, by = INPUTS[name]
    torch.manual_seed(0)
    x = change(torch.randn(20, 8, FEATURES))
    sums, products = (_errors(target, FEATURES, 64, x, by) for target in (SUMS, PRODUCTS))
    assert sums <= 2.5 * products


def test_sums_run_where_they_are_asked_for() -> None:
    """Roundoffs of normal inputs are others by sums than by products, so the tests here test sums."""
    lstm = LSTM(64, 64, implementation="cpu-fused")
    found = []
    for target in (SUMS, PRODUCTS):
        with built_for(target, 1), torch.inference_mode():
            found.append(lstm(torch.randn(5, 8, 64, generator=torch.Generator().manual_seed(0)))[0])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif("AMD" not in Path("/proc/cpuinfo").read_text(), reason="others take sums where they are told to")
@pytest.mark.parametrize(("batch", "hidden", "by_sums"), [(4, 64, True), (4, 40, False), (2, 64, False)])
def test_this_processor_takes_sums_where_they_pay(batch: int, hidden: int, by_sums: bool) -> None:
    """A processor of AMD's multiplies three rows of 48 units or more by sums, and fewer by products."""
    lstm = LSTM(hidden, hidden, implementation="cpu-fused")
    found = []
    for target in (QUICK, PRODUCTS):
        with built_for(target, 1), torch.inference_mode():
            found.append(lstm(torch.randn(5, batch, hidden, generator=torch.Generator().manual_seed(0)))[0])
            assert fused.instructions("fp32", hidden, batch) == NAMES[target == QUICK and by_sums]
    assert torch.equal(*found) != by_sums


@pytest.fixture
def new_choices() -> Iterator[None]:
    """No choice is kept from another build, nor for one."""
    dispatch.forget()
    yield
    dispatch.forget()


@pytest.mark.usefixtures("new_choices")
@pytest.mark.parametrize(
    ("target", "storage", "batch", "name"),
    [(SUMS, "fp32", 3, 1), (SUMS, "fp32", 2, 0), (PRODUCTS, "fp32", 3, 0), (f"{SUMS} -DWIDEN", "int8", 3, 0)],
)
def test_what_multiplies_is_told(target: str, storage: str, batch: int, name: int) -> None:
    """Sums are told where the kernel takes them: of float32, where they are not switched off, and of enough rows."""
    with built_for(target, 1):
        assert fused.instructions(storage, 64, batch) == NAMES[name]
        if "WIDEN" not in target:
            lstm = LSTM(64, 64, implementation="cpu-fused")
            assert lstm.explain(batch, 5).instructions == NAMES[name]


@pytest.mark.usefixtures("new_choices")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batches", [(1, 4), (4, 1)])
def test_a_later_call_of_other_rows_tells_its_own(batches: tuple[int, int], batch_first: bool, training: bool) -> None:
    """Calls that an earlier one prepared, and steps: what multiplies is that of their own rows."""
    with built_for(SUMS, 1), torch.inference_mode(not training):
        lstm = LSTM(64, 64, num_layers=2, batch_first=batch_first, implementation="cpu-fused")
        for batch in batches * 3:
            lstm(torch.randn((batch, 7, 64) if batch_first else (7, batch, 64)))
            assert [choice.instructions for choice in lstm.choices] == [NAMES[batch == 4]] * 2
        for batch in () if training else batches:
            lstm.step(torch.randn(batch, 64), (torch.zeros(2, batch, 64), torch.zeros(2, batch, 64)))
            assert [choice.instructions for choice in lstm.choices] == [NAMES[batch == 4]] * 2


def test_a_row_of_zeros_stays_exact_and_a_broken_one_alone() -> None:
    """A row of zeros is multiplied exactly; what is no number or infinite spoils its own sequence and no other."""
    lstm = LSTM(64, 64, bias=False, implementation="cpu-fused")
    x = torch.randn(3, 6, 64)
    x[:, 1] = 0
    clean = x.clone()
    x[0, 3, 5], x[0, 4, 5] = float("nan"), float("inf")
    with built_for(SUMS, 1), torch.inference_mode():
        found, expected = lstm(x)[0], lstm(clean)[0]
    assert not found[:, 1].any()
    assert bool(found[:, 3].isnan().all())
    for row in (0, 2, 5):
        torch.testing.assert_close(found[:, row], expected[:, row], rtol=1e-5, atol=1e-6)


#: Rows in whole groups and not, with features whose weights make up for them, and states beyond all bounds; and one
#: sequence, whose steps are projected before they come.
_PROBE = """
import torch
from kernels.lstm import LSTM
wrong = 0.0
for features, hidden, batch in ((21, 50, 7), (64, 64, 4), (256, 64, 8)):
    torch.manual_seed(0)
    truth, ours = (LSTM(features, hidden, implementation=name) for name in ("loop", "cpu-fused"))
    scale = torch.where(torch.arange(features) % 4 == 0, 1e4 if features == 256 else 1.0, 1.0)
    with torch.no_grad():
        truth.weight_ih_l0 /= scale
    ours.load_state_dict(truth.state_dict())
    truth = truth.double()
    for x in (torch.randn(4, batch, features) * scale, 0.5 + torch.rand(4, batch, features) * scale):
        h0, c0 = torch.randn(1, batch, hidden), torch.zeros(1, batch, hidden)
        h0[0, 1] *= 1e-20 if features == 21 else 1
        h0[0, 2] *= 1e15 if features == 64 else 1
        h0[0, 3, 5] = float("inf") if features == 64 else 1
        with torch.inference_mode():
            found, expected = ours(x, (h0, c0))[0], truth(x.double(), (h0.double(), c0.double()))[0]
        error = float((found.double() - expected).abs().max())
        wrong = max(wrong, error if error == error else 1.0)
torch.manual_seed(0)
truth, ours = (LSTM(64, 64, implementation=name) for name in ("loop", "cpu-fused"))
ours.load_state_dict(truth.state_dict())
x = torch.randn(70, 1, 64)
with torch.inference_mode():
    wrong = max(wrong, float((ours(x)[0].double() - truth.double()(x.double())[0]).abs().max()))
one_of_many = torch.eye(512)[:24].view(3, 8, 512)
torch.manual_seed(0)
truth, ours = (LSTM(512, 64, bias=False, implementation=name) for name in ("loop", "cpu-fused"))
ours.load_state_dict(truth.state_dict())
with torch.inference_mode():
    sparse = float((ours(one_of_many)[0].double() - truth.double()(one_of_many.double())[0]).abs().max())
print(wrong, sparse)
if wrong > 1e-5 or sparse > LIMIT:
    sys.exit(7)
"""


@pytest.mark.parametrize("name", [NOTHING, *SUMMED])
def test_a_planted_defect_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip in what is taken off again, and in what keeps rows from being summed, is seen."""
    target, before = f"{build.NATIVE} -DBY_SUMS=1", {BESIDE: "0"}
    code = programs.run_planted(_PROBE.replace("LIMIT", "2e-8"), tmp_path, "sums", name, target, **before)
    assert code == 0 if name == NOTHING else code not in {0, 1}
