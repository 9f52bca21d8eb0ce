"""The search for the highest load at which a test holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

#: Most tests of a search.
MOST_TESTS = 16


class LoadVerdict(StrEnum):
    """Outcome of a test at one load."""

    HELD = "held"
    BROKEN = "broken"
    INVALID = "invalid"


@dataclass(frozen=True)
class Bracket:
    """The end of a search.

    Attributes:
        held: highest load that held; None where none did.
        above: lowest load above it that did not; None where everything held.
        limit: outcome of the test at `above`.
    """

    held: float | None
    above: float | None
    limit: LoadVerdict | None = None


@dataclass(frozen=True)
class SearchSteps:
    """Settings of a search.

    Attributes:
        start: load that is tried first.
        factor: of a step, above 1.
        resolution: ratio of the two ends at which the search ends, above 1.
        floor: least load that is tried.
        ceiling: largest load that is tried.
    """

    start: float
    factor: float
    resolution: float
    floor: float
    ceiling: float


def highest(test: Callable[[float], LoadVerdict], steps: SearchSteps) -> Bracket:
    """Search for the highest load that holds: in steps from a guess until the verdict changes, then by bisection.

    Args:
        test: runs a test at a load.
        steps: how the search goes.
    """
    floor, ceiling = steps.floor, steps.ceiling
    held: float | None = None
    above: float | None = None
    limit: LoadVerdict | None = None
    load = min(max(steps.start, floor), ceiling)
    for _ in range(MOST_TESTS):
        verdict = test(load)
        if verdict is LoadVerdict.HELD:
            held = load
        else:
            above, limit = load, verdict
        if held is None:
            if load <= floor:
                break
            load = max(floor, load / steps.factor)
        elif above is None:
            if load >= ceiling:
                break
            load = min(ceiling, load * steps.factor)
        elif above / held <= steps.resolution:
            break
        else:
            load = math.sqrt(held * above)
    return Bracket(held, above, limit)
