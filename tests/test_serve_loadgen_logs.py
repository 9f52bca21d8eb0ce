"""LoadGen's logs read back, and what is made of its verdict."""

from __future__ import annotations

import numpy as np
import pytest

from bench.serve.load_test import Bound, verdict_of
from bench.serve.loadgen_logs import SUMMARY, TRACE, LoadGenResult, read_logs
from bench.serve.search import LoadVerdict

SERVER = """
Scenario : Server
Completed samples per second    : 990.34
Result is : INVALID
  Performance constraints satisfied : NO
  Min duration satisfied : Yes
  Early stopping satisfied: NO
50.00 percentile latency (ns)   : 86348
99.00 percentile latency (ns)   : 263860
"""
SINGLE = "Result is : VALID\n  Min duration satisfied : Yes\n99.0th percentile latency (ns) : 12047\n"
SAMPLE = '{"name":"Sample","ph":"b","args":{"sample_seq":%d,"issue_start_ns":%d,"complete_ns":%d}},\n'
QUERIES = "".join(SAMPLE % (n, 10 * n, 1000 * (n + 1)) for n in range(100))


def logs(folder, summary: str, trace: str = QUERIES):
    (folder / SUMMARY).write_text(summary)
    (folder / TRACE).write_text(trace)
    return folder


def test_verdict_and_figures_are_read(tmp_path):
    """What is not satisfied by name, LoadGen's percentiles, and ours from each query."""
    found = read_logs(logs(tmp_path, SERVER))
    assert not found.valid
    assert found.unsatisfied == ("Performance constraints", "Early stopping")
    assert found.by_loadgen(99) == pytest.approx(263860e-9)
    assert found.qps == 990.34
    assert found.percentile(99) == pytest.approx(99e-6)
    assert found.lateness(99) == pytest.approx(980e-9)
    assert found.without_lateness(99) == pytest.approx(99e-6 - 980e-9)


def test_a_rate_that_is_not_told_comes_from_the_mean(tmp_path):
    """One query after the other: the rate is one over the mean latency."""
    found = read_logs(logs(tmp_path, SINGLE))
    assert found.valid
    assert found.by_loadgen(99) == pytest.approx(12047e-9)
    assert found.qps == pytest.approx(1 / 50.5e-6)


@pytest.mark.parametrize(("summary", "trace"), [("nothing", QUERIES), (SERVER, "{}")])
def test_logs_without_verdict_or_queries_are_no_result(tmp_path, summary, trace):
    with pytest.raises(ValueError, match="has no"):
        read_logs(logs(tmp_path, summary, trace))


def result(unsatisfied: tuple[str, ...], latency_s: float = 0.0, late_s: float = 0.0) -> LoadGenResult:
    latencies, lateness = np.full(50, latency_s), np.full(50, late_s)
    return LoadGenResult("INVALID" if unsatisfied else "VALID", unsatisfied, {}, 1.0, latencies, lateness)


@pytest.mark.parametrize(
    ("found", "cores", "verdict"),
    [
        (result(()), 0.1, LoadVerdict.HELD),
        (result((), 0.015, 0.014), 0.1, LoadVerdict.HELD),
        (result(()), 0.6, LoadVerdict.INVALID),
        (result(("Performance constraints",), 0.03), 0.1, LoadVerdict.BROKEN),
        (result(("Performance constraints",), 0.03, 0.02), 0.1, LoadVerdict.INVALID),
        (result(("Early stopping",), 0.015), 0.1, LoadVerdict.BROKEN),
        (result(("Min queries", "Early stopping"), 0.015), 0.1, LoadVerdict.INVALID),
        (result(("Min duration",), 0.03), 0.1, LoadVerdict.INVALID),
    ],
)
def test_a_fault_of_the_generator_is_no_fault_of_the_variant(found, cores, verdict):
    """Too busy a generator, a test that is too short, or lateness that alone broke the bound: invalid."""
    judged, reason = verdict_of(found, cores, Bound(99, 0.02))
    assert judged is verdict
    assert bool(reason) == (verdict is not LoadVerdict.HELD)
