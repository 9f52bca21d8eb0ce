"""Hypothesis strategies over the recurrences of `kernels.tools.problems`, and the assertion that goes with them."""

from __future__ import annotations

import os

import torch
from hypothesis import strategies as st

from kernels.tools.problems import (
    DEVICE,
    GRADIENT_ERROR,
    GRADIENTS,
    OUTPUT_ERROR,
    OUTPUTS,
    Sizes,
    errors_backward,
    errors_forward,
    limit,
)

__all__ = [
    "DEVICE",
    "GRADIENTS",
    "GRADIENT_ERROR",
    "OUTPUTS",
    "OUTPUT_ERROR",
    "Sizes",
    "assert_close",
    "errors_backward",
    "errors_forward",
    "interpreted",
    "recurrences",
]


@st.composite
def recurrences(
    draw: st.DrawFn,
    *,
    hidden: st.SearchStrategy[int],
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16),
    batch: st.SearchStrategy[int] = st.sampled_from([1, 3, 17]),  # noqa: B008 - strategies are values
    steps: st.SearchStrategy[int] = st.sampled_from([1, 2, 5]),  # noqa: B008
    resets: st.SearchStrategy[bool] = st.just(False),  # noqa: B008
) -> Sizes:
    """Odd sizes, one direction or both, with and without lengths, resets and initial states, in either memory order."""
    rows, length = draw(batch), draw(steps)
    return Sizes(
        batch=rows,
        steps=length,
        hidden=draw(hidden),
        directions=draw(st.integers(1, 2)),
        dtype=draw(st.sampled_from(dtypes)),
        lengths=draw(st.none() | st.lists(st.integers(0, length), min_size=rows, max_size=rows).map(tuple)),
        state=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        resets=draw(resets),
    )


def assert_close(errors: dict[str, float], dtype: torch.dtype) -> None:
    """No output and no gradient is further from truth than its type allows."""
    for name, error in errors.items():
        assert error <= limit(name, dtype), f"{name}: error {error:.2e}, limit {limit(name, dtype):.0e}; all: {errors}"


def interpreted() -> bool:
    """Return whether Triton kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"
