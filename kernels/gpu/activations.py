"""Arithmetic per element of every kernel, in float32, by operations that Triton's interpreter has too."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow at either end."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x):
    """Tanh to about two roundoffs, also near zero, where 2 * sigmoid(2x) - 1 would cancel."""
    square = x * x
    # Taylor's series to x**9: below 1/4 the next term is under 1e-8 of the sum.
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    small = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - small) / (1.0 + small)
    # `square` overflows for |x| > 1.8e19, where the series is not taken.
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x >= 0, large, -large))
