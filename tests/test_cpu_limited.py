"""A compiler may wait for a core as long as it must, and one that hangs ends, with all that it started."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kernels.cpu import build, limited

Compiler = Callable[[str], list[str]]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Make a compiler of a line of shell, for `build.compiled`: it starts another process, as compilers do."""
    monkeypatch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path / "cache"))

    def made(line: str) -> list[str]:
        script, inner = tmp_path / "c++", tmp_path / "cc1plus"
        inner.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nwhile [ $# -gt 1 ]; do shift; done\n{line}\n")
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit\n{inner} "$@"\nexit $?\n')
        for path in (script, inner):
            path.chmod(0o755)
        return [str(script), "lstm.cpp"]

    return made


def gone(tmp_path: Path) -> bool:
    """Return whether the compiler's own process has ended, or ends within a second."""
    number = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            if "State:\tZ" in Path(f"/proc/{number}/status").read_text():
                return True
            os.kill(number, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.01)
    return False


def test_a_compiler_that_waits_for_a_core_is_waited_for(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than its limit of processor time, of which it uses little."""
    monkeypatch.setattr(limited, "PROCESSOR_LIMIT_S", 1)
    path = build.compiled(compiler("sleep 1.3; echo done > $1"))
    assert path.read_text() == "done\n"


def test_a_compiler_that_computes_without_end_is_ended(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says that it was processor time."""
    monkeypatch.setattr(limited, "PROCESSOR_LIMIT_S", 1)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    with pytest.raises(build.BuildError, match=r"compiled lstm\.cpp: it took more than 1 s of processor time$"):
        build.compiled(compiler("while :; do :; done"))
    assert gone(tmp_path)


def test_a_compiler_that_hangs_is_ended(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is what it started, without which its pipes would stay open; the line says that it was no processor time."""
    monkeypatch.setattr(limited, "TIME_LIMIT_S", 0.5)
    start = time.monotonic()
    with pytest.raises(build.BuildError, match=r"it took more than 0\.5 s, though less than 120 s of processor time$"):
        build.compiled(compiler("sleep 60; :"))
    assert time.monotonic() - start < 30
    assert gone(tmp_path)
    assert not list((tmp_path / "cache").iterdir())


def test_one_that_hangs_when_asked_for_its_version_is_ended(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is asked before anything is compiled."""
    monkeypatch.setattr(limited, "TIME_LIMIT_S", 0.5)
    command = compiler("")
    Path(command[0]).write_text("#!/bin/sh\nsleep 60\n")
    with pytest.raises(build.BuildError, match="was ended before it had said which version it is: it took more"):
        build.compiled(command)


def test_an_interrupt_ends_compilers_of_all_threads(compiler: Compiler, tmp_path: Path) -> None:
    """Only the first thread hears of Ctrl-C, and the others would make Python wait for their compilers."""
    command = compiler("sleep 60; :")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupted)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(KeyboardInterrupt):
            build.beside(lambda: time.sleep(60), lambda: build.compiled(command))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert gone(tmp_path)
