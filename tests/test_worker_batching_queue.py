"""The batching queue: batches are never too large, nobody waits too long, and every query leaves once."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from bench.worker.batching_queue import BatchCounts, BatchingQueue, buckets


class Clock:
    """A clock that a test moves."""

    now_s = 0.0

    def __call__(self) -> float:
        """Time now, seconds."""
        return self.now_s


@given(
    st.lists(st.lists(st.integers(0, 7), max_size=9), max_size=9),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_query_leaves_once_in_batches_that_are_not_too_large(arrivals, largest, bucketed):
    """Whatever comes, no query is lost or doubled, the oldest of a bucket leave first, and buckets do not mix."""
    bucket_of = (lambda sample: sample // 4) if bucketed else (lambda _: 0)
    queue = BatchingQueue(largest, 0.0, bucket_of)
    number = 0
    for samples in arrivals:
        queue.put((number + place, sample) for place, sample in enumerate(samples))
        number += len(samples)
    queue.close()
    batches = []
    while taken := queue.take():
        batches.append(taken)
    left = [query.number for batch in batches for query in batch]
    assert sorted(left) == list(range(number))
    assert all(1 <= len(batch) <= largest for batch in batches)
    assert all(len({bucket_of(query.sample) for query in batch}) == 1 for batch in batches)
    for bucket in (0, 1):
        of_bucket = [query.number for batch in batches for query in batch if bucket_of(query.sample) == bucket]
        assert of_bucket == sorted(of_bucket)


def test_a_full_batch_leaves_at_once():
    """However long the oldest query may wait."""
    queue = BatchingQueue(2, 1e9, clock=Clock())
    queue.put([(0, 0), (1, 0), (2, 0)])
    assert [query.number for query in queue.take()] == [0, 1]


def test_a_batch_that_is_not_full_leaves_when_its_oldest_query_has_waited():
    """Before, it does not; then it does, with all that came meanwhile."""
    clock = Clock()
    queue = BatchingQueue(8, 0.5, clock=clock)
    queue.put([(0, 0)])
    clock.now_s = 0.4
    queue.put([(1, 0)])
    assert queue._ready()[0] is None
    clock.now_s = 0.5
    assert [query.number for query in queue.take()] == [0, 1]


def test_a_query_that_comes_later_wakes_the_taker():
    """The other thread sleeps until there is something to take."""
    queue = BatchingQueue(1, 0.0)
    threading.Timer(0.02, queue.put, ([(5, 0)],)).start()
    assert [query.number for query in queue.take()] == [5]


def test_an_old_query_of_a_rare_length_is_not_starved():
    """Full batches of other buckets do not keep it waiting beyond its time."""
    clock = Clock()
    queue = BatchingQueue(2, 0.5, lambda sample: sample, clock=clock)
    queue.put([(0, 1)])
    clock.now_s = 0.6
    queue.put([(number, 0) for number in range(1, 7)])
    assert queue.take()[0].number == 0


def test_buckets_divide_samples_by_length():
    """Each holds about as many, and a longer sample is never in an earlier one."""
    lengths = [5, 1, 9, 3, 7, 2, 8, 4]
    bucket_of = buckets(lengths, 4)
    by_length = [bucket_of(place) for place in sorted(range(8), key=lengths.__getitem__)]
    assert by_length == sorted(by_length)
    assert len(set(by_length)) == 4
    assert {buckets([3, 3, 3], 4)(place) for place in range(3)} == {0}


def test_waste_is_the_share_of_padding():
    """Two queries of 2 and 4 steps compute 8, of which 6 are theirs."""
    served = BatchCounts()
    served.add([(2,), (4,)], 0.1)
    assert served.waste == 0.25
    served.add([(4,), (4,)], 0.1)
    assert served.waste == 1 - 14 / 16
    assert served.queries == 4
