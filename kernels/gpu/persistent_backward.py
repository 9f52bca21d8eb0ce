"""The backward recurrence by programs that share each sequence; the kernel that `kernels.gpu.persistent` launches."""

from __future__ import annotations

import triton
import triton.language as tl

from .fast_math import tanh
from .grid_exchange import arrive, column, held_weights, present, product, wait
from .persistent_tile import tile


@triton.jit(do_not_specialize=["steps", "first", "end"])
def backward_kernel(  # noqa: C901 - branches at compile time
    p_weight, p_c0, p_lengths, p_gates, p_cells, p_grad_output, p_grad_h_n, p_grad_c_n, p_grad_gates, p_grad_h0,
    p_grad_c0, p_held, p_counters,
    batch, steps, first, end,
    stride_gates_t, stride_gates_b, stride_gates_d, stride_cells_t, stride_cells_b, stride_cells_d,
    stride_output_t, stride_output_b, stride_output_d, stride_grad_t, stride_grad_b, stride_grad_d,
    H: tl.constexpr, DIRECTIONS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, SYNC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    WIDE: tl.constexpr, PRECISE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Turns from `first` to before `end`, of steps + 1, of one hidden tile of one batch tile of one direction.

    Turn n takes the gates' gradient of turn n - 1, makes h's of it, and from that the gates' of its own step, the n-th
    from the end; the last turn has no step and leaves the gradient of h0. Blocks stand batch row by hidden unit.
    `p_grad_gates` are integers of the gates' width and what programs read each other's work from. Between launches the
    gradients of h and c are in `p_held`, float32, and `p_grad_c0`.
    """
    TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    K: tl.constexpr = 4 * H
    DTYPE: tl.constexpr = p_weight.dtype.element_ty
    BITS: tl.constexpr = p_grad_gates.dtype.element_ty
    group, direction, o_h, o_b = tile(tl.program_id(0), H, DIRECTIONS, BLOCK_B, BLOCK_H, WIDE)
    in_h, in_b = o_h < H, o_b < batch
    inside = in_b[:, None] & in_h[None, :]
    o_state = (direction * batch + o_b[:, None]) * H + o_h[None, :]

    # Column u of this program's weights is what all gates of all units get from its unit u.
    p_columns = p_weight + direction.to(tl.int64) * K * H + o_h[None, :]
    if SYNC != "launch":
        p_rows_weight = column(p_weight + direction.to(tl.int64) * K * H + o_h, SPLIT)
        weights = held_weights(p_rows_weight, column(in_h, SPLIT), H, K=K, BLOCK_K=BLOCK_K, SPLIT=SPLIT)

    b_dh = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    b_dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if p_grad_h_n is not None:
        b_dh = tl.load(p_grad_h_n + o_state, mask=inside, other=0.0).to(tl.float32)
    if p_grad_c_n is not None:
        b_dc = tl.load(p_grad_c_n + o_state, mask=inside, other=0.0)
    if first > 0:
        b_dh = tl.load(p_held + o_state, mask=inside, other=0.0)
        b_dc = tl.load(p_grad_c0 + o_state, mask=inside, other=0.0)
    if p_lengths is not None:
        b_length = tl.load(p_lengths + o_b, mask=in_b, other=0)

    turn = first
    while turn < end:
        position = steps - 1 - turn
        time = tl.where(direction == 1, turn, position).to(tl.int64)
        # Where this direction comes from, forward in its own order: one step further back.
        before = tl.where(direction == 1, time + 1, time - 1)
        after = tl.where(direction == 1, time - 1, time + 1)
        valid = inside & (turn < steps)
        if p_lengths is not None:
            valid = valid & (time < b_length)[:, None]
        # Not dependent on the other programs, so on its way before they are waited for.
        o_gates = time * stride_gates_t + o_b[:, None] * stride_gates_b + direction * stride_gates_d + o_h[None, :]
        b_i = tl.load(p_gates + o_gates, mask=valid, other=0.0).to(tl.float32)
        b_f = tl.load(p_gates + o_gates + H, mask=valid, other=0.0).to(tl.float32)
        b_g = tl.load(p_gates + o_gates + 2 * H, mask=valid, other=0.0).to(tl.float32)
        b_o = tl.load(p_gates + o_gates + 3 * H, mask=valid, other=0.0).to(tl.float32)
        o_cells = o_b[:, None] * stride_cells_b + direction * stride_cells_d + o_h[None, :]
        b_tanh_c = tanh(tl.load(p_cells + time * stride_cells_t + o_cells, mask=valid, other=0.0), PRECISE, NATIVE)
        b_c = tl.load(p_cells + before * stride_cells_t + o_cells, mask=valid & (position > 0), other=0.0)
        if p_c0 is not None:
            b_c += tl.load(p_c0 + o_state, mask=valid & (position == 0), other=0.0)
        o_output = time * stride_output_t + o_b[:, None] * stride_output_b + direction * stride_output_d + o_h[None, :]
        b_out = tl.load(p_grad_output + o_output, mask=valid, other=0.0).to(tl.float32)

        p_after = p_grad_gates + after * stride_grad_t + direction * stride_grad_d
        p_rows = column(p_after + o_b * stride_grad_b, SPLIT)
        in_rows = column(in_b & (turn > 0), SPLIT)
        if SYNC == "launch":
            b_sum = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
            for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                o_k = start + tl.arange(0, BLOCK_K)
                in_k = o_k < K
                b_weight = tl.load(p_columns + o_k[:, None] * H, mask=in_k[:, None] & in_h[None, :], other=0.0)
                b_rows = tl.load(p_rows + o_k[None, :], mask=in_rows & in_k[None, :], other=0).to(DTYPE, bitcast=True)
                b_sum = tl.dot(b_rows, b_weight, b_sum, input_precision=PRECISION)
        else:
            if SYNC == "barrier":
                wait(p_counters + group * 32, turn * TILES)
            b_sum = product(
                weights, p_rows, in_rows, turn > 0, M=BLOCK_H, N=BLOCK_B, K=K, BLOCK_K=BLOCK_K, GROUP=GROUP,
                SPLIT=SPLIT, POLL=SYNC == "poll", DTYPE=DTYPE, PRECISION=PRECISION, NATIVE=NATIVE,
            )  # fmt: skip
        through = inside & (turn > 0)
        if p_lengths is not None:
            # Past its end a sequence holds its state, so the gradient passes.
            through = through & (after < b_length)[:, None]
        b_dh = tl.where(through, b_sum, b_dh)

        b_total = b_dh + b_out
        b_dc_here = b_dc + b_total * b_o * (1 - b_tanh_c * b_tanh_c)
        b_di = tl.where(valid, b_dc_here * b_g * b_i * (1 - b_i), 0.0).to(DTYPE)
        b_df = tl.where(valid, b_dc_here * b_c * b_f * (1 - b_f), 0.0).to(DTYPE)
        b_dg = tl.where(valid, b_dc_here * b_i * (1 - b_g * b_g), 0.0).to(DTYPE)
        b_do = tl.where(valid, b_total * b_tanh_c * b_o * (1 - b_o), 0.0).to(DTYPE)
        b_dc = tl.where(valid, b_dc_here * b_f, b_dc)

        o_grad = time * stride_grad_t + o_b[:, None] * stride_grad_b + direction * stride_grad_d + o_h[None, :]
        stored = inside & (turn < steps)
        tl.store(p_grad_gates + o_grad, present(b_di.to(BITS, bitcast=True)), mask=stored)
        tl.store(p_grad_gates + o_grad + H, present(b_df.to(BITS, bitcast=True)), mask=stored)
        tl.store(p_grad_gates + o_grad + 2 * H, present(b_dg.to(BITS, bitcast=True)), mask=stored)
        tl.store(p_grad_gates + o_grad + 3 * H, present(b_do.to(BITS, bitcast=True)), mask=stored)
        if SYNC == "barrier":
            arrive(p_counters + group * 32)
        turn += 1

    # Anew, by a program's number that is the same: `turn` is `end` by now.
    _, direction, o_h, o_b = tile(tl.program_id(0) + turn - end, H, DIRECTIONS, BLOCK_B, BLOCK_H, WIDE)
    inside = (o_b < batch)[:, None] & (o_h < H)[None, :]
    o_state = (direction * batch + o_b[:, None]) * H + o_h[None, :]
    if end > steps:
        tl.store(p_grad_h0 + o_state, b_dh.to(DTYPE), mask=inside)
    else:
        tl.store(p_held + o_state, b_dh, mask=inside)
    tl.store(p_grad_c0 + o_state, b_dc, mask=inside)
