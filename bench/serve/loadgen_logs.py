"""LoadGen's logs of a test: its verdict and figures from the summary, every query's latency from the trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.records.rounds import Floats

SUMMARY, TRACE = "mlperf_log_summary.txt", "mlperf_log_trace.json"
#: Of a query: when it was issued and when it was done, nanoseconds after its scheduled time.
_QUERY = re.compile(r'"issue_start_ns":(\d+),"complete_ns":(\d+)')
_LINE = re.compile(r"^ *([^:\n]+?) *: *(.*?) *$", re.MULTILINE)


@dataclass(frozen=True)
class LoadGenResult:
    """One test by LoadGen.

    Attributes:
        verdict: `VALID` or `INVALID`.
        unsatisfied: constraints that were not kept, as `Performance constraints`.
        percentiles_s: latency by percentile, seconds, as LoadGen has it.
        qps: queries completed a second.
        latencies_s: of each query from its scheduled time, by the trace.
        lateness_s: how late each was issued.
    """

    verdict: str
    unsatisfied: tuple[str, ...]
    percentiles_s: Mapping[float, float]
    qps: float
    latencies_s: Floats
    lateness_s: Floats

    @property
    def valid(self) -> bool:
        """Return whether LoadGen lets the test count."""
        return self.verdict == "VALID"

    def percentile(self, percentile: float) -> float:
        """A percentile of the latencies by our own account, seconds."""
        return _percentile(self.latencies_s, percentile)

    def lateness(self, percentile: float) -> float:
        """A percentile of how late queries were issued, seconds."""
        return _percentile(self.lateness_s, percentile)

    def without_lateness(self, percentile: float) -> float:
        """A percentile of the latencies from the moment that queries were issued, seconds."""
        return _percentile(self.latencies_s - self.lateness_s, percentile)

    def by_loadgen(self, percentile: float) -> float | None:
        """A percentile as LoadGen's summary has it, seconds; None for one that is not in it."""
        return self.percentiles_s.get(percentile)


def _percentile(values: Floats, percentile: float) -> float:
    return float(np.percentile(values, percentile, method="inverted_cdf"))


def read_logs(folder: Path) -> LoadGenResult:
    """Read the logs of a test.

    Raises:
        ValueError: there is no verdict, or no query in them.
    """
    text = (folder / SUMMARY).read_text(encoding="utf-8")
    fields = dict(_LINE.findall(text))
    if "Result is" not in fields:
        msg = f"{folder / SUMMARY} has no verdict; expected a line `Result is`"
        raise ValueError(msg)
    unsatisfied = tuple(
        name.removesuffix(" satisfied").removesuffix(" satisified")
        for name, value in fields.items()
        if "satisf" in name and value.upper().startswith("NO")
    )
    percentiles = {
        float(name.split()[0].removesuffix("th")): float(value) * 1e-9
        for name, value in fields.items()
        if name.endswith("percentile latency (ns)") and name[0].isdigit()
    }
    trace = (folder / TRACE).read_text(encoding="utf-8", errors="replace")
    delays = np.array(_QUERY.findall(trace), dtype=np.float64)
    if not len(delays):
        msg = f"{folder / TRACE} has no query; expected one line per query"
        raise ValueError(msg)
    lateness_s, latencies_s = delays[:, 0] * 1e-9, delays[:, 1] * 1e-9
    qps = next(
        (float(fields[name]) for name in ("Completed samples per second", "Samples per second") if name in fields), 0.0
    )
    if not qps:
        # One after the other: LoadGen names no rate but the mean's.
        qps = 1.0 / float(latencies_s.mean())
    return LoadGenResult(fields["Result is"], unsatisfied, percentiles, qps, latencies_s, lateness_s)
