"""The load generator against a small server of the test's: arrivals, latencies from the schedule, a lost server."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from bench.records.wire import ANSWER, QUERY
from bench.run.worker_process import WorkerError
from bench.serve.load_test import Bound, generate
from bench.serve.loadgen_logs import read_logs

pytest.importorskip("mlperf_loadgen", reason="needs mlcommons-loadgen")
BOUND = Bound(90, 1.0)


class Echo:
    """Answers each query at once, except that it stalls once, or goes away.

    Args:
        stall_s: seconds that it does nothing, after as many queries as `after`.
        leaves: whether it goes away then.
    """

    def __init__(self, stall_s: float = 0.0, after: int = 50, *, leaves: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="echo-"))
        self.stall_s, self.after, self.leaves = stall_s, after, leaves
        self.asked: list[int] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.folder / "socket"))
        self._listening.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        connected, _ = self._listening.accept()
        rest = b""
        with connected, self._listening:
            while data := connected.recv(4096):
                rest += data
                whole = len(rest) - len(rest) % QUERY.size
                for number, sample in QUERY.iter_unpack(rest[:whole]):
                    self.asked.append(sample)
                    if len(self.asked) == self.after:
                        if self.leaves:
                            return
                        time.sleep(self.stall_s)
                    connected.sendall(ANSWER.pack(number))
                rest = rest[whole:]

    def load(self, qps: float = 400.0, duration_s: float = 0.5):
        """Run one test in Server."""
        task = {
            "path": str(self.folder / "socket"), "folder": str(self.folder), "scenario": "server", "qps": qps,
            "percentile": BOUND.percentile, "bound_s": BOUND.seconds, "duration_s": duration_s, "most_s": 20.0,
            "least": BOUND.least_queries, "seed": 3, "samples": 64,
        }  # fmt: skip
        ran = generate(task, 60.0)
        return ran, read_logs(self.folder)


def test_all_queries_are_asked_and_the_verdict_is_loadgens():
    """The percentiles of LoadGen's summary are those of its trace, and the samples are of the library."""
    echo = Echo()
    ran, found = echo.load()
    assert found.valid
    assert len(echo.asked) == len(found.latencies_s) >= BOUND.least_queries
    assert set(echo.asked) <= set(range(64))
    assert found.percentile(90) == pytest.approx(found.by_loadgen(90), rel=1e-3)
    assert 0 < ran["cpu_s"] < ran["process_s"]


def test_queries_that_were_due_in_a_stall_have_waited_for_it():
    """No coordinated omission: a stall of 0.3 s at 400 queries per second is in the latencies of about 120 of them."""
    found = Echo(stall_s=0.3).load()[1]
    assert 60 <= sum(found.latencies_s > 0.05) <= 240
    assert max(found.latencies_s) >= 0.29


def test_a_server_that_goes_away_ends_the_test():
    """LoadGen would wait for ever for its answers."""
    with pytest.raises(WorkerError, match="went away"):
        Echo(leaves=True).load()
