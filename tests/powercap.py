"""A folder that looks like /sys/class/powercap, whose counters count what a test plants: joules, or a power."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Self

#: Value from which counters of real packages start again.
RANGE_UJ = 262_143_328_850


class PlantedPower:
    """RAPL zones of packages that take a known power and spend known joules, shown when they are brought up to date.

    Args:
        folder: in which the zones are made.
        power_w: of each package, watts.
        start_uj: what the counters show at first, microjoules.
        range_uj: value from which they start again.
        packages: how many there are.
    """

    def __init__(
        self, folder: Path, power_w: float, start_uj: int = 0, range_uj: int = RANGE_UJ, packages: int = 1
    ) -> None:
        self.power_w, self._start_uj, self._range_uj = power_w, start_uj, range_uj
        self._begun_s, self._spent_j = time.perf_counter(), 0.0
        self._files: list[Path] = []
        for number in range(packages):
            self._files.append(zone(folder / f"intel-rapl:{number}", f"package-{number}", start_uj, range_uj))

    def spend(self, joules: float) -> None:
        """Let each package spend joules beside its power."""
        self._spent_j += joules
        self.update()

    def update(self) -> None:
        """Let the counters show what was used until now."""
        used_uj = int(1e6 * (self._spent_j + self.power_w * (time.perf_counter() - self._begun_s)))
        for file in self._files:
            # In one step: no reader sees half a number.
            twin = file.with_suffix(".new")
            twin.write_text(f"{(self._start_uj + used_uj) % self._range_uj}\n")
            os.replace(twin, file)  # noqa: PTH105

    def __enter__(self) -> Self:
        """Bring the counters up to date a thousand times a second from now on."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(1e-3):
            self.update()


def zone(folder: Path, name: str, energy_uj: int, range_uj: int = RANGE_UJ) -> Path:
    """Write a zone; returns the file of its counter."""
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    return folder / "energy_uj"
