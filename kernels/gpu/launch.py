"""Launches of a kernel's host code, as data: for the ahead-of-time compiler and the table of resources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One compiled form of one kernel.

    Attributes:
        kernel: the function that `triton.jit` made.
        signature: Triton's type of each argument by name: `*fp16`, `i32`, `constexpr`.
        constants: value of each `constexpr` argument.
        grid: programs of a launch.
        num_warps, num_stages: the compiler's options.
        cooperative: whether all programs must run at the same time.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    grid: int
    num_warps: int
    num_stages: int
    cooperative: bool
