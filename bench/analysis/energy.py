"""From the energy of timed blocks to the figures of a record."""

from __future__ import annotations

import statistics
from typing import Any

from bench.analysis.repeats import spread
from bench.machine.energy import Idle
from bench.plan.cases import Case
from bench.records.rounds import Samples

NOT_READ = "no timed block has a reading of the counter"


def energy_figures(case: Case, samples: Samples, idle: Idle, facts: dict[str, Any]) -> dict[str, Any]:
    """The energy fields of a case's record: of each seating the joules of its blocks over its calls.

    Idle power is in them: what the machine takes anyway it takes in a slow variant for longer.

    Args:
        case: whose.
        samples: of its group.
        idle: the counter before the groups.
        facts: `batch` and `valid_steps` of the workload, for decoding `target_steps` too.
    """
    empty: dict[str, Any] = dict.fromkeys((
        "energy_per_seq_j", "energy_per_seq_lo_j", "energy_per_seq_hi_j", "energy_per_token_j", "power_w",
    ))  # fmt: skip
    found = empty | {"idle_power_w": idle.power_w, "energy": idle.source}
    if not idle.available:
        return found | {"energy": f"unavailable: {idle.reason}"}
    kept = samples.kept_of(case.variant)
    seatings = [[r.blocks[case.variant] for r in rounds] for rounds in kept]
    read = [[block for block in blocks if block.energy_j is not None] for blocks in seatings]
    read = [blocks for blocks in read if blocks]
    if not read:
        return found | {"energy": f"unavailable: {NOT_READ}"}
    every = [block for blocks in read for block in blocks]
    if reason := idle.too_short(statistics.median(block.timed_s for block in every)):
        return found | {"energy": f"unavailable: {reason}"}
    of_seq = [
        sum(block.energy_j or 0.0 for block in blocks) / sum(block.calls for block in blocks) / facts["batch"]
        for blocks in read
    ]
    if min(of_seq) <= 0:
        return found | {"energy": f"unavailable: {idle.source} did not move in a seating's timed blocks"}
    tokens = facts["batch"] * facts["target_steps"] if case.mode == "decode" else facts["valid_steps"]
    joules, seconds = (sum(values) for values in zip(*((b.energy_j or 0.0, b.timed_s) for b in every), strict=True))
    each_j = statistics.median(of_seq)
    found |= {"energy_per_seq_j": each_j, "energy_per_token_j": each_j * facts["batch"] / tokens}
    found["power_w"] = joules / seconds
    if (ends := spread(of_seq)) is not None:
        found |= {"energy_per_seq_lo_j": ends.low, "energy_per_seq_hi_j": ends.high}
    return found
