"""Programs on the CPU kernel as built from changed sources, each in a process of its own that crashes alone.

Importing torch takes longer than such a program, so they are forks of one process that has imported it and has run
nothing: started with threads of its own it could not be forked.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from kernels.cpu import build

ROOT = Path(__file__).parents[1]

PRINTED = "printed"
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

    def __enter__(self) -> Self:
        self._headers = tempfile.TemporaryDirectory()
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
        self._headers.cleanup()

    def _quick(self, target: str) -> str:
        """Flags of the quickest way to compile for a target: the standard headers are half of what is read."""
        # Without optimisation tiles in plain C++ would run for longer than they compile.
        flags = f"{target} {'-Og' if 'EMULATED_TILES' in target else '-O0'}"
        folder = Path(self._headers.name) / flags.replace("/", "_").replace(" ", "_")
        header = folder / "standard.h"
        if not folder.exists():
            folder.mkdir(parents=True)
            sources = "".join(path.read_text(encoding="utf-8") for path in sorted(build.SOURCE.parent.glob("*.[ch]*")))
            header.write_text("".join(sorted(set(re.findall(r"^ *(#include <.+>\n)", sources, re.MULTILINE)))))
            command = [*build.compiler(), *build.FLAGS, *flags.split(), "-x", "c++-header", str(header)]
            # A compiler that cannot leaves none, and then reads the headers each time.
            subprocess.run([*command, "-o", f"{header}.gch"], check=False, capture_output=True)
        return f"{flags} -include {header}" if Path(f"{header}.gch").exists() else flags

    def said(self, code: str, folder: Path) -> str:
        """What a program on the kernel as it is prints; it has to end with 0."""
        ended = self.run(code, folder, own_cache=False)
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
        own_cache: bool = True,
    ) -> int:
        """Exit code of a program, minus a signal's number where one ended it.

        Args:
            code: its text, to which `sys`, `Path` and `build` are known.
            folder: takes what it prints, in a file `PRINTED`.
            source: what is compiled. A changed one is compiled in the quickest way, since a defect is one at any level
                of optimisation.
            target: flags of the compiler.
            own_cache: whether compiled kernels are kept there too, and not where the user's are.
        """
        target = self._quick(target) if source != build.SOURCE else target
        start = (
            "import sys\nfrom pathlib import Path\nfrom kernels.cpu import build\n"
            f"build.SOURCE = Path({str(source)!r})\nbuild.library.__defaults__ = ({target!r},)\n"
        )
        prints = folder / PRINTED
        environment = {"SEQ2SEQ_KERNEL_CACHE": str(folder)} if own_cache else {}
        asked = {"code": start + code, "prints": str(prints), "environment": environment}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        print(prints.read_text(encoding="utf-8", errors="replace")[-800:])
        return int(answer)


def changed_sources(planted: str, instead: str, folder: Path) -> Path:
    """The kernel's sources in another folder, some text replaced wherever it stands; the one that is compiled."""
    found = False
    for path in (*build.SOURCE.parent.glob("*.cpp"), *build.SOURCE.parent.glob("*.h")):
        text = path.read_text(encoding="utf-8")
        found = found or planted in text
        (folder / path.name).write_text(text.replace(planted, instead) if planted else text, encoding="utf-8")
    assert found
    return folder / build.SOURCE.name
