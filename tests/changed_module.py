"""Loads a changed copy of a module of the kernels, for tests that plant a defect in its source."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load(path: Path, package: str) -> ModuleType:
    """Load a file as a module of a package, so that its relative imports work.

    From a file, since Triton reads a kernel's source there; and known by its name, by which dataclasses look it up.
    """
    spec = importlib.util.spec_from_file_location(f"{package}.{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
