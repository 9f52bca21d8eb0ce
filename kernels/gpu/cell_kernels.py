"""Rest of a time step after its product, as Triton kernels: gates, states, and their derivatives.

One launch does one step of every sequence and of both directions, one tile of sequences by hidden units a program.
Shapes: T steps, batch B, D directions, hidden size H; states are contiguous, the rest has strides of its own.

States may be updated in place: an element is read and written by one program alone, and what is written depends on
what was read, so no thread of that program can write before another has read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import sigmoid, tanh


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def forward_kernel(
    p_input,  # (T, B, D, 4H)
    p_recurrent,  # (D, B, 4H); None: zeros
    p_hidden,  # (D, B, H): h before this step, read where a sequence has ended; None: zeros
    p_c,  # (D, B, H): c before this step; None: zeros
    p_lengths,  # (B,) or None
    p_resets,  # (D, T, B) bytes, not zero where a row starts from zeros; or None
    p_output,  # (T, B, D, H)
    p_hidden_new,  # (D, B, H), may be p_hidden; None: not wanted
    p_c_new,  # (D, B, H), may be p_c
    p_gates,  # (T, B, D, 4H) or None
    p_cells,  # (T, B, D, H) or None
    step,
    steps,
    batch,
    s_input_t,
    s_input_b,
    s_input_d,
    s_output_t,
    s_output_b,
    s_output_d,
    s_gates_t,
    s_gates_b,
    s_gates_d,
    s_cells_t,
    s_cells_b,
    s_cells_d,
    HIDDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One step of both directions: direction 0 at `step`, direction 1 as far from the end."""
    direction, rows, columns, inside = _tile_of_program(batch, HIDDEN, BLOCK_B, BLOCK_H)
    # Offsets over steps and sequences pass 2**31.
    t = tl.where(direction == 0, step, steps - 1 - step).to(tl.int64)
    o_state = (direction * batch + rows) * HIDDEN + columns
    live = inside
    if p_lengths is not None:
        # What stands past a length may be NaN, so it is not even loaded.
        live = inside & (t < tl.load(p_lengths + rows, mask=rows < batch, other=0))

    recurs = live
    if p_resets is not None:
        o_reset = (direction * steps + t) * batch + rows
        recurs = live & (tl.load(p_resets + o_reset, mask=rows < batch, other=0) == 0)

    p_tile = p_input + t * s_input_t + rows * s_input_b + direction * s_input_d + columns
    i, f, g, o = _load_gates(p_tile, live, HIDDEN)
    if p_recurrent is not None:
        p_product = p_recurrent + (direction * batch + rows) * (4 * HIDDEN) + columns
        ri, rf, rg, ro = _load_gates(p_product, recurs, HIDDEN)
        i, f, g, o = i + ri, f + rf, g + rg, o + ro
    c = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if p_c is not None:
        c = tl.load(p_c + o_state, mask=inside, other=0.0)
    c_before = c
    if p_resets is not None:
        c_before = tl.where(recurs, c, 0.0)

    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    c_new = f * c_before + i * g
    # Rounded here, so that what the next product reads is what the output says.
    h_new = (o * tanh(c_new)).to(p_output.dtype.element_ty)
    out = h_new
    if p_lengths is not None:
        held = tl.zeros((BLOCK_B, BLOCK_H), tl.float32).to(p_output.dtype.element_ty)
        out = tl.where(live, h_new, held)
        if p_hidden is not None:
            held = tl.load(p_hidden + o_state, mask=inside, other=0.0)
        h_new, c_new = tl.where(live, h_new, held), tl.where(live, c_new, c)

    tl.store(p_output + t * s_output_t + rows * s_output_b + direction * s_output_d + columns, out, mask=inside)
    tl.store(p_c_new + o_state, c_new, mask=inside)
    if p_hidden_new is not None:
        tl.store(p_hidden_new + o_state, h_new, mask=inside)
    if p_gates is not None:
        p_kept = p_gates + t * s_gates_t + rows * s_gates_b + direction * s_gates_d + columns
        _store_gates(p_kept, i, f, g, o, inside, HIDDEN)
        tl.store(p_cells + t * s_cells_t + rows * s_cells_b + direction * s_cells_d + columns, c_new, mask=inside)


@triton.jit(do_not_specialize=["step", "steps", "batch"])
def backward_kernel(  # noqa: C901 - what is absent is a branch of the compiler
    p_gates,  # (T, B, D, 4H)
    p_cells,  # (T, B, D, H)
    p_c0,  # (D, B, H): c before the first step; None: zeros
    p_lengths,  # (B,) or None
    p_resets,  # (D, T, B) bytes, not zero where a row started from zeros; or None
    p_output,  # (T, B, D, H): gradient of the output
    p_dh,  # (D, B, H): gradient of h that later steps send; None: zeros
    p_dc,  # (D, B, H): the same of c; None: zeros
    p_grad,  # (T, B, D, 4H), written: gradient of the gates' input
    p_compact,  # (D, B, 4H), written with the same for the next product, zero where a row started from zeros; or None
    p_carry,  # (D, B, H), written with dh where a sequence has ended and zero elsewhere; may be p_dh; None: no lengths
    p_dc_new,  # (D, B, H), written, may be p_dc
    step,
    steps,
    batch,
    s_gates_t,
    s_gates_b,
    s_gates_d,
    s_cells_t,
    s_cells_b,
    s_cells_d,
    s_output_t,
    s_output_b,
    s_output_d,
    s_grad_t,
    s_grad_b,
    s_grad_d,
    FIRST: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The derivative of `forward_kernel` at `step`, of both directions."""
    direction, rows, columns, inside = _tile_of_program(batch, HIDDEN, BLOCK_B, BLOCK_H)
    t = tl.where(direction == 0, step, steps - 1 - step).to(tl.int64)
    before = tl.where(direction == 0, t - 1, t + 1)
    o_state = (direction * batch + rows) * HIDDEN + columns
    live = inside
    if p_lengths is not None:
        live = inside & (t < tl.load(p_lengths + rows, mask=rows < batch, other=0))

    recurs = live
    if p_resets is not None:
        o_reset = (direction * steps + t) * batch + rows
        recurs = live & (tl.load(p_resets + o_reset, mask=rows < batch, other=0) == 0)

    p_kept = p_gates + t * s_gates_t + rows * s_gates_b + direction * s_gates_d + columns
    i, f, g, o = _load_gates(p_kept, live, HIDDEN)
    p_cell = p_cells + rows * s_cells_b + direction * s_cells_d + columns
    tanh_c = tanh(tl.load(p_cell + t * s_cells_t, mask=live, other=0.0))
    c_before = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if not FIRST:
        c_before = tl.load(p_cell + before * s_cells_t, mask=recurs, other=0.0)
    elif p_c0 is not None:
        c_before = tl.load(p_c0 + o_state, mask=recurs, other=0.0)
    p_from = p_output + t * s_output_t + rows * s_output_b + direction * s_output_d + columns
    from_output = tl.load(p_from, mask=live, other=0.0).to(tl.float32)
    dh = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if p_dh is not None:
        dh = tl.load(p_dh + o_state, mask=inside, other=0.0).to(tl.float32)
    dc = tl.zeros((BLOCK_B, BLOCK_H), tl.float32)
    if p_dc is not None:
        dc = tl.load(p_dc + o_state, mask=inside, other=0.0)

    total = dh + from_output
    dc_here = dc + total * o * (1.0 - tanh_c * tanh_c)
    di = dc_here * g * i * (1.0 - i)
    df = dc_here * c_before * f * (1.0 - f)
    dg = dc_here * i * (1.0 - g * g)
    do = total * tanh_c * o * (1.0 - o)
    dc_new = dc_here * f
    if p_resets is not None:
        dc_new = tl.where(recurs, dc_new, 0.0)
    if p_lengths is not None:
        # Gates, cells and what came from the output were loaded as zeros there, so all four are zero already.
        dc_new = tl.where(live, dc_new, dc)
        # The product that follows is added to this: where a sequence has ended its rows are zero.
        tl.store(p_carry + o_state, tl.where(live, 0.0, dh).to(p_carry.dtype.element_ty), mask=inside)

    tl.store(p_dc_new + o_state, dc_new, mask=inside)
    p_row = p_grad + t * s_grad_t + rows * s_grad_b + direction * s_grad_d + columns
    _store_gates(p_row, di, df, dg, do, inside, HIDDEN)
    if p_compact is not None:
        if p_resets is not None:
            di, df = tl.where(recurs, di, 0.0), tl.where(recurs, df, 0.0)
            dg, do = tl.where(recurs, dg, 0.0), tl.where(recurs, do, 0.0)
        p_copy = p_compact + (direction * batch + rows) * (4 * HIDDEN) + columns
        _store_gates(p_copy, di, df, dg, do, inside, HIDDEN)


@triton.jit
def _tile_of_program(batch, HIDDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """Direction, rows (BLOCK_B, 1) in 64 bits, columns (1, BLOCK_H), and which elements exist."""
    program = tl.program_id(0)
    across: tl.constexpr = (HIDDEN + BLOCK_H - 1) // BLOCK_H
    down = tl.cdiv(batch, BLOCK_B)
    rows = ((program // across) % down) * BLOCK_B + tl.arange(0, BLOCK_B)[:, None].to(tl.int64)
    columns = (program % across) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    return program // (across * down), rows, columns, (rows < batch) & (columns < HIDDEN)


@triton.jit
def _load_gates(p_tile, mask, HIDDEN: tl.constexpr):
    """The four gates' tiles, each a hidden size after the one before, in float32; zeros where masked."""
    return (
        tl.load(p_tile, mask=mask, other=0.0).to(tl.float32),
        tl.load(p_tile + HIDDEN, mask=mask, other=0.0).to(tl.float32),
        tl.load(p_tile + 2 * HIDDEN, mask=mask, other=0.0).to(tl.float32),
        tl.load(p_tile + 3 * HIDDEN, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _store_gates(p_tile, i, f, g, o, mask, HIDDEN: tl.constexpr):
    """Store float32 tiles as `_load_gates` reads them, rounded to the memory's type."""
    tl.store(p_tile, i, mask=mask)
    tl.store(p_tile + HIDDEN, f, mask=mask)
    tl.store(p_tile + 2 * HIDDEN, g, mask=mask)
    tl.store(p_tile + 3 * HIDDEN, o, mask=mask)
