"""The load generator: MLPerf LoadGen in a process of its own, `python -m bench.serve.generator` with a task on stdin.

LoadGen schedules the queries ahead (Poisson arrivals in Server) and counts a latency from the scheduled time, so a slow
system does not delay the queries that follow. A separate process can be ended whatever LoadGen is waiting for, and its
CPU time is that of the generator only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from typing import Any

from bench.records.wire import ANSWER, QUERY

#: Exit code when the other side closed before all queries were answered.
EXIT_LOST = 3


def settings(loadgen: Any, task: dict[str, Any]) -> Any:
    """LoadGen's settings of a task.

    Args:
        loadgen: the module.
        task: `scenario`, `percentile` (as 99), `duration_s`, `most_s`, `least` queries, `seed`, and of what the
            scenario needs `qps` and `bound_s`.
    """
    found = loadgen.TestSettings()
    names = {"server": "Server", "offline": "Offline", "single-stream": "SingleStream"}
    found.scenario = getattr(loadgen.TestScenario, names[task["scenario"]])
    found.mode = loadgen.TestMode.PerformanceOnly
    found.min_duration_ms = round(1e3 * task["duration_s"])
    found.max_duration_ms = round(1e3 * task["most_s"])
    found.min_query_count = task["least"]
    found.qsl_rng_seed = found.sample_index_rng_seed = found.schedule_rng_seed = task["seed"]
    if task["scenario"] == "server":
        found.server_target_qps = task["qps"]
        found.server_target_latency_ns = round(1e9 * task["bound_s"])
        found.server_target_latency_percentile = task["percentile"] / 100
    elif task["scenario"] == "offline":
        found.offline_expected_qps = task["qps"]
        # One query of as many samples as the expected rate makes.
        found.min_query_count = 1
    else:
        found.single_stream_target_latency_percentile = task["percentile"] / 100
        found.single_stream_expected_latency_ns = max(1, round(1e9 / task["qps"]))
    return found


def generate(loadgen: Any, task: dict[str, Any]) -> dict[str, float]:
    """Run one test; LoadGen's logs are in the task's folder afterwards.

    Returns:
        CPU and wall seconds of the test.
    """
    with socket.socket(socket.AF_UNIX) as connected:
        connected.connect(task["path"])
        ended = threading.Event()
        threading.Thread(target=_complete, args=(loadgen, connected, ended), daemon=True).start()

        def issue(samples: list[Any]) -> None:
            try:
                connected.sendall(b"".join(QUERY.pack(sample.id, sample.index) for sample in samples))
            except OSError:
                # LoadGen would ignore an exception and wait for the answers forever.
                os._exit(EXIT_LOST)

        system = loadgen.ConstructSUT(issue, lambda: None)
        library = loadgen.ConstructQSL(task["samples"], task["samples"], lambda _: None, lambda _: None)
        logs, output = loadgen.LogSettings(), loadgen.LogOutputSettings()
        output.outdir, output.copy_summary_to_stdout = task["folder"], False
        logs.log_output, logs.enable_trace = output, True
        cpu_s, start = time.process_time(), time.perf_counter()
        loadgen.StartTestWithLogSettings(system, library, settings(loadgen, task), logs, "")
        found = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - start}
        ended.set()
        loadgen.DestroyQSL(library)
        loadgen.DestroySUT(system)
    return found | {"process_s": time.process_time()}


def _complete(loadgen: Any, connected: socket.socket, ended: threading.Event) -> None:
    """Tell LoadGen of each answer; if the other side is gone, LoadGen would wait forever, so end it."""
    rest = b""
    while not ended.is_set():
        try:
            data = connected.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            break
        rest += data
        whole = len(rest) - len(rest) % ANSWER.size
        answers = [loadgen.QuerySampleResponse(number, 0, 0) for (number,) in ANSWER.iter_unpack(rest[:whole])]
        rest = rest[whole:]
        if answers:
            loadgen.QuerySamplesComplete(answers)
    if not ended.is_set():
        os._exit(EXIT_LOST)


def main() -> int:
    """Read a task, run it, print what it took."""
    import mlperf_loadgen  # noqa: PLC0415 - optional

    print(json.dumps(generate(mlperf_loadgen, json.load(sys.stdin))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
