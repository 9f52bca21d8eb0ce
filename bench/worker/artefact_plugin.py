"""Plugin of a worker that proves an artefact: adds the variant `artefact`, which runs the file that `ARTEFACT` names.

The worker knows it as a runtime of its own, so that the gate, the audit and the rounds hold it against the equations
and against the variant it was made from, and no setting of that variant helps it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from seq2seq.execution.variants import VARIANTS
from seq2seq.models.base import Model
from seq2seq.runtimes.registry import RUNTIMES

PATH, VARIANT = "SEQ2SEQ_BENCH_ARTEFACT", "SEQ2SEQ_BENCH_ARTEFACT_OF"
NAME = "artefact"


class Applied:
    """A model as the artefact runs it."""

    def __init__(self, model: Model, _options: Mapping[str, Any]) -> None:
        spec = importlib.util.spec_from_file_location(NAME, os.environ[PATH])
        if spec is None or spec.loader is None:
            msg = f"{os.environ[PATH]} is not a Python file"
            raise ImportError(msg)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self._run = module.apply(model)

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Run one call."""
        found: tuple[Tensor, Tensor, Tensor] = self._run(*inputs)
        return found

    def reload(self) -> None:
        """Take over overwritten weights, where the artefact holds a copy of them."""
        reload = getattr(self._run, "reload", None)
        if reload is not None:
            reload()


def register() -> None:
    """Add the variant."""
    if VARIANT not in os.environ:
        return
    RUNTIMES[NAME] = Applied  # type: ignore[assignment]
    VARIANTS[NAME] = dataclasses.replace(
        VARIANTS[os.environ[VARIANT]].here(),
        name=NAME,
        lstm="nn",
        lstm_options={},
        vendor_lstm=True,
        compiler=None,
        compile_options={},
        allow_rnn=False,
        runtime=NAME,
        runtime_options={},
        own_precision=None,
        requirements=(),
        builds=None,
    )


register()
