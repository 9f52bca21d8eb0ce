"""Files of a day: a work folder for whatever stages write, and an out folder of few files that is whole at any moment.

The out folder has the state, the summary, one archive of the work folder, the tables and the list of what was found
wrong: `MOST_FILES` at most, since few can be copied back from a borrowed machine. Each is
replaced as a whole, so a kill or the end of the loan leaves the previous version.
"""

from __future__ import annotations

import io
import json
import secrets
import shutil
import tarfile
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ...host.output import replacing, why_unwritable, write_whole
from ...refusals import NAME as REFUSED

STATE, SUMMARY, ARCHIVE = "state.json", "summary.md", "results.tar.gz"
#: Files that the out folder has at most, the one that is being written included.
MOST_FILES = 8
#: Version of the state's schema.
SCHEMA = 1
#: Larger files stay out of the archive and are named in the summary.
LARGEST_BYTES = 32 << 20
#: Fast enough to pack while a stage measures: a core for some tens of milliseconds.
COMPRESSION = 3
RUNNING = "running"


class DayError(ValueError):
    """An out folder that a day cannot be written to; the message says what to do."""


@dataclass
class DayFolder:
    """Out folder and work folder of a day.

    Attributes:
        path: the out folder.
        work: the work folder.
        state: content of state.json: `stages` by name, each with its status, reason and seconds.
    """

    path: Path
    work: Path
    state: dict[str, Any] = field(default_factory=dict)
    packed_s: float = -1e9

    @classmethod
    def new(cls, path: Path, *, rehearsal: bool) -> Self:
        """Begin a day in a new or empty folder.

        Raises:
            DayError: when it holds anything or cannot be written.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            kind = "a day that was begun: give --resume to continue it" if (path / STATE).exists() else "something else"
            msg = f"{path} holds {kind}, or name a new folder with --out"
            raise DayError(msg)
        if why := why_unwritable(path):
            msg = f"{path} cannot be written ({why}); name another folder with --out"
            raise DayError(msg)
        path.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="gpu-day-"))
        state = {"schema": SCHEMA, "token": secrets.token_hex(8), "rehearsal": rehearsal, "stages": {}}
        found = cls(path, work, state)
        found.save()
        return found

    @classmethod
    def resumed(cls, path: Path, *, rehearsal: bool) -> Self:
        """Continue a day: in its own work folder, or, on another machine, in one that its archive is unpacked to.

        Raises:
            DayError: when the folder holds no day, or a rehearsal where a day was asked for, or the reverse.
        """
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            if state["schema"] != SCHEMA:
                msg = f"schema {state['schema']}, expected {SCHEMA}"
                raise ValueError(msg)  # noqa: TRY301 - one message for all that can be wrong with it
            work = Path(state["work"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            msg = f"{path / STATE} is not the state of a day ({error}); begin one without --resume"
            raise DayError(msg) from error
        if state["rehearsal"] != rehearsal:
            kind, instead = ("rehearsal", "give") if state["rehearsal"] else ("day on a GPU", "leave out")
            msg = f"{path} is a {kind}; {instead} --rehearse to continue it"
            raise DayError(msg)
        found = cls(path, work, state)
        for unfinished in path.glob(".*.new"):
            unfinished.unlink()
        # The file named after the token tells this machine's folder from one of the same name on another.
        if not (work / state["token"]).exists():
            found.work = Path(tempfile.mkdtemp(prefix="gpu-day-"))
            if (path / ARCHIVE).exists():
                with tarfile.open(path / ARCHIVE) as archive:
                    archive.extractall(found.work, filter="data")
        found.save()
        return found

    @property
    def tables(self) -> Path:
        """Folder of the measured tables and of what was found wrong."""
        return self.work / "tables"

    def stage(self, name: str) -> Path:
        """Folder of a stage."""
        found = self.work / name
        found.mkdir(parents=True, exist_ok=True)
        return found

    def save(self) -> None:
        """Write the state."""
        self.tables.mkdir(parents=True, exist_ok=True)
        (self.work / self.state["token"]).touch()
        self.state["work"] = str(self.work)
        write_whole(self.path / STATE, json.dumps(self.state, indent=1).encode() + b"\n")

    def set(self, name: str, **values: Any) -> None:
        """Change what the state says of a stage, and write it."""
        self.state["stages"].setdefault(name, {}).update(values)
        self.save()

    def pack(self) -> None:
        """Rewrite the archive, and next to it copies of the tables and the list of what was found wrong."""
        left: list[str] = []
        with (
            replacing(self.path / ARCHIVE) as file,
            tarfile.open(fileobj=file, mode="w:gz", compresslevel=COMPRESSION) as archive,
        ):
            for path in sorted(self.work.rglob("*")):
                name = str(path.relative_to(self.work))
                if not path.is_symlink() and path.is_file() and not _add(archive, path, name):
                    left.append(name)
        self.state["not_packed"] = left
        tables = [path for path in sorted(self.tables.glob("*.json"), key=_changed) if path.name != REFUSED]
        # State, summary, archive, refused.json and a file that is being written leave room for these.
        copied = [*tables[5 - MOST_FILES :], self.tables / REFUSED]
        kept = {STATE, *(source.name for source in copied)}
        for old in self.path.glob("*.json"):
            if old.name not in kept:
                old.unlink()
        for source in copied:
            if source.exists():
                write_whole(self.path / source.name, source.read_bytes())
        self.packed_s = time.monotonic()

    def clear(self) -> None:
        """Remove the work folder, whose files the archive has."""
        if not self.state.get("not_packed"):
            shutil.rmtree(self.work, ignore_errors=True)


def _add(archive: tarfile.TarFile, path: Path, name: str) -> bool:
    """Add a file as it is now, and return whether the archive lacks nothing: False for one too large or unreadable.

    A stage may be writing or removing it, and what the archive says of its size must hold.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            return False
        data = path.read_bytes()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), int(time.time())
    archive.addfile(info, io.BytesIO(data))
    return True


def _changed(path: Path) -> float:
    return path.stat().st_mtime
