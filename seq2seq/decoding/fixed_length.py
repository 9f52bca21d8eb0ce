"""Decoding as it is measured: a whole batch for a fixed number of steps, so that all variants do equal work.

Free running, which is what is timed, and along a given path, which can be compared step by step with teacher forcing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.decoding.search import Decoder, beam_search, forecast, greedy
from seq2seq.models.base import State, select


class Steps:
    """Parts of a model that decoding needs, each compiled on its own; see `Decoder`."""

    def __init__(self, config: Any, encode: Callable[..., State], step: Callable[..., tuple[Tensor, State]]) -> None:
        self.config, self._encode, self._step = config, encode, step

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> State:
        """Call `Model.encode`, possibly compiled."""
        return self._encode(source, lengths)

    def step(self, value: Tensor, state: State) -> tuple[Tensor, State]:
        """Call `Model.step`, possibly compiled."""
        return self._step(value, state)


def free_running(decoder: Decoder, batch: Batch, beam: int) -> dict[str, Tensor]:
    """Decode from the sources for as many steps as the targets have; no token ends a sequence.

    Args:
        decoder: to decode with.
        batch: with a target, which gives the number of steps and, to real values, their covariates.
        beam: hypotheses of a sequence; 1 is greedy.

    Returns:
        `tokens` (batch, steps) and `scores` (batch,); with a beam also `parents` and `chosen`, see `Decoded`. For real
        values `values` (batch, steps, output_size).

    Raises:
        ValueError: for a batch without a target.
    """
    target = _target(batch)
    if not decoder.config.target_vocabulary:
        return {"values": forecast(decoder, batch.source, target, batch.source_lengths)}
    source, lengths, steps = batch.source, batch.source_lengths, target.size(1)
    if beam == 1:
        found = greedy(decoder, source, lengths, end=None, max_steps=steps)
        return {"tokens": found.tokens, "scores": found.scores}
    found = beam_search(decoder, source, lengths, beam=beam, end=None, max_steps=steps, trace=True)
    traced = {"parents": found.parents, "chosen": found.chosen}
    return {"tokens": found.tokens, "scores": found.scores} | {n: v for n, v in traced.items() if v is not None}


@torch.no_grad()
def forced(decoder: Decoder, batch: Batch, beam: int) -> Tensor:
    """Outputs (batch * beam, steps, head_size) of the same steps, all hypotheses fed with the target.

    Raises:
        ValueError: for a batch without a target.
    """
    target = _target(batch)
    rows = torch.arange(batch.size, device=target.device).repeat_interleave(beam)
    state = select(decoder.encode(batch.source, batch.source_lengths), rows)
    found = []
    for step in range(target.size(1)):
        outputs, state = decoder.step(target[rows, step], state)
        # A copy: a step that runs in a captured graph reuses its memory.
        found.append(outputs.clone())
    return torch.stack(found, 1)


def _target(batch: Batch) -> Tensor:
    if batch.target is None:
        msg = "the batch has no target, so its decoder reads the source and cannot be fed its own output"
        raise ValueError(msg)
    return batch.target
