"""Cold runs: processes start side by side, and each has the machine to itself in its own run."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

from bench.plan.cases import Case
from bench.records.schema import Status
from bench.run.cold import ColdCase, ColdRuns, CompiledKernel
from bench.run.worker_process import WorkerError

CASES = [Case("seed", name, "inference", "cpu", 1) for name in ("a", "b", "c", "d", "e")]


class Actor:
    """Plays the process of a cold run.

    Args:
        name: variant of its case.
        going: names of the processes that may run now.
        seen: of each measured case, the processes that could run meanwhile, and its request.
        dies: request in which it dies, by variant.
    """

    def __init__(self, name: str, log: Path, going: set[str], seen: dict[str, Any], dies: dict[str, str]) -> None:
        self._name, self._log, self._going, self._seen, self._dies = name, log, going, seen, dies

    def __enter__(self):
        self._log.write_text(f"{self._name} began\n")
        self._die("start")
        self._going.add(self._name)
        return self

    def __exit__(self, *_: object) -> None:
        self._going.discard(self._name)

    def stop(self) -> None:
        """Stand still."""
        self._going.discard(self._name)

    def go_on(self) -> None:
        """Go on."""
        self._going.add(self._name)

    def ask(self, request: str, _limit_s: float, **fields: Any):
        """Play the request."""
        self._die(request)
        if request == "cold":
            self._seen[self._name] = (set(self._going), fields)
            yield {"event": "cold", "fields": {"build_s": 1.0}, "built": {} if fields["built"] else {"lstm-1": 7.0}}

    def _die(self, request: str) -> None:
        if self._dies.get(self._name) == request:
            raise WorkerError(Status.CRASHED, f"died at {request}")


def run(folder: Path, cores: int, dies: dict[str, str] | None = None, kept: dict[str, str] | None = None):
    """What came of each case by variant, and what was seen while it was measured."""
    going: set[str] = set()
    seen: dict[str, Any] = {}
    asked = [
        ColdCase(
            case,
            lambda log, _cache, name=case.variant: Actor(name, log, going, seen, dies or {}),
            folder / (kept or {}).get(case.variant, "kept"),
            folder / "log",
            builds=case.variant != "c",
        )
        for case in CASES
    ]
    found = {case.variant: (fields, error) for case, fields, error in ColdRuns(folder, 1.0, cores).run(asked)}
    assert not going
    assert [path.name for path in folder.iterdir() if path.name not in {"kept", "other"}] == ["log"]
    assert sorted((folder / "log").read_text().split()) == sorted([*"abcde", *["began"] * 5])
    (folder / "log").unlink()
    return found, seen


def test_nobody_else_runs_while_a_case_is_measured(tmp_path):
    """Processes that were started beside it stand still or have ended."""
    for cores in (1, 2, 9):
        found, seen = run(tmp_path, cores)
        assert list(found) == list("abcde")
        assert {name: going for name, (going, _) in seen.items()} == {name: {name} for name in "abcde"}


def test_whoever_dies_takes_nobody_along(tmp_path):
    """At its start, while it imports, or in its run: the others have their fields."""
    found, _ = run(tmp_path, 3, {"a": "start", "c": "prepare", "e": "cold"})
    reasons = {name: error and error.reason for name, (_, error) in found.items()}
    assert reasons == {"a": "died at start", "b": None, "c": "died at prepare", "d": None, "e": "died at cold"}
    assert [name for name, (fields, _) in found.items() if fields] == ["b", "d"]


def test_the_kernel_s_compilation_is_handed_on_where_the_kernel_is(tmp_path):
    """Not to cases whose processes keep compiled kernels elsewhere, as another checkout's do, or that need none."""
    _, seen = run(tmp_path, 2, kept={"b": "other", "d": "other"})
    assert {name: fields["built"] for name, (_, fields) in seen.items()} == {
        "a": {}, "b": {}, "c": {}, "d": {"lstm-1": 7.0}, "e": {"lstm-1": 7.0}
    }  # fmt: skip


def test_a_kernel_that_was_compiled_before_is_found_and_counted(tmp_path):
    """It lies where processes look for it, with its content, and no case is asked to compile it."""
    (tmp_path / "cache" / "kernels").mkdir(parents=True)
    (tmp_path / "cache" / "kernels" / "lstm-1.so").write_bytes(b"compiled")
    kernel = CompiledKernel.found(tmp_path / "cache", {"lstm-1": 5.0, "lstm-2": 3.0})
    shutil.rmtree(tmp_path / "cache")
    runs = ColdRuns(tmp_path, 1.0)
    runs.keep(tmp_path / "kept", kernel)
    assert (tmp_path / "kept" / "kernels" / "lstm-1.so").read_bytes() == b"compiled"
    # The second one came of nothing: its seconds are those of an attempt that failed.
    assert (runs.built_of(tmp_path / "kept"), runs.built_of(tmp_path / "other")) == ({"lstm-1": 5.0}, {})


def test_attempts_to_compile_that_failed_count_nothing(tmp_path):
    """Without a library their seconds are not the kernel's."""
    assert CompiledKernel.found(tmp_path, {"lstm-1": 5.0}) == CompiledKernel()


def test_an_interrupted_start_ends_at_once_and_leaves_no_process(tmp_path):
    """Whoever leaves does not wait for a process that hangs as it starts; when it is up, it is ended."""
    up, ended, hold = threading.Event(), threading.Event(), threading.Event()

    class Hanging(Actor):
        def __enter__(self):
            up.set()
            hold.wait(10)
            return super().__enter__()

        def __exit__(self, *_: object) -> None:
            super().__exit__()
            ended.set()

    going: set[str] = set()
    asked = ColdCase(CASES[0], lambda log, _: Hanging("a", log, going, {}, {}), tmp_path / "kept", tmp_path / "log")
    with ColdRuns(tmp_path, 1.0).begun(asked):
        assert up.wait(10)
    assert not ended.is_set()
    hold.set()
    assert ended.wait(10)
    assert not going
