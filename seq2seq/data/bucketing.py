"""Batches of sequences of about the same length, so that few steps are padding.

Sorting everything would give the same batches in every epoch, short ones first; sorting within shuffled pools keeps
most of the gain, and the batches come in random order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Batches that are sorted together.
POOL_BATCHES = 32


def bucketed(
    lengths: Sequence[tuple[int, ...]], batch: int, seed: int, epoch: int, pool_batches: int = POOL_BATCHES
) -> list[list[int]]:
    """Batches of one epoch: places in `lengths`, each exactly once, in an order that seed and epoch decide.

    Args:
        lengths: steps of each example, one number a tensor (source and target).
        batch: examples in a batch; one batch may be smaller.
        seed: of the shuffling.
        epoch: from 0; each has another order.
        pool_batches: batches sorted together; 1 is random batching.

    Raises:
        ValueError: when batch or pool_batches is not positive, or an example has no step.
    """
    if batch < 1 or pool_batches < 1:
        msg = f"batch is {batch} and pool_batches {pool_batches}, expected at least 1 each"
        raise ValueError(msg)
    if any(min(steps) < 1 for steps in lengths):
        msg = "an example has no step, expected at least one in each of its sequences"
        raise ValueError(msg)
    generator = np.random.default_rng((seed, epoch))
    order = generator.permutation(len(lengths)).tolist()
    pool = batch * pool_batches
    batches = []
    for start in range(0, len(order), pool):
        chosen = sorted(order[start : start + pool], key=lengths.__getitem__)
        batches += [chosen[first : first + batch] for first in range(0, len(chosen), batch)]
    return [batches[place] for place in generator.permutation(len(batches))]


def padding_waste(lengths: Sequence[tuple[int, ...]], batches: Sequence[Sequence[int]]) -> float:
    """Share of steps that are padding when each batch is as long as its longest sequence, from 0 to 1.

    Args:
        lengths: steps of each example, one number a tensor.
        batches: places in `lengths`.
    """
    valid = computed = 0
    for places in batches:
        for steps in zip(*(lengths[place] for place in places), strict=True):
            valid += sum(steps)
            computed += len(steps) * max(steps)
    return 1 - valid / computed if computed else 0.0


def padding_note(lengths: Sequence[tuple[int, ...]], batch: int) -> str:
    """Share of padding in the training batches, and the share if they were drawn at random.

    Args:
        lengths: steps of each example, one number a tensor.
        batch: examples in a batch.
    """
    wastes = [padding_waste(lengths, bucketed(lengths, batch, 0, 0, pool)) for pool in (POOL_BATCHES, 1)]
    return f"{wastes[0]:.0%} of the steps in batches of {batch} are padding, {wastes[1]:.0%} if drawn at random"
