"""From the energy of load tests to the figures of a record."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.analysis.repeats import spread
from bench.machine.energy import LEAST_UPDATES, Idle
from bench.serve.load_test import LoadTest


def energy_figures(tests: Sequence[LoadTest], idle: Idle) -> dict[str, Any]:
    """The energy fields of a variant's record: of each repeat the joules of its test over the queries in it.

    Idle power is in them, as in records.csv: a slow variant takes it for longer.

    Args:
        tests: at the load of the record, one per repeat.
        idle: the counter before anything was served.
    """
    found: dict[str, Any] = {"idle_power_w": idle.power_w, "energy": idle.source}
    if not idle.available:
        return found | {"energy": f"unavailable: {idle.reason}"}
    read = [
        (test.energy_j, test.energy_queries, test.energy_s)
        for test in tests
        if test.energy_j is not None and test.energy_queries and test.energy_s
    ]
    if not read:
        return found | {"energy": "unavailable: no test has a reading of the counter"}
    joules, queries, seconds = zip(*read, strict=True)
    if idle.update_s is not None and statistics.median(seconds) < LEAST_UPDATES * idle.update_s:
        took = (
            f"{idle.source} moves every {1e3 * idle.update_s:.3g} ms and a test took {statistics.median(seconds):.3g} s"
        )
        return found | {"energy": f"unavailable: {took}; it takes more --budget"}
    if min(joules) <= 0:
        return found | {"energy": f"unavailable: {idle.source} did not move in a test"}
    of_query = [energy / count for energy, count in zip(joules, queries, strict=True)]
    found |= {"energy_per_query_j": statistics.median(of_query), "power_w": sum(joules) / sum(seconds)}
    if (ends := spread(of_query)) is not None:
        found |= {"energy_per_query_lo_j": ends.low, "energy_per_query_hi_j": ends.high}
    return found
