"""Causes of a change between two runs: what differs in their environments, and likely causes in order.

The order is a rule of thumb, not a proof. It counts points: what changed between the two runs, whether the other cases
changed at the same run, and how sure the change itself is. Each cause carries its reasons, so that a reader can
disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.analysis import comparability as comparable
from bench.analysis.change_points import CHANCE, Change
from bench.analysis.comparability import Difference, Environment

#: Packages that only the variants named after them use.
RUNTIMES = ("onnxruntime", "openvino")
#: Share of the other cases from which on a change is one of all cases.
MOST = 0.5
#: Below this share of `CHANCE` a change is no accident.
SURE = 0.01


class Cause(StrEnum):
    """Causes that may have changed a figure for good; of two with as many points the earlier one is named first."""

    CODE = "code"
    SOFTWARE = "software"
    MACHINE = "machine"
    NOISE = "noise"


@dataclass(frozen=True)
class Guess:
    """A possible cause, the points that speak for it, and why."""

    cause: Cause
    points: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """`code (commit from 1a2b3c4 to 5d6e7f8; 0 of 3 other cases changed at the same run)`."""
        return f"{self.cause} ({'; '.join(self.reasons)})"


@dataclass(frozen=True)
class Between:
    """Differences between the run before a change and the first one after it.

    Attributes:
        code: commit, uncommitted changes, plugins.
        software: versions of packages and libraries.
        machine: system, microcode, driver, governor, clock.
    """

    code: tuple[Difference, ...]
    software: tuple[Difference, ...]
    machine: tuple[Difference, ...]

    @property
    def all(self) -> tuple[Difference, ...]:
        """Everything, the code first."""
        return (*self.code, *self.software, *self.machine)


def between(before: Environment, after: Environment) -> Between:
    """Compare the environments of two runs."""
    return Between(comparable.code(before, after), comparable.software(before, after), comparable.state(before, after))


def moved_from(difference: Difference) -> str:
    """`torch from 2.13.0 to 2.14.1`."""
    return f"{difference.what} from {difference.base} to {difference.new}"


def guesses(found: Between, change: Change, variant: str, others: tuple[int, int], doubtful: bool) -> tuple[Guess, ...]:
    """Sort the causes that something speaks for, the likeliest first; there is always at least one.

    Args:
        found: what differs.
        change: that is to be explained.
        variant: that changed.
        others: how many other cases changed the same way at the same run, and how many there are.
        doubtful: whether a figure next to the change was marked.
    """
    moved, count = others
    together = bool(count) and moved > MOST * count
    company = (
        f"{moved} of {count} other cases changed at the same run" if count else "there is no other case to compare with"
    )
    software = [d for d in found.software if d.what not in RUNTIMES or variant.startswith(d.what)]
    sides: dict[Cause, tuple[Sequence[Difference], int]] = {
        # A change of our code seldom affects everything; an update of torch or of the system seldom affects one case.
        Cause.CODE: (found.code, 3 - together),
        Cause.SOFTWARE: (software, 2 + together),
        Cause.MACHINE: (found.machine, 1 + together),
    }
    made = [
        Guess(cause, points, (*map(moved_from, differing), company))
        for cause, (differing, points) in sides.items()
        if differing
    ]
    if together and not found.machine:
        made.append(Guess(Cause.MACHINE, 1 + (not made), (company, "no recorded fact of the machine changed")))
    noise = []
    if not found.all:
        noise.append("nothing that is recorded changed")
    if doubtful:
        noise.append("a figure next to the change is doubtful")
    if change.chance > SURE * CHANCE:
        noise.append(f"noise alone gives such a change with probability {change.chance:.2g}")
    if noise or not made:
        made.append(Guess(Cause.NOISE, len(noise), tuple(noise) or ("nothing points to another cause",)))
    return tuple(sorted(made, key=lambda guess: -guess.points))
