"""Programs on the CPU kernel as built from changed sources, each in a process of its own that crashes alone.

Importing torch takes longer than such a program, so they are forks of one process that has imported it and has run
nothing: started with threads of its own it could not be forked. Compiling takes longer too, so all of `planted_defects`
are compiled into one library a target, in which an environment variable chooses one of them, or none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cpu_builds import one_at_a_time
from planted_defects import EVERY

from kernels.cpu import build

ROOT = Path(__file__).parents[1]

PRINTED = "printed"
#: Number of the defect that a library with several behaves with; without the variable it has none.
DEFECT = "PLANTED_DEFECT"
#: In code with a defect: whether that is the one.
PLANTED = "PLANTED"
#: Name for the library with several as it is without any.
NOTHING = "nothing"
#: What the sources with defects begin with: a process that has loaded the library may choose by this variable, too.
HEADER = f"""#pragma once
#include <cstdlib>
extern "C" int planted_defect;
int planted_defect = std::getenv("{DEFECT}") ? std::atoi(std::getenv("{DEFECT}")) : -1;
"""
#: For the walk of one sequence, in place of what the processor is: whether other steps are projected beside.
BESIDE = "PLANTED_BESIDE"
#: What is asked in planted sources in place of what stands there.
SETTINGS = {
    "is_intel() ? 0 : ": f'std::getenv("{BESIDE}") ? std::atoi(std::getenv("{BESIDE}")) * FARTHEST : is_intel() ? 0 : ',
}
#: Answers each line, a program with its environment and the file for what it prints, with its exit code.
SERVER = """
import json, os, sys, traceback
import cpu_builds, hypothesis, pytest, recurrences
from kernels import lstm

def run(asked):
    file = os.open(asked["prints"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(asked["environment"])
    try:
        exec(compile(asked["code"], "program", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        code = run(json.loads(line))
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class KernelPrograms:
    """Runs programs in forks; a context."""

    def __init__(self, folder: Path) -> None:
        """Take a folder that all processes of one run of the tests have in common."""
        self._planted = folder / "planted"
        self._compiled: set[str] = set()

    def __enter__(self) -> Self:
        paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=os.environ | paths, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.communicate()

    def said(self, code: str, folder: Path) -> str:
        """What a program on the kernel as it is prints; it has to end with 0."""
        ended = self.run(code, folder)
        text = (folder / PRINTED).read_text(encoding="utf-8")
        assert ended == 0, text[-500:]
        return text

    def run(
        self,
        code: str,
        folder: Path,
        *,
        source: Path = build.SOURCE,
        target: str = build.NATIVE,
        cache: Path | None = None,
        **environment: str,
    ) -> int:
        """Exit code of a program, minus a signal's number where one ended it.

        Args:
            code: its text, to which `sys`, `Path` and `build` are known.
            folder: takes what it prints, in a file `PRINTED`.
            source: what is compiled. A changed one is compiled in the quickest way, since a defect is one at any level
                of optimisation.
            target: flags of the compiler.
            cache: folder of compiled kernels; None is the user's.
            environment: variables that it gets besides.
        """
        target += "" if source == build.SOURCE else " -Og"
        start = (
            "import sys\nfrom pathlib import Path\nfrom kernels.cpu import build\n"
            f"build.SOURCE = Path({str(source)!r})\nbuild.library.__defaults__ = ({target!r},)\n"
        )
        prints = folder / PRINTED
        environment |= {} if cache is None else {"SEQ2SEQ_KERNEL_CACHE": str(cache)}
        asked = {"code": start + code, "prints": str(prints), "environment": environment}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        print(prints.read_text(encoding="utf-8", errors="replace")[-800:])
        return int(answer)

    def run_planted(
        self, code: str, folder: Path, table: str, name: str, target: str = build.NATIVE, **environment: str
    ) -> int:
        """Exit code of a program on the kernel with a defect in a table of `planted_defects`, or `NOTHING`.

        The first program for a target compiles all of them, unless another worker of pytest-xdist has.
        """
        source = self._planted / build.SOURCE.name
        with one_at_a_time(self._planted):
            if not source.exists():
                planted_sources(EVERY, self._planted)
            if target not in self._compiled:
                built = self.run("build.library()", folder, source=source, target=target, cache=self._planted)
                assert built == 0, (folder / PRINTED).read_text(encoding="utf-8")[-500:]
                self._compiled.add(target)
        if name != NOTHING:
            environment |= {DEFECT: str([*EVERY].index(f"{table} {name}"))}
        return self.run(code, folder, source=source, target=target, cache=self._planted, **environment)


def planted_sources(defects: Mapping[str, tuple[str, str]], folder: Path, compiled: str = build.SOURCE.name) -> Path:
    """The kernel's sources in another folder, with defects to choose from; returns the file that is compiled.

    Args:
        defects: by name, code wherever it stands and what it becomes, in which `PLANTED` is true where the defect is
            the one that is chosen. Where it is false, this does what the code does.
        folder: where they are written.
        compiled: name of that file.
    """
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(build.SOURCE.parent.glob("*.[ch]*"))}
    whole = "\n".join(texts.values())
    for number, (name, (right, instead)) in enumerate(defects.items()):
        # No other defect has changed, or brought, a place of it.
        assert "\n".join(texts.values()).count(right) == whole.count(right) > 0, name
        assert PLANTED in instead, name
        chosen = instead.replace(PLANTED, f"(planted_defect == {number})")
        texts = {path: text.replace(right, chosen) for path, text in texts.items()}
    texts[compiled] = f'#include "planted.h"\n{texts[compiled]}'
    for right, instead in SETTINGS.items():
        assert any(right in text for text in texts.values()), right
        texts = {path: text.replace(right, instead) for path, text in texts.items()}
    for path, text in {**texts, "planted.h": HEADER}.items():
        (folder / path).write_text(text, encoding="utf-8")
    return folder / compiled


def changed_sources(right: str, instead: str, folder: Path) -> Path:
    """The kernel's sources in another folder, some text replaced wherever it stands; the one that is compiled."""
    found = False
    for path in (*build.SOURCE.parent.glob("*.cpp"), *build.SOURCE.parent.glob("*.h")):
        text = path.read_text(encoding="utf-8")
        found = found or right in text
        (folder / path.name).write_text(text.replace(right, instead), encoding="utf-8")
    assert found
    return folder / build.SOURCE.name
