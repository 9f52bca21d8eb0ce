"""Models of the transformers library as files: read from a folder, or from the Hugging Face hub."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import Tensor

from seq2seq.models.huggingface import PretrainedSeq2Seq, transformers
from seq2seq.models.huggingface_config import PretrainedConfig
from seq2seq.models.layer_groups import PretrainedError


def load_config(name: str | Path) -> PretrainedConfig:
    """Sizes of such a model, without its weights.

    Raises:
        PretrainedError: when the library is not installed, it is not an encoder-decoder, or its sizes cannot be read.
    """
    library = transformers()
    with refused(name):
        theirs = library.AutoConfig.from_pretrained(name)
    if not getattr(theirs, "is_encoder_decoder", False):
        msg = f"{name} is a {theirs.model_type} model, which is not an encoder-decoder; expected one, as Marian or T5"
        raise PretrainedError(msg)
    return PretrainedConfig.of(theirs, str(name))


def load_weights(name: str | Path) -> dict[str, Tensor]:
    """The fp32 state_dict of such a model behind our calls.

    Raises:
        PretrainedError: when the library is not installed, or gives no such model.
    """
    library = transformers()
    with refused(name):
        model = library.AutoModelForSeq2SeqLM.from_pretrained(name)
    ours = PretrainedSeq2Seq(model, PretrainedConfig.of(model.config, str(name)))
    return {key: value.detach().float() for key, value in ours.state_dict().items()}


@contextlib.contextmanager
def refused(name: str | Path) -> Any:
    """Make what the library raises about a model one line."""
    try:
        yield
    except (AttributeError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        msg = f"{name}: transformers does not load it: {' '.join(str(error).split())}"
        raise PretrainedError(msg) from error
