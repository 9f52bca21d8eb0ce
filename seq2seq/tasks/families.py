"""Sizes of each model family that has a decoder, for data whose sizes a task knows."""

from __future__ import annotations

from typing import Any

from seq2seq.models.attention import AttentionConfig
from seq2seq.models.base import Config
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.gnmt import LEAST_LAYERS, GNMTConfig
from seq2seq.models.transformer import rival


def family_config(model: str, layers: int, common: dict[str, Any], lstm: dict[str, Any], **attention: Any) -> Config:
    """Sizes of a model.

    Args:
        model: of `seq2seq.tasks.task.DECODERS`: `lstm`; `attention`, the same with attention, Luong's general one
            unless said otherwise; `gnmt`, which has at least 2 layers; or `transformer`, of about as many parameters
            as the `lstm`.
        layers: of the encoder, and of the decoder where `lstm` does not say otherwise.
        common: fields that all families have.
        lstm: further ones of `lstm` and `attention`.
        attention: further options, of `attention` only.
    """
    if model == "gnmt":
        return GNMTConfig(**common, num_layers=max(layers, LEAST_LAYERS))
    if model == "attention":
        return AttentionConfig(**common, **lstm, **attention, num_layers=layers)
    config = Seq2SeqConfig(**common, **lstm, num_layers=layers)
    return rival(config) if model == "transformer" else config
