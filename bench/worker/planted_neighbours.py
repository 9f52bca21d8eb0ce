"""Variants that disturb the one after them, for `selftest carryover`: a plugin that its workers load.

Each computes what nn.LSTM computes, and then behaves like a bad runtime: its threads continue to spin, it flushes the
caches, or it fragments the heap.
"""

from __future__ import annotations

import threading
import time
import zlib
from typing import Any

import torch
from torch import nn

from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS

SPINNERS, SPIN_S = 2, 0.050
FILLED_BYTES = 64 << 20
#: Bytes of a piece of the heap, and how many are allocated before every other one is given back.
PIECE_BYTES, PIECES = 24 << 10, 2000
#: Bytes that a spinning thread works on without Python's lock, some 50 us, and its pause after that, seconds. Linux
#: gives a core to whoever has slept: threads that never pause cost others a long call now and then, which no median
#: shows.
_SPUN, PAUSE_S = bytes(256 << 10), 20e-6


class _Spinners:
    """Threads that are busy until a moment that can be moved."""

    def __init__(self) -> None:
        self._until_s = 0.0
        self._wanted = threading.Event()
        for _ in range(SPINNERS):
            threading.Thread(target=self._spin, daemon=True).start()

    def spin(self) -> None:
        """Be busy for `SPIN_S` from now on."""
        self._until_s = time.perf_counter() + SPIN_S
        self._wanted.set()

    def _spin(self) -> None:
        while True:
            self._wanted.wait()
            while time.perf_counter() < self._until_s:
                zlib.crc32(_SPUN)
                time.sleep(PAUSE_S)
            self._wanted.clear()


class SpinningLSTM(nn.LSTM):
    """Leaves two threads spinning for 50 ms, as runtimes with thread pools of their own do."""

    spinners: _Spinners | None = None

    def forward(self, *arguments: Any) -> Any:
        """Compute, then start to spin."""
        cls = type(self)
        # Threads do not survive a fork, so they start in the process that calls.
        cls.spinners = cls.spinners or _Spinners()
        found = super().forward(*arguments)
        cls.spinners.spin()
        return found


class FillingLSTM(nn.LSTM):
    """Walks 64 MB, so that the caches hold nothing of other variants."""

    walked: torch.Tensor | None = None

    def forward(self, *arguments: Any) -> Any:
        """Compute, then walk."""
        cls = type(self)
        if cls.walked is None:
            with torch.inference_mode(False):
                cls.walked = torch.zeros(FILLED_BYTES, dtype=torch.uint8)
        found = super().forward(*arguments)
        cls.walked.add_(1)
        return found


class FragmentingLSTM(nn.LSTM):
    """Leaves the heap in pieces: of many small blocks every other one is given back."""

    left: list[bytearray]

    def forward(self, *arguments: Any) -> Any:
        """Compute, then allocate and give back in a pattern."""
        found = super().forward(*arguments)
        pieces = [bytearray(PIECE_BYTES) for _ in range(PIECES)]
        type(self).left = pieces[::2]
        return found


LSTMS |= {
    "planted-spinner": SpinningLSTM,
    "planted-cache-filler": FillingLSTM,
    "planted-fragmenter": FragmentingLSTM,
}
for _name, _summary in (
    ("planted-spinner", "nn.LSTM, then two threads spin for 50 ms"),
    ("planted-cache-filler", "nn.LSTM, then 64 MB are walked"),
    ("planted-fragmenter", "nn.LSTM, then the heap is left in pieces"),
):
    VARIANTS[_name] = Variant(_name, _summary, lstm=_name, own_threads=_name == "planted-spinner")
