"""Variants that fail in one way each: what a run must survive and tell apart."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import time
from typing import Any

import torch
from torch import Tensor

from bench.gate.planted_defects import GateOrder
from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS

#: Passes of one LSTM after which the late failures begin: more than a cold run makes, fewer than the rounds make.
LATE = 60

Result = tuple[Tensor, tuple[Tensor, Tensor]]


class SegmentationFault(LoopLSTM):
    """Reads address 0."""

    def forward(self, *_: Any) -> Result:
        """Never returns."""
        ctypes.string_at(0)
        raise AssertionError


class ImpossibleAllocation(LoopLSTM):
    """Asks for a petabyte."""

    def forward(self, x: Tensor, *_: Any) -> Result:
        """Never returns."""
        return torch.empty(1 << 50, dtype=x.dtype), (x, x)


class KilledFromOutside(LoopLSTM):
    """Ends as if somebody had killed the process."""

    def forward(self, *_: Any) -> Result:
        """Never returns."""
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


class Hanging(LoopLSTM):
    """Never ends."""

    def forward(self, *_: Any) -> Result:
        """Never returns."""
        while True:
            time.sleep(60)


class Raising(LoopLSTM):
    """Raises an error over several lines."""

    def forward(self, *_: Any) -> Result:
        """Never returns."""
        msg = "planted:\nthe kernel does not take this"
        raise NotImplementedError(msg)


class WrongWhenWarm(LoopLSTM):
    """Right at first, wrong once it was called often, as a kernel whose workspace is never cleared."""

    calls = 0

    def forward(self, *arguments: Any) -> Result:
        """Run the loop, add an error when called often."""
        self.calls += 1
        output, state = super().forward(*arguments)
        return (output + 0.01, state) if self.calls > LATE else (output, state)


class SegmentationFaultWhenTimed(LoopLSTM):
    """Fails inside the timed blocks alone, which hold the garbage collector off: in the rounds, not before."""

    calls = 0

    def forward(self, *arguments: Any) -> Result:
        """Run the loop until it was timed a few times."""
        self.calls += not gc.isenabled()
        if self.calls > 2 * LATE:
            ctypes.string_at(0)
        return super().forward(*arguments)


class Talkative(LoopLSTM):
    """Right, but prints into the process's standard output, past Python too."""

    def forward(self, *arguments: Any) -> Result:
        """Run the loop."""
        print("planted: a line on standard output")
        os.write(1, b'{"event": "planted"}\n')
        return super().forward(*arguments)


def _never(device: str, mode: str, workload: object) -> str:
    del device, mode, workload
    return "planted: it needs a machine that nobody has"


PLANTS: dict[str, Any] = {
    "segfault": SegmentationFault,
    "allocates-too-much": ImpossibleAllocation,
    "killed": KilledFromOutside,
    "hangs": Hanging,
    "raises": Raising,
    "wrong": GateOrder,
    "wrong-when-warm": WrongWhenWarm,
    "segfault-when-timed": SegmentationFaultWhenTimed,
    "talkative": Talkative,
}
for _name, _lstm in PLANTS.items():
    LSTMS[_name] = _lstm
    VARIANTS[_name] = Variant(_name, f"planted: {_lstm.__doc__}", lstm=_name)
VARIANTS["nowhere"] = Variant("nowhere", "planted: never available", requirements=(_never,))
