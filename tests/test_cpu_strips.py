"""The walk of several whole sequences by AVX2 alone, against the equations in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import FLAGS, NARROW, assert_gives_twice, built_for
from hypothesis import given
from hypothesis import strategies as st
from planted_defects import STRIPS
from planted_kernels import NOTHING, KernelPrograms
from recurrences import DEVICE

from kernels import LSTM
from kernels.cpu import build

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs"),
    pytest.mark.skipif(not {"avx2", "fma"} <= set(FLAGS), reason="needs AVX2"),
]
_ALONE = "avx512f" not in FLAGS


@pytest.mark.parametrize("target", [build.NATIVE, NARROW] if _ALONE else [NARROW])
@given(
    batch=st.integers(1, 20) | st.sampled_from([63, 64, 70]),
    steps=st.integers(1, 12) | st.sampled_from([33, 65]),
    features=st.sampled_from([1, 3, 16, 31, 129, 150]),
    hidden=st.sampled_from([1, 7, 8, 12, 16, 31, 64, 131]),
    threads=st.integers(1, 3),
    given=st.booleans(),
    bias=st.booleans(),
    batch_first=st.booleans(),
    seed=st.integers(0, 999),
)
def test_whole_sequences_are_the_equations(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str,
    batch: int,
    steps: int,
    features: int,
    hidden: int,
    threads: int,
    given: bool,
    bias: bool,
    batch_first: bool,
    seed: int,
) -> None:
    """Whatever the sizes and the team, both directions give what the equations give, and the same call again."""
    torch.manual_seed(seed)
    options = {"bias": bias, "batch_first": batch_first, "bidirectional": True}
    truth = LSTM(features, hidden, **options, implementation="loop").double()
    ours = LSTM(features, hidden, **options, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    x = torch.rand((batch, steps, features) if batch_first else (steps, batch, features)) - 0.5
    state = tuple(torch.rand(2, 2, batch, hidden) - 0.5) if given else None
    assert_gives_twice(ours, truth, x, state, target, threads, 1e-5)


@pytest.mark.parametrize("target", [build.NATIVE if _ALONE else NARROW])
def test_gates_at_their_ends_and_no_numbers_stay_what_they_are(target: str) -> None:
    """One division for two gates overflows only where one is below 1e-29, and what is no number stays none.

    A gate i of sigmoid(-9) times tanh(-60) is -1.2e-4, and one of sigmoid(-66.6) times -1 is -1.2e-29.
    """
    lstm = LSTM(1, 8, bias=False, implementation="cpu-fused")
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
        for gate, weight in enumerate((-9.0, 1.0, -60.0, 1.0)):
            lstm.weight_ih_l0[8 * gate : 8 * gate + 8] = weight
    ends = [1.0, -1.0, 0.0, 6.5, 7.4, 1e4, -1e4, float("inf"), float("nan"), 1e-30]
    x = torch.tensor(ends).view(1, -1, 1)
    with built_for(target, 1), torch.inference_mode():
        _, (h, c) = lstm(x)
    gates = x[0].double() * torch.tensor([-9.0, 1.0, -60.0, 1.0])
    right = gates[:, :1].sigmoid() * gates[:, 2:3].tanh()
    for found, expected in ((c[0], right), (h[0], gates[:, 3:].sigmoid() * right.tanh())):
        torch.testing.assert_close(found.double(), expected.expand(-1, 8), rtol=1e-5, atol=1e-29, equal_nan=True)


#: Several sequences each way from a given state over several chunks of steps, rows in six and fewer, weights of which
#: one strip fills the nearest cache, and one sequence of which a single step is left to project.
_PROBE = """
import torch
from kernels.lstm import LSTM
torch.manual_seed(0)
for batch, steps, features, hidden in ((7, 30, 150, 140), (13, 12, 9, 20), (2, 40, 5, 17), (1, 65, 5, 17)):
    truth = LSTM(features, hidden, bidirectional=True, implementation="loop").double()
    ours = LSTM(features, hidden, bidirectional=True, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    state = torch.randn(2, batch, hidden) / 2, torch.randn(2, batch, hidden)
    x = torch.randn(steps, batch, features)
    with torch.inference_mode():
        expected, found = truth(x.double(), tuple(value.double() for value in state)), ours(x, state)
    for value, right in zip((found[0], *found[1]), (expected[0], *expected[1])):
        if not (value - right).abs().max() < 1e-5:
            sys.exit(7)
"""


@pytest.mark.parametrize("name", [NOTHING, *STRIPS])
def test_a_planted_defect_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip in strips, in what is projected ahead, and in the states of rows is far beyond the tolerance."""
    if not _ALONE:
        pytest.skip("a processor with AVX-512 has other walks, and defects are planted in its own")
    code = programs.run_planted(_PROBE, tmp_path, "strips", name)
    assert code == 0 if name == NOTHING else code not in {0, 1}
