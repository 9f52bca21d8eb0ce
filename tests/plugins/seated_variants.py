"""Variants that do one thing each when they have a turn, or when they are gated after the rounds; right otherwise."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
import threading
import time
from typing import Any

from torch import Tensor

from bench.gate.planted_defects import GateOrder
from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS

Result = tuple[Tensor, tuple[Tensor, Tensor]]
#: Threads that a variant of its own brings.
THREADS = 2


def _within(name: str) -> bool:
    """Return whether a function of this name has called."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == name:
            return True
        frame = frame.f_back
    return False


def _spin() -> None:
    data = bytes(1 << 20)
    while True:
        # Lets other Python threads run meanwhile.
        hashlib.sha256(data)


class Spinning(LoopLSTM):
    """Brings threads that go on spinning after each call."""

    def forward(self, *arguments: Any) -> Result:
        """Run the loop."""
        if not any(thread.name == "spinning" for thread in threading.enumerate()):
            for _ in range(THREADS):
                threading.Thread(target=_spin, name="spinning", daemon=True).start()
        return super().forward(*arguments)


def _exit() -> None:
    os._exit(7)


def _segfault() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


def _hang() -> None:
    time.sleep(60)


def _out_of_memory() -> None:
    msg = "planted"
    raise MemoryError(msg)


def _lie(forge: Any) -> None:
    """Have the process tell of its turns otherwise than they were."""
    requests = sys.modules["bench.worker.server"].REQUESTS
    honest = requests["turn"]

    def lying(request: Any, emit: Any) -> None:
        honest(request, lambda event, **fields: emit(event, **forge(fields)))

    requests["turn"] = lying


def _shortened(fields: dict[str, Any], share_of_wall: float, share_of_calls: float) -> dict[str, Any]:
    """Return the fields of a turn of other lengths than it had."""
    block = fields["block"] | {"calls_s": [share_of_calls * call_s for call_s in fields["block"]["calls_s"]]}
    return fields | {name: fields[name] * share_of_wall for name in ("wall_s", "warm_s")} | {"block": block}


def _slow_clock() -> None:
    _lie(lambda fields: _shortened(fields, 0.25, 0.25))


def _forged() -> None:
    _lie(lambda fields: _shortened(fields, 1.0, 0.5))


def _buy_waits() -> None:
    """Share a core with a process of its own, and leave out of its turns what it waited for that one."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if os.fork() == 0:
        while True:
            pass

    def forge(fields: dict[str, Any]) -> dict[str, Any]:
        share = 1 - fields["queued_s"] / fields["wall_s"]
        return _shortened(fields, share, share) | {"queued_s": 0.0}

    _lie(forge)


ENDINGS = {"exits": _exit, "segfaults": _segfault, "hangs": _hang, "out-of-memory": _out_of_memory}
#: By the name of a function of the worker: how the variants are called that do something inside it.
WHEN = {"take_turn": "in-turn", "stand": "when-gated-again"}


def _planted(caller: str, act: Any) -> type[LoopLSTM]:
    class Planted(LoopLSTM):
        """Does what was planted, inside a certain function alone."""

        def forward(self, *arguments: Any) -> Result:
            """Run the loop."""
            if _within(caller):
                act()
            return super().forward(*arguments)

    return Planted


def _once(act: Any) -> Any:
    done: list[bool] = []

    def acting() -> None:
        if not done:
            done.append(True)
            act()

    return acting


PLANTS = {f"{name}-{when}": _planted(caller, act) for caller, when in WHEN.items() for name, act in ENDINGS.items()}
PLANTS |= {
    "slow-clock": _planted("take_turn", _once(_slow_clock)),
    "forged-samples": _planted("take_turn", _once(_forged)),
    "bought-waits": _planted("take_turn", _once(_buy_waits)),
    "spinning": Spinning,
    "wrong": GateOrder,
}
for _name, _lstm in PLANTS.items():
    LSTMS[_name] = _lstm
    VARIANTS[_name] = Variant(_name, "planted", lstm=_name, own_threads=_name == "spinning")
