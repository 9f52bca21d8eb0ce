"""`python -m bench show RUN --rivals PATTERN`: the fastest of some variants against the fastest of all others."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench import units
from bench.analysis.figures import speedup
from bench.analysis.intervals import Interval
from bench.analysis.run_summary import DOUBT, UNTIMED, doubts, groups, pace, percentile
from bench.errors import UsageError, meant
from bench.records.reader import RecordedRun
from bench.records.schema import Record, Status

#: In place of a precision: whatever is fastest, in any.
ANY = "any"
COLUMNS = ("case", "precision", "fastest of ours", "p50", "share of ceiling", "fastest rival", "time of rival / ours")


@dataclass(frozen=True)
class Pairing:
    """The fastest variant of ours and the fastest of all others, in one group.

    Attributes:
        title: of the group.
        precision: of both, or `ANY`.
        ratio: time of the rival over that of ours, formed within rounds: above 1, ours is faster.
    """

    title: str
    precision: str
    ours: Record
    rival: Record
    ratio: Interval

    @property
    def cells(self) -> list[str]:
        """The row of the table, in the order of `COLUMNS`."""
        own = DOUBT if doubts(self.ours) else ""
        either = own or (DOUBT if doubts(self.rival) else "")
        p50, share = percentile(self.ours, "p50")[0], units.share(self.ours.ceiling_share)
        ratio = units.ratio_interval(self.ratio.value, self.ratio.low, self.ratio.high)
        ours = (self.ours.variant, p50 and own + p50, share)
        return [self.title, self.precision, *ours, self.rival.variant, either + ratio]


def pairings(run: RecordedRun, pattern: str) -> list[Pairing]:
    """Pair the fastest in each group: in each precision that both sides have, and in any precision.

    Args:
        run: whose records and rounds.
        pattern: names of our variants, in which * stands for anything; all other variants are rivals.

    Raises:
        UsageError: no measured variant has such a name, none is left as a rival, or no group has both.
    """
    measured = [record for record in run.records if record.status is Status.OK]
    names = sorted({record.variant for record in measured})
    ours = fnmatch.filter(names, pattern)
    if not ours or len(ours) == len(names):
        what = (
            "matches every variant of this run, which leaves no rival"
            if ours
            else "matches no variant that this run measured"
        )
        named = [record for record in run.records if fnmatch.fnmatchcase(record.variant, pattern)]
        reason = next((f"{record.variant}: {record.reason}" for record in named if record.reason and not ours), None)
        msg = f"--rivals {pattern}: {what}; {reason or meant(pattern, names)}"
        raise UsageError(msg)
    found = list(_paired(run, measured, frozenset(ours)))
    if not found:
        msg = f"--rivals {pattern}: no group of this run has a time of one of them and of a rival"
        raise UsageError(msg)
    return found


def _paired(run: RecordedRun, measured: Iterable[Record], ours: frozenset[str]) -> Iterator[Pairing]:
    # Which is the fastest of those without a figure is not known.
    for group in groups(record for record in measured if pace(record)[0] < UNTIMED):
        # Full precision first, as that is what most models run in.
        precisions = sorted({record.precision for record in group.records}, key=lambda p: (p != "fp32", p))
        for precision in (*precisions, ANY):
            members = [record for record in group.records if precision in {record.precision, ANY}]
            best = next((record for record in members if record.variant in ours), None)
            rival = next((record for record in members if record.variant not in ours), None)
            # A single precision would be said twice.
            if best is None or rival is None or (precision == ANY and len(precisions) == 1):
                continue
            ratio = speedup(run.group(best), rival.variant, best.variant)
            if ratio is not None:
                yield Pairing(group.title, precision, best, rival, ratio)
