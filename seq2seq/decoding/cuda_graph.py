"""A decoding step as one CUDA graph: what a step costs is then its kernels, and not the Python around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seq2seq.decoding.search import Decoder
from seq2seq.models.base import State

#: Steps before the capture, in which libraries choose their kernels and take their workspace.
WARM_UPS = 3


@dataclass(frozen=True)
class _Captured:
    """A graph and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    value: Tensor
    state: State
    outputs: Tensor


class CapturedStep:
    """A decoder whose step is captured once for each shape of its inputs, and replayed from then on.

    Outputs and state are in memory that the next step overwrites; a state handed back to `step` needs no copy.
    Weights may be overwritten in place. It serves models whose state keeps its shape from step to step.

    Args:
        decoder: on a CUDA device, without autocast around it.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.config: Any = decoder.config
        self._decoder = decoder
        self._captured: dict[tuple[Any, ...], _Captured] = {}

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> State:
        """Encode as the decoder does."""
        return self._decoder.encode(source, lengths)

    def step(self, value: Tensor, state: State) -> tuple[Tensor, State]:
        """Do one step as the decoder does; the results are in memory that the next step overwrites.

        Raises:
            ValueError: for a model whose state grows with the steps.
        """
        key = (value.shape, *((name, tensor.shape) for name, tensor in state.items()))
        if key not in self._captured:
            self._captured[key] = self._capture(value, state)
        own = self._captured[key]
        own.value.copy_(value)
        for name, tensor in own.state.items():
            if state[name] is not tensor:
                tensor.copy_(state[name])
        own.graph.replay()
        return own.outputs, dict(own.state)

    def _capture(self, value: Tensor, state: State) -> _Captured:
        value, state = value.clone(), {name: tensor.clone() for name, tensor in state.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                _, following = self._decoder.step(value, state)
        torch.cuda.current_stream().wait_stream(stream)
        if any(following[name].shape != tensor.shape for name, tensor in state.items()):
            msg = "the state of this model changes its shape from step to step; one captured graph cannot serve it"
            raise ValueError(msg)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, following = self._decoder.step(value, state)
            for name, tensor in state.items():
                tensor.copy_(following[name])
        return _Captured(graph, value, state, outputs)
