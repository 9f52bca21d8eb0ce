"""A planted slowdown: from which size on is it found, and how often is one found that is not there?"""

from __future__ import annotations

from pathlib import Path

from bench.analysis.compare import MARGIN, CaseVerdict, verdict
from bench.console import Console
from bench.selftest.pairs import Pair, bench
from bench.selftest.part import Found, Options, least, most, percent, row_of, spread

PAIRS = 20
SLOWDOWNS = (0.0, 0.01, 0.02, 0.03, 0.05)
#: Slowdown that must be found, in what share of pairs, and the share of false alarms that may be.
MUST_FIND, POWER, FALSE_ALARMS = 0.03, 0.95, 0.01
#: Seconds that a pair may take, warm-up included.
LIMIT_S = 10.0


def run(options: Options, folder: Path, console: Console) -> Found:
    """Measure pairs with each planted slowdown; these take turns, so that a busy moment meets all of them alike."""
    planted = options.planted or SLOWDOWNS
    found = Found(
        "power",
        [
            "threads",
            "planted",
            "measured apart",
            "pairs",
            "called slower",
            "called faster",
            "change p50",
            "marked",
            "a pair took",
        ],
    )
    for threads in options.threads:
        count = options.pairs or PAIRS
        pairs: dict[float, list[Pair]] = {share: [] for share in planted}
        with bench(options.settings(threads), options.processes, folder) as workers:
            turns = ((case, share) for case in options.cases(threads, count) for share in planted)
            for number, (case, share) in enumerate(turns):
                console.status(f"power, {threads} threads: pair {number + 1} of {count * len(planted)}")
                pairs[share].append(workers.pair(case, options.seconds, share))
                found.raw.append(row_of(pairs[share][-1], number=number, planted=share))
        for share, measured in pairs.items():
            _judge(found, threads, share, measured)
    return found


def _judge(found: Found, threads: int, share: float, pairs: list[Pair]) -> None:
    verdicts = [verdict(pair.speedup, MARGIN) for pair in pairs]
    slower, faster = verdicts.count(CaseVerdict.SLOWER), verdicts.count(CaseVerdict.FASTER)
    planted, change = spread(p.planted_share for p in pairs)[0], spread(1 / p.speedup.value - 1 for p in pairs)[0]
    took = max(p.wall_s for p in pairs)
    found.rows.append(
        [str(threads), percent(share, 0), percent(planted), str(len(pairs)), str(slower), str(faster), percent(change),
         str(sum(p.marked for p in pairs)), f"{took:.1f} s at most"]
    )  # fmt: skip
    where = f"at {threads} thread{'s' if threads > 1 else ''}"
    if share == 0:
        allowed = max(1, most(FALSE_ALARMS, len(pairs)))
        words = f"{slower + faster} false alarms in {len(pairs)} pairs {where}, target at most {allowed}"
        found.judge(slower + faster <= allowed, words)
    if share == MUST_FIND:
        needed = least(POWER, len(pairs))
        words = f"{percent(share, 0)} found in {slower} of {len(pairs)} pairs {where}, target {needed}"
        found.judge(slower >= needed, words)
        found.judge(took <= LIMIT_S, f"a pair took {took:.1f} s at most {where}, target {LIMIT_S:g} s")
