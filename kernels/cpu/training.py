"""Calls of a module with gradients that are like an earlier one, without what Python decides in a first call.

Checking input, state and parameters and choosing a kernel takes longer than a short sequence. `entry.cpp` says in two
microseconds that a call is as plain as the one it was settled for; its layers then follow each other at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.recurrence import LayerOptions
from . import entry
from .build import library
from .layer import DifferentiableLayer
from .packing import TRAINED
from .told import told

State = tuple[Tensor, Tensor]

#: Past the look for transforms of torch.func, which the entry has taken.
_apply = super(torch.autograd.Function, DifferentiableLayer).apply


class PreparedTraining:
    """The layers of a module for calls with gradients; nothing in here changes, so threads may share it.

    Args:
        parameters: of each layer, of each direction, as for `fused.run`; contiguous, and in the module's order.
        options: of the call that settled this, with weights kept in float32, or as `TRAINED` under autocast.
        choices: of one call, as `at_once` returns them besides its results.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[tuple[Tensor, ...]]],
        options: LayerOptions,
        choices: tuple[Any, ...],
    ) -> None:
        self._told, self._options = told(choices, options.storage, options.hidden), options
        self._layers = [[value for own in layer for value in own] for layer in parameters]
        # Held here and not by the function: see `entry.bind`.
        self._flat = [value for layer in self._layers for value in layer]
        *_, self._trains = entry.bind(
            library(),
            0,
            [(value, 0, 0) for value in self._flat],
            None,
            self._told,
            features=self._flat[0].size(1),
            hidden=options.hidden,
            directions=options.directions,
            states=len(parameters) * options.directions,
            work=0,
            least_long=0,
            cast=int(options.storage == TRAINED),
        )

    def stands(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Return whether a module's parameters are those that this was made for, in their order."""
        return len(parameters) == len(self._flat) and all(
            now is value for now, value in zip(parameters.values(), self._flat, strict=True)
        )

    def at_once(
        self, parameters: Mapping[str, Tensor | None], x: Any, hx: Any, batch_first: bool
    ) -> tuple[tuple[Tensor, State], tuple[Any, ...]] | None:
        """Run all layers where the call is like the one that settled this; else None, and nothing is done.

        Args:
            parameters: those of the module now.
            x: what it was given for input.
            hx: the state that it was given, if any.
            batch_first: order of x.
        """
        options = self._options
        if options.batch_first is not batch_first or not self._trains(parameters, x, hx, batch_first):
            return None
        choices = self._told.of(x.size(0 if batch_first else 1))
        if len(self._layers) == 1:
            h0, c0 = hx or (None, None)
            output, h_n, c_n = _apply(x, h0, c0, None, None, options, *self._layers[0])
            return (output, (h_n, c_n)), choices
        hidden, cell = [], []
        for number, flat in enumerate(self._layers):
            place = slice(number * options.directions, (number + 1) * options.directions)
            h0, c0 = (None, None) if hx is None else (hx[0][place], hx[1][place])
            x, h_n, c_n = _apply(x.to(torch.float32), h0, c0, None, None, options, *flat)
            hidden.append(h_n)
            cell.append(c_n)
        return (x, (torch.cat(hidden), torch.cat(cell))), choices
