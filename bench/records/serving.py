"""Serving: the records of `python -m bench serve`, one per variant, and the LoadGen tests that they are made from.

`ServingRecord` is the single source of the columns of serving.csv, and `TEST_COLUMNS` of those of
serving-tests.csv.gz; results/columns.md is checked against both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.records import durable
from bench.records.raw_csv import RawFile
from bench.records.schema import Status, column, in_markdown, meanings
from bench.records.tables import json_line, now, parse, write_csv

FILE, TABLE = "serving.jsonl", "serving.csv"
#: Ratio of the two loads at which the search of a repeat ends. Its tests are so long that they break where the load is
#: this many times what the variant can do; where it is less, they may hold.
RESOLUTION = 1.06

TEST_COLUMNS = {
    "workload": "As in serving.csv.",
    "variant": "As in serving.csv.",
    "phase": "What the test was for: `single-stream`, `offline`, `search` or `repeat N`.",
    "target_qps": "The load that arrives, in queries per second. Only in Server and Offline.",
    "qps": "The number of queries that were completed per second.",
    "queries": "The number of queries in the test.",
    "verdict": "The verdict: `held` (LoadGen says VALID), `broken` (the bound did not hold) or `invalid`.",
    "reason": "Why the verdict is not `held`.",
    "latency_p50_s": "The median latency, from the scheduled time, in seconds.",
    "latency_p90_s": "The 90th percentile of the latency, in seconds.",
    "latency_p99_s": "The 99th percentile of the latency, in seconds.",
    "latency_bound_s": "The latency at the bounded percentile as LoadGen reports it, in seconds.",
    "lateness_p99_s": "The 99th percentile of how late the generator issued its queries, in seconds.",
    "generator_cores": "The number of cores that the generator kept busy.",
    "batch_mean": "The mean number of queries in a batch, or in a step.",
    "waste": "The share of the computed steps that were padding, or rows without a query.",
    "service_share": "The share of the test during which the variant was working.",
    "energy_j": "The energy counted from the first query to the last reading, in joules. Empty without a counter.",
    "energy_queries": "The number of queries that were answered by that reading.",
    "energy_s": "The time between these two moments, in seconds.",
    "why": "What disturbed the test, in words. Empty if nothing did.",
}
TESTS = RawFile("serving-tests.csv.gz", tuple(TEST_COLUMNS), ("workload", "variant"))


@dataclass(frozen=True)
class ServingRecord:
    """One row of serving.csv: one variant behind a batching queue, under the load that LoadGen makes.

    An empty cell means that there is no valid test to take the figure from, never zero.
    """

    workload: str = column("As in records.csv.", "")
    variant: str = column("The name of the variant.", "")
    mode: str = column(
        "The mode: `inference`, or `decode`, in which the decoder is fed what it generated.",
        "inference",
    )
    device: str = column("The device that was used: `cpu` or `cuda`.", "")
    threads: int = column("The number of CPU threads that the variant was given.", 0)
    precision: str = column("As in records.csv.", "")
    scenario: str = column("The scenario of LoadGen: `server`, `single-stream` or `offline`.", "")
    status: Status = column("As in records.csv.", Status.OK)
    reason: str = column("Why the status is not ok, or why there is no figure.", "")
    percentile: float | None = column("The percentile of the latency that is bounded, such as 99.")
    bound_s: float | None = column("The latency bound, in seconds. Empty without one.")
    largest_batch: int = column(
        "The largest number of queries that the queue puts into a batch; by step, the number of rows.",
        0,
    )
    longest_wait_s: float | None = column(
        "The longest time that the queue lets its oldest query wait for others, in seconds. Empty by step."
    )
    lengths: str = column("Which queries can share a batch: `padded` or `bucketed`. Empty by step.", "")
    batching: str = column(
        "How queries are batched: `queue` forms whole batches; `step` has rows that queries join and leave between "
        "steps.",
        "queue",
    )
    qps: float | None = column(
        "Queries per second. Server: the highest load at which LoadGen calls the test valid, as the median over "
        "repeats. Offline: completed queries per second. Single-stream: one over the mean latency."
    )
    qps_lo: float | None = column(
        "Lower end of the 95 % interval of `qps` (Student's t over repeats, on logarithms), in queries per second."
    )
    qps_hi: float | None = column(
        "Upper end of the 95 % interval of `qps`, in queries per second. In server it starts from the lowest load "
        "that did not hold, so that it includes the step of the search."
    )
    repeats: int = column("The number of searches, or tests, behind the figures, each in a process of its own.", 0)
    latency_p50_s: float | None = column("The median latency at that load, from the scheduled time, in seconds.")
    latency_p90_s: float | None = column("The 90th percentile of that latency, in seconds.")
    latency_p99_s: float | None = column("The 99th percentile of that latency, in seconds.")
    latency_bound_s: float | None = column("The latency at the bounded percentile as LoadGen reports it, in seconds.")
    latency_ours_s: float | None = column("The same latency as computed here from the trace of each query, in seconds.")
    single_p50_s: float | None = column(
        "The median latency when one query follows the other (SingleStream), in seconds."
    )
    single_p99_s: float | None = column(
        "The 99th percentile of the latency when one query follows the other, in seconds."
    )
    offline_qps: float | None = column(
        "Queries per second when all are there at once (Offline), as the median over processes: one before the "
        "repeats, and those of the repeats."
    )
    offline_qps_lo: float | None = column(
        "Lower end of the 95 % interval of `offline_qps` (Student's t over processes, on logarithms), in queries per "
        "second."
    )
    offline_qps_hi: float | None = column("Upper end of the 95 % interval of `offline_qps`, in queries per second.")
    queries: int | None = column("The number of queries in the test from which the latencies come.")
    loadgen: str = column("LoadGen's verdict on that test: `VALID` or `INVALID`.", "")
    batch_mean: float | None = column("The mean number of queries in a batch, or in a step, at that load.")
    waste: float | None = column(
        "The share of the computed steps that were padding, or rows without a query, at that load."
    )
    lateness_p99_s: float | None = column(
        "The 99th percentile of how late the generator issued its queries at that load, in seconds."
    )
    generator_cores: float | None = column("The number of cores that the generator kept busy at that load.")
    disturbed_share: float | None = column("The share of the tests during which something else used the machine.")
    parity_error: float | None = column("As in records.csv.")
    parity_limit: float | None = column("As in records.csv.")
    batched_error: float | None = column(
        "The largest relative difference between a query's results in a batch and alone."
    )
    batched_limit: float | None = column(
        "The largest difference that is allowed: twice the limit of the gate, once for each side."
    )
    energy_per_query_j: float | None = column(
        "The energy of a query at that load in joules, as the median over repeats: what the counter of the whole "
        "package or board counted, divided by the answered queries. It includes idle power, the generator and "
        "everything else that ran there."
    )
    energy_per_query_lo_j: float | None = column(
        "Lower end of the 95 % interval of `energy_per_query_j` (Student's t over repeats), in joules."
    )
    energy_per_query_hi_j: float | None = column("Upper end of the 95 % interval of `energy_per_query_j`, in joules.")
    power_w: float | None = column("The mean power during those tests, in watts.")
    idle_power_w: float | None = column("The power before anything was served, in watts.")
    energy: str = column(
        "The name of the counter, as in records.csv; or `unavailable` and the reason why there is no figure.",
        "",
    )
    recorded_at: str = column("The time at which the record was written, in UTC.", "")


COLUMNS = tuple(found.name for found in dataclasses.fields(ServingRecord))


def append(folder: Path, record: ServingRecord) -> ServingRecord:
    """Append a record to serving.jsonl and rewrite serving.csv; return the record with its time.

    Raises:
        OSError: when it cannot be written.
    """
    stamped = dataclasses.replace(record, recorded_at=now())
    durable.append(folder / FILE, json_line(dataclasses.asdict(stamped)).encode())
    write_csv(folder / TABLE, COLUMNS, map(dataclasses.asdict, read(folder)))
    return stamped


def append_tests(folder: Path, tests: Iterable[Mapping[str, Any]]) -> None:
    """Append LoadGen tests to serving-tests.csv.gz, values by the names of `TEST_COLUMNS`."""
    TESTS.append(folder, ([test[name] for name in TEST_COLUMNS] for test in tests))


def read(folder: Path) -> list[ServingRecord]:
    """The records of a run folder; none where nothing was served.

    Raises:
        UsageError: a line is not a record of this release.
    """
    path = folder / FILE
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return parse(path, lines, ServingRecord)


@dataclass(frozen=True)
class ServingTest:
    """One LoadGen test as serving-tests.csv.gz has it; see `TEST_COLUMNS`.

    Attributes:
        target_qps, latency_bound_s, batch_mean: not a number where the test has none.
    """

    workload: str
    variant: str
    phase: str
    target_qps: float
    verdict: str
    latency_bound_s: float
    batch_mean: float
    why: str

    @property
    def searched(self) -> bool:
        """Return whether it is of a search for the highest load."""
        return self.phase == "search" or self.repeat is not None

    @property
    def repeat(self) -> int | None:
        """Number of the repeat that it is of; None for other tests."""
        first, _, number = self.phase.partition(" ")
        return int(number) if first == "repeat" and number.isdecimal() else None

    @property
    def counts(self) -> bool:
        """Return whether its latency counts."""
        return self.verdict != "invalid" and not math.isnan(self.latency_bound_s)


def read_tests(folder: Path) -> list[ServingTest]:
    """The LoadGen tests of a run folder; none where nothing was served.

    Raises:
        UsageError: the file is damaged, or not one of ours.
    """
    found = []
    for row in TESTS.rows(folder):
        test = dict(zip(TEST_COLUMNS, row, strict=True))
        figures = {name: float(test[name] or "nan") for name in ("target_qps", "latency_bound_s", "batch_mean")}
        words = {name: test[name] for name in ("workload", "variant", "phase", "verdict", "why")}
        found.append(ServingTest(**words, **figures))  # type: ignore[arg-type]
    return found


def ends(tests: Iterable[ServingTest]) -> dict[int, tuple[float, float]]:
    """The two loads at which each repeat ended: the highest that held, and the lowest above it that broke the bound.

    A repeat that ended elsewhere, as at a test that is not valid, has no end.

    Args:
        tests: of one variant, served in the scenario `server`.
    """
    repeats: dict[int, dict[float, str]] = {}
    for test in tests:
        if test.repeat is not None:
            repeats.setdefault(test.repeat, {})[test.target_qps] = test.verdict
    found = {}
    for number, verdicts in repeats.items():
        held = max((load for load, verdict in verdicts.items() if verdict == "held"), default=math.nan)
        above = min((load for load, verdict in verdicts.items() if verdict != "held" and load > held), default=math.nan)
        if verdicts.get(above) == "broken":
            found[number] = (held, above)
    return found


def beyond_offline(record: ServingRecord) -> str:
    """Return why a load is to be distrusted that lies above what is done when all queries are there at once, or "".

    A queue that is never empty has the fullest batches, so no arrivals are served faster. Both intervals count, and
    what the tests of a search cannot tell.
    """
    most = record.offline_qps_hi or record.offline_qps
    if record.scenario != "server" or record.qps is None or most is None:
        return ""
    if (record.qps_lo or record.qps) <= RESOLUTION * most:
        return ""
    borne = _interval(record.qps, record.qps_lo, record.qps_hi)
    offline = _interval(record.offline_qps or most, record.offline_qps_lo, record.offline_qps_hi)
    return (
        f"{record.variant} on {record.workload} seems to sustain {borne} queries/s, but answers {offline} when all are "
        "there at once: one of the two is wrong, or smaller batches take less time a query; measure again with more "
        "--budget"
    )


def load_text(record: ServingRecord) -> str:
    """`812 [790, 840]`, in queries per second; `~` before a load that `beyond_offline` distrusts."""
    if record.qps is None:
        return "no figure"
    return f"{'~' if beyond_offline(record) else ''}{_interval(record.qps, record.qps_lo, record.qps_hi)}"


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def dictionary() -> str:
    """The dictionary of columns in Markdown, as it stands in results/columns.md."""
    return in_markdown({TABLE: meanings(ServingRecord), TESTS.name: TEST_COLUMNS})
