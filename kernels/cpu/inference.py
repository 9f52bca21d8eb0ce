"""All layers of a module in one call of the CPU kernel, without gradients: for calls where Python takes the time.

What depends on the parameters alone is prepared once and kept: packed weights, and what the kernel is told of them. A
later call checks that the parameters are the same and unchanged, and hands over addresses.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import entry, packing
from .build import CHANGED, checked, library
from .native_arguments import address, fitting, hidden_of
from .teams import least_long, team
from .told import told

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


#: `LayersCall` of lstm.cpp, as bytes: ctypes takes a microsecond to convert as many arguments one by one.
_CALL = struct.Struct("@16q").pack
#: `Halves` of lstm.cpp: what is bf16 of x, h0, c0 and the results.
_HALVES = (1, 2, 4)
_HALF_RESULTS = 8
#: How the kernel looks whether weights are still what was packed: `lstm_layers`.
NOT_AT_ALL, SAMPLES, WHOLE = range(3)


class Prepared:
    """The layers of a module as the kernel reads them; nothing in here changes, so threads may share it.

    Args:
        parameters: of each layer, of each direction: weight_ih (4H, features), weight_hh (4H, H), and both biases
            (4H,), if any.
        features: of a step of the input.
        storage: key of `kernels.cpu.packing.KEPT`. For `TRAINED`, which is autocast's, weights are kept in bf16 as
            the processor multiplies it fastest, and changes are looked for as for float32.
        names: of the parameters in the module, in the same order; none if this serves a single call.
        choices: of one call, as `at_once` and `step` return them besides their results.

    Attributes:
        lasting: whether it may be kept for later calls. Not where a parameter had to be copied, or has no version.

    Raises:
        RuntimeError: when parameters do not fit each other, which torch's modules let happen.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[tuple[Tensor, ...]]],
        features: int,
        *,
        storage: str,
        names: Sequence[str] = (),
        choices: tuple[Any, ...] = (),
    ) -> None:
        flat = [own for layer in parameters for own in layer]
        values = [value for own in flat for value in own]
        self.features, self.hidden = features, hidden_of(values[1])
        self.directions, self.states = len(parameters[0]), len(flat)
        self.lasting = len(names) == len(values) and not any(v.is_inference() or not v.is_contiguous() for v in values)
        self._by_autocast = storage == packing.TRAINED
        self._forgotten, self._long = packing.forgotten.value, least_long("fp32" if self._by_autocast else storage)
        storage = "bf16" if self._by_autocast else storage
        # Read before the weights are: what is changed meanwhile must not look as if it had been packed.
        self._kept = [
            (name, value, value.data_ptr(), value._version, value.shape)  # noqa: SLF001
            for name, value in (zip(names, values, strict=True) if self.lasting else ())
        ]
        self._native = library(kept=packing.KEPT[storage][0])
        self._sources = (Source * (2 * len(flat)))()
        self._weights = (Direction * len(flat))()
        #: What the addresses above point into. With its memory held, nothing else can come to lie at an address.
        self._held: list[Any] = []
        self._work = 0
        for index, own in enumerate(flat):
            features = self.features if index < self.directions else self.directions * self.hidden
            self._work += 4 * self.hidden * (self.hidden + features + 16)
            self._add(index, fitting(own, features, self.hidden), storage)
        layers = Layers(
            len(parameters), self.directions, self.features, self.hidden, packing.KEPT[storage][0],
            ctypes.addressof(self._sources), ctypes.addressof(self._weights),
        )  # fmt: skip
        self._held += [layers, self._sources, self._weights]
        self._at = ctypes.addressof(layers)
        #: Calls that are like an earlier one, past the rest of Python: see `entry.bind`.
        self.at_once = self.step = entry.declined
        if self.lasting:
            self.at_once, self.step, _ = entry.bind(
                self._native,
                self._at,
                [(value, at, version) for _, value, at, version, _ in self._kept],
                (self._held, self._kept),
                told(choices, storage, self.hidden),
                features=self.features,
                hidden=self.hidden,
                directions=self.directions,
                states=self.states,
                work=self._work,
                least_long=self._long,
                cast=int(self._by_autocast),
            )

    def _add(self, index: int, own: Sequence[Tensor], storage: str) -> None:
        packed = [packing.pack(weight, "forward", storage, lasting=self.lasting) for weight in own[:2]]
        for offset, (weight, found) in enumerate(zip(own, packed, strict=False)):
            marks = found.sampled, found.mark
            self._sources[2 * index + offset] = Source(weight.data_ptr(), weight.numel(), *marks)
        biases: Sequence[int | None] = [bias.data_ptr() for bias in own[2:]] or [None, None]
        scales = [address(found.scale) for found in packed]
        self._weights[index] = Direction(*(found.values.data_ptr() for found in packed), *biases, *scales)
        self._held += [packed, [value.detach() for value in own]]

    def stands(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Return whether parameters are the same, unchanged as far as torch can tell; the kernel looks at the values.

        Args:
            parameters: those of the module now, by name.
        """
        if self._forgotten != packing.forgotten.value:
            return False
        for name, value, at, version, shape in self._kept:
            if (
                parameters.get(name) is not value
                or value.data_ptr() != at
                or value._version != version  # noqa: SLF001
                or value.shape != shape
                or not value.is_contiguous()
            ):
                return False
        return True

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
            x: (batch, steps, features) if batch first, else (steps, batch, features); contiguous. x, h0 and c0 are
                float32, for `TRAINED` or bfloat16, each as it comes.
            h0: (layers * directions, batch, H) contiguous, or None for zeros.
            c0: the same.
            lengths: (batch,) int32, or None for all steps.
            resets: (directions, steps, batch) bool, contiguous: see `kernels.common.recurrence.Forward`; or None.
            batch_first: order of x and of the output.
            fresh: whether this was prepared just now, so that the values need no look.

        Returns:
            Output (as x, with directions * H features), h_n and c_n (layers * directions, batch, H); float32, for
            `TRAINED` bfloat16.
        """
        first, second, _ = x.shape
        batch, steps = (first, second) if batch_first else (second, first)
        kind, halves = torch.float32, 0
        if self._by_autocast:
            kind, halves = torch.bfloat16, _HALF_RESULTS
            for value, half in zip((x, h0, c0), _HALVES, strict=True):
                halves |= half if value is not None and value.dtype is torch.bfloat16 else 0
        output = x.new_empty(first, second, self.directions * self.hidden, dtype=kind)
        h_n, c_n = (x.new_empty(self.states, batch, self.hidden, dtype=kind) for _ in range(2))
        threads, by_rows = team(batch * steps * self._work, batch, self.hidden)
        look = NOT_AT_ALL if fresh else WHOLE if batch * steps >= self._long * threads else SAMPLES
        status = self._native.lstm_layers(_CALL(
            self._at, batch, steps, batch_first, threads, by_rows, look, x.data_ptr(),
            0 if h0 is None else h0.data_ptr(), 0 if c0 is None else c0.data_ptr(),
            0 if lengths is None else lengths.data_ptr(), 0 if resets is None else resets.data_ptr(),
            output.data_ptr(), h_n.data_ptr(), c_n.data_ptr(), halves,
        ))  # fmt: skip
        if status and checked(self._native, status) == CHANGED:
            return None
        return output, h_n, c_n
