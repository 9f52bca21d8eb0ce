"""Reasons why a runtime cannot run a case, in words."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from seq2seq.runtimes import int8
from seq2seq.workloads.workload import Workload


def inference_only(device: str, mode: str, workload: Workload) -> str | None:
    """Converted models and weights in fewer bits have no gradients."""
    del device, workload
    return None if mode != "training" else "inference only: converted or rounded weights have no gradients"


def needs_packages(*names: str) -> Callable[[str, str, Workload], str | None]:
    """Packages that must import, by name."""

    def check(device: str, mode: str, workload: Workload) -> str | None:
        del device, mode, workload
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                missing = isinstance(error, ModuleNotFoundError) and error.name == name
                why = "which is not installed" if missing else f"which does not load here ({error})"
                return f"needs {name}, {why}: pip install {' '.join(names)}"
        return None

    return check


def needs_int8(device: str, mode: str, workload: Workload) -> str | None:
    """A torch that quantises, and an engine for it."""
    del device, mode, workload
    return int8.why_not()
