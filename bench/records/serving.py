"""Serving: the records of `python -m bench serve`, one a variant, and the LoadGen tests that they are made from.

`ServingRecord` is the single source of the columns of serving.csv, and `TEST_COLUMNS` of those of
serving-tests.csv.gz; results/README.md is checked against both.
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
    "workload": "as in serving.csv",
    "variant": "as in serving.csv",
    "phase": "what the test was for: `single-stream`, `offline`, `search`, or `repeat N`",
    "target_qps": "queries a second that arrive; in Server and Offline alone",
    "qps": "queries a second that were completed",
    "queries": "how many there were",
    "verdict": "`held` (LoadGen says VALID), `broken` (the bound did not hold), or `invalid`",
    "reason": "why it is not `held`",
    "latency_p50_s": "median latency, from the scheduled time, seconds",
    "latency_p90_s": "90th percentile",
    "latency_p99_s": "99th percentile",
    "latency_bound_s": "latency at the percentile of the bound, by LoadGen",
    "lateness_p99_s": "99th percentile of how late the generator issued its queries",
    "generator_cores": "cores that the generator kept busy",
    "batch_mean": "queries in a batch, or in a step, on average",
    "waste": "share of the computed steps that were padding, or of rows without a query",
    "service_share": "share of the test in which the variant was at work",
    "energy_j": "joules that the counter counted from the first query to its last reading; empty without one",
    "energy_queries": "queries that were answered by then",
    "energy_s": "seconds between the two",
    "why": "what disturbed the test, in words; empty when nothing did",
}
TESTS = RawFile("serving-tests.csv.gz", tuple(TEST_COLUMNS), ("workload", "variant"))


@dataclass(frozen=True)
class ServingRecord:
    """One row of serving.csv: one variant behind a batching queue, under the load that LoadGen makes.

    An empty cell means that there is no valid test to take the figure from, never zero.
    """

    workload: str = column("as in records.csv", "")
    variant: str = column("name of the variant", "")
    mode: str = column("`inference`, or `decode`: the decoder is fed with what it generated", "inference")
    device: str = column("`cpu` or `cuda`", "")
    threads: int = column("CPU threads the variant was given", 0)
    precision: str = column("as in records.csv", "")
    scenario: str = column("of LoadGen: `server`, `single-stream` or `offline`", "")
    status: Status = column("as in records.csv", Status.OK)
    reason: str = column("why the status is not `ok`, or why there is no figure", "")
    percentile: float | None = column("percentile of the latency that is bounded, as 99")
    bound_s: float | None = column("the bound, seconds; empty without one")
    largest_batch: int = column("most queries that the queue puts into a batch; by step, rows", 0)
    longest_wait_s: float | None = column(
        "longest that the queue lets its oldest query wait for company, seconds; empty by step"
    )
    lengths: str = column("`padded` or `bucketed`: who may share a batch; empty by step", "")
    batching: str = column("`queue`: whole batches; `step`: rows that queries join and leave between steps", "queue")
    qps: float | None = column(
        "server: highest load at which LoadGen calls the test valid, queries a second, median over repeats; offline: "
        "queries completed a second; single-stream: one over the mean latency"
    )
    qps_lo: float | None = column("lower end of its 95 % interval (Student's t over repeats, on logarithms)")
    qps_hi: float | None = column(
        "upper end; in server from the lowest load that did not hold, so that the step of the search is in it"
    )
    repeats: int = column("searches, or tests, that it is made from, each in a process of its own", 0)
    latency_p50_s: float | None = column("median latency at that load, from the scheduled time, seconds")
    latency_p90_s: float | None = column("90th percentile")
    latency_p99_s: float | None = column("99th percentile")
    latency_bound_s: float | None = column("latency at the bounded percentile, by LoadGen")
    latency_ours_s: float | None = column("the same computed by us from the trace of each query")
    single_p50_s: float | None = column("median latency of one query after the other (SingleStream)")
    single_p99_s: float | None = column("99th percentile of it")
    offline_qps: float | None = column(
        "queries a second when all are there at once (Offline), median over processes: one before the repeats, and "
        "those of the repeats"
    )
    offline_qps_lo: float | None = column("lower end of its 95 % interval (Student's t over processes, on logarithms)")
    offline_qps_hi: float | None = column("upper end")
    queries: int | None = column("queries of the test that the latencies are of")
    loadgen: str = column("LoadGen's verdict on that test: `VALID` or `INVALID`", "")
    batch_mean: float | None = column("queries in a batch, or in a step, at that load, on average")
    waste: float | None = column(
        "share of the computed steps that were padding, or of rows without a query, at that load"
    )
    lateness_p99_s: float | None = column("how late the generator issued its queries at that load, 99th percentile")
    generator_cores: float | None = column("cores that the generator kept busy at that load")
    disturbed_share: float | None = column("share of the tests beside which something else used the machine")
    parity_error: float | None = column("as in records.csv")
    parity_limit: float | None = column("as in records.csv")
    batched_error: float | None = column("largest relative difference between a query's results in a batch and alone")
    batched_limit: float | None = column("largest allowed difference: twice the gate's limit, once for each side")
    energy_per_query_j: float | None = column(
        "energy of a query at that load, joules, median over repeats: what the counter of the whole package or board "
        "counted, over the queries that were answered; with idle power, the generator and whatever else ran there"
    )
    energy_per_query_lo_j: float | None = column("lower end of its 95 % interval (Student's t over repeats), joules")
    energy_per_query_hi_j: float | None = column("upper end, joules")
    power_w: float | None = column("power meanwhile, watts")
    idle_power_w: float | None = column("power before anything was served, watts")
    energy: str = column("the counter, as in records.csv; or `unavailable` and why there is no figure", "")
    recorded_at: str = column("when the record was written, UTC", "")


COLUMNS = tuple(found.name for found in dataclasses.fields(ServingRecord))


def append(folder: Path, record: ServingRecord) -> ServingRecord:
    """Append a record to serving.jsonl and make serving.csv anew; returns the record with its time.

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
        UsageError: a line is no record of this release.
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
        "--seconds"
    )


def load_text(record: ServingRecord) -> str:
    """`812 [790, 840]`, in queries a second; `~` before a load that `beyond_offline` distrusts."""
    if record.qps is None:
        return "no figure"
    return f"{'~' if beyond_offline(record) else ''}{_interval(record.qps, record.qps_lo, record.qps_hi)}"


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def dictionary() -> str:
    """The dictionary of columns in Markdown, as it stands in results/README.md."""
    return in_markdown({TABLE: meanings(ServingRecord), TESTS.name: TEST_COLUMNS})
