"""Weights that the gate draws: such that no bias and no norm is lost in the rounding, whatever the model's size."""

from __future__ import annotations

import torch

from seq2seq.models.base import Config
from seq2seq.models.weights import Weights, initial_weights


def random_weights(config: Config, seed: int) -> Weights:
    """Weights for the gate: matrices as the model initialises them, biases up to 0.5, norms 0.5 to 1.5.

    Biases are so at any size and of any shape: Marian keeps one as a row of zeros, and who left it out would pass.
    torch draws biases from +-1/sqrt(hidden_size), so that at a large size a lost bias would hide in the rounding of
    bf16. A norm's weights are factors: near zero, all steps would look alike after it, and attention would have
    nothing to choose from.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = initial_weights(config, seed)
    return {
        name: torch.rand(value.shape, generator=generator) + (0.5 if _is_norm(name) else -0.5)
        if value.dim() == 1 or name.endswith("bias")
        else value
        for name, value in weights.items()
    }


def _is_norm(name: str) -> bool:
    """Return whether a weight is the factors of a norm."""
    *_, module, kind = name.split(".")
    return "norm" in module and kind == "weight"
