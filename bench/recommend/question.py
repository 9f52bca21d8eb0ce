"""The question that a recommendation answers: an objective, and bounds that the variant must keep."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from bench import units
from bench.analysis.racing import MARGIN


class Objective(enum.StrEnum):
    """Quantity to minimise, or to maximise in the case of throughput."""

    P99 = "latency-p99"
    P50 = "latency-p50"
    THROUGHPUT = "throughput"
    MEMORY = "memory"
    COLD_START = "cold-start"
    LOAD = "load"


#: Objectives that come from the timed rounds, and so have a probability; the others are measured once a case.
TIMED = (Objective.P99, Objective.P50, Objective.THROUGHPUT)
#: What makes a variant the best, as an infinitive.
BEST = {
    Objective.P99: "to be fastest by the 99th percentile",
    Objective.P50: "to be fastest by median latency",
    Objective.THROUGHPUT: "to have the highest throughput",
    Objective.MEMORY: "to take the least memory",
    Objective.COLD_START: "to start soonest",
    Objective.LOAD: "to sustain the highest load under the bound",
}
#: Comparative of an objective, and what a multiple is a multiple of.
WORSE = {
    Objective.P99: ("slower", "takes {} as long"),
    Objective.P50: ("slower", "takes {} as long"),
    Objective.THROUGHPUT: ("slower", "takes {} as long"),
    Objective.MEMORY: ("larger", "takes {} the memory"),
    Objective.COLD_START: ("longer to start", "takes {} as long to start"),
}
#: Differences up to this share are no reason to prefer one variant to another.
EQUIVALENT = MARGIN
#: Probability from which on something counts as known.
SURE = 0.95


@dataclass(frozen=True)
class Question:
    """A question to a run.

    Attributes:
        objective: what to look for.
        mode: `inference`, `training` or `decode`; None for all that the run has.
        max_error: largest relative error against float64, results and gradients.
        max_drop: largest change of the user's metric from the baseline's, either way, as a share.
        latency_bound_s: longest time of a call: its 99th percentile where that is the objective, else its median; with
            the objective `load` longest latency of a query, at the percentile of the serving records.
        memory_bound_bytes: largest peak memory above that of the process before the model was built, on a GPU the
            allocator's.
        calls: calls that one start serves; a start is then part of the cost, spread over them.
        workload: name of the one to answer for; None for all.
        served_percentile: percentile that serving bounds, as 99; None but for answers about load.
    """

    objective: Objective = Objective.P50
    mode: str | None = None
    max_error: float | None = None
    max_drop: float | None = None
    latency_bound_s: float | None = None
    memory_bound_bytes: float | None = None
    calls: float | None = None
    workload: str | None = None
    served_percentile: float | None = None

    def asks_for(self, workload: str, mode: str) -> bool:
        """Return whether a group is asked about."""
        return self.mode in {None, mode} and self.workload in {None, workload}

    @property
    def scope(self) -> str:
        """Return ` of WORKLOAD in MODE`, to follow a noun; without what the question leaves open."""
        named = (("of", self.workload), ("in", self.mode))
        return "".join(f" {word} {name}" for word, name in named if name)

    @property
    def bounds(self) -> tuple[str, ...]:
        """The bounds in words."""
        percentile = "p99" if self.objective is Objective.P99 else "p50"
        if self.served_percentile is not None:
            percentile = f"p{self.served_percentile:g}"
        named = (
            (self.max_error, f"error at most {units.error(self.max_error)}"),
            (self.max_drop, f"metric changes by at most {units.share(self.max_drop)}"),
            (self.latency_bound_s, f"{percentile} at most {units.seconds(self.latency_bound_s)}"),
            (self.memory_bound_bytes, f"memory at most {units.megabytes(self.memory_bound_bytes)}"),
        )
        return tuple(text for value, text in named if value is not None)
