"""Choices as a module tells them for any batch: what multiplies depends on its rows, and a prepared call serves all."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from .build import library
from .packing import KEPT

#: More rows than a batch has.
MANY = 1 << 40


class Told(NamedTuple):
    """Choices of a module's layers, by the rows of a call.

    Attributes:
        sums_from: rows from which on additions take the place of multiplications.
        choices: a choice a layer for fewer rows, and for as many or more.
    """

    sums_from: int
    choices: tuple[tuple[Any, ...], tuple[Any, ...]]

    def of(self, rows: int) -> tuple[Any, ...]:
        """Choices of a call with a batch of so many rows."""
        return self.choices[rows >= self.sums_from]


def told(choices: tuple[Any, ...], storage: str, hidden: int) -> Told:
    """Tell the choices of one call for calls with any number of rows.

    Args:
        choices: of `kernels.dispatch`, one a layer.
        storage: how the weights are kept, a key of `kernels.cpu.packing.KEPT`.
        hidden: units of the layers.
    """
    native, kept = library(), KEPT[storage][0]
    few, many = (native.instructions(kept, hidden, rows).decode() for rows in (0, MANY))
    both = (choices, choices) if few == many else (_multiplied_by(choices, few), _multiplied_by(choices, many))
    return Told(native.sums_from(hidden), both)


def _multiplied_by(choices: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if all(choice.instructions == name for choice in choices):
        return choices
    return tuple(dataclasses.replace(choice, instructions=name) for choice in choices)
