"""Lines of JSON on disk: each is there for good once it was appended, and a reader skips one that was cut off."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

#: Files of a stage: answers in the columns of check.csv, facts of the machine, measured shapes as a table.
ROWS, FACTS, TIMINGS = "rows.jsonl", "facts.jsonl", "timings.json"


def append(path: Path, value: dict[str, Any]) -> None:
    """Append a line, and return once the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(json.dumps(value, default=str).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Read the whole lines of a file; none where there is no file."""
    if not path.exists():
        return []
    # What follows the last line end was cut off by a kill.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line]
