"""The walks of one sequence, interleaved or overlapped, against the equations in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import BYTE_INPUTS, FAR, LITTLE, OTHERS, TARGETS, built_for
from hypothesis import given
from hypothesis import strategies as st
from planted_kernels import NOTHING, KernelPrograms, planted_sources
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
    with torch.inference_mode():
        expected, states = truth(x.double(), state and tuple(value.double() for value in state))
        with built_for(target, threads):
            found = [ours(x, state) for _ in range(2)]
    for output, own in found:
        for value, right in zip((output, *own), (expected, *states), strict=True):
            torch.testing.assert_close(
                value.double(), right, rtol=0, atol=ALLOWED["int8" if storage == "w8a8" else storage]
            )


#: By name: code of the walk, and what it becomes, with a slip where PLANTED is true.
_INTERLEAVED = {
    "many": ("rows[r] = inputs[done + r]", "rows[r] = inputs[done + r * !PLANTED]"),
    "ring": ("? 2 * AHEAD : TOGETHER", "? (PLANTED ? 1 : 2) * AHEAD : TOGETHER"),
    "part": ("std::min(part, groups - start_of)", "std::min(part - PLANTED, groups - start_of)"),
    "ahead": ("if (at == 0 && more) begin(s + AHEAD);", "if (at == 0 && more) begin(s + AHEAD - PLANTED);"),
    "left": ("left -= open;", "left -= open + PLANTED;"),
    "fourth": ("projecting + 3 * GATES", "projecting + (PLANTED ? 2 : 3) * GATES"),
    "back": ("cell(gates_of, s % 2 ? own.first", "cell(gates_of, s % 2 && !PLANTED ? own.first"),
}
_OVERLAPPED = {
    "ring": ("s % AHEAD *", "s % (PLANTED ? AHEAD / 2 : AHEAD) *"),
    "again": ("if (s % AHEAD == 0) project(s);", "if (s % (PLANTED ? 2 * AHEAD : AHEAD) == 0) project(s);"),
    "last": ("std::min(AHEAD, a->steps - s)", "std::min(AHEAD, a->steps - s - PLANTED)"),
    "row": ("time(s + r) * a->x_step, input_room", "time(s + r * !PLANTED) * a->x_step, input_room"),
    "apart": ("sums[gate] += own[at][gate]", "sums[gate] += own[at][PLANTED ? 0 : gate]"),
    "between": ("word += 4 * EACH;", "word += 4 * (EACH - PLANTED);"),
    "done": ("past >= 0 ? open : 0", "past >= 0 ? open - PLANTED : 0"),
    "back": ("cell(gates_of, s % 2 ? own.first", "cell(gates_of, s % 2 && !PLANTED ? own.first"),
}
_WIDE = "avx512f" in build.cpu_flags().split()
DEFECTS = _INTERLEAVED if _WIDE else _OVERLAPPED
#: Steps are projected beside others, as all but the first of these defects need it.
_BUILD = f"{build.NATIVE} -DBESIDE=(planted_defect!=0)" if _WIDE else build.NATIVE
#: One sequence each way from a given state, over several chunks of steps, against the loop's.
_PROBE = """
import torch
from kernels.lstm import LSTM
torch.manual_seed(0)
for storage, allowed in (("fp32", 1e-5), ("int8", 3e-2)):
    truth = LSTM(90, 80, bidirectional=True, implementation="loop").double()
    ours = LSTM(90, 80, bidirectional=True, implementation="cpu-fused", weight_storage=storage)
    ours.load_state_dict(truth.state_dict())
    x, state = torch.randn(70, 1, 90), (torch.randn(2, 1, 80) / 2, torch.randn(2, 1, 80))
    with torch.inference_mode():
        expected, found = truth(x.double(), tuple(value.double() for value in state))[0], ours(x, state)[0]
    if not (found - expected).abs().max() < allowed:
        sys.exit(7)
"""


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's sources with all of these."""
    return planted_sources(DEFECTS, tmp_path_factory.mktemp("defects"))


@pytest.mark.parametrize("name", [NOTHING, *DEFECTS])
def test_a_planted_defect_is_seen(name: str, defects: Path, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip that projecting other steps and multiplying beside a cell are prone to is far beyond the tolerance."""
    if not (_WIDE or "avx2" in build.cpu_flags().split()):
        pytest.skip("these walks need AVX-512 or AVX2")
    code = programs.run_planted(_PROBE, tmp_path, defects, name, _BUILD)
    assert code == 0 if name == NOTHING else code not in {0, 1}
