"""Tiny models of the transformers library, made on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

#: Sizes that all have, and what each architecture has beside them; layers and heads are odd where they can be.
SHARED = {"vocab_size": 40, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MARIAN = {
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 32,
    "forced_eos_token_id": None,
}
T5 = {"d_kv": 6, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 3}
ARCHITECTURES = ("marian", "t5", "t5-gated")


def tiny(architecture: str):
    """A model of the library, from a seed, with every weight that it starts at zero drawn too."""
    library = pytest.importorskip("transformers")
    if architecture == "marian":
        config, kind = library.MarianConfig(**SHARED, **MARIAN), library.MarianMTModel
    else:
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if "gated" in architecture else {}
        config, kind = library.T5Config(**SHARED, **T5, **gated), library.T5ForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).eval()
        if architecture == "marian":
            model.final_logits_bias.normal_()
    return model


def save(architecture: str, folder: Path) -> Path:
    """Such a model in a folder, as its `save_pretrained` writes it."""
    tiny(architecture).save_pretrained(folder)
    return folder
