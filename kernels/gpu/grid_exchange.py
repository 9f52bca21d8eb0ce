"""Exchange of rows among the programs of one launch, and their multiplication by weights that programs hold.

Two ways to know that a row has arrived: a counter in global memory that all programs of a group add to (`arrive`,
`wait`), or the row itself, where memory was filled with a bit pattern beforehand that no writer stores (`missing`).
Both need all programs of a group to run at the same time, so such kernels are launched cooperatively: a grid that does
not fit then fails at the launch instead of waiting forever.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Memory that has not been written yet, as an integer of the element's width: all bits set. As a float that is a NaN,
#: and not the one that arithmetic gives on NVIDIA's GPUs (0x7FFF, 0x7FFFFFFF).
ABSENT = tl.constexpr(-1)


@triton.jit
def arrive(p_counter):
    """Say that this program's stores before this call may be read by a program that waits for the counter."""
    # All threads' stores come before the block's barrier, and the one thread's atomic comes after it. Release at GPU
    # scope is cumulative: what happened before it, the other threads' stores included, is visible before the sum is.
    tl.debug_barrier()
    tl.atomic_add(p_counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_counter, target):
    """Return when `target` arrivals are counted; what was stored before them is then visible to all threads."""
    # Adding nothing with acquire is an acquire load; a volatile load would order nothing. One thread does it, and the
    # others stand behind it at the block's barrier, so by cumulativity they too read what was released.
    while tl.atomic_add(p_counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def present(b_bits):
    """The bits to store: another NaN where a value has just those of `ABSENT`, or its reader would wait forever."""
    NAN: tl.constexpr = (1 << (b_bits.dtype.primitive_bitwidth - 1)) - 1
    return tl.where(b_bits == ABSENT, tl.full(b_bits.shape, NAN, b_bits.dtype), b_bits)


@triton.jit
def missing(chunks):
    """Return whether one element of a tuple of blocks has not arrived."""
    b_absent = chunks[0] == ABSENT
    for index in tl.static_range(1, len(chunks)):
        b_absent = b_absent | (chunks[index] == ABSENT)
    return tl.max(tl.reshape(b_absent, [b_absent.numel]).to(tl.int32), 0) != 0


@triton.jit
def offsets(BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Places of the elements of a chunk of K: (1, BLOCK_K), or (SPLIT, 1, BLOCK_K / SPLIT)."""
    # With SPLIT a product is a batch of SPLIT products over their own part of K, and Triton gives each warp its own:
    # a warp's part of the weights is read by no other and so can stay in its registers.
    if SPLIT == 1:
        o_k = tl.arange(0, BLOCK_K)[None, :]
    else:
        o_k = tl.arange(0, SPLIT)[:, None, None] * (BLOCK_K // SPLIT)
        o_k = o_k + tl.arange(0, BLOCK_K // SPLIT)[None, None, :]
    return o_k


@triton.jit
def column(b_vector, SPLIT: tl.constexpr):
    """A vector as (N, 1), or (1, N, 1), beside `offsets`."""
    return b_vector[:, None] if SPLIT == 1 else b_vector[None, :, None]


@triton.jit
def held_weights(p_rows, inside, stride_k, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """All chunks of a program's weights; `p_rows` and `inside` say of each row where it begins and whether it exists.

    Neighbours along K stand `stride_k` apart.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    chunks = ()
    for index in tl.static_range(CHUNKS):
        o_k = index * BLOCK_K + offsets(BLOCK_K, SPLIT)
        chunks += (tl.load(p_rows + o_k * stride_k, mask=inside & (o_k < K), other=0.0),)  # type: ignore[assignment]
    return chunks


@triton.jit
def load_rows(
    p_rows, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, POLL: tl.constexpr,
):  # fmt: skip
    """`COUNT` chunks, from the `FIRST` on, of rows that other programs wrote while this kernel runs, as integers."""
    chunks = ()
    for index in tl.static_range(COUNT):
        o_k = (FIRST + index) * BLOCK_K + offsets(BLOCK_K, SPLIT)
        mask = inside & (o_k < K)
        if POLL:
            # Volatile: read again each time, past the first-level cache, which other multiprocessors' stores miss.
            b_bits = tl.load(p_rows + o_k, mask=mask, other=0, volatile=True)
        else:
            # From the second-level cache too: a line of the first level may be older than the barrier.
            b_bits = tl.load(p_rows + o_k, mask=mask, other=0, cache_modifier=".cg")
        chunks += (b_bits,)  # type: ignore[assignment]
    return chunks


@triton.jit
def together(chunks):
    """The chunks as they are, none of them used before all were asked for: assembly that does nothing."""
    # Triton moves each chunk's way through shared memory up to its load, and behind the barriers of that way the next
    # load is only asked for when the one before has come. What may have an effect nothing is moved across.
    kept = ()
    for index in tl.static_range(len(chunks)):
        kept += (_unmoved(chunks[index]),)  # type: ignore[assignment]
    return kept


@triton.jit
def _unmoved(b_bits):
    PACK: tl.constexpr = 32 // b_bits.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_bits], dtype=b_bits.dtype, is_pure=False, pack=PACK)


@triton.jit
def product(
    weights, p_rows, inside, waits, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, SPLIT: tl.constexpr, POLL: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Rows (N, K) in global memory times the transpose of held weights (M, K), float32 (N, M).

    `p_rows` and `inside` say of each row where it begins and whether it exists; rows are integers of the width of
    DTYPE. GROUP chunks are on their way at the same time, which costs registers. With POLL, `waits` says whether the
    rows may not have been written yet. NATIVE: not in the interpreter, which knows no assembly.
    """
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    b_sum = tl.zeros([M, N], tl.float32) if SPLIT == 1 else tl.zeros([SPLIT, M, N], tl.float32)
    for first in tl.static_range(0, CHUNKS, GROUP):
        chunks = load_rows(p_rows, inside, first, min(GROUP, CHUNKS - first), K, BLOCK_K, SPLIT, POLL)
        if POLL:
            # No order among loads or stores is asked for: each element proves its own arrival. That no element is torn
            # is what NVIDIA's GPUs do; PTX promises it only for strong stores, and Triton's are weak.
            while waits & missing(chunks):
                chunks = load_rows(p_rows, inside, first, min(GROUP, CHUNKS - first), K, BLOCK_K, SPLIT, POLL)
        elif NATIVE and GROUP > 1 and SPLIT > 1:
            chunks = together(chunks)
        for index in tl.static_range(min(GROUP, CHUNKS - first)):
            b_rows = chunks[index].to(DTYPE, bitcast=True)
            b_rows = tl.trans(b_rows) if SPLIT == 1 else tl.permute(b_rows, (0, 2, 1))
            b_sum = tl.dot(weights[first + index], b_rows, b_sum, input_precision=PRECISION)
    if SPLIT == 1:
        b_sum = tl.trans(b_sum)
    else:
        # A split makes Triton bring neighbours along the last dimension into one thread, and the rest of the sum into
        # neighbouring ones; a plain sum over dimension 0 goes through shared memory twice and takes many registers.
        b_low, b_high = tl.split(tl.reshape(tl.permute(b_sum, (2, 1, 0)), [N, M, SPLIT // 2, 2]))
        b_sum = tl.sum(b_low + b_high, 2)
    return b_sum
