"""Configurations of `kernels.gpu.persistent`: what fits on chip, and an order of what is worth trying first."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton

from ..common.recurrence import Problem

#: What a problem on a CPU is planned for, so that tests choose what an H200 would: multiprocessors and capability.
H200 = (132, 90)
#: Shared memory of one block, bytes, by compute capability; others (8.6, 8.9, 12.0) have the least.
SHARED_BYTES = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
LEAST_SHARED_BYTES = 101376
#: How many configurations a tuner is offered.
MOST_CONFIGS = 12
#: What the driver said when a grid did not fit that ought to: this process gets fewer multiprocessors than the GPU has,
#: as under the Multi-Process Service with a share of threads. Or that there are no such grids here. Nothing then runs
#: that waits within a launch.
FEWER: list[str] = []
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class PersistentConfig:
    """Division of a problem among programs, and its launch.

    Attributes:
        block_b, block_h: batch rows and hidden units (all four gates) of a program.
        block_k: of the sum over h (or over the gates' gradients), at a time.
        group: blocks of it that are loaded at a time.
        split: parts of `block_k` that different warps sum over, the weights in their registers; 1: all warps sum over
            everything, the weights in shared memory.
        sync: `barrier`, `poll` or `launch`.
        num_warps, num_stages: options of Triton's compiler; stages count for `launch`.
    """

    block_b: int
    block_h: int
    block_k: int
    group: int
    split: int
    sync: str
    num_warps: int
    num_stages: int = 1


def refuses(problem: Problem, *, backward: bool) -> str | None:
    """Reason why no configuration serves, or None."""
    del backward
    if problem.dtype not in DTYPES:
        return f"persistent kernels take float16, bfloat16 and float32, not {problem.dtype}"
    if problem.resets:
        return "persistent kernels have no resets in the middle of the steps"
    if problem.device == "cuda" and problem.capability < 80:
        return f"persistent kernels need compute capability 8.0 or newer, this GPU has {problem.capability / 10}"
    return None


def configs(problem: Problem, *, backward: bool) -> list[PersistentConfig]:
    """Configurations that fit, best guess first, at most `MOST_CONFIGS`; those with `launch` serve any size.

    `poll` is estimated to be faster and offered, but never comes first: no GPU has shown yet that it is right.
    """

    def estimate(config: PersistentConfig) -> float:
        return step_us(problem, config, backward=backward)

    streamed = sorted(_streamed(problem, backward=backward), key=estimate)
    # A single step has nothing to wait for, and no use for weights that stay.
    if problem.steps <= 1 or FEWER:
        return streamed
    held = sorted(_held(problem, backward=backward), key=estimate)
    half = (MOST_CONFIGS - 2) // 2
    barrier = [config for config in held if config.sync == "barrier"][:half]
    poll = [config for config in held if config.sync == "poll"][:half]
    rest = sorted([*barrier, *streamed[:2]], key=estimate)
    return [rest[0], *poll, *rest[1:]]


def programs(problem: Problem, config: PersistentConfig) -> int:
    """Size of the grid: directions x batch tiles x hidden tiles."""
    return problem.directions * -(-problem.batch // config.block_b) * -(-problem.hidden_size // config.block_h)


def _held(problem: Problem, *, backward: bool) -> list[PersistentConfig]:
    """All configurations that keep the weights on chip and run all programs at once, one a multiprocessor."""
    multiprocessors = problem.multiprocessors or H200[0]
    wgmma = (problem.capability or H200[1]) == 90 and problem.dtype.itemsize == 2 and not backward
    units = [size for size in (8, 16, 32, 64) if size == 8 or size < 2 * problem.hidden_size]
    rows = [size for size in (8, 16, 32, 64) if size == 8 or size < 2 * problem.batch]
    found = []
    for block_h, block_b, num_warps in itertools.product(units, rows, (4, 8, 16)):
        # Without a split only Hopper's warp-group product keeps up: from 64 rows of weights and 16 of batch on.
        together = wgmma and block_h >= 16 and block_b >= 16
        wide = num_warps == 8 and (block_h > 16 or problem.hidden_size <= 1024)
        together = together and (wide or (num_warps, block_h, block_b) == (4, 16, 16))
        for split in (1, num_warps) if together else (num_warps,):
            for (block_k, group), sync in itertools.product(
                _loads(problem, split, backward=backward), ("barrier", "poll")
            ):
                config = PersistentConfig(block_b, block_h, block_k, group, split, sync, num_warps)
                if programs(problem, config) <= multiprocessors and _fits(problem, config, backward=backward):
                    found.append(config)
    return found


def _streamed(problem: Problem, *, backward: bool) -> list[PersistentConfig]:
    """Configurations that read the weights again at every step: they need no room for them, and no co-residency."""
    size = problem.dtype.itemsize
    rows = triton.next_power_of_2(min(max(problem.batch, 16), 64))
    if _ieee(problem):
        return [
            PersistentConfig(min(rows, 32), 16, 32, 1, 1, "launch", 4, 4),
            PersistentConfig(rows, 8, 32, 1, 1, "launch", 4, 4),
        ]
    del backward
    return [
        PersistentConfig(rows, 16, 256 // size, 1, 1, "launch", 4, 4),
        PersistentConfig(rows, 32, 128 // size, 1, 1, "launch", 8, 4),
        PersistentConfig(min(rows, 32), 16, 256 // size, 1, 1, "launch", 4, 4),
    ][: 3 if rows > 32 else 2]


def _loads(problem: Problem, split: int, *, backward: bool) -> list[tuple[int, int]]:
    """Ways to load a row: size of a block and blocks at a time, for all of the row at once, a half, a quarter..."""
    length = problem.hidden_size * (4 if backward else 1)
    # Without a split a block is staged in shared memory beside the weights, so it stays small.
    least, most = (16 * split, 1024) if split > 1 else (16, 256)
    sizes = [size for size in (1024, 512, 256, 128, 64, 32, 16) if least <= size <= most]
    padded = min(-(-length // size) * size for size in sizes)
    ways = []
    for parts in (1, 2, 4, 8, 16):
        fitting = [size for size in sizes if padded % (parts * size) == 0]
        ways += [(size, padded // (parts * size)) for size in fitting[:1]]
    return ways


def _ieee(problem: Problem) -> bool:
    """Return whether products are made without tensor cores."""
    return problem.dtype == torch.float32 and not problem.tf32


def _sizes(problem: Problem, config: PersistentConfig, *, backward: bool) -> tuple[int, int, int]:
    """Rows of weights of a program (tensor cores take 16 at least); length of its sum, without and with padding."""
    rows = max(16, config.block_h * (1 if backward else 4))
    length = problem.hidden_size * (4 if backward else 1)
    return rows, length, -(-length // config.block_k) * config.block_k


def _fits(problem: Problem, config: PersistentConfig, *, backward: bool) -> bool:
    """Return whether a program's weights and what comes besides them fit on chip.

    Only the compiler knows for certain. This follows what it gave for capability 9.0 (docs/notebook/gpu-compiled.md),
    so that what passes here does not spill into memory.
    """
    size, threads = problem.dtype.itemsize, 32 * config.num_warps
    rows, _, padded = _sizes(problem, config, backward=backward)
    weights = rows * padded * size
    loaded = config.block_b * config.group * config.block_k * size
    # A tile's elements of one thread, each with its gates, states and addresses.
    own = -(-config.block_b * config.block_h // threads)
    least = 24 if config.num_warps == 16 else 30 if backward else 36
    registers = least + (24 if backward else 8) * own
    # What was read is kept until it is known to be complete, and compared.
    registers += loaded * (2 if config.sync == "poll" else 1) // (4 * threads)
    if config.split == 1:
        # Each product of 16 along K keeps the address of its weights.
        registers += rows * config.block_b // threads + padded // (8 if config.num_warps == 8 else 9)
        shared = weights + config.block_b * config.block_k * size + 8192
    else:
        # Without tensor cores each thread holds the weights of several others as well.
        registers += weights * (5 if _ieee(problem) else 1) // (4 * threads) + rows * config.block_b // 32
        shared = max(weights, config.split * rows * config.block_b * 4)
    capability = problem.capability or H200[1]
    limit = min(255 if config.split == 1 else 250, 65536 // threads)
    return registers <= limit and shared <= SHARED_BYTES.get(capability, LEAST_SHARED_BYTES)


def step_us(problem: Problem, config: PersistentConfig, *, backward: bool) -> float:
    """Rough time of a step in microseconds on an H200: for the order of candidates and of kernels, nothing else.

    Assumed, not measured: 5 TB/s from the second-level cache and 110 KB/us of it for one multiprocessor, 1e6
    multiplications a microsecond and multiprocessor with 16-bit tensor cores, half of that with TF32, a fifth without.
    """
    size = problem.dtype.itemsize
    rows, length, padded = _sizes(problem, config, backward=backward)
    waves = -(-programs(problem, config) // (problem.multiprocessors or H200[0]))
    read = config.block_b * length * size
    if config.sync == "launch":
        read += rows * length * size
    moved = max(programs(problem, config) * read / 5e6, waves * read / 1.1e5)
    speed = 1e6 if size == 2 else 2e5 if _ieee(problem) else 5e5
    products = waves * rows * padded * max(8, config.block_b) / speed
    if config.sync == "launch":
        # Loads and products overlap, yet every block costs its turn.
        return 2.5 + max(moved, products) + 0.1 * padded / config.block_k
    if config.split == 1:
        products = padded / 16 * max(24, config.block_b) / 1750
    else:
        products += 0.004 * rows * config.block_b * config.split / (32 * config.num_warps)
    # A group of loads is asked for when the one before has come.
    rounds = -(-padded // (config.block_k * config.group))
    return (1.6 if config.sync == "barrier" else 0.9) + 0.4 * (rounds - 1) + moved + products
