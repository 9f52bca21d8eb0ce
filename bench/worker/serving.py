"""Serving in the child: one variant behind a batching queue, asked by the load generator through a socket.

The generator sends 16 bytes per query (its number and which sequence it asks about), and gets 8 back (its number) when
the query's batch is done. The sequences are here from the start, so their way over a network is in no latency.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from bench.gate import batched
from bench.gate.audit import Audit

# Imported to register how the inputs of own models are taken apart.
from bench.gate.own_rows import library_of, rows_of
from bench.gate.parity import gate_for
from bench.machine.energy import counter_if_any
from bench.plan.cases import OWN, Case
from bench.records.wire import ANSWER, QUERY
from bench.timing import clock
from bench.timing.query_energy import QueryEnergy
from bench.worker.batching_queue import BatchCounts, BatchingQueue, buckets
from bench.worker.gating import TIMED_SEED, WEIGHTS_SEED, gated, refuse_replaced
from seq2seq.execution.executable import execute
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model.workload import OwnWorkload
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

Emit = Callable[..., None]

#: Sequences that can be asked about, at least.
LIBRARY = 256
#: Seconds that the generator has to connect.
CONNECT_S = 60.0
#: Calls of each size before the load, the first of which may compile or choose.
WARM_CALLS = 3


class Server:
    """A variant, its queue and its gates in this process.

    Attributes:
        energy: of the test that is being served.
    """

    energy: QueryEnergy

    def __init__(self, request: dict[str, Any], emit: Emit) -> None:
        case = Case(**request["case"])
        self.case, self.largest, self.wait_s = case, request["largest"], request["wait_s"]
        workload = find_workload(case.workload)
        emit("stage", name="build and gate", variant=case.variant)
        weights, batch = starting_weights(workload, WEIGHTS_SEED), workload.make_batch(TIMED_SEED)
        gate = gate_for(workload, case.mode, case.device)
        refuse_replaced("a plugin")
        self.executable = execute(workload, VARIANTS[case.executed], case.mode, case.device, weights)
        self.gate, audit = gate, Audit(gate, weights, batch)
        self._gated = functools.partial(gated, gate, audit, self.executable, self.executable.prepare(batch))
        self.library = library_of(workload, max(LIBRARY, self.largest))
        longest = [sum(steps) for steps in self.library.lengths]
        self.bucket_of = buckets(longest) if request["lengths"] == "bucketed" else lambda _: 0

    @staticmethod
    def refuses(case: Case) -> str | None:
        """Reason why a variant cannot be served in this way, or None."""
        variant = VARIANTS[case.executed]
        if variant.compiler == "dynamo":
            return "it compiles again for each shape, and a queue's batches have many"
        if variant.runtime is not None and case.workload.startswith(OWN):
            return "its runtime converts a model of your own for one shape, and a queue's batches have many"
        return None

    def refuses_model(self) -> str | None:
        """Reason why its model cannot be, or None."""
        return None

    def run(self, batch: Any) -> Mapping[str, Tensor]:
        """Results of a batch by name; call it inside the executable's context."""
        return self.executable.named(self.executable.call(self.executable.prepare(batch)))

    def check(self, seed: int, when: str, emit: Emit) -> bool:
        """Gate and audit on the workload's own batch, then a query in a batch against itself alone."""
        found = self._gated(seed, warm=when == "after")
        together: dict[str, Any] = {"batched_error": None, "batched_limit": None}
        if found["passed"]:
            verdict = self.check_together(found["parity_limit"], seed)
            together = {"batched_error": verdict.error, "batched_limit": verdict.limit}
            if not verdict.passed:
                found |= {"passed": False, "reason": verdict.reason}
        emit("gate", variant=self.case.variant, when=when, **found, **together)
        return bool(found["passed"])

    def check_together(self, parity_limit: float, seed: int) -> batched.Batched:
        """Compare queries in batches with themselves alone."""
        with self.executable.context():
            return batched.check(self.run, self.library, self.largest, parity_limit, seed)

    def warm_up(self) -> tuple[float, float]:
        """Call every size that is a power of two, and the largest; returns the seconds of the smallest and largest."""
        sizes = [2**power for power in range(self.largest.bit_length()) if 2**power < self.largest] + [self.largest]
        took_s = []
        with self.executable.context():
            for size in sizes:
                batch = self.library.gather([place % len(self.library.lengths) for place in range(size)])
                for _ in range(WARM_CALLS):
                    start = time.perf_counter()
                    self.run(batch)
                    clock.synchronize(self.case.device)
                took_s.append(time.perf_counter() - start)
        return took_s[0], took_s[-1]

    def load(self, path: Path, emit: Emit, scenario: str, *, energy: bool = False) -> None:
        """Serve one test: whatever comes through a socket at a path, until the other side closes it.

        Args:
            path: of the socket, which this makes.
            emit: sends an event.
            scenario: of LoadGen.
            energy: whether to read the device's counter of energy.
        """
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            listening.listen(1)
            listening.settimeout(CONNECT_S)
            emit("listening")
            connected, _ = listening.accept()
        queue = self.make_queue(scenario)
        self.energy = QueryEnergy(counter_if_any(self.case.device) if energy else None)
        cpu_s = time.process_time()
        with connected:
            reader = threading.Thread(target=_receive, args=(connected, queue), daemon=True)
            reader.start()
            served = self.serve(queue, connected)
            reader.join()
        refuse_replaced(self.case.variant)
        emit(
            "served",
            batches=served.batches,
            queries=served.queries,
            together=served.together,
            waste=served.waste,
            busy_s=served.busy_s,
            cpu_s=time.process_time() - cpu_s,
            **self.energy.fields(),
        )

    def make_queue(self, scenario: str) -> Any:
        """The queue of a test; nothing waits for queries that never come: only in Server can more arrive."""
        largest = 1 if scenario == "single-stream" else self.largest
        return BatchingQueue(largest, self.wait_s if scenario == "server" else 0.0, self.bucket_of)

    def serve(self, queue: Any, connected: socket.socket) -> BatchCounts:
        """Answer what comes, until the queue is closed and empty."""
        served = BatchCounts()
        with self.executable.context():
            while taken := queue.take():
                self.energy.begin()
                start = time.perf_counter()
                samples = [query.sample for query in taken]
                self.run(self.library.gather(samples))
                clock.synchronize(self.case.device)
                served.add([self.library.lengths[sample] for sample in samples], time.perf_counter() - start)
                # A generator that was ended before its answers came is not this process's concern.
                with contextlib.suppress(OSError):
                    connected.sendall(b"".join(ANSWER.pack(query.number) for query in taken))
                self.energy.answered(len(taken))
        return served


def _receive(connected: socket.socket, queue: Any) -> None:
    """Put what comes in into the queue, until the other side closes."""
    rest = b""
    with contextlib.suppress(OSError):
        while data := connected.recv(1 << 16):
            rest += data
            whole = len(rest) - len(rest) % QUERY.size
            queue.put(QUERY.iter_unpack(rest[:whole]))
            rest = rest[whole:]
    queue.close()


_served: dict[str, Server] = {}


#: Ways to serve, by what `--batching` calls them; others register themselves.
SERVERS: dict[str, type[Server]] = {"queue": Server}


def serving(request: dict[str, Any], emit: Emit) -> None:
    """One step of serving: `begin` builds, gates and warms up, `load` serves one test, `end` gates again.

    `rows` examines only own models, whose inputs may not consist of sequences that can be separated.
    """
    action = request["action"]
    if action == "rows":
        for name in request["workloads"]:
            rows_of(cast("OwnWorkload", find_workload(name)))
    elif action == "begin":
        way = SERVERS[request["batching"]]
        server = None
        reason = way.refuses(Case(**request["case"]))
        if reason is None:
            server = way(request, emit)
            reason = server.refuses_model()
        if server is None or reason is not None:
            emit("refused", reason=reason)
            return
        if server.check(request["seed"], "before", emit):
            emit("stage", name="warm-up", variant=server.case.variant)
            single_s, largest_s = server.warm_up()
            emit("ready", single_s=single_s, largest_s=largest_s, samples=len(server.library.lengths))
            _served["server"] = server
    elif action == "load":
        _served["server"].load(Path(request["path"]), emit, request["scenario"], energy=request["energy"])
    else:
        _served["server"].check(request["seed"], "after", emit)
