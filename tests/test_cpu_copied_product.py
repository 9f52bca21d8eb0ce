"""Gradients of wide weights, whose products copy their left operand, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import FAR, TARGETS, built_for
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_defects import COPIED_PRODUCT
from planted_kernels import NOTHING, KernelPrograms
from recurrences import DEVICE

from kernels import LSTM

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the kernel is for CPUs")


@pytest.mark.parametrize("target", [*TARGETS, FAR])
@settings(max_examples=20)
@given(
    batch=st.integers(1, 9),
    steps=st.integers(1, 30),
    features=st.sampled_from([127, 128, 131, 200]),
    hidden=st.sampled_from([1, 5, 21, 128, 130]),
    threads=st.integers(1, 3),
    lengths=st.booleans(),
    seed=st.integers(0, 999),
)
def test_gradients_of_wide_weights_are_the_loop_s(  # noqa: PLR0913, PLR0917 - what hypothesis draws
    target: str, batch: int, steps: int, features: int, hidden: int, threads: int, lengths: bool, seed: int
) -> None:
    """Over one chunk of rows or several, padded or not, each parameter's gradient is that of the equations."""
    torch.manual_seed(seed)
    truth = LSTM(features, hidden, implementation="loop").double()
    ours = LSTM(features, hidden, implementation="cpu-fused")
    ours.load_state_dict(truth.state_dict())
    x, by = torch.randn(steps, batch, features), torch.randn(steps, batch, hidden)
    ends = torch.randint(0, steps + 1, (batch,)) if lengths else None
    (truth(x.double(), None, ends)[0] * by).sum().backward()
    with built_for(target, threads):
        (ours(x, None, ends)[0] * by).sum().backward()
    for value, right in zip(ours.parameters(), truth.parameters(), strict=True):
        assert value.grad is not None
        torch.testing.assert_close(value.grad.double(), right.grad, rtol=1e-4, atol=2e-4)


#: Gradients of a layer wider than a product, over several chunks of rows.
_PROBE = """
import torch
from kernels.lstm import LSTM
torch.manual_seed(0)
found = []
x, by = torch.randn(60, 5, 131), torch.randn(60, 5, 130)
for name, dtype in (("loop", torch.float64), ("cpu-fused", torch.float32)):
    lstm = LSTM(131, 130, implementation=name).to(dtype)
    if found:
        lstm.load_state_dict(state)
    state = lstm.state_dict()
    (lstm(x.to(dtype))[0] * by).sum().backward()
    found.append([value.grad.double() for value in lstm.parameters()])
if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*found)):
    sys.exit(7)
"""


@pytest.mark.parametrize("name", [NOTHING, *COPIED_PRODUCT])
def test_a_planted_defect_is_seen(name: str, tmp_path: Path, programs: KernelPrograms) -> None:
    """Each slip that copying and cutting into chunks are prone to is far beyond the tolerance."""
    code = programs.run_planted(_PROBE, tmp_path, "copied product", name)
    assert code == 0 if name == NOTHING else code not in {0, 1}
