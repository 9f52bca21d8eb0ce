"""The head as built for several kinds of processors: what multiplies, how deep its sums may be, and defects in it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import HEADS, NARROW_VNNI, NO_VNNI, head_built_for
from planted_kernels import DEFECT, NOTHING, planted_sources
from recurrences import DEVICE
from test_kernels_head import check, true_outputs
from torch import Tensor

from kernels import ShortlistHead
from kernels.cpu import build, shortlist
from kernels.tools import sanitize
from seq2seq.execution.variants import VARIANTS

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the head is for CPUs"),
    pytest.mark.skipif(bool(shortlist.hindrance()), reason=str(shortlist.hindrance())),
]

#: What multiplies, by what a build is for; the rest is this machine's.
NAMES = {
    "-march=x86-64-v3": "avx2-int16",
    "-march=x86-64-v3 -DEMULATED_VNNI": "avx-vnni",
    NARROW_VNNI: "avx-vnni",
    NO_VNNI: "avx512-int16",
}


@pytest.fixture(params=HEADS, scope="module", autouse=True)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to multiply that can run here."""
    with head_built_for(request.param):
        yield request.param


def _close_by_h() -> tuple[ShortlistHead, Tensor]:
    """Outputs that differ by what rounding h leaves, which alone errs: 8 bits hold these weights as they are."""
    torch.manual_seed(0)
    head, h = ShortlistHead(32, 2000, exact=4), torch.randn(1, 32)
    h[0, 0] = 60.0
    levels = 127 if shortlist.instructions().endswith("-vnni") else 32767
    with torch.no_grad():
        head.weight.copy_(torch.randint(-127, 128, head.weight.shape))
        head.weight[:, 1] = 127.0
        spread = 0.3 / levels * h.norm() * head.weight.norm(dim=1)
        head.bias.zero_()
        head.bias.copy_(spread * torch.randn(2000) - true_outputs(head, h)[0])
    return head, h


def test_what_rounding_of_h_leaves_is_in_the_bound() -> None:
    """Outputs that h's integers cannot tell apart are computed in float32."""
    head, h = _close_by_h()
    check(head, h)
    assert head.refined > head.exact


def _deep() -> tuple[ShortlistHead, Tensor]:
    """The largest sums of the deepest products, of an output that is not among the largest."""
    head, h = ShortlistHead(140_000, 2, bias=False), torch.ones(1, 140_000)
    with torch.no_grad():
        head.weight[0], head.weight[1] = 1.0, 0.5
    return head, h


def test_deep_sums_stay_in_32_bits() -> None:
    """By h in fewer levels, the deeper they are."""
    head, h = _deep()
    check(head, h)
    assert head.refined == 1


def test_no_error_passes_its_bound() -> None:
    """Of many outputs of many rows."""
    torch.manual_seed(0)
    head, h = ShortlistHead(64, 4000), torch.randn(16, 64)
    with torch.no_grad():
        assert torch.all((head(h) - true_outputs(head, h)).abs().amax(-1) <= head.error_bound(h))


def _widely_rounded(size: float) -> tuple[ShortlistHead, Tensor]:
    """Outputs of two vectors that integers rank the other way: 5 is 214 and becomes 152, 40 is 204 and becomes 255.

    All sums on the way to them rise, so none is larger than the last.
    """
    head, h = ShortlistHead(129, 64, bias=False), torch.full((1, 129), size / 1e3)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[5], head.weight[5, 0] = 1.2 * 0.4e3, 1.2 * 127e3
        head.weight[40], head.weight[40, 0] = 0.6e3, 127e3
    return head, h


def test_the_largest_may_be_far_below_others_in_integers() -> None:
    """By its own bound and by that of others, so that a whole vector is skipped only below both."""
    head, h = _widely_rounded(1.0)
    check(head, h)
    with torch.no_grad():
        assert head(h).argmax() == 5


def test_an_output_that_overflows_in_integers_alone_is_computed_in_float32() -> None:
    """255 becomes infinite at this size, which the true 204 is not."""
    head, h = _widely_rounded(1.45e36)
    check(head, h)
    with torch.no_grad():
        assert head(h).argmax() == 5


def test_sums_that_overflow_when_scaled_leave_exact_outputs() -> None:
    """Large inputs by small weights, whose true outputs are finite, have them all in float32 and no bound."""
    torch.manual_seed(1)
    head, h = ShortlistHead(1024, 400, bias=False), torch.full((1, 1024), 1e34)
    with torch.no_grad():
        head.weight.normal_(0.0, 1e-6)
        head.weight[0], head.weight[1] = 1e-4, -1e-4
        # Float32 resolves these outputs to 1e-6 of themselves.
        head.weight[2:, 0] = 0.2 * (1 + 1e-3 * torch.randn(398))
        truth = true_outputs(head, h)
        assert head(h).argmax() == truth.argmax()
        assert head.refined == 400
        assert head.error_bound(h).isnan()
    check(head, h)


def test_small_inputs_by_large_weights_are_not_lost() -> None:
    """Nor is the output that is not among the largest."""
    head, h = ShortlistHead(8, 2), torch.full((1, 8), 1e-31)
    with torch.no_grad():
        head.weight[:], head.bias[:] = 1e31, torch.tensor([0.0, 100.0])
        torch.testing.assert_close(head(h), torch.tensor([[8.0, 108.0]]))


#: Code of the head, what it becomes, wrong where PLANTED is true, and the test that has to fail then.
DEFECTS = {
    "a tenth of the bound": (
        "return size_of(",
        "return (PLANTED ? 0.1f : 1.0f) * size_of(",
        test_no_error_passes_its_bound,
    ),
    "h without its rest": (
        "rest(row.rest)",
        "rest(PLANTED ? 0.0f : row.rest)",
        test_what_rounding_of_h_leaves_is_in_the_bound,
    ),
    "all levels at any depth": (
        "most = levels(depth);",
        "most = PLANTED ? Products::MOST : levels(depth);",
        test_deep_sums_stay_in_32_bits,
    ),
    "vectors skipped by their lower bound": (
        "best.back() - most -",
        "best.back() - (PLANTED ? 0.0f : most) -",
        test_the_largest_may_be_far_below_others_in_integers,
    ),
    "bounds without the roundings of float32": (
        "((r + kept) * (norm + rest) + bias) * rounding",
        "(PLANTED ? vec{} : ((r + kept) * (norm + rest) + bias) * rounding)",
        test_an_output_that_overflows_in_integers_alone_is_computed_in_float32,
    ),
    "inputs of any size": (
        "&& largest <= largest_scaled(depth)",
        "&& (PLANTED || largest <= largest_scaled(depth))",
        test_sums_that_overflow_when_scaled_leave_exact_outputs,
    ),
    "small inputs as zeros": (
        "largest == 0.0f ?",
        "(PLANTED ? largest <= LEAST : largest == 0.0f) ?",
        test_small_inputs_by_large_weights_are_not_lost,
    ),
}


_WAIT = "barrier.wait(thread, threads);"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The head's sources with all of these, and a barrier that may be left out."""
    defects = {name: (right, instead) for name, (right, instead, _) in DEFECTS.items()}
    barrier = {"barrier": (_WAIT, f"if (!PLANTED) {_WAIT}")}
    return planted_sources(defects | barrier, tmp_path_factory.mktemp("planted"), shortlist.SOURCE)


@pytest.fixture(scope="module")
def changed(target: str, planted: Path) -> ctypes.CDLL:
    """The head with its defects, of which none is chosen yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCE", planted)
        patch.setenv("SEQ2SEQ_KERNEL_CACHE", str(planted.parent))
        found = shortlist.library.func.__wrapped__(f"{target} -Og")  # type: ignore[attr-defined]
    assert isinstance(found, ctypes.CDLL)
    return found


@pytest.mark.parametrize("name", [NOTHING, *DEFECTS])
def test_a_defect_in_native_code_is_caught(name: str, changed: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it a test above fails, and with none of them none does."""
    monkeypatch.setattr(shortlist, "library", lambda: changed)
    chosen = ctypes.c_int.in_dll(changed, "planted_defect")
    chosen.value = [*DEFECTS, NOTHING].index(name)
    if name == NOTHING:
        for *_, test in DEFECTS.values():
            test()
    else:
        with pytest.raises(AssertionError):
            DEFECTS[name][2]()


def test_the_instructions_have_a_name(target: str) -> None:
    """That of what the build multiplies by."""
    flags = build.cpu_flags().split()
    wide = "avx512-vnni" if "avx512_vnni" in flags else "avx512-int16"
    here = wide if "avx512bw" in flags else "avx-vnni" if "avx_vnni" in flags else "avx2-int16"
    assert shortlist.instructions() == NAMES.get(target, here)
    assert ShortlistHead(20, 100).instructions == shortlist.instructions()


def test_without_its_instructions_it_says_what_it_needs() -> None:
    """The layer raises, and variants are unavailable, for the same reason."""
    needs = "needs a processor with AVX2"
    with head_built_for("-march=x86-64"):
        with torch.no_grad(), pytest.raises(RuntimeError, match=f"{needs}.*; use torch.nn.Linear"):
            ShortlistHead(20, 100)(torch.randn(3, 20))
        with pytest.raises(build.BuildError, match=needs):
            shortlist.instructions()
        assert needs in str(VARIANTS["cpu-fused-head"].builds("decode"))


@pytest.fixture(scope="module")
def races(target: str, planted: Path) -> Path:
    """The program that checks for races, built once: the barrier is taken away as it runs."""
    return sanitize.build(sanitize.RACES, planted.parent / "races", planted, sanitize.HEAD, target)


@pytest.mark.slow
def test_sanitizers_find_nothing(target: str, races: Path, tmp_path: Path) -> None:
    """No access out of bounds, no undefined behaviour and no data race over odd sizes and teams."""
    others = sanitize.CHECKS.keys() - {sanitize.RACES}
    built = [sanitize.build(name, tmp_path / name, main_file=sanitize.HEAD, target=target) for name in others]
    for program in (*built, races):
        passed, said = sanitize.run(program)
        assert passed, said


@pytest.mark.slow
def test_a_missing_barrier_is_a_data_race(races: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ThreadSanitizer sees a thread that does not wait for all outputs of a row."""
    monkeypatch.setenv(DEFECT, str(len(DEFECTS)))
    passed, said = sanitize.run(races)
    assert not passed
    assert "data race" in said
