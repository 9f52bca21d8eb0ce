"""A task that trains in a moment, and variants that lose their way while they train on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_tasks import Sines

from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.tasks.registry import TASKS

#: Passes of one LSTM after which the late failures begin: more than gates and warm-up make.
LATE = 30


def _load(path: object = None, samples: int = 1) -> Any:
    del path, samples
    return Sines(train=64)


class Wrong(LoopLSTM):
    """Half of what it should be."""

    def forward(self, *inputs: Any) -> Any:
        """As the loop, halved."""
        outputs, state = super().forward(*inputs)
        return outputs / 2, state


class Late(LoopLSTM):
    """Right for a while."""

    passes = 0

    def forward(self, *inputs: Any) -> Any:
        """As the loop, until it is not."""
        type(self).passes += 1
        outputs, state = super().forward(*inputs)
        if type(self).passes > LATE and outputs.requires_grad:
            return outputs * torch.nan, state
        return outputs, state


TASKS["tiny"] = _load
LSTMS |= {"wrong": Wrong, "late": Late}
for name in ("wrong", "late"):
    VARIANTS[name] = Variant(name, "loses its way", lstm=name)
