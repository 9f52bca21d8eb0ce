"""`python -m kernels gpu-day`: run all stages, the most valuable first, each in a child process; archive the results.

A hang, a crash or a wrong result costs only its own stage, and a wrong result is never timed. The output folder holds
at most eight files and is complete at any moment, because a machine that is lent for minutes may be taken away.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ... import measurements as table
from ... import refusals
from ...host.numbers import duration
from ...host.output import run_command, write_whole
from ...host.usage import PACKAGE, Parser, part_of
from . import findings, summary
from .day_folder import RUNNING, SUMMARY, DayFolder
from .stage_process import CRASH, ERROR, HANG, MARK, OK, PARTIAL, WRONG, StageEnd, kill_left, run_stage
from .stages import DAY, PART_S, REHEARSAL, DayStage

#: The checkout, or the folder that an installed package lies in.
ROOT = Path(__file__).resolve().parents[3]
#: Seconds between two archives while a stage runs, and what is kept for the last one.
PACK_S, CLOSING_S = 15.0, 8.0
#: Seconds to find out whether torch sees a GPU: in a child, as a driver that hangs would take this process with it.
LOOK_LIMIT_S = 90.0
LEFT, SKIPPED, UNAVAILABLE = "left", "skipped", "unavailable"
#: What `--resume` does again, and what keeps stages that need it from running.
OPEN = frozenset({RUNNING, LEFT, PARTIAL, SKIPPED})
BROKEN = frozenset({HANG, CRASH, ERROR, SKIPPED, UNAVAILABLE})
EXIT_LEFT = 4
#: How the planted stages of a rehearsal have to end.
PLANTED = {"planted-hang": HANG, "planted-crash": CRASH, "planted-wrong": WRONG, "after-a-crash": SKIPPED}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a day.

    Returns:
        0 when all stages ended and nothing was wrong, 1 when something was, 2 when it cannot run here, 4 when stages
        are left for `--resume`. A rehearsal: 0 when every planted defect was caught and nothing else was wrong.
    """
    began = time.monotonic()
    options = parser().parse_args(arguments)
    stages = REHEARSAL if options.rehearse else DAY
    known = [stage.name for stage in stages]
    if unknown := set(options.again) - set(known):
        print(
            f"error: --again {', '.join(sorted(unknown))}: no such stage, expected {', '.join(known)}", file=sys.stderr
        )
        return 2
    if options.again and not options.resume:
        print("error: --again repeats stages of a day that was begun: give --resume too", file=sys.stderr)
        return 2
    if not options.rehearse and not _sees_gpu():
        print("gpu-day: torch sees no GPU; --rehearse runs all stages at tiny sizes in Triton's interpreter",
              file=sys.stderr)  # fmt: skip
        return 2
    try:
        refusals.read(table.FOLDER / refusals.NAME)
        folder = (DayFolder.resumed if options.resume else DayFolder.new)(options.out, rehearsal=options.rehearse)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in options.again:
        folder.state["stages"].pop(name, None)
        shutil.rmtree(folder.work / name, ignore_errors=True)
    parts = (1, 2) if options.part == "all" else (int(options.part),)
    limit_s = options.time_limit or sum(PART_S[part] for part in parts)
    day = Day(folder, stages, began + limit_s - CLOSING_S)
    try:
        day.run([stage for stage in stages if stage.part in parts])
        code = rehearsal_verdict(folder, stages) if options.rehearse else verdict(folder, stages, parts)
    finally:
        day.close()
    print((folder.path / SUMMARY).read_text(encoding="utf-8"))
    print(f"{time.monotonic() - began:.0f} s; all results are in {folder.path}")
    return code


def parser() -> Parser:
    """The command line's grammar."""
    found = Parser(prog=f"python -m {PACKAGE} gpu-day", description=(__doc__ or "").splitlines()[0])
    add = found.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="new folder for the results, at most 8 files")
    add("--part", choices=("1", "2", "all"), default="all", help="part of the day (default: %(default)s)")
    add(
        "--time-limit",
        type=duration,
        metavar="TIME",
        help="time for all of it, such as 4.5min (default: 4.5min for part 1, 6.7min for part 2, 11.2min for both)",
    )
    add("--resume", action="store_true", help="continue the day in DIR, on this machine or another")
    add(
        "--again",
        action="append",
        default=[],
        metavar="STAGE",
        help="with --resume: run this stage again; can be repeated",
    )
    add("--rehearse", action="store_true", help="without a GPU: tiny sizes in Triton's interpreter, planted defects")
    return found


def _sees_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return not subprocess.run([sys.executable, "-c", code], check=False, timeout=LOOK_LIMIT_S).returncode  # noqa: S603 - this interpreter
    except subprocess.TimeoutExpired:
        return False


class Day:
    """Runs stages into a folder until the time is over."""

    def __init__(self, folder: DayFolder, stages: Sequence[DayStage], deadline_s: float) -> None:
        self.folder, self.stages, self.deadline_s = folder, stages, deadline_s

    def run(self, stages: Sequence[DayStage]) -> None:
        """Run the stages that are open, in order."""
        self._continue()
        for stage in stages:
            status = self.folder.state["stages"].get(stage.name, {}).get("status")
            if status is None or status in OPEN:
                self._stage(stage)
                self.publish()

    def close(self) -> None:
        """Write what there is; what a stage had no time for to say is in the archive."""
        self.publish()
        self.folder.clear()

    def publish(self) -> None:
        """Write the list of refused configurations, the summary and the archive.

        If a file of a stage cannot be read, only the summary is lost, since the day cannot be repeated.
        """
        try:
            refusals.write(self.folder.tables / refusals.NAME, findings.listed(self.folder.work))
            text = summary.write(self.folder.state, self.folder.work, self.stages)
        except (ArithmeticError, LookupError, OSError, TypeError, ValueError, ImportError) as error:
            reason = f"a result cannot be read: {type(error).__name__}: {error}"
            print(f"error: {reason}", flush=True)
            text = f"# No summary\n\n{reason}\n\nAll results are in the archive; the stages: {self.folder.state}\n"
        self.folder.pack()
        write_whole(self.folder.path / SUMMARY, text.encode())

    def _continue(self) -> None:
        """Take over what an earlier process left, and the tables and refusals that the checkout has."""
        for name, found in self.folder.state["stages"].items():
            if found.get("status") == RUNNING and "pid" in found:
                print(f"{name} was interrupted and runs again", flush=True)
                kill_left(found["pid"], self.folder.state["token"])
        for path in table.FOLDER.glob("*.json"):
            if not (self.folder.tables / path.name).exists():
                shutil.copyfile(path, self.folder.tables / path.name)
        # Results may be unreadable here, so what was found right since goes only with the next `publish`.
        for path in (self.folder.work / findings.INHERITED, self.folder.tables / refusals.NAME):
            known = [*refusals.read(path), *refusals.read(table.FOLDER / refusals.NAME)]
            refusals.write(path, dict.fromkeys(known))

    def _stage(self, stage: DayStage) -> None:
        left_s = self.deadline_s - time.monotonic()
        if kept := self._obstacle(stage, left_s):
            status, reason = kept
            print(f"{stage.name}: {status}, {reason}", flush=True)
            self.folder.set(stage.name, status=status, reason=reason)
            return
        limit_s = min(stage.limit_s, left_s)
        print(f"{stage.name}: {stage.asks} (at most {limit_s:.0f} s)", flush=True)
        place = self.folder.stage(stage.name)
        log = place / "log.txt"
        log.unlink(missing_ok=True)
        end = run_stage(
            self._command(stage, place, limit_s), log, cwd=ROOT, environment=self._environment(), limit_s=limit_s,
            started=lambda pid: self.folder.set(stage.name, status=RUNNING, pid=pid), look=self._look,
        )  # fmt: skip
        self._record(stage, end)

    def _record(self, stage: DayStage, end: StageEnd) -> None:
        said = f": {end.reason}" if end.reason else ""
        print(f"{stage.name}: {end.status} after {end.took_s:.0f} s{said}", flush=True)
        self.folder.set(stage.name, status=end.status, reason=end.reason, took_s=round(end.took_s, 1))

    def _look(self) -> None:
        if time.monotonic() - self.folder.packed_s > PACK_S:
            self.folder.pack()

    def _obstacle(self, stage: DayStage, left_s: float) -> tuple[str, str] | None:
        """Return why a stage does not run now: status and reason."""
        found = self.folder.state["stages"]
        for name in stage.needs:
            if (status := found.get(name, {}).get("status")) in BROKEN:
                return SKIPPED, f"it needs {name}, which ended as {status}"
        if stage.suite and not (ROOT / "bench" / "__main__.py").exists():
            return UNAVAILABLE, "the benchmark suite is not here: run it from a checkout"
        if stage.program and _program(stage.program[0]) is None:
            return UNAVAILABLE, f"{stage.program[0]} is not installed"
        if left_s < stage.least_s:
            return LEFT, f"{max(left_s, 0):.0f} s were left, and it takes at least {stage.least_s:.0f}"
        return None

    def _command(self, stage: DayStage, place: Path, limit_s: float) -> list[str]:
        words = stage.resumed if stage.resumed and (place / "run" / "plan.json").exists() else stage.command
        values = {
            "package": PACKAGE, "folder": place, "work": self.folder.work, "tables": self.folder.tables,
            "seconds": f"{max(limit_s - stage.closing_s, limit_s / 4):.0f}",
        }  # fmt: skip
        program = [str(_program(stage.program[0])), *stage.program[1:]] if stage.program else []
        return [*program, sys.executable, *(word.format(**values) for word in words)]

    def _environment(self) -> Mapping[str, str]:
        own = {MARK: self.folder.state["token"], table.VARIABLE: str(self.folder.tables), "COLUMNS": "120"}
        if self.folder.state["rehearsal"]:
            own |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return os.environ | own


def _program(name: str) -> str | None:
    """Path of a program of the CUDA toolkit, which often is not on the search path."""
    place = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(place) if place.exists() else None)


def verdict(folder: DayFolder, stages: Sequence[DayStage], parts: Sequence[int]) -> int:
    """Return the exit code of a day on a GPU."""
    ended = {folder.state["stages"].get(stage.name, {}).get("status") for stage in stages if stage.part in parts}
    if ended & {WRONG, ERROR, HANG, CRASH}:
        return 1
    return EXIT_LEFT if ended & {*OPEN, None} else 0


def rehearsal_verdict(folder: DayFolder, stages: Sequence[DayStage]) -> int:
    """Return 0 when every planted defect was caught and nothing else was wrong; say what was not as it should be."""
    faults = list(_faults(folder, stages))
    for fault in faults:
        print(f"REHEARSAL: {fault}")
    return 1 if faults else 0


def _faults(folder: DayFolder, stages: Sequence[DayStage]) -> Iterator[str]:
    for stage in stages:
        status = folder.state["stages"].get(stage.name, {}).get("status")
        expected = PLANTED.get(stage.name, OK)
        if status is not None and status != expected:
            yield f"{stage.name} ended as {status}, expected {expected}"
    listed = findings.refusals(folder.work)
    if folder.state["stages"].get("planted-wrong") and not listed:
        yield "the planted wrong configurations were not found"
    for file, measured in findings.tables(folder.work):
        for entry in measured.entries:
            for name, timing in entry.kernels.items():
                for one in listed:
                    fields = all(f"{key}={value!r}" in one.config for key, value in timing.config.items())
                    if (one.implementation, one.backward) == (name, entry.phase == "backward") and fields:
                        yield f"a configuration that was found wrong was timed ({file}): {one.config}"


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} gpu-day"))
