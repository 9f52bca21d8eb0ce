"""The tile of a recurrence that one program of the persistent kernels has: group, direction, units and rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile(
    program, H: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, WIDE: tl.constexpr
):
    """Group of programs that exchange rows, direction, hidden units (BLOCK_H,) and batch rows (BLOCK_B,).

    The kernels ask at their beginning and again at their end, with `program` plus a zero that no compiler knows:
    offsets that only the end needs would otherwise be kept through all steps, at a register each.
    """
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    group = program // TILES
    o_h = (program % TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_b = (group // DIRECTIONS) * BLOCK_B + tl.arange(0, BLOCK_B)
    if WIDE:
        o_b = o_b.to(tl.int64)
    return group, group % DIRECTIONS, o_h, o_b
