"""The sides of a comparison: an interpreter, a virtual environment, a checkout, or a revision of this one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bench.errors import UsageError
from bench.machine import environment
from bench.run.worker_process import ROOT, Home

#: Where a virtual environment has its interpreter.
_INTERPRETERS = ("bin/python", "Scripts/python.exe")
#: What is in the root of a checkout.
_CHECKOUT = ("bench/__init__.py", "kernels/__init__.py", "seq2seq/__init__.py")
LEAST_PYTHON = (3, 11)
_LIMIT_S = 60.0


@dataclass(frozen=True)
class Side:
    """One side.

    Attributes:
        name: `base` or `new`.
        word: what the user called it.
        kind: `interpreter`, `checkout` or `revision`.
        home: interpreter and checkout that its seats run.
        commit: of the checkout, in full; or why there is none.
    """

    name: str
    word: str
    kind: str
    home: Home
    commit: str

    @property
    def label(self) -> str:
        """`BASE` or `NEW`."""
        return self.name.upper()

    @property
    def shown(self) -> Path:
        """A path whose last part differs from the other side's: of an interpreter the environment's folder."""
        path = Path(self.home.python).parent if self.kind == "interpreter" else Path(self.word)
        return path.parent if path.name in {"bin", "Scripts"} else path

    def facts(self, software: dict[str, object]) -> dict[str, object]:
        """Return the side's section in environment.json.

        Args:
            software: versions of packages in its interpreter.
        """
        found = {"given": self.word, "kind": self.kind, "python_path": self.home.python, "commit": self.commit}
        return found | software


def find(name: str, word: str, scratch: Path) -> Side:
    """Find out what the user named.

    Args:
        name: of the side.
        word: path of an interpreter, a virtual environment or a checkout, or a git revision of this checkout.
        scratch: folder for the files of a revision.

    Raises:
        UsageError: it is not one of these, or an interpreter that does not run.
    """
    path = Path(word).expanduser()
    if path.is_file():
        return _interpreter(name, word, path)
    if path.is_dir():
        for place in _INTERPRETERS:
            if (path / place).is_file():
                return _interpreter(name, word, path / place)
        if all((path / file).is_file() for file in _CHECKOUT):
            root = path.resolve()
            return Side(name, word, "checkout", Home(sys.executable, root), environment.git(root)["commit"])
    return _revision(name, word, scratch)


def uncommitted(sides: tuple[Side, ...]) -> str:
    """A line about changes that a revision does not have; nothing where there are none."""
    named = [side.label for side in sides if side.kind == "revision"]
    found = environment.git()
    if not named or not found.get("dirty"):
        return ""
    return (
        f"{' and '.join(named)}: a revision is measured as committed, without the uncommitted changes of this checkout "
        f"({found['changed_files']} files); name the folder {ROOT} to measure it as it is"
    )


def _interpreter(name: str, word: str, path: Path) -> Side:
    # A virtual environment is known by the path of its link, so the link is not followed.
    python = str(path.absolute())
    if not os.access(path, os.X_OK):
        _refuse(name, f"{path} is not executable; expected a Python interpreter or the folder of a virtual environment")
    try:
        done = subprocess.run(  # noqa: S603 - what the user named
            [python, "-c", "import sys; print('version', *sys.version_info[:2])"],
            capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        said = done.stdout.split()
        version = tuple(map(int, said[1:])) if said[:1] == ["version"] and len(said) == 3 else None  # noqa: PLR2004
    except (OSError, subprocess.TimeoutExpired, ValueError):
        version = None
    if version is None:
        _refuse(name, f"{path} does not run as a Python interpreter; name bin/python of an environment with torch")
    elif version < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        _refuse(name, f"{path} is Python {'.'.join(map(str, version))}; expected {least} or newer")
    return Side(name, word, "interpreter", Home(python, ROOT), environment.git()["commit"])


def _revision(name: str, word: str, scratch: Path) -> Side:
    """The files of a revision, in a folder of their own: nothing is left in the repository, however this ends."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{word}^{{commit}}")
    if found.returncode:
        where = "a revision of this git checkout"
        if _git("rev-parse", "--git-dir").returncode:
            where = f"a git revision (and {ROOT} is not a git checkout)"
        _refuse(name, f"{word!r} is not an interpreter, virtual environment or checkout that exists, nor {where}")
    commit = found.stdout.decode().strip()
    archive = _git("archive", "--format=tar", commit)
    if archive.returncode:
        _refuse(name, f"git cannot give out {word!r}: {archive.stderr.decode(errors='replace').strip()}")
    root = scratch / name
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(root, filter="data")
    if not all((root / file).is_file() for file in _CHECKOUT):
        _refuse(name, f"revision {word!r} is older than the packages bench, kernels and seq2seq; name a newer one")
    return Side(name, word, "revision", Home(sys.executable, root), commit)


def _git(*words: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(  # noqa: S603 - git, on this checkout
            ["git", "-C", str(ROOT), *words],  # noqa: S607
            capture_output=True, timeout=_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, 1, b"", str(error).encode())


def _refuse(name: str, why: str) -> None:
    msg = f"{name.upper()}: {why}"
    raise UsageError(msg)
