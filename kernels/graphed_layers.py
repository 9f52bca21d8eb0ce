"""All layers of a `kernels.LSTM` on a GPU by what an earlier call settled: without gradients, as one CUDA graph.

Products and kernels of all layers are one launch then, as they are one call on a CPU (`kernels.cpu.inference`). A graph
is found by the addresses of what it reads and writes (`kernels.gpu.graph_cache`), so nothing is copied, results lie in
memory of their own, and weights that are overwritten in place are read as they are. With gradients the layers run one
after the other (`kernels.direct_layers`), and what is spared is to settle anew which kernel serves.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dispatch
from .common.fast_path import autocast_dtype, intercepted
from .common.recurrence import LayerOptions
from .direct_layers import infer_into, layer
from .dispatch import Choice
from .gpu import graph_cache
from .gpu.graph_cache import Named
from .gpu.product_settings import product_settings
from .graphed_training import TrainedCall, brief, train

Results = tuple[Tensor, Tensor, Tensor]
State = tuple[Tensor, Tensor]
_Form = tuple[Any, ...]

#: Shapes that are remembered; sequences of real data come in many lengths.
REMEMBERED = 1024
#: Passes whose memory was new, without a replay between them, after which training pauses its graphs: memory that does
#: not come back, as with batches of many lengths, makes each pass pay for a key and for copies that only a replay is
#: worth. Twice as many as graphs are held, so that what can be held is found.
MOST_MISSES = 128
#: Calls that train without graphs in the first pause; each later one is twice as long, until something is replayed.
FIRST_PAUSE = 1024
#: What `graph_cache.state` counts such calls by.
PAUSED = f"training graphs pause, since {MOST_MISSES} passes in a row had new memory"


class _Settled(NamedTuple):
    """Settings of a call, for those like it.

    Attributes:
        options: what runs.
        choices: the same in words, one per layer.
        key: all that decides what is launched without gradients, besides the addresses of tensors.
        call: with gradients, of a short sequence.
        learns: whether gradients will be needed.
    """

    options: LayerOptions
    choices: tuple[Choice, ...]
    key: Named
    call: TrainedCall | None
    learns: bool


class GraphedLayers:
    """The layers of a module with the parameters that they have now; threads may share it.

    Args:
        parameters: of each layer, of each direction: weight_ih (4H, features), weight_hh (4H, H), and both biases
            (4H,), if any.
        hidden: H.
        names: of the parameters in the module, in the same order.
        precision: gives whether the recurrence rounds float32 factors to TF32, for a device and a type.
        graphs: where graphs are kept; those of this process by default.
    """

    def __init__(
        self,
        parameters: Sequence[Sequence[tuple[Tensor, ...]]],
        hidden: int,
        names: Sequence[str],
        precision: Callable[[torch.device, torch.dtype], bool],
        graphs: graph_cache.Graphs = graph_cache.GRAPHS,
    ) -> None:
        values = [value for layer in parameters for own in layer for value in own]
        self._parameters, self._hidden, self._precision, self._graphs = parameters, hidden, precision, graphs
        self._names = names
        self._directions, self._features = len(parameters[0]), values[0].size(1)
        self._states = len(parameters) * self._directions
        self._dtype, self._device = values[0].dtype, values[0].device
        self._flat = values
        self._at, self._strides, self._learning = _seen(values)
        self._learns = any(self._learning)
        self._chosen: dict[_Form, _Settled] = {}
        self._generation = dispatch.generation()
        #: Addresses of the parameters, as part of the key of each graph; one object, whose hash is computed once. A
        #: graph holds the configurations that were chosen when it was captured.
        forms = [(value.shape, value.dtype) for value in values]
        self._name = Named((self._generation, *self._at, *self._strides, *forms))
        self._search = GraphSearch()

    def stands(self, parameters: Mapping[str, Tensor | None]) -> bool:
        """Return whether parameters are the same tensors in the same memory that learn as before; values may differ.

        Args:
            parameters: those of the module now, by name.
        """
        if len(self._names) != len(self._flat) or self._generation != dispatch.generation():
            return False
        # Compared without a loop in Python, at each call.
        same = all(map(operator.is_, map(parameters.get, self._names), self._flat))
        return same and _seen(self._flat) == (self._at, self._strides, self._learning)

    def step(self, *_: Any) -> None:
        """Return None: no step has its state updated in place here."""

    def at_once(
        self, parameters: Mapping[str, Tensor | None], x: Any, hx: Any, batch_first: bool
    ) -> tuple[tuple[Tensor, State], tuple[Choice, ...]] | None:
        """Run all layers where an earlier call was like this one and only the kernels would have to see it.

        Args:
            parameters: as for `stands`.
            x: what a module was given for input.
            hx: the state that it was given, if any.
            batch_first: order of x.

        Returns:
            Output and state as `run`, and what ran, one choice per layer; None where it does not take the call.
        """
        if intercepted() or not self._plain(x) or not self.stands(parameters):
            return None
        h0 = c0 = None
        if hx is not None:
            if not isinstance(hx, (tuple, list)) or len(hx) != 2:  # noqa: PLR2004 - h and c
                return None
            h0, c0 = hx
            wanted = (self._states, x.size(0 if batch_first else 1), self._hidden)
            if not (self._plain(h0) and self._plain(c0) and h0.shape == wanted and c0.shape == wanted):
                return None
        settled = self._chosen.get(self._form(x, h0, c0, batch_first))
        if settled is None:
            return None
        output, h_n, c_n = self._run(x, h0, c0, settled)
        return (output, (h_n, c_n)), settled.choices

    def run(self, x: Tensor, hx: Any, options: LayerOptions, choices: tuple[Choice, ...]) -> Results:
        """Run all layers, and take calls like this one from now on.

        Args:
            x: (batch, steps, features) if batch first, else (steps, batch, features).
            hx: h and c, each (layers * directions, batch, H), or None for zeros.
            options: what runs.
            choices: the same in words, one per layer.

        Returns:
            Output (as x, with directions * H features), h_n and c_n (layers * directions, batch, H).
        """
        h0, c0 = hx or (None, None)
        form = self._form(x, h0, c0, options.batch_first)
        if len(self._chosen) == REMEMBERED:
            self._chosen.clear()
        key, call = Named((self._name, options, form)), None
        if form[0] and brief(x, options):
            flat = [tuple(itertools.chain.from_iterable(layer)) for layer in self._parameters]
            call = TrainedCall(self._name, form, options, flat, (x, h0, c0), self._graphs, self._search.saw)
        settled = self._chosen[form] = _Settled(options, choices, key, call, learns=form[0])
        return self._run(x, h0, c0, settled)

    def _run(self, x: Tensor, h0: Tensor | None, c0: Tensor | None, settled: _Settled) -> Results:
        options = settled.options
        if settled.learns:
            if settled.call is None:
                return self._one_by_one(x, h0, c0, options)
            if self._search.goes_on():
                return train(x, h0, c0, settled.call, self._flat)
            self._graphs.note(PAUSED)
            return self._one_by_one(x, h0, c0, options)
        first, second, _ = x.shape
        batch, dtype = first if options.batch_first else second, options.dtype
        output = x.new_empty(first, second, self._directions * self._hidden, dtype=dtype)
        h_n = x.new_empty(self._states, batch, self._hidden, dtype=dtype)
        c_n = x.new_empty(self._states, batch, self._hidden, dtype=dtype)

        def launch() -> None:
            infer_into(x, self._parameters, h0, c0, options, (output, h_n, c_n))

        self._graphs.run(launch, settled.key, (), (x, h0, c0, output, h_n, c_n))
        return output, h_n, c_n

    def _one_by_one(self, x: Tensor, h0: Tensor | None, c0: Tensor | None, options: LayerOptions) -> Results:
        """All layers, keeping what their gradients need."""
        if len(self._parameters) == 1:
            return layer(x, self._parameters[0], h0, c0, None, options, gradients=True)
        ends = []
        for number, own in enumerate(self._parameters):
            place = slice(number * self._directions, (number + 1) * self._directions)
            first, last = (None if v is None else v[place] for v in (h0, c0))
            x, *end = layer(x, own, first, last, None, options, gradients=True)
            ends.append(end)
        h_n, c_n = map(torch.cat, zip(*ends, strict=True))
        return x, h_n, c_n

    def _form(self, x: Tensor, h0: Tensor | None, c0: Tensor | None, batch_first: bool) -> _Form:
        """All that decides what runs besides the parameters, options and addresses; first, whether gradients will."""
        learns = torch.is_grad_enabled() and (
            self._learns
            or x.requires_grad
            or (h0 is not None and h0.requires_grad)
            or (c0 is not None and c0.requires_grad)
        )
        tf32, autocast = self._precision(self._device, self._dtype), autocast_dtype(self._device)
        settings = product_settings(autocast or self._dtype)
        states = None if h0 is None or c0 is None else (h0.stride(), h0.dtype, c0.stride(), c0.dtype)
        return learns, x.shape, x.stride(), x.dtype, batch_first, states, autocast, tf32, *settings

    def _plain(self, value: Any) -> bool:
        """Return whether it is a tensor of the parameters' type and device that kernels can read where it lies."""
        return (
            (type(value) is Tensor or type(value) is nn.Parameter)
            and value.dtype is self._dtype
            and value.device == self._device
            and value.layout is torch.strided
            and value.numel() > 0
            and not value.is_neg()
        )


class GraphSearch:
    """Decides whether training tries graphs: not for a while after many passes had new memory, then again."""

    def __init__(self) -> None:
        self._missed = self._left = 0
        self._pause = FIRST_PAUSE

    def goes_on(self) -> bool:
        """Return whether a call should try a graph, and count it if not."""
        if not self._left:
            return True
        self._left -= 1
        return False

    def saw(self, times: int) -> None:
        """Take note of a pass.

        Args:
            times: what `graph_cache.Graphs.run` returned. Memory that was seen before is on the way to a graph, which
                neither is a miss nor shows that the graph will be of use.
        """
        if times > graph_cache.SIGHTINGS:
            self._missed, self._pause = 0, FIRST_PAUSE
        elif not times:
            self._missed += 1
            if self._missed >= MOST_MISSES:
                self._missed, self._left, self._pause = 0, self._pause, 2 * self._pause


def _seen(values: Sequence[Tensor]) -> tuple[list[int], list[tuple[int, ...]], list[bool]]:
    """Addresses, strides, and whether they learn."""
    return list(map(Tensor.data_ptr, values)), list(map(Tensor.stride, values)), list(map(_LEARNS, values))


_LEARNS = operator.attrgetter("requires_grad")
