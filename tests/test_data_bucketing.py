"""Batches of like length: each example once an epoch, in an order of its own, with less padding than at random."""

from __future__ import annotations

from itertools import chain

import pytest

from seq2seq.data.bucketing import bucketed, padding_waste

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

lengths_of_pairs = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=100)
#: As those of real sentences: many short, few long, both sides alike.
SKEWED = [(1 + place % 97 * place % 31, 2 + place % 97 * place % 31) for place in range(500)]


@given(lengths=lengths_of_pairs, batch=st.integers(1, 20), pool=st.integers(1, 5), seed=SEEDS, epoch=st.integers(0, 99))
def test_each_example_comes_once_an_epoch(lengths, batch, pool, seed, epoch):
    """Every example is in exactly one batch, and no batch is empty or too large; all but one are full."""
    batches = bucketed(lengths, batch, seed, epoch, pool)
    assert sorted(chain(*batches)) == list(range(len(lengths)))
    assert all(1 <= len(places) <= batch for places in batches)
    assert sum(len(places) < batch for places in batches) <= 1


@given(lengths=lengths_of_pairs, seed=SEEDS, epoch=st.integers(0, 99))
def test_one_pool_is_sorted(lengths, seed, epoch):
    """Within a pool no batch reaches into the lengths of another: sorted, the batches follow each other."""
    batches = sorted(sorted(lengths[place] for place in places) for places in bucketed(lengths, 4, seed, epoch, 100))
    # Batches of equal first lengths may be sorted by their sizes alone, so ends are compared, not neighbours.
    assert list(chain(*batches)) == sorted(lengths)


def test_order_follows_seed_and_epoch():
    """Equal seed and epoch give the same batches in the same order; another of either gives others."""
    one = bucketed(SKEWED, 16, seed=1, epoch=2)
    assert bucketed(SKEWED, 16, seed=1, epoch=2) == one
    assert bucketed(SKEWED, 16, seed=2, epoch=1) != one
    assert bucketed(SKEWED, 16, seed=1, epoch=3) != one


def test_batches_do_not_come_by_length():
    """Within an epoch short and long batches are mixed, or training would see the short ones first."""
    firsts = [SKEWED[places[0]] for places in bucketed(SKEWED, 16, seed=0, epoch=0)]
    assert firsts not in (sorted(firsts), sorted(firsts, reverse=True))


@given(seed=SEEDS, batch=st.integers(4, 32))
def test_buckets_waste_less_than_chance(seed, batch):
    """On lengths that differ, batches of like length compute less than half the padding of random ones."""
    assert padding_waste(SKEWED, bucketed(SKEWED, batch, seed, 0)) < 0.5 * padding_waste(
        SKEWED, bucketed(SKEWED, batch, seed, 0, pool_batches=1)
    )


def test_waste_is_the_share_of_padded_steps():
    """Both tensors of a pair are padded to their own longest: here 4 x 2 + 4 x 2 steps, of which 4 are padding."""
    lengths = [(4, 4), (2, 2), (9, 9)]
    assert padding_waste(lengths, [[0, 1]]) == pytest.approx(4 / 16)
    assert padding_waste(lengths, [[0, 1], [2]]) == pytest.approx(4 / 34)
    assert padding_waste(lengths, [[0], [1], [2]]) == 0
    assert padding_waste([], []) == 0


@pytest.mark.parametrize(("batch", "pool"), [(0, 1), (1, 0), (-1, 1)])
def test_sizes_below_one_are_refused(batch, pool):
    with pytest.raises(ValueError, match=f"batch is {batch} and pool_batches {pool}, expected at least 1 each"):
        bucketed(SKEWED, batch, 0, 0, pool)


def test_example_without_a_step_is_refused():
    with pytest.raises(ValueError, match="an example has no step"):
        bucketed([(3, 3), (3, 0)], 2, 0, 0)
