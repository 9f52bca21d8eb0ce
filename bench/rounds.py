"""A round: one pass over a group's variants, one turn each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from bench.block import Block
from bench.interference import Interference


@dataclass(frozen=True)
class Round:
    """One pass over the variants of a group.

    Attributes:
        number: from 0, in its seating.
        blocks: what was timed, by variant, in the order in which they ran.
        wall_s: how long it took, untimed calls included, seconds.
        waited_s: how long a quiet moment was waited for before it, seconds.
        beside: what else happened meanwhile.
        order: the variants as they ran, those that were forgotten since included.
    """

    number: int
    blocks: dict[str, Block]
    wall_s: float = 0.0
    waited_s: float = 0.0
    beside: Interference = field(default_factory=Interference)
    order: tuple[str, ...] = ()

    @property
    def disturbed(self) -> bool:
        """Return whether something else used the machine meanwhile."""
        return bool(self.beside.why)

    def row(self, group: str, process: int) -> list[Any]:
        """Facts that the round knows about itself, in the order of ROUND_COLUMNS."""
        return [
            *(group, process, self.number, f"{self.wall_s:.6g}", f"{self.waited_s:.6g}"),
            *dataclasses.asdict(self.beside).values(),
        ]
