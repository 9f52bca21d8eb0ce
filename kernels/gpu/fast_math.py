"""Exponential and reciprocal as one instruction each, and an LSTM's nonlinearities with as few of them as there can be.

`tl.exp` and `/` guard against subnormal numbers, which triples the instructions of a cell; the sums here keep to the
normal range instead. The interpreter knows no assembly: there `NATIVE` is false and ordinary operations take its place.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp2(x, NATIVE: tl.constexpr):
    """2**x to two roundoffs; subnormal results are zero."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def reciprocal(x, NATIVE: tl.constexpr):
    """1 / x to one roundoff; of nothing beyond 2**126, whose reciprocal is subnormal."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def decay(x, SCALE: tl.constexpr, NATIVE: tl.constexpr):
    """exp(-SCALE * x), at most 2**40, so that a product of three stays below 2**126."""
    # NaN has to come through: a minimum that drops it would make a broken input look sound.
    exponent = tl.minimum(x * (-1.4426950408889634 * SCALE), 40.0, propagate_nan=tl.PropagateNan.ALL)
    return exp2(exponent, NATIVE)


@triton.jit
def tanh_numerator(x, small, PRECISE: tl.constexpr):
    """tanh(x) * (1 + small), where small = exp(-2x); the error is absolute, or relative where `PRECISE`."""
    value = 1.0 - small
    if PRECISE:
        square = x * x
        # Taylor's series to x**9, as 1 - small cancels near zero; below 1/4 the next term is under 1e-8 of the sum.
        series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
        value = tl.where(tl.abs(x) < 0.25, series * (1.0 + small), value)
    return value


@triton.jit
def cell(i, f, g, o, c, PRECISE: tl.constexpr, NATIVE: tl.constexpr):
    """One step from the sums in front of the gates: i, f, g, o behind them, c and h; all float32.

    The four gates share a reciprocal, o * tanh(c) another: 7 special-function instructions an element, not 10.
    """
    one_i = 1.0 + decay(i, 1.0, NATIVE)
    one_f = 1.0 + decay(f, 1.0, NATIVE)
    small_g = decay(g, 2.0, NATIVE)
    one_g = 1.0 + small_g
    part = one_i * one_g
    shared = reciprocal(part * one_f, NATIVE)
    by_f = shared * one_f
    i = by_f * one_g
    g = by_f * one_i * tanh_numerator(g, small_g, PRECISE)
    f = shared * part
    c = f * c + i * g
    small_c = decay(c, 2.0, NATIVE)
    one_o = 1.0 + decay(o, 1.0, NATIVE)
    one_c = 1.0 + small_c
    shared = reciprocal(one_o * one_c, NATIVE)
    o = shared * one_c
    return i, f, g, o, c, o * (shared * one_o * tanh_numerator(c, small_c, PRECISE))


@triton.jit
def tanh(x, PRECISE: tl.constexpr, NATIVE: tl.constexpr):
    """Tanh of float32."""
    small = decay(x, 2.0, NATIVE)
    return tanh_numerator(x, small, PRECISE) * reciprocal(1.0 + small, NATIVE)
