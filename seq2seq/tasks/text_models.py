"""Sizes of each model family for texts, by task and size; a family's module is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seq2seq.models.base import Config
from seq2seq.models.encoder_decoder import Seq2SeqConfig
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
        model: `lstm`; `attention`, the same with Luong's general attention; `gnmt`, which has at least 2 layers; or
            `transformer`, of about as many parameters as the `lstm`.
        size: `small`, which trains on 2 CPU cores in minutes, or `full`.
        sizes: those of a task.
        vocabulary: tokens.

    Raises:
        ValueError: for another model or size.
    """
    if size not in sizes:
        msg = f"size is {size!r}, expected one of {', '.join(sizes)}"
        raise ValueError(msg)
    chosen = sizes[size]
    common: dict[str, Any] = {
        "input_size": chosen.embedding,
        "hidden_size": chosen.hidden,
        "output_size": vocabulary,
        "dropout": chosen.dropout,
        "source_vocabulary": vocabulary,
        "target_vocabulary": vocabulary,
    }
    if model == "lstm":
        return Seq2SeqConfig(**common, num_layers=chosen.layers, bidirectional=True)
    if model == "attention":
        from seq2seq.models.attention import AttentionConfig  # noqa: PLC0415

        return AttentionConfig(**common, num_layers=chosen.layers, bidirectional=True, attention="general")
    if model == "gnmt":
        from seq2seq.models.gnmt import LEAST_LAYERS, GNMTConfig  # noqa: PLC0415

        return GNMTConfig(**common, num_layers=max(chosen.layers, LEAST_LAYERS))
    if model == "transformer":
        from seq2seq.models.transformer import rival  # noqa: PLC0415

        return rival(text_config("lstm", size, sizes, vocabulary))
    msg = f"model is {model!r}, expected one of {', '.join(DECODERS)}"
    raise ValueError(msg)
