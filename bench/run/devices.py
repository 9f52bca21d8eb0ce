"""Measure the devices of a run before its groups: their ceilings, and their power when idle."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from bench.analysis.roofline import Ceilings
from bench.machine.energy import Idle
from bench.run.group import Host
from bench.run.worker_process import Worker, WorkerError, scratch_folder

#: The ceilings may take so long; a suite's own limit is one for a case.
CEILINGS_LIMIT_S = 120.0
#: So may a GPU's steps, most of it to compile; a kernel that waits forever costs this much, once.
STEPS_LIMIT_S = 60.0


def ceilings(runner: Host, device: str) -> Ceilings | None:
    """Measure what a device can do now, by a new worker; without it the run continues, and says so."""
    runner.console.status("measuring what this machine can do at most")
    try:
        with (
            runner.watch.on("ceilings"),
            scratch_folder() as scratch,
            runner.seat(runner.settings, 0, scratch) as worker,
        ):
            (found,) = worker.ask("ceilings", CEILINGS_LIMIT_S, device=device)
            if device == "cuda":
                found |= _steps(runner, worker)
    except WorkerError as error:
        runner.console.say(f"the ceilings of {device} could not be measured: {error.reason}", "red")
        return None
    return Ceilings.of(found)


def _steps(runner: Host, worker: Worker) -> dict[str, Any]:
    """Measure how fast the GPU's programs take steps together; where that fails the rates stand, and it says so."""
    try:
        (found,) = worker.ask("steps", STEPS_LIMIT_S)
    except WorkerError as error:
        runner.console.say(f"the steps of a GPU's programs could not be measured: {error.reason}", "red")
        return {}
    for reason in found["without"]:
        runner.console.say(f"no time of a GPU's steps: {reason}")
    return {"step_s": found["step_s"]}


def note_idle(idle: Mapping[str, Idle], facts: dict[str, Any], part: dict[str, Any]) -> None:
    """Write what devices use when idle into environment.json; what an earlier part of the run found stays there.

    Args:
        idle: counter of each device, as this part of the run found it.
        facts: the content of environment.json.
        part: the section of this part of the run, which has its own findings if it is not the first.
    """
    found = {device: dataclasses.asdict(counter) for device, counter in idle.items()}
    if part is not facts["run"]:
        part["energy"] = found
    facts["energy"] = found | (facts.get("energy") or {})
