"""Truth and yardsticks of a problem, kept in files for the other processes of a group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.host.output import replacing

#: Quantities of a problem that are larger are not kept: a few of them would fill a small disk.
MOST_BYTES = 256 * 2**20


@dataclass(frozen=True)
class KeptQuantities:
    """Quantities by problem and precision, computed by the first process that asks.

    Attributes:
        folder: of one workload, mode and device; it need not exist.
    """

    folder: Path

    def get(self, problem: str, precision: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The quantities, read where another process has computed them.

        Raises:
            OSError: when the folder cannot be written.
        """
        path = self.folder / f"{problem}-{precision}.pt"
        if path.exists():
            found: dict[str, Tensor] = torch.load(path, weights_only=True)
            return found
        found = compute()
        if sum(value.numel() * value.element_size() for value in found.values()) <= MOST_BYTES:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path, synced=False) as file:
                torch.save(found, file)
        return found
