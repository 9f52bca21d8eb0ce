"""Errors for data that cannot be used, and optional packages, whose absence is one."""

from __future__ import annotations

import importlib
from typing import Any


class DataError(ValueError):
    """A file of data cannot be used; the message is one line: file, row (1-based), cause, what was expected."""


class DataUnavailableError(RuntimeError):
    """The data of a workload is not available here; the message says what to install."""


def optional(module: str, needs: str) -> Any:
    """A module of an optional package, whose name is that of the module with hyphens.

    Args:
        module: name to import.
        needs: subject and verb of the message, as "BLEU needs".

    Raises:
        DataUnavailableError: when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        package = package if package == "vega_datasets" else package.replace("_", "-")
        msg = f"{needs} the package {package}, which is not installed: pip install {package}"
        raise DataUnavailableError(msg) from error
