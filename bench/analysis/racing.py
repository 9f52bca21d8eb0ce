"""Racing: which variants of a group still need rounds, and when the group's answer stands.

The answer is the fastest variant, or the set of variants that are equal to it within `MARGIN`: not those whose
intervals merely overlap, but those whose interval lies within the margin. Further rounds go to variants that are
undecided between fastest and slower, and to those whose intervals are wider than the suite asks for. All others rest.

Looking often and stopping when the figures please would make intervals hold less often than they say. So a run looks
at doublings of its rounds alone, and decides by intervals that are `CARE` times as wide as those that it reports;
`tests/test_racing.py` counts wrong decisions on synthetic rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from bench.analysis.figures import speedup
from bench.analysis.intervals import Interval, ratio_interval
from bench.plan.cases import LEAST_ROUNDS
from bench.records.rounds import Round, Samples, ratios

#: Times within this share of each other make no difference to a user.
MARGIN = 0.03
#: Factor by which intervals are wider while a run decides whether to continue: 99 % in place of 95 %.
CARE = 1.3
#: Shortest and longest time of further rounds that a group is advised to get, seconds: less is not worth its gates.
LEAST_S, MOST_S = 10.0, 3600.0
#: Smallest factor by which rounds are advised to grow to tell variants apart or to collect calls: what is estimated to
#: be decided by a few more may not be. Where only intervals are too wide, the factor may be smaller (`missing_factor`).
LEAST_GROWTH = 1.2
#: First rounds of a seating, in which all variants take part.
FIRST_ROUNDS = 8
#: A seating that began with this many rounds or seconds of nothing but disturbed ones is spoilt, with at least
#: `SPOILT_LEAST` rounds. Far cores alone spoil none: a start and gates would be paid for what may last all day.
SPOILT_ROUNDS, SPOILT_S, SPOILT_LEAST = LEAST_ROUNDS, 1.0, 3


@dataclass(frozen=True)
class Standing:
    """Order of a group's variants, as far as it is known.

    Attributes:
        best: the variant with the shortest median time.
        equal: variants certainly within `MARGIN` of it.
        slower: variants certainly slower than it, by however little.
        undecided: variants of which neither is sure.
        wide: variants whose speedup has a wider interval than the suite asks for.
        disturbed: variants whose figures rest on disturbed rounds for lack of others.
        against: of each other variant, time of the best over its time, with the interval.
    """

    best: str
    equal: frozenset[str]
    slower: frozenset[str]
    undecided: frozenset[str]
    wide: frozenset[str]
    disturbed: frozenset[str]
    against: dict[str, Interval]

    @property
    def needing(self) -> frozenset[str]:
        """Variants for which more rounds are needed; none where the answer stands."""
        return self.undecided | self.wide | self.disturbed


def standing(
    samples: Samples, variants: Collection[str], reference: str, interval: float, care: float = 1.0
) -> Standing | None:
    """Judge a group by its rounds so far.

    Args:
        samples: of the group.
        variants: that take part.
        reference: variant that speedups are relative to.
        interval: half-width that the suite asks for, as a share.
        care: factor by which intervals are taken to be wider than they are.

    Returns:
        None while a variant has no round.
    """
    # Where the reference dropped out, any other serves to find the fastest; there are no speedups to narrow then.
    yardstick = reference if reference in variants else min(variants, default="")
    speeds = {name: speedup(samples, yardstick, name) for name in variants}
    known = {name: found for name, found in speeds.items() if found is not None}
    if set(known) != set(variants) or not known:
        return None
    best = max(known, key=lambda name: known[name].value)
    against = {}
    for name in variants:
        if name != best and (found := speedup(samples, best, name)) is not None:
            against[name] = found.widened(care)
    equal = frozenset(name for name, found in against.items() if found.low > 1 - MARGIN and found.high < 1 + MARGIN)
    slower = frozenset(name for name, found in against.items() if found.high < 1)
    wide = frozenset(name for name, found in known.items() if found.half_width > interval and yardstick == reference)
    disturbed = frozenset(name for name in known if samples.lacking(name))
    return Standing(best, equal, slower, frozenset(against) - equal - slower, wide, disturbed, against)


def certain(samples: Samples, found: Standing) -> bool:
    """Return whether the best is certainly faster than all others, in each state of the machine that was seen too.

    Unlike the figures, this needs no undisturbed rounds: on a host that keeps the cores far apart, the order in that
    state is known. Where the state changed, the order must hold in both.

    Args:
        samples: of the group.
        found: its standing, which disturbed rounds may have decided.
    """
    if not found.against or found.slower != set(found.against):
        return False
    return all(_faster_in_each_state(samples, found.best, name) for name in found.against)


def _faster_in_each_state(samples: Samples, best: str, other: str) -> bool:
    states = samples.states(best, other)
    return bool(states) and all(taken and ratio_interval(ratios(taken, best, other)).high < 1 for taken in states)


def places(found: Standing | None) -> dict[str, str]:
    """The place of each variant, as the column `standing` has it."""
    if found is None:
        return {}
    named = {found.best: "best"} | dict.fromkeys(found.equal, "equal")
    return named | dict.fromkeys(found.slower, "slower") | dict.fromkeys(found.undecided, "undecided")


def players(found: Standing | None, variants: Collection[str], reference: str) -> frozenset[str]:
    """Variants that need more rounds, with the best and the reference to compare with; none when all is decided."""
    if found is None:
        return frozenset(variants)
    if not found.needing:
        return frozenset()
    return found.needing | {found.best} | ({reference} & set(variants))


class Race:
    """Choice of the variants that continue in a seating: all at first, then those that need more, checked at doublings.

    Args:
        everybody: all variants that take turns.
        needing: says who needs more rounds, from the rounds of the seating so far.
        replaceable: nobody goes on where nothing but disturbed rounds came of the seating's beginning: what lasts so
            long may last longer, and another seating may find it gone.
    """

    def __init__(
        self,
        everybody: Collection[str],
        needing: Callable[[Sequence[Round]], frozenset[str]],
        *,
        replaceable: bool = False,
    ) -> None:
        self._going, self._needing, self._replaceable = frozenset(everybody), needing, replaceable
        self._next = FIRST_ROUNDS

    def __call__(self, rounds: Sequence[Round]) -> Collection[str]:
        """Names of the variants that continue after these rounds; disturbed rounds do not count."""
        clean = sum(not found.disturbed for found in rounds)
        if self._replaceable and len(rounds) >= SPOILT_LEAST and not any(found.usable for found in rounds):
            lasted_s = sum(found.wall_s for found in rounds)
            if len(rounds) >= SPOILT_ROUNDS or lasted_s >= SPOILT_S:
                return ()
        if clean >= self._next:
            self._next = 2 * clean
            self._going = self._needing(rounds)
        return self._going


def missing_factor(found: Standing, interval: float, widths: Iterable[float] = ()) -> float:
    """Factor by which rounds must grow for the answer to stand, estimated from the present doubt.

    For an undecided rival, the nearer of two outcomes counts: certainly slower, or certainly equal (`growth`).

    Args:
        found: of the group.
        interval: half-width that the suite asks for, as a share.
        widths: half-widths of the speedups that are too wide.
    """
    factors = [(width / interval) ** 2 for width in widths]
    rivals = [found.against[name] for name in found.undecided]
    factors += [growth(ratio.value, ratio.high / ratio.low) for ratio in rivals]
    return max(factors, default=1.0)


def growth(value: float, spread: float) -> float:
    """Factor by which rounds must grow until a ratio is certainly on one side of 1, or certainly within `MARGIN` of it.

    An interval narrows with the square root of the rounds, and of the processes that they are shared out among.

    Args:
        value: the ratio.
        spread: upper end of its interval over the lower one.
    """
    distance = abs(math.log(value))
    return max(LEAST_GROWTH, (math.log(spread) / 2 / max(distance, -math.log(1 - MARGIN) - distance)) ** 2)


def further_s(samples: Samples, variants: Iterable[str], factor: float) -> float:
    """Seconds of further rounds that give a group this many times its present rounds, within `LEAST_S` and `MOST_S`.

    All advice on measuring further is made of this, whoever gives it.

    Args:
        samples: of the group.
        variants: whose figures must rest on undisturbed rounds.
        factor: by which rounds must grow.
    """
    timed_s = [sum(b.timed_s for each in rounds for b in each.blocks.values()) for rounds in samples.processes]
    # One that was given up is short; the longest one says what a seating takes.
    clean_s = max(map(samples.lacking, variants), default=0) * max(timed_s, default=0.0)
    return min(MOST_S, max(LEAST_S, (factor - 1) * sum(timed_s), clean_s))
