"""All layers of a module in one call of the CPU kernel, without gradients: for calls where Python takes the time.

What depends on the parameters alone is prepared once and kept: packed weights, and what the kernel is told of them. A
later call checks that the parameters are the same and unchanged, and hands over addresses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..common.fast_path import watched
from . import fused, packing
from .build import CHANGED, checked, library

Results = tuple[Tensor, Tensor, Tensor]

_pointer = ctypes.c_void_p
_number = ctypes.c_int64


class Source(ctypes.Structure):
    """`Source` of lstm.cpp."""

    _fields_ = (("values", _pointer), ("count", _number), ("sampled", ctypes.c_uint64), ("all", ctypes.c_uint64))


class Direction(ctypes.Structure):
    """`Direction` of lstm.cpp."""

    _fields_ = tuple((name, _pointer) for name in ("packed_ih", "packed", "bias_ih", "bias_hh", "scale_ih", "scale"))


class Layers(ctypes.Structure):
    """`Layers` of lstm.cpp."""

    _fields_ = (
        *((name, _number) for name in ("layers", "directions", "features", "hidden", "kept")),
        ("sources", _pointer), ("weights", _pointer),
    )  # fmt: skip


#: How the kernel looks whether weights are still what was packed: `lstm_layers`.
NOT_AT_ALL, SAMPLES, WHOLE = range(3)


class Prepared:
    """The layers of a module as the kernel reads them; nothing in here changes, so threads may share it.

    Args:
        parameters: of each layer, of each direction: weight_ih (4H, features), weight_hh (4H, H), and both biases
            (4H,), if any.
        features: of a step of the input.
        storage: key of `kernels.cpu.packing.KEPT`.

    Attributes:
        lasting: whether it may be kept for later calls. Not where a parameter had to be copied, or has no version.

    Raises:
        RuntimeError: when parameters do not fit each other, which torch's modules let happen.
    """

    def __init__(self, parameters: Sequence[Sequence[tuple[Tensor, ...]]], features: int, *, storage: str) -> None:
        flat = [own for layer in parameters for own in layer]
        values = [value for own in flat for value in own]
        self.features, self.hidden, self._storage = features, values[1].size(1), storage
        self.directions, self.states = len(parameters[0]), len(flat)
        self.lasting = not any(value.is_inference() or not value.is_contiguous() for value in values)
        self._forgotten = packing.forgotten()
        # Read before the weights are: what is changed meanwhile must not look as if it had been packed.
        self._kept = [
            (value, value.data_ptr(), value._version, value.shape)  # noqa: SLF001
            for value in (values if self.lasting else ())
        ]
        self._native = library()
        self._sources = (Source * (2 * len(flat)))()
        self._weights = (Direction * len(flat))()
        #: What the addresses above point into. With its memory held, nothing else can come to lie at an address.
        self._held: list[Any] = []
        self._work = 0
        for index, own in enumerate(flat):
            features = self.features if index < self.directions else self.directions * self.hidden
            self._work += 4 * self.hidden * (self.hidden + features + 16)
            self._add(index, fused.fitting(own, features, self.hidden), storage)
        layers = Layers(
            len(parameters), self.directions, self.features, self.hidden, packing.KEPT[storage][0],
            ctypes.addressof(self._sources), ctypes.addressof(self._weights),
        )  # fmt: skip
        self._held.append(layers)
        self._at = ctypes.addressof(layers)

    def _add(self, index: int, own: Sequence[Tensor], storage: str) -> None:
        packed = [packing.pack(weight, "forward", storage) for weight in own[:2]]
        for offset, (weight, found) in enumerate(zip(own, packed, strict=False)):
            marks = found.sampled, found.mark
            self._sources[2 * index + offset] = Source(weight.data_ptr(), weight.numel(), *marks)
        biases: Sequence[int | None] = [bias.data_ptr() for bias in own[2:]] or [None, None]
        scales = [fused.address(found.scale) for found in packed]
        self._weights[index] = Direction(*(found.values.data_ptr() for found in packed), *biases, *scales)
        self._held += [packed, [value.detach() for value in own]]

    def stands(self, parameters: Sequence[Tensor | None]) -> bool:
        """Return whether parameters are the same, unchanged as far as torch can tell; the kernel looks at the values.

        Args:
            parameters: those of the module now, in the order in which they were given.
        """
        if self._forgotten != packing.forgotten() or len(parameters) != len(self._kept):
            return False
        for now, (value, at, version, shape) in zip(parameters, self._kept, strict=True):
            if (
                now is not value
                or value.data_ptr() != at
                or value._version != version  # noqa: SLF001
                or value.shape != shape
                or not value.is_contiguous()
            ):
                return False
        return True

    def takes(self, x: Any, hx: Any, resets: Any = None, *, batch_first: bool = True, step: bool = False) -> bool:
        """Return whether input and state can be read in place, and only the kernel would have to see the call.

        Args:
            x: what a module was given for input.
            hx: the state that it was given, if any.
            resets: of a step, the rows that begin anew, if any.
            batch_first: order of x.
            step: whether x is one step, (batch, features), and the state is to be written too.
        """
        if torch.is_grad_enabled() or watched() or torch.is_autocast_enabled("cpu") or not _plain(x):
            return False
        shape = x.shape
        if len(shape) != (2 if step else 3) or shape[-1] != self.features or not x.numel():
            return False
        if hx is None:
            return True
        h0, c0 = hx
        wanted = (self.states, shape[0 if batch_first or step else 1], self.hidden)
        if not (_plain(h0) and _plain(c0) and h0.shape == wanted and c0.shape == wanted):
            return False
        if resets is not None and not (_plain(resets, torch.bool) and resets.shape == shape[:1]):
            return False
        return not step or (self.directions == 1 and abs(h0.data_ptr() - c0.data_ptr()) >= h0.nbytes)

    def run(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        *,
        batch_first: bool,
        fresh: bool = False,
    ) -> Results | None:
        """Run all layers; None, and nothing done, where the weights' values are no longer those that were packed.

        Args:
            x: (batch, steps, features) if batch first, else (steps, batch, features); contiguous float32.
            h0: (layers * directions, batch, H) contiguous, or None for zeros.
            c0: the same.
            lengths: (batch,) int32, or None for all steps.
            resets: (directions, steps, batch) bool, contiguous: see `kernels.common.recurrence.Forward`; or None.
            batch_first: order of x and of the output.
            fresh: whether this was prepared just now, so that the values need no look.

        Returns:
            Output (as x, with directions * H features), h_n and c_n (layers * directions, batch, H).
        """
        first, second, _ = x.shape
        batch, steps = (first, second) if batch_first else (second, first)
        output = x.new_empty(first, second, self.directions * self.hidden)
        h_n = x.new_empty(self.states, batch, self.hidden)
        c_n = x.new_empty(self.states, batch, self.hidden)
        done = self._call(batch, steps, batch_first, fresh, x, h0, c0, lengths, resets, output, h_n, c_n)
        return (output, h_n, c_n) if done else None

    def step(self, x: Tensor, h: Tensor, c: Tensor, resets: Tensor | None = None) -> Tensor | None:
        """One step of all layers, their state updated in place; None, and nothing done, as `run`.

        Args:
            x: (batch, features) contiguous float32.
            h: (layers, batch, H) contiguous, overwritten.
            c: the same.
            resets: (batch,) bool, contiguous: rows whose state is zero before the step; or None.

        Returns:
            Output (batch, H), h of the last layer.
        """
        batch = x.size(0)
        output = x.new_empty(batch, self.hidden)
        if not self._call(batch, 1, True, False, x, h, c, None, resets, output, h, c):
            return None
        increment_version((h, c))
        return output

    def _call(  # noqa: PLR0913, PLR0917 - what the kernel takes
        self,
        batch: int,
        steps: int,
        batch_first: bool,
        fresh: bool,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        output: Tensor,
        h_n: Tensor,
        c_n: Tensor,
    ) -> bool:
        threads, by_rows = fused.team(batch * steps * self._work, batch, self.hidden)
        look = NOT_AT_ALL if fresh else WHOLE if fused.long(batch, steps, threads, self._storage) else SAMPLES
        status = self._native.lstm_layers(
            self._at, batch, steps, batch_first, threads, by_rows, look,
            x.data_ptr(), h0 if h0 is None else h0.data_ptr(), c0 if c0 is None else c0.data_ptr(),
            lengths if lengths is None else lengths.data_ptr(), resets if resets is None else resets.data_ptr(),
            output.data_ptr(), h_n.data_ptr(), c_n.data_ptr(),
        )  # fmt: skip
        return (checked(self._native, status) if status else status) != CHANGED


def _plain(value: Any, dtype: torch.dtype = torch.float32) -> bool:
    """Return whether it is a tensor that the kernel can read where it lies."""
    return (
        type(value) is Tensor
        and value.dtype is dtype
        and value.is_cpu
        and value.layout is torch.strided
        and value.is_contiguous()
        and not value.is_neg()
    )
