"""Stages of the rehearsal that go wrong on purpose: what a day on a GPU has to survive is tried without one."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...dispatch import MODULES
from ...host.output import run_command
from ...host.usage import Parser
from .. import check_work
from ..check import row_of
from ..check_work import CheckQuestion, CheckResult
from ..problems import Sizes
from ..process_pool import Pool
from . import json_lines

#: The kernel that is made wrong, and seconds for a configuration that hangs.
KERNEL, TIMEOUT_S = "persistent", 4.0
SIZES = Sizes(2, 2, 16)


def main() -> int:
    """Go wrong as asked; 1 after wrong results."""
    parser = Parser(prog="python -m kernels.tools.gpu_day.planted", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("hang", "crash", "wrong"))
    parser.add_argument("--folder", type=Path, required=True, help="folder of the stage")
    options = parser.parse_args()
    if options.what == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(3600)
    if options.what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    with Pool(work, timeout_s=TIMEOUT_S) as pool:
        for outcome in pool.run(_questions()):
            line = row_of(outcome)
            json_lines.append(options.folder / json_lines.ROWS, line)
            print(f"{line['status'].upper()}: {line['config']} {line['reason']}", flush=True)
    return 1


def work(task: CheckQuestion) -> CheckResult:
    """Answer a question with a kernel that has a defect."""
    if task.kind == "streams":
        time.sleep(3600)
    if task.kind == "threads":
        os.kill(os.getpid(), signal.SIGKILL)
    module: Any = importlib.import_module(MODULES[task.implementation])
    forward = module.forward

    def wrong(args: Any, config: Any = None) -> None:
        forward(args, config)
        args.output.add_(0.1)

    module.forward = wrong
    try:
        return check_work.work(task)
    finally:
        module.forward = forward


def _questions() -> Iterator[CheckQuestion]:
    """A configuration that is wrong, one that hangs and one that crashes."""
    module = importlib.import_module(MODULES[KERNEL])
    configs = module.configs(SIZES.problem(), backward=False)
    for number, kind in enumerate(("parity", "streams", "threads")):
        yield CheckQuestion(kind, KERNEL, SIZES, config=configs[number])


if __name__ == "__main__":
    run_command(main)
