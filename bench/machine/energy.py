"""Energy counters: RAPL of the processor's packages (Linux powercap), and NVML of an NVIDIA GPU.

A counter is of a whole package or board, whatever runs there: on a shared machine others' work is in it, and always the
power that the machine takes when it does nothing. That idle power is measured apart, and taken off nothing.
Sources: Linux, Documentation/power/powercap; NVML, nvmlDeviceGetTotalEnergyConsumption.
"""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.machine import gpu
from bench.machine.facts import known

POWERCAP = Path("/sys/class/powercap")
#: Idle power is measured over so long; then the counter is watched until it has moved `MOVES` times, at most `WATCH_S`.
IDLE_S, WATCH_S, MOVES = 1.0, 2.0, 20
#: A timed block must last at least this many updates of the counter: each of its ends is uncertain by one.
LEAST_UPDATES = 10
_ZONE = re.compile(r"intel-rapl:\d+")


class EnergyUnavailableError(Exception):
    """No energy can be read here; the message says why, and what to do if anything can be done."""


class EnergyCounter(Protocol):
    """Something that counts joules.

    Attributes:
        name: of it, for people.
    """

    name: str

    def read(self) -> tuple[int, ...]:
        """Read its parts, each in units of its own."""

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy between two readings."""


@dataclass(frozen=True)
class _Zone:
    """A RAPL zone: its counter in microjoules, and the value from which it starts again at 0."""

    name: str
    path: str
    range_uj: int

    def read(self) -> int:
        with open(self.path, "rb") as file:  # noqa: PTH123 - between timed calls, where Path objects cost time
            return int(file.read())


class Rapl:
    """The RAPL counters of all packages of the processor.

    Args:
        powercap: folder with the zones.

    Raises:
        EnergyUnavailableError: there are none, or they cannot be read.
    """

    def __init__(self, powercap: Path) -> None:
        folders = sorted(found for found in powercap.glob("intel-rapl:*") if _ZONE.fullmatch(found.name))
        try:
            zones = [_zone(folder) for folder in folders]
            # The zone psys is of the whole board, packages included.
            self._zones = [zone for zone in zones if zone.name.startswith("package")]
            for zone in self._zones:
                zone.read()
        except PermissionError as error:
            msg = f"{error.filename} is readable only by root; let others read: sudo chmod a+r {powercap}/*/energy_uj"
            raise EnergyUnavailableError(msg) from error
        except (OSError, ValueError) as error:
            msg = f"a RAPL counter under {powercap} cannot be read: {error}"
            raise EnergyUnavailableError(msg) from error
        if not self._zones:
            where = (
                "a virtual machine, most of which have none" if _virtual() else "this processor, kernel or container"
            )
            msg = f"no RAPL counter of a package under {powercap} ({where})"
            raise EnergyUnavailableError(msg)
        self.name = f"RAPL {', '.join(zone.name for zone in self._zones)}"

    def read(self) -> tuple[int, ...]:
        """Microjoules of each package."""
        return tuple(zone.read() for zone in self._zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy of all packages between two readings, between which a counter started again at most once."""
        found = 0
        for zone, first, last in zip(self._zones, before, after, strict=True):
            found += last - first if last >= first else last - first + zone.range_uj
        return 1e-6 * found


def _zone(folder: Path) -> _Zone:
    text = {name: (folder / name).read_text(encoding="ascii").strip() for name in ("name", "max_energy_range_uj")}
    return _Zone(text["name"], str(folder / "energy_uj"), int(text["max_energy_range_uj"]))


def _virtual() -> bool:
    return bool(known(lambda: re.search(r"^flags.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE)))


class NvmlEnergy:
    """The energy that a GPU has used since its driver was loaded.

    Args:
        nvml: the library and the device's handle.

    Raises:
        EnergyUnavailableError: this GPU, driver or slice of a GPU does not count it.
    """

    name = "NVML"

    def __init__(self, nvml: tuple[Any, Any]) -> None:
        self._library, self._handle = nvml
        try:
            self.read()
        # The library has an error class for each reason.
        except Exception as error:
            msg = f"NVML does not count this GPU's energy: {error}"
            raise EnergyUnavailableError(msg) from error

    def read(self) -> tuple[int, ...]:
        """Millijoules."""
        return (int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)),)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Energy between two readings; in 64 bits the counter does not start again."""
        return 1e-3 * (after[0] - before[0])


def counter(device: str, powercap: Path | None = None) -> EnergyCounter:
    """The energy counter of a device.

    Args:
        device: `cpu` or `cuda`.
        powercap: folder with RAPL zones; `POWERCAP` unless given.

    Raises:
        EnergyUnavailableError: there is none that can be read.
    """
    if device != "cuda":
        return Rapl(powercap or POWERCAP)
    nvml = gpu.nvml()
    if nvml is None:
        msg = "NVML is not available; it needs an NVIDIA GPU and pip install nvidia-ml-py"
        raise EnergyUnavailableError(msg)
    return NvmlEnergy(nvml)


@functools.cache
def counter_if_any(device: str) -> EnergyCounter | None:
    """The energy counter of a device, or None."""
    try:
        return counter(device)
    except EnergyUnavailableError:
        return None


@dataclass(frozen=True)
class Idle:
    """The energy counter of a device while nothing of ours runs.

    Attributes:
        source: name of the counter; empty without one.
        power_w: power that the device takes in that time, watts.
        update_s: time between two moves of the counter, seconds.
        reason: why nothing can be measured; empty where it can.
    """

    source: str = ""
    power_w: float | None = None
    update_s: float | None = None
    reason: str = ""

    @property
    def available(self) -> bool:
        """Return whether energy can be measured."""
        return not self.reason

    def too_short(self, block_s: float) -> str:
        """Return why blocks of a length are too short for the counter; an empty text where they are not."""
        if self.update_s is None or block_s >= LEAST_UPDATES * self.update_s:
            return ""
        return (
            f"{self.source} moves every {1e3 * self.update_s:.3g} ms and a timed block took {1e3 * block_s:.3g} ms; it "
            f"takes --block {LEAST_UPDATES * self.update_s:.3g}"
        )


def idle(
    device: str,
    powercap: Path | None = None,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> Idle:
    """Measure the idle power of a device, and how often its counter moves.

    Args:
        device: `cpu` or `cuda`.
        powercap: as for `counter`.
        sleep: waits so many seconds.
        clock: seconds now.
    """
    try:
        found = counter(device, powercap)
    except EnergyUnavailableError as error:
        return Idle(reason=str(error))
    before, start_s = found.read(), clock()
    sleep(IDLE_S)
    after, end_s = found.read(), clock()
    # Watching keeps a core busy, so it comes after.
    moved_s: list[float] = []
    last, until_s = found.read(), clock() + WATCH_S
    while len(moved_s) < MOVES and clock() < until_s:
        now = found.read()
        if now != last:
            moved_s.append(clock())
            last = now
    if len(moved_s) < 3:  # noqa: PLR2004 - two intervals, at least
        return Idle(found.name, reason=f"{found.name} moved {len(moved_s)} times in {WATCH_S:g} s")
    steps_s = sorted(later - earlier for earlier, later in itertools.pairwise(moved_s))
    return Idle(found.name, found.joules(before, after) / (end_s - start_s), steps_s[len(steps_s) // 2])
