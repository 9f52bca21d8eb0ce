"""Weights of a model as a state_dict in fp32, and those that every variant starts from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seq2seq.models.base import Config

Weights = dict[str, Tensor]


def initial_weights(config: Config, seed: int) -> Weights:
    """Torch's own initialisation, from a seed; the same for every variant."""
    # torch.manual_seed would seed the GPUs' generators too, which fork_rng(devices=[]) does not put back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return dict(config.build(nn.LSTM).state_dict())
