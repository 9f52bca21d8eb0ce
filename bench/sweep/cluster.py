"""The nodes of a Ray cluster; nothing else here imports ray.

A node takes part if it offers the resource `bench_slot: 1`, which each unit takes completely. Counts of CPUs would not
keep a node exclusive, since a task can ask for none. Which node measures what is decided by `bench.sweep.pulling`, so
tasks are bound to their node and never retried by Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.sweep.hosts import kind_of
from bench.sweep.pulling import JobEnd, SweepNode, UnitJob

LOCAL, AUTO, SLOT = "local", "auto", "bench_slot"
#: Seconds that nodes may take to say what they are, before a sweep begins without those that did not.
DESCRIBE_LIMIT_S = 120.0
#: Seconds that the head of a cluster may take to accept a connection; Ray itself waits half a minute, and logs.
CONNECT_LIMIT_S = 3.0
#: Variable with which tests let several nodes of one machine measure, at the price of figures that mean nothing.
SHARED_MACHINE = "BENCH_SWEEP_SHARED_MACHINE"
#: Memory of a node's object store, bytes: results pass through it, a few megabytes each.
STORE_BYTES = 200_000_000
#: Ray's words for the niceness of its tasks, 15 unless set when a node is started.
NICENESS = "RAY_worker_niceness"


@dataclass
class RayCluster:
    """Nodes of a Ray cluster that measure.

    Attributes:
        address: of the cluster, or `local` for only this machine.
        checkout: folder of this project on the nodes.
        plugins: files that add variants, at the same path on each node.
        device: that units need, `cpu` or `cuda`.
        admit: returns why a node may not measure, by what it says of itself; empty if it may.
        say: takes lines for people.
    """

    address: str
    checkout: Path
    plugins: Sequence[str]
    device: str
    admit: Callable[[dict[str, Any]], str]
    say: Callable[[str, str], None]
    _known: dict[str, SweepNode | None] = field(default_factory=dict, init=False)
    #: Machine of each node that has said what it is, by the node's id.
    _machines: dict[str, str] = field(default_factory=dict, init=False)
    _asked: dict[str, Any] = field(default_factory=dict, init=False)
    _running: dict[Any, tuple[UnitJob, SweepNode]] = field(default_factory=dict, init=False)

    @contextlib.contextmanager
    def connected(self) -> Iterator[RayCluster]:
        """Connect to the cluster, or start one on this machine that ends with this process.

        Raises:
            UsageError: ray is not installed, there is no cluster at the address, or none of its nodes may measure.
        """
        reach(self.address)
        if importlib.util.find_spec("ray") is None:
            msg = "the package ray, which reaches the nodes, is missing; pip install ray"
            raise UsageError(msg)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray  # noqa: PLC0415 - optional, and slow to import

        # Ray ends the process at SIGTERM; ours says what is safe first.
        before = signal.getsignal(signal.SIGTERM)
        common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        try:
            if self.address == LOCAL:
                os.environ.setdefault(NICENESS, "0")
                ray.init(
                    num_cpus=1,
                    resources={SLOT: 1},
                    include_dashboard=False,
                    object_store_memory=STORE_BYTES,
                    **common,
                )
            else:
                ray.init(address=self.address, **common)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            msg = f"no Ray cluster answers at {self.address}: {first}; start one with ray start --head, or use local"
            raise UsageError(msg) from error
        finally:
            signal.signal(signal.SIGTERM, before)
        # Of each node that is lost Ray prints the end of its log; the sweep says the same in a line.
        ray._private.worker._worker_logs_enabled = False  # noqa: SLF001 - it has no option for that
        try:
            self._meet()
            yield self
        finally:
            ray.shutdown()

    def nodes(self) -> Sequence[SweepNode]:
        """Nodes that are there now and may measure; new ones are asked what they are, and join when they answer."""
        alive = self._alive()
        for node_id in [known for known in self._known if known not in alive]:
            del self._known[node_id]
            self._gone(node_id)
        for node_id, values in alive.items():
            if node_id not in self._known and node_id not in self._asked:
                self._ask(node_id, values)
        self._hear(alive)
        return [node for node_id in alive if (node := self._known.get(node_id)) is not None]

    def begin(self, job: UnitJob, node: SweepNode, request: dict[str, Any]) -> None:
        """Have a node measure a job."""
        task = self._task("measure_unit", gpus=int(self.device == "cuda"))
        self._running[self._on(task, node.node_id).remote(str(self.checkout), request)] = (job, node)

    def ended(self, wait_s: float) -> Sequence[JobEnd]:
        """Jobs that ended since the last call; waits up to some seconds for the first."""
        import ray  # noqa: PLC0415

        if not self._running:
            time.sleep(wait_s)
            return []
        ready, _ = ray.wait(list(self._running), timeout=wait_s)
        found = []
        for reference in ready:
            job, node = self._running.pop(reference)
            try:
                found.append(JobEnd(job, node, ray.get(reference)))
            except ray.exceptions.RayTaskError as error:
                # The node is there, and what it ran raised: it would again elsewhere.
                last = str(error).strip().splitlines()[-1]
                failed: dict[str, Any] = {
                    "files": {},
                    "ended": "failed",
                    "reason": f"the task raised {last}",
                    "wall_s": None,
                }
                found.append(JobEnd(job, node, failed))
            except ray.exceptions.RayError as error:
                found.append(JobEnd(job, node, None, _first_sentence(error)))
                self._known.pop(node.node_id, None)
                self._gone(node.node_id)
        return found

    def cancel(self) -> None:
        """End what is being measured."""
        import ray  # noqa: PLC0415

        for reference in self._running:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(reference, force=True)

    def _meet(self) -> None:
        """Wait until the nodes have said what they are.

        Raises:
            UsageError: none may measure.
        """
        end_s = time.perf_counter() + DESCRIBE_LIMIT_S
        found = self.nodes()
        while self._asked and time.perf_counter() < end_s:
            time.sleep(0.2)
            found = self.nodes()
        for node_id in self._asked:
            self.say(f"node {node_id[:8]} has not said what it is: another sweep may hold its {SLOT}", "yellow")
        if not found:
            msg = (
                f"no node of the cluster can measure; start each with ray start --resources '{{\"{SLOT}\": 1}}', with "
                f"this commit checked out in {self.checkout}"
            )
            raise UsageError(msg)

    def _alive(self) -> dict[str, dict[str, Any]]:
        """Nodes that are there and offer a slot, by id."""
        import ray  # noqa: PLC0415

        return {
            str(node["NodeID"]): node
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get(SLOT, 0) > 0
        }  # fmt: skip

    def _ask(self, node_id: str, values: dict[str, Any]) -> None:
        """Ask a node what it is, unless its resources say already that it may not measure."""
        offered = values["Resources"].get(SLOT, 0)
        reason = f"its {SLOT} is {offered:g}, expected 1: two units at a time would disturb each other"
        if offered == 1:
            reason = "it offers no GPU" if self.device == "cuda" and not values["Resources"].get("GPU") else ""
        if reason:
            self._leave_out(node_id, values, reason)
            return
        task = self._on(self._task("describe"), node_id)
        self._asked[node_id] = task.remote(str(self.checkout), list(self.plugins))

    def _hear(self, alive: dict[str, dict[str, Any]]) -> None:
        """Take the answers that are there."""
        import ray  # noqa: PLC0415

        for node_id in [asked for asked in self._asked if asked not in alive]:
            del self._asked[node_id]
        if not self._asked:
            return
        ready, _ = ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=0)
        for node_id, reference in [(name, asked) for name, asked in self._asked.items() if asked in ready]:
            del self._asked[node_id]
            values = alive[node_id]
            try:
                told = ray.get(reference)
            except ray.exceptions.RayError as error:
                last = str(error).strip().splitlines()[-1]
                self._leave_out(node_id, values, f"it cannot run the checkout in {self.checkout}: {last}")
                continue
            self._machines[node_id] = str(told.get("machine_id", ""))
            if reason := self.admit(told) or self._beside(node_id):
                self._leave_out(node_id, values, reason)
                continue
            name = self._name(node_id, values, alive)
            if told["niceness"] > 0:
                self.say(
                    f"{name}: its tasks run at niceness {told['niceness']}, so other work there goes first unless Ray "
                    f"runs as root; start its Ray with {NICENESS}=0",
                    "yellow",
                )
            self._known[node_id] = SweepNode(name, node_id, told["hostname"], kind_of(told))

    def _beside(self, node_id: str) -> str:
        """Why a node may not measure for another one on its machine, which measures already; empty if it may."""
        machine = self._machines[node_id]
        if not machine or os.environ.get(SHARED_MACHINE):
            return ""
        for other, node in self._known.items():
            if node is not None and other != node_id and self._machines[other] == machine:
                return f"it is on the machine of {node.name}, and two units at a time would disturb each other"
        return ""

    def _gone(self, node_id: str) -> None:
        """Let nodes that were left out for one that is gone be asked again."""
        machine = self._machines.pop(node_id, "")
        for other in [other for other, found in self._machines.items() if machine and found == machine]:
            if self._known.get(other, other) is None:
                del self._known[other]

    def _leave_out(self, node_id: str, values: dict[str, Any], reason: str) -> None:
        self._known[node_id] = None
        self.say(f"node {values['NodeName']} is left out: {reason}", "yellow")

    @staticmethod
    def _name(node_id: str, values: dict[str, Any], alive: dict[str, dict[str, Any]]) -> str:
        """Name of a node as `ray start --node-name` gave it, else its address; with its id where two share it."""
        name = str(values["NodeName"])
        shared = sum(other["NodeName"] == name for other in alive.values()) > 1
        return f"{name}-{node_id[:6]}" if shared else name

    @staticmethod
    def _task(function: str, gpus: int = 0) -> Any:
        """A function of the checkout on a node as a task that holds its slot."""
        import ray  # noqa: PLC0415

        return ray.remote(num_cpus=0, num_gpus=gpus, resources={SLOT: 1}, max_retries=0)(_of_checkout(function))

    @staticmethod
    def _on(task: Any, node_id: str) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

        return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False))


def reach(address: str) -> None:
    """Find out that something answers at an address, before Ray tries for half a minute.

    Args:
        address: of a cluster; only `HOST:PORT` is looked at.

    Raises:
        UsageError: nothing does, or it is not an address.
    """
    if address in {LOCAL, AUTO} or "://" in address:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) >= 1 << 16:
        msg = f"--cluster {address} is not an address; expected HOST:PORT, such as head:6379, {AUTO} or {LOCAL}"
        raise UsageError(msg)
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_LIMIT_S).close()
    except OSError as error:
        msg = (
            f"no Ray cluster answers at {address}: {error.strerror or error}; start one with ray start --head, or use "
            f"{LOCAL}"
        )
        raise UsageError(msg) from error


def _of_checkout(function: str) -> Callable[[str, Any], Any]:
    """Return a function for a node: it needs nothing but Python until it has found the checkout there.

    Ray carries a function that is defined in another one by its content, so a node needs no path to this module.
    """
    module = {"describe": "bench.sweep.hosts", "measure_unit": "bench.sweep.node"}[function]

    def on_node(checkout: str, argument: Any) -> Any:
        import importlib  # noqa: PLC0415 - on the node
        import sys  # noqa: PLC0415

        if checkout not in sys.path:
            sys.path.insert(0, checkout)
        return getattr(importlib.import_module(module), function)(argument)

    return on_node


def _first_sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
