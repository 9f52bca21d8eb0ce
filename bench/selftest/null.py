"""A variant against itself: how far off is the ratio, and does the interval hold the truth, which is 1?"""

from __future__ import annotations

from pathlib import Path

from bench.console import Console
from bench.selftest.pairs import Pair, bench
from bench.selftest.part import Found, Options, least, most, percent, row_of, spread

PAIRS = 40
#: 90th percentile of |ratio - 1| that pairs may reach, at one thread and at more.
TARGET_ONE, TARGET_MORE = 0.005, 0.01
#: Share of pairs whose 95 % interval must hold 1; share that may be lost to marking.
COVERAGE = (0.92, 0.99)
LOST = 0.25


def run(options: Options, folder: Path, console: Console) -> Found:
    """Measure the pairs of each number of threads."""
    found = Found(
        "null", ["threads", "pairs", "marked", "|ratio - 1| p50 / p90 / max", "intervals that hold 1", "width"]
    )
    for threads in options.threads:
        count = options.pairs or PAIRS
        pairs = []
        with bench(options.settings(threads), options.processes, folder) as workers:
            for number, case in enumerate(options.cases(threads, count)):
                console.status(f"null, {threads} threads: pair {number + 1} of {count}")
                pairs.append(workers.pair(case, options.seconds))
                found.raw.append(row_of(pairs[-1], number=number))
        _judge(found, threads, pairs)
    return found


def _judge(found: Found, threads: int, pairs: list[Pair]) -> None:
    clean = [pair for pair in pairs if not pair.marked]
    errors = spread(pair.error for pair in clean)
    held, width = sum(p.holds_one for p in clean), spread(p.speedup.half_width for p in clean)[0]
    lost = len(pairs) - len(clean)
    found.rows.append(
        [str(threads), str(len(pairs)), str(lost), percent(errors), f"{held} of {len(clean)}", f"+-{percent(width)}"]
    )
    where = f"at {threads} thread{'s' if threads > 1 else ''}"
    allowed = most(LOST, len(pairs))
    found.judge(lost <= allowed, f"{lost} of {len(pairs)} pairs lost to marking {where}, target at most {allowed}")
    if not clean:
        # Nothing is left to judge, and the line above has said why.
        return
    target = TARGET_ONE if threads == 1 else TARGET_MORE
    found.judge(errors[1] <= target, f"p90 of |ratio - 1| {percent(errors[1])} {where}, target {percent(target)}")
    low, high = least(COVERAGE[0], len(clean)), most(COVERAGE[1], len(clean))
    found.judge(low <= held <= high, f"{held} of {len(clean)} intervals hold 1 {where}, target {low} to {high}")
