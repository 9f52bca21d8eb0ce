"""The walks of one sequence, interleaved or overlapped, against the equations in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import BYTE_INPUTS, FAR, FLAGS, LITTLE, OTHERS, QUICK, TARGETS, assert_gives_twice
from hypothesis import given
from hypothesis import strategies as st
from planted_defects import INTERLEAVED, OVERLAPPED
from planted_kernels import BESIDE, NOTHING, KernelPrograms
from recurrences import DEVICE

from kernels import LSTM
from kernels.cpu import build

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")

#: Errors of outputs and states, of gates that are not large.
ALLOWED = {"fp32": 1e-5, "bf16": 2e-2, "int8": 3e-2}
#: Every width of vectors, and weights far away, projected in the other of two ways.
BUILDS = [*TARGETS, FAR]


#: With how they keep weights; other builds have other integers alone.
KEPT = [(target, storage) for target in BUILDS for storage in ALLOWED]
KEPT += [(f"{other} {LITTLE}", "int8") for other in OTHERS] + [(target, "w8a8") for target in BYTE_INPUTS]
#: All steps projected before they come, and by sums, on any processor.
KEPT += [(f"{QUICK} -DBESIDE=0 -DBY_SUMS=1", "fp32")] if "avx512f" in FLAGS else []


@pytest.mark.parametrize(("target", "storage"), KEPT)
@given(
    steps=st.integers(1, 17) | st.sampled_from([64, 65, 70]),
    features=st.integers(1, 150),
    hidden=st.sampled_from([1, 12, 16, 31, 48, 64, 80, 109, 128]),
    threads=st.integers(1, 3),
    given=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_one_sequence_is_the_equations(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str, storage: str, steps: int, features: int, hidden: int, threads: int, given: bool, bias: bool, seed: int
) -> None:
    """Whatever the sizes and the team, both directions give what the equations give, and the same call again."""
    torch.manual_seed(seed)
    truth = LSTM(features, hidden, bias=bias, bidirectional=True, implementation="loop").double()
    ours = LSTM(features, hidden, bias=bias, bidirectional=True, implementation="cpu-fused", weight_storage=storage)
    ours.load_state_dict(truth.state_dict())
    x = torch.rand(steps, 1, features) - 0.5
    state = tuple(torch.rand(2, 2, 1, hidden) - 0.5) if given else None
    assert_gives_twice(ours, truth, x, state, target, threads, ALLOWED["int8" if storage == "w8a8" else storage])


_WIDE = "avx512f" in build.cpu_flags().split()
DEFECTS = INTERLEAVED if _WIDE else OVERLAPPED
#: One sequence each way from a given state, over several chunks of steps and over two steps, against the loop's.
_PROBE = """
import torch
from kernels.lstm import LSTM
torch.manual_seed(0)
for storage, allowed in (("fp32", 1e-5), ("int8", 3e-2)):
    truth = LSTM(90, 80, bidirectional=True, implementation="loop").double()
    ours = LSTM(90, 80, bidirectional=True, implementation="cpu-fused", weight_storage=storage)
    ours.load_state_dict(truth.state_dict())
    state = torch.randn(2, 1, 80) / 2, torch.randn(2, 1, 80)
    for steps in (70, 2):
        x = torch.randn(steps, 1, 90)
        with torch.inference_mode():
            expected, found = truth(x.double(), tuple(value.double() for value in state))[0], ours(x, state)[0]
        if not (found - expected).abs().max() < allowed:
            sys.exit(7)
"""


@pytest.mark.parametrize("name", [NOTHING, *DEFECTS])
def test_a_planted_defect_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip that projecting other steps and multiplying beside a cell are prone to is far beyond the tolerance."""
    if not (_WIDE or "avx2" in build.cpu_flags().split()):
        pytest.skip("these walks need AVX-512 or AVX2")
    # Steps are projected beside others, as all but one of these defects need it.
    beside = {BESIDE: str(int(name != "many"))} if _WIDE else {}
    code = programs.run_planted(_PROBE, tmp_path, "one sequence", name, **beside)
    assert code == 0 if name == NOTHING else code not in {0, 1}
