"""The process that measures one unit on a node: `python -m bench.sweep.measure REQUEST.json DIR`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from bench.console import Console
from bench.errors import UsageError
from bench.plan.cases import Case, Filters, Suite
from bench.plan.validation import validate
from bench.records.folder import RunFolder
from bench.run.planning import make_plan
from bench.run.runner import Runner
from bench.run.worker_process import Settings
from bench.sweep.units import same_cases
from kernels.host.cores import usable_cores

#: Ray starts its tasks with a lower priority, at which any other work on the node would go first.
NORMAL_PRIORITY = 0


def main() -> int:
    """Measure the unit of a request into a folder that is there; 0 when every case is recorded."""
    asked, out = map(Path, sys.argv[1:])
    request = json.loads(asked.read_text(encoding="utf-8"))
    # Only root may raise it again; the sweep warns of nodes where this fails.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NORMAL_PRIORITY)
    threads = request["threads"] or usable_cores()
    settings = Settings(threads, request["omp_wait"], tuple(map(Path, request["plugins"])))
    planned = [validate(Case, case | {"threads": threads}, "the unit's cases") for case in request["cases"]]
    filters = Filters(
        variants=tuple(dict.fromkeys(case.variant for case in planned)),
        modes=(planned[0].mode,),
        threads=threads,
        device=planned[0].device,
    )
    try:
        plan = make_plan(validate(Suite, request["suite"], "the unit's suite"), filters, settings, build=True)
        if differs := same_cases(planned, [found.case for found in plan.cases]):
            print(f"this node expands {request['unit']} to other cases: it {differs}; check plugins and checkpoints")
            return 2
        folder = RunFolder(out)
        console = Console(len(plan.cases), plan.expected_s())
        runner = Runner(plan, folder, settings, console)
        if request["seed"] is not None:
            runner.seed = request["seed"]
        with folder.locked(), console:
            runner.run(request["command"])
    except UsageError as error:
        print(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
