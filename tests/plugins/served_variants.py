"""Variants to serve that do one thing each; right otherwise."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from torch import Tensor

from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS

Result = tuple[Tensor, tuple[Tensor, Tensor]]
#: Each LSTM of a `sleepy` call under load takes so long, seconds.
NAP_S = 0.05
#: Calls under load after which `dying` ends its process.
LIVES = 5
#: Batch of the workload's own, which the ordinary gate asks; `leaking` is right for it.
OWN_BATCH = 4


def under_load() -> bool:
    """Return whether the queue has called, and no gate."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "serve":
            return True
        frame = frame.f_back
    return False


class Sleepy(LoopLSTM):
    """Sleeps in every call under load."""

    def forward(self, *arguments: Any) -> Result:
        """Sleep, then run the loop."""
        if under_load():
            time.sleep(NAP_S)
        return super().forward(*arguments)


class Dying(LoopLSTM):
    """Ends its process after a few calls under load."""

    calls = 0

    def forward(self, *arguments: Any) -> Result:
        """Run the loop, for some time."""
        Dying.calls += under_load()
        if Dying.calls > LIVES:
            os._exit(9)
        return super().forward(*arguments)


class Leaking(LoopLSTM):
    """Adds a little of the first sequence of a batch to all, unless the batch is the workload's own."""

    def forward(self, *arguments: Any) -> Result:
        """Run the loop on inputs that know of each other."""
        source, *rest = arguments
        if source.size(0) not in {1, OWN_BATCH}:
            source = source + 0.01 * source[:1]
        return super().forward(source, *rest)


for _name, _lstm in {"sleepy": Sleepy, "dying": Dying, "leaking": Leaking}.items():
    LSTMS[_name] = _lstm
    VARIANTS[_name] = Variant(_name, "planted", lstm=_name)
