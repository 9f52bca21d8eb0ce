"""The keeper of a rank: starts it, listens to it, ends it if it is silent, and reports its end to the others."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from bench.errors import UsageError
from bench.run.worker_process import DRAIN_S, ROOT, START_LIMIT_S, end, guard

#: Seconds that the others get to notice that one rank is gone.
PATIENCE_S = 20.0
#: Words of a rank that is about to take steps with the others, to wait for them, or to compute without them.
SIGNS = {"alive", "waits", "computes"}
#: Processor time, as a share of the time at all, that a rank uses which computes and does not hang.
BUSY = 0.05


class RankEnd(StrEnum):
    """Ways in which a rank can end, the worst first."""

    DIED = "died"
    HUNG = "hung"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"
    DONE = "done"


@dataclass(frozen=True)
class RankReport:
    """End of a rank, and its last output.

    Attributes:
        rank: its number.
        ended: how.
        reason: in words.
        stage: what it did last.
        events: steps and gates.
    """

    rank: int
    ended: RankEnd
    reason: str = ""
    stage: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class RankPlace:
    """Place of this process among those that torchrun started."""

    rank: int
    world: int
    exchange: Path

    @staticmethod
    def here(exchange: Path | None) -> RankPlace:
        """Read torchrun's environment variables.

        Args:
            exchange: folder that all ranks see; None for one of this machine's own.

        Raises:
            UsageError: torchrun did not start this.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
        if missing := [name for name in names if name not in os.environ]:
            how = "torchrun --nproc-per-node 2 -m bench ranks"
            msg = f"{missing[0]} is not set; the ranks are started by torchrun: {how}"
            raise UsageError(msg)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if exchange is None and os.environ.get("LOCAL_WORLD_SIZE", str(world)) != str(world):
            msg = "the ranks are on several machines; name a folder that all of them see with --exchange"
            raise UsageError(msg)
        port, run = os.environ["MASTER_PORT"], os.environ["TORCHELASTIC_RUN_ID"]
        name = f"seq2seq-bench-ranks-{os.getuid()}-{run}-{port}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return RankPlace(rank, world, (exchange or Path(tempfile.gettempdir())) / name)

    def path(self, rank: int) -> Path:
        """File of a rank's report."""
        return self.exchange / f"rank-{rank}.json"


def keep(place: RankPlace, task: dict[str, Any], silence_s: float, limit_s: float) -> RankReport:
    """Run a rank to its end, whatever that is.

    Args:
        place: of this rank.
        task: of the process that trains.
        silence_s: longest time without a word of it, seconds.
        limit_s: longest time in all.
    """
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "bench.worker.ranks"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, cwd=ROOT, start_new_session=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(task["threads"]), "MKL_NUM_THREADS": str(task["threads"])},
    )  # fmt: skip
    watch = guard(child.pid)
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(child, lines), daemon=True)
    try:
        reader.start()
        assert child.stdin is not None  # noqa: S101 - it is a pipe
        # The end of one that is gone already has been reported.
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(task))
            child.stdin.close()
        return _listen(place, child, lines, silence_s, time.monotonic() + limit_s)
    finally:
        end(child, watch)
        reader.join(DRAIN_S)


def _listen(
    place: RankPlace, child: subprocess.Popen[str], lines: queue.Queue[str | None], silence_s: float, deadline_s: float
) -> RankReport:
    """Take a rank's words until it ends or is silent for too long."""
    events: list[dict[str, Any]] = []
    stage, doing, used_s = "start", "alive", 0.0
    while True:
        # A rank that waits for another one in a step is ended by its own collective's limit, so the one that hangs is
        # silent for longer than those that wait for it. In a meeting it waits for as long as the others live.
        patience_s = START_LIMIT_S if stage == "start" else math.inf if doing == "waits" else 2 * silence_s
        wait_s = max(0.0, min(patience_s, deadline_s - time.monotonic()))
        try:
            line = lines.get(timeout=wait_s)
        except queue.Empty:
            before_s, used_s = used_s, _processor_s(child.pid)
            if doing == "computes" and used_s - before_s > BUSY * wait_s and time.monotonic() < deadline_s:
                continue
            return RankReport(place.rank, RankEnd.HUNG, f"said nothing for {wait_s:.0f} s", stage, events)
        if line is None:
            code = child.wait()
            how = f"died of signal {-code}" if code < 0 else f"ended with exit code {code}"
            return RankReport(place.rank, RankEnd.DIED, how, stage, events)
        event = json.loads(line)
        if event["event"] in SIGNS:
            stage, doing = event["stage"], event["event"]
            used_s = _processor_s(child.pid) if doing == "computes" else 0.0
        elif event["event"] in {"done", "failed", "unavailable"}:
            return RankReport(place.rank, RankEnd(event["event"]), event.get("reason", ""), stage, events)
        else:
            events.append(event)


def _processor_s(pid: int) -> float:
    """Processor time of a process so far; 0 for one that is gone."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None  # noqa: S101 - it is a pipe
    with child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def tell(place: RankPlace, report: RankReport) -> None:
    """Leave a rank's report where rank 0 finds it."""
    place.exchange.mkdir(parents=True, exist_ok=True)
    unfinished = place.exchange / f".rank-{report.rank}"
    unfinished.write_text(json.dumps(asdict(report)), encoding="utf-8")
    unfinished.replace(place.path(report.rank))


def gather(place: RankPlace, patience_s: float) -> list[RankReport]:
    """Reports of all ranks; one whose keeper reports nothing in time counts as dead."""
    deadline_s = time.monotonic() + patience_s
    found = []
    for rank in range(place.world):
        path = place.path(rank)
        while not path.exists() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        if path.exists():
            values = json.loads(path.read_text(encoding="utf-8"))
            found.append(RankReport(**(values | {"ended": RankEnd(values["ended"])})))
        else:
            found.append(RankReport(rank, RankEnd.DIED, "its keeper told nothing", "unknown"))
    return found
