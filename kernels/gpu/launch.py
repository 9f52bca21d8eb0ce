"""A launch as data: what the ahead-of-time compiler and the table of resources need to know, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched.

    Attributes:
        kernel: the function under `triton.jit`.
        signature: argument name to Triton's type: `*fp16`, `i32`, `constexpr`.
        constants: compile-time arguments by name.
        grid: programs.
        num_warps: warps of a program.
        num_stages: depth of software pipelining.
        cooperative: whether all programs must run at the same time.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    grid: int
    num_warps: int
    num_stages: int
    cooperative: bool
