"""A decoder with attention that is fed what it found: all steps of a batch in one native call (`decoder.cpp`).

`decoder_training` has its gradients.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import build, packing, teams
from .native_arguments import fitting

SOURCE = "decoder.cpp"
#: `FedCall` of fed_steps.h, as bytes.
CALL = struct.Struct("@19qd12q").pack
#: Steps of a batch from which a look at all of the weights is a small part of a call.
LONG = 32


class FedLayer(ctypes.Structure):
    """`FedLayer` of fed_steps.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("packed_ih", "packed", "bias_ih", "bias_hh"))


@dataclass(frozen=True)
class Memory:
    """Memory that a decoder looks at, with how it scores each of its steps for a query.

    Attributes:
        values: (batch, memory steps, memory size), whose weighted mean is what a step finds.
        keys: (batch, memory steps, key size), which queries are compared with.
        mask: (batch, memory steps) bool, false for padding; None if all count.
        query: weight (key size, hidden) and bias (key size,) or None, by which a query is made of h; None where h is
            the query.
        vector: (key size,): a score is vector . tanh(query + key); None for query . key.
        scale: factor of the scores.
    """

    values: Tensor
    keys: Tensor
    mask: Tensor | None
    query: tuple[Tensor, Tensor | None] | None = None
    vector: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class FedState:
    """State that a step starts from: h and c, (layers, batch, hidden), and what is fed to it, (batch, fed size)."""

    hidden: Tensor
    cell: Tensor
    fed: Tensor


class DecoderInputs(NamedTuple):
    """Arguments of `run`, which describes each."""

    x: Tensor
    state: FedState
    layers: Sequence[tuple[Tensor, ...]]
    memory: Memory
    combine: tuple[Tensor, Tensor | None]
    lengths: Tensor | None
    dropped: Tensor | None
    feeds_context: bool


class DecoderSizes(NamedTuple):
    """The numbers that a `FedCall` begins with; `parts` is what threads share the rows out in."""

    batch: int
    steps: int
    inputs: int
    fed_size: int
    hidden: int
    layers: int
    memory_steps: int
    memory_size: int
    key_size: int
    feeds_context: bool
    parts: int = 1

    @property
    def work(self) -> int:
        """Multiplications of all steps."""
        features = self.inputs + self.fed_size + (self.layers - 1) * self.hidden
        lstm = 4 * self.hidden * (features + self.layers * (self.hidden + 16))
        looks = self.memory_steps * (self.key_size + self.memory_size) + self.key_size * self.hidden
        return self.batch * self.steps * (lstm + looks + self.hidden * (self.memory_size + self.hidden))


def hindrance() -> str | None:
    """Reason why there is no such decoder on this machine, or None; compiles it unless that was done before."""
    found = library()
    return found if isinstance(found, str) else None


def run(  # noqa: PLR0913 - all that a decoder reads
    x: Tensor,
    state: FedState,
    layers: Sequence[tuple[Tensor, ...]],
    memory: Memory,
    combine: tuple[Tensor, Tensor | None],
    lengths: Tensor | None = None,
    dropped: Tensor | None = None,
    *,
    feeds_context: bool,
) -> tuple[Tensor, FedState]:
    """Run all steps: the LSTM on [x; fed], what its h finds in the memory, and tanh(W [found; h] + b).

    All tensors are float32 on a CPU unless said otherwise.

    Args:
        x: (batch, steps, inputs).
        state: of the first step.
        layers: of each layer weight_ih (4H, features), weight_hh (4H, H) and both biases (4H,), if any.
        memory: what is looked at.
        combine: weight (hidden, memory size + hidden) and bias (hidden,) or None.
        lengths: (batch,) int32, steps after which a row keeps its state; all when None.
        dropped: (layers - 1, batch, steps, hidden), factors of what each layer hands to the next; all 1 when None.
        feeds_context: whether the next step is fed what was found, not what was decoded.

    Returns:
        What each step decoded, (batch, steps, hidden), zero past a row's length; and the state after each row's last
        step.

    Raises:
        BuildError: where there is no such decoder on this machine.
        RuntimeError: for arguments that do not fit each other, or of another type or device.
        MemoryError: where native code finds no memory.
    """
    given = DecoderInputs(x, state, layers, memory, combine, lengths, dropped, feeds_context)
    return run_keeping(given, keeps=False)[:2]


def run_keeping(given: DecoderInputs, *, keeps: bool) -> tuple[Tensor, FedState, DecoderSizes, Tensor | None]:
    """Run all steps as `run`; returns also the sizes of the call and, with `keeps`, what a backward pass needs."""
    native = build.available(library())
    x, state, layers, memory, combine, lengths, dropped, feeds_context = given
    (batch, steps, inputs), hidden = x.shape, state.hidden.size(2)
    (memory_steps, memory_size), key_size, fed_size = memory.values.shape[1:], memory.keys.size(2), state.fed.size(1)
    sizes = DecoderSizes(
        batch, steps, inputs, fed_size, hidden, len(layers), memory_steps, memory_size, key_size, feeds_context
    )  # fmt: skip
    # tanh takes as long as 8 products.
    tanhs = 8 * batch * steps * memory_steps * key_size * (memory.vector is not None)
    sizes = sizes._replace(parts=max(1, min(teams.threads_for(sizes.work + tanhs), batch)))
    whole = batch * steps >= LONG
    held: list[Tensor] = []  # whatever addresses below point into

    def packed(weight: Tensor, order: str = "forward") -> int:
        found = packing.pack(weight.contiguous(), order, whole=whole, lasting=not keeps).values
        held.append(found)
        return int(found.data_ptr())

    weights = (FedLayer * len(layers))()
    features = inputs + fed_size
    for number, own in enumerate(layers):
        weight_ih, weight_hh, *biases = fitting(own, features, hidden)
        held += [weight_ih, weight_hh, *biases]
        weights[number] = FedLayer(packed(weight_ih), packed(weight_hh), *(bias.data_ptr() for bias in biases))
        features = hidden
    query, query_bias = memory.query or (None, None)
    _check(given)
    after = FedState(*(value.new_empty(value.shape) for value in (state.hidden, state.cell, state.fed)))
    decoded = x.new_empty(batch, steps, hidden)
    first = (
        *sizes, ctypes.addressof(weights),
        *(contiguous(value, held) for value in (x, memory.values, memory.keys, memory.mask)),
        0 if query is None else packed(query, "linear"), contiguous(query_bias, held), contiguous(memory.vector, held),
        memory.scale,
        packed(combine[0], "linear"), contiguous(combine[1], held), contiguous(lengths, held),
        contiguous(dropped, held),
        *(contiguous(value, held) for value in (state.hidden, state.cell, state.fed)),
        after.hidden.data_ptr(), after.cell.data_ptr(), after.fed.data_ptr(), decoded.data_ptr(),
    )  # fmt: skip
    kept = x.new_empty(native.decoder_kept(CALL(*first, 0))) if keeps else None
    status = native.decoder_run(CALL(*first, 0 if kept is None else kept.data_ptr()))
    build.checked(native, status, "decoder_failure")
    return decoded, after, sizes, kept


def contiguous(value: Tensor | None, held: list[Tensor]) -> int:
    """Address of a tensor's numbers in their order, in memory that `held` keeps; 0 for None."""
    if value is None:
        return 0
    held.append(value.contiguous())
    return held[-1].data_ptr()


def _check(given: DecoderInputs) -> None:
    """Refuse what native code would read past the end of; the LSTM's parameters are checked as they are packed."""
    x, state, weights, memory, combine, lengths, dropped, feeds_context = given
    layers = len(weights)
    (batch, steps, inputs), hidden = x.shape, state.hidden.size(2)
    (memory_steps, memory_size), key_size = memory.values.shape[1:], memory.keys.size(2)
    query, query_bias = memory.query or (None, None)
    expected = (
        (x, (batch, steps, inputs)),
        (memory.values, (batch, memory_steps, memory_size)),
        (memory.keys, (batch, memory_steps, hidden if query is None else key_size)),
        (memory.mask, (batch, memory_steps)),
        (query, (key_size, hidden)),
        (query_bias, (key_size,)),
        (memory.vector, (key_size,)),
        (combine[0], (hidden, memory_size + hidden)),
        (combine[1], (hidden,)),
        (state.hidden, (layers, batch, hidden)),
        (state.cell, (layers, batch, hidden)),
        (state.fed, (batch, memory_size if feeds_context else hidden)),
        (lengths, (batch,)),
        (dropped, (layers - 1, batch, steps, hidden)),
    )
    for value, shape in expected:
        if value is not None and value.shape != shape:
            msg = f"an argument of the decoder has shape {tuple(value.shape)}, expected {shape}"
            raise RuntimeError(msg)
        dtype = torch.bool if value is memory.mask else torch.int32 if value is lengths else torch.float32
        if value is not None and (value.dtype is not dtype or not value.is_cpu):
            msg = f"an argument of the decoder is of {value.dtype} on {value.device}, expected {dtype} on cpu"
            raise RuntimeError(msg)


@functools.cache
def library(target: str = build.NATIVE) -> ctypes.CDLL | str:
    """The compiled decoder, or why there is none; what failed once is not tried again in this process.

    Args:
        target: the compiler's flags for a CPU.
    """
    native = build.load(SOURCE, target, "decoder")
    if isinstance(native, str):
        return native
    native.decoder_failure.restype = ctypes.c_char_p
    for function in (native.decoder_kept, native.decoder_run, native.decoder_back):
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_char_p]
    return native
