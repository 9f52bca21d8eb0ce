"""The forward recurrence by programs that share each sequence; the kernel that `kernels.gpu.persistent` launches."""

from __future__ import annotations

import triton
import triton.language as tl

from .fast_math import cell
from .grid_exchange import arrive, column, held_weights, offsets, present, product, wait
from .persistent_tile import tile


@triton.jit(do_not_specialize=["steps", "first", "end"])
def forward_kernel(  # noqa: C901 - branches at compile time
    p_input, p_weight, p_h0, p_c0, p_lengths, p_output, p_exchange, p_h_n, p_c_n, p_gates, p_cells, p_counters,
    batch, steps, first, end,
    stride_input_t, stride_input_b, stride_input_d, stride_output_t, stride_output_b, stride_output_d,
    stride_exchange_t, stride_exchange_b, stride_exchange_d, stride_gates_t, stride_gates_b, stride_gates_d,
    stride_cells_t, stride_cells_b, stride_cells_d,
    H: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, SYNC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Steps from `first` to before `end` of one hidden tile of one batch tile of one direction.

    Blocks stand batch row by hidden unit. `p_exchange` and `p_h0` are integers of the gates' width; every step's h is
    written to memory of its own there, so no program can overwrite what another still has to read. `p_output` is None
    where the exchange is the output itself. Between launches the state is in `p_h_n` and `p_c_n`.
    """
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    BITS: tl.constexpr = p_exchange.dtype.element_ty
    group, direction, o_h, o_b = tile(tl.program_id(0), H, DIRECTIONS, BLOCK_B, BLOCK_H, WIDE)
    in_h, in_b = o_h < H, o_b < batch
    inside = in_b[:, None] & in_h[None, :]
    o_state = (direction * batch + o_b[:, None]) * H + o_h[None, :]

    # Row g * BLOCK_H + u of this program's weights is gate g of its unit u.
    o_row = tl.arange(0, 4 * BLOCK_H)
    o_unit = (tl.program_id(0) % TILES) * BLOCK_H + o_row % BLOCK_H
    p_rows_weight = column(p_weight + (direction * 4 * H + (o_row // BLOCK_H) * H + o_unit).to(tl.int64) * H, SPLIT)
    in_rows_weight = column(o_unit < H, SPLIT)
    if SYNC != "launch":
        weights = held_weights(p_rows_weight, in_rows_weight, 1, K=H, BLOCK_K=BLOCK_K, SPLIT=SPLIT)

    b_h = tl.zeros([BLOCK_B, BLOCK_H], DTYPE)
    b_c = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if p_h0 is not None:
        b_h = tl.load(p_h0 + o_state, mask=inside, other=0).to(DTYPE, bitcast=True)
    if p_c0 is not None:
        b_c = tl.load(p_c0 + o_state, mask=inside, other=0.0)
    if first > 0:
        b_h = tl.load(p_h_n + o_state, mask=inside, other=0.0)
        b_c = tl.load(p_c_n + o_state, mask=inside, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + o_b, mask=in_b, other=0)

    position = first
    while position < end:
        time = tl.where(direction == 1, steps - 1 - position, position).to(tl.int64)
        valid = inside
        if p_lengths is not None:
            valid = inside & (time < b_length)[:, None]
        # Not dependent on the other programs, so on its way before they are waited for.
        p_x = (
            p_input + time * stride_input_t + o_b[:, None] * stride_input_b + direction * stride_input_d + o_h[None, :]
        )
        b_i = tl.load(p_x, mask=valid, other=0.0).to(tl.float32)
        b_f = tl.load(p_x + H, mask=valid, other=0.0).to(tl.float32)
        b_g = tl.load(p_x + 2 * H, mask=valid, other=0.0).to(tl.float32)
        b_o = tl.load(p_x + 3 * H, mask=valid, other=0.0).to(tl.float32)

        before = tl.where(direction == 1, time + 1, time - 1)
        p_before = p_exchange + before * stride_exchange_t + direction * stride_exchange_d
        if p_h0 is None:
            p_rows = column(p_before + o_b * stride_exchange_b, SPLIT)
            in_rows = column(in_b & (position > 0), SPLIT)
        else:
            if position == 0:
                p_before = p_h0 + direction * batch * H
            p_rows = column(p_before + o_b * tl.where(position == 0, H, stride_exchange_b), SPLIT)
            in_rows = column(in_b, SPLIT)
        if SYNC == "launch":
            b_sum = tl.zeros([4 * BLOCK_H, BLOCK_B], tl.float32)
            for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
                o_k = start + offsets(BLOCK_K, 1)
                b_weight = tl.load(p_rows_weight + o_k, mask=in_rows_weight & (o_k < H), other=0.0)
                b_rows = tl.load(p_rows + o_k, mask=in_rows & (o_k < H), other=0).to(DTYPE, bitcast=True)
                b_sum = tl.dot(b_weight, tl.trans(b_rows), b_sum, input_precision=PRECISION)
            b_sum = tl.trans(b_sum)
        else:
            if SYNC == "barrier":
                wait(p_counters + group * 32, position * TILES)
            b_sum = product(
                weights, p_rows, in_rows, position > 0, M=4 * BLOCK_H, N=BLOCK_B, K=H, BLOCK_K=BLOCK_K, GROUP=GROUP,
                SPLIT=SPLIT, POLL=SYNC == "poll", DTYPE=DTYPE, PRECISION=PRECISION, NATIVE=NATIVE,
            )  # fmt: skip
        # Gates to the last two dimensions, which stand in one thread's registers: (i, f), (g, o).
        b_sum = tl.permute(tl.reshape(b_sum, [BLOCK_B, 2, 2, BLOCK_H]), (0, 3, 1, 2))
        b_sum_ig, b_sum_fo = tl.split(b_sum)
        b_sum_i, b_sum_g = tl.split(b_sum_ig)
        b_sum_f, b_sum_o = tl.split(b_sum_fo)
        b_i, b_f, b_g, b_o, b_c_new, b_h_new = cell(
            b_i + b_sum_i, b_f + b_sum_f, b_g + b_sum_g, b_o + b_sum_o, b_c, PRECISE, NATIVE
        )
        b_h_new = b_h_new.to(DTYPE)
        if p_lengths is not None:
            b_c_new = tl.where(valid, b_c_new, b_c)
            b_h_new = tl.where(valid, b_h_new, b_h)
        b_h, b_c = b_h_new, b_c_new

        # First what the others wait for.
        o_exchange = time * stride_exchange_t + o_b[:, None] * stride_exchange_b + direction * stride_exchange_d
        tl.store(p_exchange + o_exchange + o_h[None, :], present(b_h.to(BITS, bitcast=True)), mask=inside)
        if SYNC == "barrier":
            arrive(p_counters + group * 32)
        if p_output is not None:
            o_output = time * stride_output_t + o_b[:, None] * stride_output_b + direction * stride_output_d
            b_out = tl.where(valid, b_h, 0.0).to(DTYPE)
            tl.store(p_output + o_output + o_h[None, :], b_out, mask=inside)
        if p_gates is not None:
            # Evicted first (.cs): nothing reads either before the backward pass, and what the programs exchange should
            # stay. That pass reads gates once. It reads cells in two turns that follow each other; its first read is a
            # plain load, which keeps them for the second whatever this store did.
            o_gates = time * stride_gates_t + o_b[:, None] * stride_gates_b + direction * stride_gates_d + o_h[None, :]
            tl.store(p_gates + o_gates, b_i.to(DTYPE), mask=inside, cache_modifier=".cs")
            tl.store(p_gates + o_gates + H, b_f.to(DTYPE), mask=inside, cache_modifier=".cs")
            tl.store(p_gates + o_gates + 2 * H, b_g.to(DTYPE), mask=inside, cache_modifier=".cs")
            tl.store(p_gates + o_gates + 3 * H, b_o.to(DTYPE), mask=inside, cache_modifier=".cs")
            o_cells = time * stride_cells_t + o_b[:, None] * stride_cells_b + direction * stride_cells_d
            tl.store(p_cells + o_cells + o_h[None, :], b_c, mask=inside, cache_modifier=".cs")
        position += 1

    # Anew, by a program's number that is the same: `position` is `end` by now.
    _, direction, o_h, o_b = tile(tl.program_id(0) + position - end, H, DIRECTIONS, BLOCK_B, BLOCK_H, WIDE)
    inside = (o_b < batch)[:, None] & (o_h < H)[None, :]
    o_state = (direction * batch + o_b[:, None]) * H + o_h[None, :]
    tl.store(p_h_n + o_state, b_h, mask=inside)
    tl.store(p_c_n + o_state, b_c, mask=inside)
