"""Sizes of models for texts, by task and size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from seq2seq.models.base import Config
from seq2seq.tasks.families import family_config
from seq2seq.tasks.task import DECODERS


@dataclass(frozen=True)
class TextSizes:
    """Sizes of a model, whatever its family.

    Attributes:
        embedding: features of an embedded token.
        hidden: hidden size of the decoder, and of each direction of the encoder.
        layers: of encoder and decoder each.
        dropout: probability of dropping a value in training.
    """

    embedding: int
    hidden: int
    layers: int
    dropout: float


def text_config(model: str, size: str, sizes: Mapping[str, TextSizes], vocabulary: int) -> Config:
    """Sizes of a model that reads and writes tokens of one vocabulary.

    Args:
        model: as for `family_config`.
        size: `small`, which trains on 2 CPU cores in minutes, or `full`.
        sizes: those of a task.
        vocabulary: tokens.

    Raises:
        ValueError: for another model or size.
    """
    if size not in sizes:
        msg = f"size is {size!r}, expected one of {', '.join(sizes)}"
        raise ValueError(msg)
    if model not in DECODERS:
        msg = f"model is {model!r}, expected one of {', '.join(DECODERS)}"
        raise ValueError(msg)
    chosen = sizes[size]
    common = {
        "input_size": chosen.embedding,
        "hidden_size": chosen.hidden,
        "output_size": vocabulary,
        "dropout": chosen.dropout,
        "source_vocabulary": vocabulary,
        "target_vocabulary": vocabulary,
    }
    return family_config(model, chosen.layers, common, {"bidirectional": True})
