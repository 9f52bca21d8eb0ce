"""Variants whose rank 1 does one thing when it trains; right on every other rank.

The gate of rank 0 takes longer than a collective may: `GATE_S` seconds for each way to divide the work.
"""

from __future__ import annotations

import os
import time
from typing import Any

from torch import Tensor

from bench.gate.parity import Gate
from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS

Result = tuple[Tensor, tuple[Tensor, Tensor]]
#: Calls of one of a model's LSTMs after which rank 1 hangs: more than its gate makes.
LIVES = 8
#: Seconds that rank 0's gate takes at least, from an environment variable.
GATE_S = float(os.environ.get("SEQ2SEQ_TEST_GATE_S", "0"))


class SlowRank(LoopLSTM):
    """Sleeps in each call on rank 1."""

    def forward(self, *arguments: Any) -> Result:
        """Sleep, then run the loop."""
        if os.environ.get("RANK") == "1":
            time.sleep(0.02)
        return super().forward(*arguments)


class HangingRank(LoopLSTM):
    """Lets the others wait for rank 1."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls = 0

    def forward(self, *arguments: Any) -> Result:
        """Run the loop, for some time."""
        self.calls += 1
        if os.environ.get("RANK") == "1" and self.calls > LIVES:
            time.sleep(600)
        return super().forward(*arguments)


for _name, _lstm in {"slow-rank": SlowRank, "hanging-rank": HangingRank}.items():
    LSTMS[_name] = _lstm
    VARIANTS[_name] = Variant(_name, "planted", lstm=_name)


_judge = Gate.judge


def _judge_late(gate: Gate, *arguments: Any) -> Any:
    """Judge, some time later."""
    time.sleep(GATE_S)
    return _judge(gate, *arguments)


Gate.judge = _judge_late
