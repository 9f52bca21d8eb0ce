"""The mark: a file that holds the variant whose turn it is, so that a crash in the rounds is laid at the right door."""

from __future__ import annotations

import json
import os


def write(file: int, name: str) -> None:
    """Set the mark in one write.

    Args:
        file: its descriptor.
        name: of the variant, of any length; empty when it is nobody's turn.
    """
    # What is left of a longer name follows the line's end.
    os.pwrite(file, json.dumps(name).encode() + b"\n", 0)


def read(content: bytes) -> str:
    """The variant in a mark's content; empty where it was nobody's turn yet, or no longer."""
    line, ended, _ = content.partition(b"\n")
    return str(json.loads(line)) if ended else ""
