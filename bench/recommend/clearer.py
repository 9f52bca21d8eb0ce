"""Advice for an unclear answer: the number of further rounds that it needs, and the command that measures them."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from bench.analysis import racing
from bench.analysis.intervals import Interval
from bench.records.rounds import Samples
from bench.run.more import duration

#: More rounds than this many times those there are help less than a quieter machine does.
MOST = 50.0
#: Repeats of serving, where there were none or one, and the most that are worth their time here.
REPEATS, MOST_REPEATS = 5, 50


@dataclass(frozen=True)
class Clearer:
    """Additional rounds that would decide between two variants, or show that they are equal.

    Attributes:
        between: the variants that they would decide between; empty where they answer another question.
        rounds: more of them, over all processes.
        seconds: of rounds, as `bench.analysis.racing.further_s` has them.
        hopeless: whether that is more than is worth measuring here.
    """

    between: tuple[str, ...]
    rounds: int
    seconds: float
    hopeless: bool

    @property
    def purpose(self) -> str:
        """Name the purpose of the advice."""
        return f"decide between {' and '.join(f'`{name}`' for name in self.between)}" if self.between else "decide"

    @property
    def text(self) -> str:
        """The advice in words, without the command."""
        if self.hopeless:
            return f"measure again where nothing else runs: here it would take about {self.rounds} more rounds"
        return f"measure about {duration(self.seconds)} longer"

    def command(self, path: Path) -> str:
        """The command that measures them into the run folder; empty if that is not worthwhile."""
        more = f"python -m bench run --resume {shlex.quote(str(path))} --more {duration(self.seconds)}"
        return "" if self.hopeless else more


@dataclass(frozen=True)
class MoreRepeats:
    """Serving again, with enough repeats to decide.

    Attributes:
        repeats: of each variant.
        words: of the command.
        hopeless: whether that is more than is worth measuring here.
    """

    repeats: int
    words: tuple[str, ...]
    hopeless: bool

    purpose: ClassVar[str] = "decide"

    @classmethod
    def of(
        cls, what: Sequence[str], variants: Sequence[str], bound: str, repeats: int, value: float, spread: float
    ) -> MoreRepeats:
        """Estimate the repeats that tell variants apart, or show that they are equal.

        Args:
            what: options that name what is served.
            variants: to serve.
            bound: as `p99=20ms`.
            repeats: that there were.
            value: load of the best over that of the other, at least 1.
            spread: upper end of its interval over the lower one.
        """
        factor = racing.growth(value, spread) if spread > 1 else 1.0
        wanted = math.ceil(factor * repeats) if repeats > 1 else REPEATS
        words = ["python", "-m", "bench", "serve", *what]
        words += [word for name in variants for word in ("--variant", name)]
        return cls(wanted, (*words, "--bound", bound, "--repeats", str(wanted)), wanted > MOST_REPEATS)

    @property
    def text(self) -> str:
        """The advice in words, without the command."""
        if self.hopeless:
            return f"serve again where nothing else runs: here it would take about {self.repeats} repeats"
        return f"serve again with about {self.repeats} repeats"

    def command(self, _: Path) -> str:
        """The command that serves into a new folder; empty if that is not worthwhile."""
        return "" if self.hopeless else shlex.join(self.words)


def more_calls(samples: Samples, variants: Sequence[str], wanted: int) -> Clearer | None:
    """Estimate the rounds that give the best of some variants as many calls as wanted, and half as many again.

    Args:
        samples: of the group.
        variants: those that are looked at.
        wanted: calls that a figure takes where they are independent.
    """
    counts = [sum(len(timed) for rounds in samples.calls(name) for timed in rounds) for name in variants]
    kept = [found for rounds in samples.kept() for found in rounds]
    if not kept or not max(counts, default=0):
        return None
    return _of(samples, variants, max(racing.LEAST_GROWTH, 1.5 * wanted / max(counts)))


def clearer(excess: Interval, samples: Samples, variants: Sequence[str], between: tuple[str, ...] = ()) -> Clearer:
    """Estimate the rounds that narrow an interval until it is on one side of 1, or within `racing.MARGIN` of it.

    Args:
        excess: cost of the second over that of the best, at least 1.
        samples: of the group.
        variants: of the group that are compared.
        between: the two that the interval is of.
    """
    return _of(samples, variants, racing.growth(excess.value, excess.high / excess.low), between)


def _of(samples: Samples, variants: Sequence[str], factor: float, between: tuple[str, ...] = ()) -> Clearer:
    """Advice to measure a multiple of the rounds."""
    kept = sum(map(len, samples.kept()))
    seconds = racing.further_s(samples, variants, factor)
    return Clearer(between, math.ceil(kept * (factor - 1)), seconds, factor > MOST)
