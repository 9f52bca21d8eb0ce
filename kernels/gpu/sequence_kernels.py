"""The recurrence as one loop over time inside a program, forward and backward: what `sequence.py` launches.

A program has some sequences of one direction. Its warps share the hidden units out among them; each holds the four
gates of its units, and the weights for them, in registers through all steps. h, or backward the gates' gradient, goes
around through shared memory once a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fast_math import cell, tanh

#: Whose values change from batch to batch. Without a kernel of its own for multiples of 16 nothing is lost: `GRAIN`
#: says what is aligned.
UNSPECIALISED = (
    "steps", "batch", "s_input_t", "s_input_b", "s_input_d", "s_output_t", "s_output_b", "s_output_d",
    "s_gates_t", "s_gates_b", "s_gates_d", "s_cells_t", "s_cells_b", "s_cells_d", "s_grad_t", "s_grad_b", "s_grad_d",
)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def forward_kernel(  # noqa: C901 - what is absent costs no branch at run time
    p_gates_input, p_weight_hh, p_h0, p_c0, p_lengths, p_output, p_h_n, p_c_n, p_gates, p_cells,
    steps, batch, hidden,
    s_input_t, s_input_b, s_input_d, s_output_t, s_output_b, s_output_d,
    s_gates_t, s_gates_b, s_gates_d, s_cells_t, s_cells_b, s_cells_d,
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, GRAIN: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Walk through time: arguments as in `recurrence.Forward`, hidden size and strides in units of `GRAIN`."""
    # With a unit that divides them all, Triton sees what is aligned.
    hidden = hidden * GRAIN
    s_input_t, s_input_b, s_input_d = s_input_t * GRAIN, s_input_b * GRAIN, s_input_d * GRAIN
    s_output_t, s_output_b, s_output_d = s_output_t * GRAIN, s_output_b * GRAIN, s_output_d * GRAIN
    s_gates_t, s_gates_b, s_gates_d = s_gates_t * GRAIN, s_gates_b * GRAIN, s_gates_d * GRAIN
    s_cells_t, s_cells_b, s_cells_d = s_cells_t * GRAIN, s_cells_b * GRAIN, s_cells_d * GRAIN
    # The first dimension of every tile counts warps. Triton gives each warp one of them, so a warp holds the four
    # gates of its own units, and their weights, in tensor core order; and it keeps Triton from wgmma, which would
    # read the weights from shared memory again at every step.
    PART: tl.constexpr = UNITS // WARPS
    dtype = p_gates_input.dtype.element_ty
    tiles = tl.cdiv(batch, BLOCK_B)
    direction = tl.program_id(0) // tiles
    first_row = (tl.program_id(0) % tiles) * BLOCK_B
    o_row = tl.arange(0, BLOCK_B)
    row_valid = first_row + o_row < batch

    o_gate = tl.arange(0, 4 * PART)
    b_gate_unit = tl.arange(0, WARPS)[:, None] * PART + (o_gate % PART)[None, :]
    b_column = (o_gate // PART)[None, :] * hidden + b_gate_unit
    b_unit = tl.arange(0, WARPS)[:, None] * PART + tl.arange(0, PART)[None, :]
    o_from = tl.arange(0, UNITS)
    # Padded units: their weights are zero both ways, so nothing of them reaches a product.
    b_weight = tl.load(
        p_weight_hh + direction.to(tl.int64) * 4 * hidden * hidden
        + b_column[:, :, None] * hidden + o_from[None, None, :],
        mask=(b_gate_unit < hidden)[:, :, None] & (o_from < hidden)[None, None, :], other=0.0,
    )  # fmt: skip

    gate_valid = (b_gate_unit < hidden)[:, :, None] & row_valid[None, None, :]
    unit_valid = (b_unit < hidden)[:, :, None] & row_valid[None, None, :]
    # 64-bit up to the tile, 32-bit within.
    start = first_row.to(tl.int64)
    p_gates_input += direction.to(tl.int64) * s_input_d + start * s_input_b
    p_output += direction.to(tl.int64) * s_output_d + start * s_output_b
    b_input = o_row[None, None, :] * s_input_b + b_column[:, :, None]
    b_output = o_row[None, None, :] * s_output_b + b_unit[:, :, None]
    b_state = o_row[None, None, :] * hidden + b_unit[:, :, None]
    state = (direction.to(tl.int64) * batch + start) * hidden
    if p_gates is not None:
        p_gates += direction.to(tl.int64) * s_gates_d + start * s_gates_b
        p_cells += direction.to(tl.int64) * s_cells_d + start * s_cells_b
        b_gates = o_row[None, None, :] * s_gates_b + b_column[:, :, None]
        b_cells = o_row[None, None, :] * s_cells_b + b_unit[:, :, None]

    b_h = tl.zeros((WARPS, PART, BLOCK_B), dtype)
    if p_h0 is not None:
        b_h = tl.load(p_h0 + state + b_state, mask=unit_valid, other=0.0)
    b_c = tl.zeros((WARPS, PART, BLOCK_B), tl.float32)
    if p_c0 is not None:
        b_c = tl.load(p_c0 + state + b_state, mask=unit_valid, other=0.0)
    # Steps past the tile's longest sequence are only filled in, after the loop.
    longest = steps
    if p_lengths is not None:
        b_length = _lengths(p_lengths + first_row + o_row, row_valid, steps)
        longest = tl.max(b_length, axis=0)

    t = direction * (longest - 1)
    move = (1 - 2 * direction).to(tl.int64)
    valid = gate_valid & (longest > 0)
    if p_lengths is not None:
        valid = valid & (t < b_length)[None, None, :]
    b_next = tl.load(p_gates_input + t.to(tl.int64) * s_input_t + b_input, mask=valid, other=0.0)
    done = 0
    # `while`, not `for`: out of a `for` Triton would sink the weights' way from shared memory into registers back
    # into the loop, to save registers, and a step would wait for all of them.
    while done < longest:
        b_sum = b_next.to(tl.float32)
        done += 1
        # Asked for a step ahead, so that memory works while this step computes. No program writes what is read here.
        valid = gate_valid & (done < longest)
        if p_lengths is not None:
            valid = valid & (t + move < b_length)[None, None, :]
        b_next = tl.load(p_gates_input + (t + move) * s_input_t + b_input, mask=valid, other=0.0)

        # Each warp gets all of h through shared memory: the one exchange of a step.
        b_all = tl.broadcast_to(tl.reshape(b_h, (1, UNITS, BLOCK_B)), (WARPS, UNITS, BLOCK_B))
        b_sum += tl.dot(b_weight, b_all, input_precision=PRECISION)
        i, f, g, o = _split(b_sum, WARPS, PART, BLOCK_B)
        i, f, g, o, c_new, h_new = cell(i, f, g, o, b_c, PRECISE, NATIVE)
        h_new = h_new.to(dtype)
        b_out = h_new
        if p_lengths is not None:
            inside = (t < b_length)[None, None, :]
            b_out = tl.where(inside, h_new, 0.0)
            h_new = tl.where(inside, h_new, b_h)
            c_new = tl.where(inside, c_new, b_c)
        b_h = h_new
        b_c = c_new
        tl.store(p_output + t.to(tl.int64) * s_output_t + b_output, b_out, mask=unit_valid)
        if p_gates is not None:
            kept = _join(i.to(dtype), f.to(dtype), g.to(dtype), o.to(dtype))
            kept = tl.reshape(tl.permute(kept, (0, 3, 4, 1, 2)), (WARPS, 4 * PART, BLOCK_B))
            tl.store(p_gates + t.to(tl.int64) * s_gates_t + b_gates, kept, mask=gate_valid)
            tl.store(p_cells + t.to(tl.int64) * s_cells_t + b_cells, b_c, mask=unit_valid)
        t = (t + move).to(tl.int32)
    tl.store(p_h_n + state + b_state, b_h, mask=unit_valid)
    tl.store(p_c_n + state + b_state, b_c, mask=unit_valid)

    if p_lengths is not None:
        if p_gates is not None:
            # Held: the last cells in the first direction, the first ones in the other, which starts at the far end.
            if p_c0 is not None:
                b_first = tl.load(p_c0 + state + b_state, mask=unit_valid & (direction == 1), other=0.0)
            else:
                b_first = tl.zeros((WARPS, PART, BLOCK_B), tl.float32)
            b_c = tl.where(direction == 1, b_first, b_c)
        b_zero = tl.zeros((WARPS, PART, BLOCK_B), dtype)
        t = longest
        while t < steps:
            tl.store(p_output + t.to(tl.int64) * s_output_t + b_output, b_zero, mask=unit_valid)
            if p_gates is not None:
                b_zeros = tl.zeros((WARPS, 4 * PART, BLOCK_B), dtype)
                tl.store(p_gates + t.to(tl.int64) * s_gates_t + b_gates, b_zeros, mask=gate_valid)
                tl.store(p_cells + t.to(tl.int64) * s_cells_t + b_cells, b_c, mask=unit_valid)
            t += 1


@triton.jit(do_not_specialize=UNSPECIALISED)
def backward_kernel(  # noqa: C901 - as above
    p_weight_hh, p_c0, p_lengths, p_gates, p_cells, p_grad_output, p_grad_h_n, p_grad_c_n,
    p_grad_gates, p_grad_h0, p_grad_c0,
    steps, batch, hidden,
    s_gates_t, s_gates_b, s_gates_d, s_cells_t, s_cells_b, s_cells_d,
    s_output_t, s_output_b, s_output_d, s_grad_t, s_grad_b, s_grad_d,
    BLOCK_B: tl.constexpr, UNITS: tl.constexpr, WARPS: tl.constexpr, GRAIN: tl.constexpr,
    PRECISION: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Walk back through time: arguments as in `recurrence.Backward`, sizes as in the forward kernel."""
    hidden = hidden * GRAIN
    s_gates_t, s_gates_b, s_gates_d = s_gates_t * GRAIN, s_gates_b * GRAIN, s_gates_d * GRAIN
    s_cells_t, s_cells_b, s_cells_d = s_cells_t * GRAIN, s_cells_b * GRAIN, s_cells_d * GRAIN
    s_output_t, s_output_b, s_output_d = s_output_t * GRAIN, s_output_b * GRAIN, s_output_d * GRAIN
    s_grad_t, s_grad_b, s_grad_d = s_grad_t * GRAIN, s_grad_b * GRAIN, s_grad_d * GRAIN
    # Tiles as in the forward kernel; the loop goes the other way through time.
    PART: tl.constexpr = UNITS // WARPS
    dtype = p_gates.dtype.element_ty
    tiles = tl.cdiv(batch, BLOCK_B)
    direction = tl.program_id(0) // tiles
    first_row = (tl.program_id(0) % tiles) * BLOCK_B
    o_row = tl.arange(0, BLOCK_B)
    row_valid = first_row + o_row < batch

    o_gate = tl.arange(0, 4 * PART)
    b_gate_unit = tl.arange(0, WARPS)[:, None] * PART + (o_gate % PART)[None, :]
    b_column = (o_gate // PART)[None, :] * hidden + b_gate_unit
    b_unit = tl.arange(0, WARPS)[:, None] * PART + tl.arange(0, PART)[None, :]
    # Transposed, 16 units a warp: a row for each of them, a column for each unit of each gate. With twice the warps the
    # second half takes the last two gates. Padded units are zero both ways.
    HALVES: tl.constexpr = 16 // PART
    FROM: tl.constexpr = 4 * UNITS // HALVES
    o_warp = tl.arange(0, WARPS)
    b_to = (o_warp % (UNITS // 16))[:, None] * 16 + tl.arange(0, 16)[None, :]
    b_from = (o_warp // (UNITS // 16))[:, None] * FROM + tl.arange(0, FROM)[None, :]
    b_weight = tl.load(
        p_weight_hh + direction.to(tl.int64) * 4 * hidden * hidden
        + ((b_from // UNITS) * hidden + b_from % UNITS)[:, None, :] * hidden + b_to[:, :, None],
        mask=(b_to < hidden)[:, :, None] & (b_from % UNITS < hidden)[:, None, :], other=0.0,
    )  # fmt: skip

    gate_valid = (b_gate_unit < hidden)[:, :, None] & row_valid[None, None, :]
    unit_valid = (b_unit < hidden)[:, :, None] & row_valid[None, None, :]
    start = first_row.to(tl.int64)
    p_gates += direction.to(tl.int64) * s_gates_d + start * s_gates_b
    p_cells += direction.to(tl.int64) * s_cells_d + start * s_cells_b
    p_grad_output += direction.to(tl.int64) * s_output_d + start * s_output_b
    p_grad_gates += direction.to(tl.int64) * s_grad_d + start * s_grad_b
    b_gates = o_row[None, None, :] * s_gates_b + b_column[:, :, None]
    b_cells = o_row[None, None, :] * s_cells_b + b_unit[:, :, None]
    b_output = o_row[None, None, :] * s_output_b + b_unit[:, :, None]
    b_grad = o_row[None, None, :] * s_grad_b + b_column[:, :, None]
    b_state = o_row[None, None, :] * hidden + b_unit[:, :, None]
    state = (direction.to(tl.int64) * batch + start) * hidden

    b_dh = tl.zeros((WARPS, PART, BLOCK_B), tl.float32)
    if p_grad_h_n is not None:
        b_dh = tl.load(p_grad_h_n + state + b_state, mask=unit_valid, other=0.0).to(tl.float32)
    b_dc = tl.zeros((WARPS, PART, BLOCK_B), tl.float32)
    if p_grad_c_n is not None:
        b_dc = tl.load(p_grad_c_n + state + b_state, mask=unit_valid, other=0.0)
    longest = steps
    if p_lengths is not None:
        b_length = _lengths(p_lengths + first_row + o_row, row_valid, steps)
        longest = tl.max(b_length, axis=0)

    t = (1 - direction) * (longest - 1)
    move = (2 * direction - 1).to(tl.int64)
    gates_valid = gate_valid & (longest > 0)
    units_valid = unit_valid & (longest > 0)
    if p_lengths is not None:
        gates_valid = gates_valid & (t < b_length)[None, None, :]
        units_valid = units_valid & (t < b_length)[None, None, :]
    b_next_gates = tl.load(p_gates + t.to(tl.int64) * s_gates_t + b_gates, mask=gates_valid, other=0.0)
    b_next_grad = tl.load(p_grad_output + t.to(tl.int64) * s_output_t + b_output, mask=units_valid, other=0.0)
    b_c = tl.load(p_cells + t.to(tl.int64) * s_cells_t + b_cells, mask=unit_valid & (longest > 0), other=0.0)
    b_next_c = tl.load(p_cells + (t + move) * s_cells_t + b_cells, mask=unit_valid & (longest > 1), other=0.0)
    if p_c0 is not None:
        b_next_c += tl.load(p_c0 + state + b_state, mask=unit_valid & (longest == 1), other=0.0)
    done = 0
    # `while` and loads a step ahead for the reasons given in the forward kernel.
    while done < longest:
        done += 1
        b_before, b_here, b_grad_output = b_next_c, b_next_gates, b_next_grad
        gates_valid = gate_valid & (done < longest)
        units_valid = unit_valid & (done < longest)
        if p_lengths is not None:
            gates_valid = gates_valid & (t + move < b_length)[None, None, :]
            units_valid = units_valid & (t + move < b_length)[None, None, :]
        b_next_gates = tl.load(p_gates + (t + move) * s_gates_t + b_gates, mask=gates_valid, other=0.0)
        b_next_grad = tl.load(p_grad_output + (t + move) * s_output_t + b_output, mask=units_valid, other=0.0)
        b_next_c = tl.load(
            p_cells + (t + 2 * move) * s_cells_t + b_cells, mask=unit_valid & (done + 1 < longest), other=0.0
        )
        if p_c0 is not None:
            # Before the first step there are the initial cells; of the two loads one is masked out.
            b_next_c += tl.load(p_c0 + state + b_state, mask=unit_valid & (done + 1 == longest), other=0.0)

        # Past a length the gates are read as zeros, and so every gradient of them is zero.
        i, f, g, o = _split(b_here.to(tl.float32), WARPS, PART, BLOCK_B)
        tanh_c = tanh(b_c, PRECISE, NATIVE)
        b_total = b_dh + b_grad_output.to(tl.float32)
        b_dc_here = b_dc + b_total * o * (1.0 - tanh_c * tanh_c)
        b_joined = _join(
            (b_dc_here * g * i * (1.0 - i)).to(dtype),
            (b_dc_here * b_before * f * (1.0 - f)).to(dtype),
            (b_dc_here * i * (1.0 - g * g)).to(dtype),
            (b_total * tanh_c * o * (1.0 - o)).to(dtype),
        )
        tl.store(
            p_grad_gates + t.to(tl.int64) * s_grad_t + b_grad,
            tl.reshape(tl.permute(b_joined, (0, 3, 4, 1, 2)), (WARPS, 4 * PART, BLOCK_B)), mask=gate_valid,
        )  # fmt: skip
        b_joined = tl.permute(b_joined, (3, 4, 0, 1, 2))
        if BLOCK_B == 8 and HALVES == 1:
            # Too narrow for wgmma, so the plain product keeps the weights in registers as well, and the warps share
            # one copy of the gradients.
            b_dh_before = tl.dot(
                tl.reshape(b_weight, (UNITS, FROM)), tl.reshape(b_joined, (FROM, BLOCK_B)), input_precision=PRECISION
            )
        else:
            b_all = tl.broadcast_to(
                tl.reshape(b_joined, (HALVES, 1, FROM, BLOCK_B)), (HALVES, WARPS // HALVES, FROM, BLOCK_B)
            )
            b_dh_before = tl.dot(b_weight, tl.reshape(b_all, (WARPS, FROM, BLOCK_B)), input_precision=PRECISION)
            if HALVES == 2:
                b_dh_before = tl.sum(tl.reshape(b_dh_before, (2, UNITS, BLOCK_B)), axis=0)
        b_dh_before = tl.reshape(b_dh_before, (WARPS, PART, BLOCK_B))
        b_dc_before = b_dc_here * f
        if p_lengths is not None:
            inside = (t < b_length)[None, None, :]
            b_dh_before = tl.where(inside, b_dh_before, b_dh)
            b_dc_before = tl.where(inside, b_dc_before, b_dc)
        b_dh = b_dh_before
        b_dc = b_dc_before
        b_c = b_before
        t = (t + move).to(tl.int32)
    tl.store(p_grad_h0 + state + b_state, b_dh.to(dtype), mask=unit_valid)
    tl.store(p_grad_c0 + state + b_state, b_dc, mask=unit_valid)

    if p_lengths is not None:
        b_zeros = tl.zeros((WARPS, 4 * PART, BLOCK_B), dtype)
        t = longest
        while t < steps:
            tl.store(p_grad_gates + t.to(tl.int64) * s_grad_t + b_grad, b_zeros, mask=gate_valid)
            t += 1


@triton.jit
def _lengths(p_lengths, mask, steps):
    """Lengths of a tile's sequences; what lies outside of 0 to `steps` counts as the nearer of the two."""
    # Loops go as far as `longest`; lengths that were on the GPU already were not checked.
    return tl.minimum(tl.maximum(tl.load(p_lengths, mask=mask, other=0), 0), steps)


@triton.jit
def _split(x, WARPS: tl.constexpr, PART: tl.constexpr, BLOCK_B: tl.constexpr):
    """(WARPS, 4 * PART, BLOCK_B) into i, f, g, o, each (WARPS, PART, BLOCK_B), without leaving the thread."""
    x = tl.permute(tl.reshape(x, (WARPS, 2, 2, PART, BLOCK_B)), (0, 3, 4, 1, 2))
    even, odd = tl.split(x)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o


@triton.jit
def _join(i, f, g, o):
    """i, f, g, o, each (WARPS, PART, BLOCK_B), to (WARPS, PART, BLOCK_B, 2, 2); the last two count the gate."""
    return tl.join(tl.join(i, g), tl.join(f, o))
