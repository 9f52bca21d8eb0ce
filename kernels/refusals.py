"""Configurations that must not run on this machine, since a check found them wrong: `refused.json` beside the tables.

`python -m kernels gpu-day` writes the file. `kernels.dispatch` and the tuner leave out what it lists; a kernel of which
nothing is left is refused with the reason, as any other that cannot serve.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from . import measurements
from .host.output import write_whole

NAME = "refused.json"

C = TypeVar("C")


@dataclass(frozen=True)
class Refusal:
    """A configuration that must not run, at any size and in any type.

    Attributes:
        implementation: `cell`, `sequence` or `persistent`.
        backward: in which pass; inference and a forward pass that saves count as one.
        config: the configuration as `repr` writes it; empty for all of the implementation's.
        reason: what was found, a line.
    """

    implementation: str
    backward: bool
    config: str
    reason: str


def reason(implementation: str, config: object, *, backward: bool) -> str | None:
    """Return why a configuration is not to run; None where nothing is against it."""
    for found in load(measurements.folder() / NAME):
        if (found.implementation, found.backward) == (implementation, backward) and found.config in {"", repr(config)}:
            return found.reason
    return None


def allowed(implementation: str, configs: Sequence[C], *, backward: bool) -> list[C]:
    """Return the configurations that may run, in their order."""
    return [config for config in configs if reason(implementation, config, backward=backward) is None]


@functools.lru_cache(maxsize=4)
def load(path: Path) -> tuple[Refusal, ...]:
    """Read a list as `read` does, once a process."""
    return read(path)


def read(path: Path) -> tuple[Refusal, ...]:
    """Read a list; empty where there is no file.

    Raises:
        ValueError: naming the file, when it is not a list of refusals.
    """
    if not path.exists():
        return ()
    try:
        return tuple(Refusal(**entry) for entry in json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        msg = f"{path} is not a list of refused configurations ({error!r}); delete it, or run the check that wrote it"
        raise ValueError(msg) from error


def write(path: Path, refusals: Iterable[Refusal]) -> None:
    """Write a list so that a process that is killed leaves the old file or the new one."""
    data = [dataclasses.asdict(found) for found in refusals]
    write_whole(path, json.dumps(data, indent=1).encode() + b"\n")
