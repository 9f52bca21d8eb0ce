"""Other people's pre-trained models behind our calls: encoder-decoders of the transformers library (Marian, T5, BART).

They are loaded by the library's own code, and train and decode as ours do. Of Marian and T5 the benchmark knows the
sizes and the work (`seq2seq.models.huggingface_config`), and measures them.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from seq2seq.layers.padding import valid_mask
from seq2seq.models.base import Config, Model, check_lengths, check_steps
from seq2seq.models.keep_float64 import Unrounded
from seq2seq.models.layer_groups import PretrainedError

#: Modules by `model_type` whose weights are not weights: sines and cosines, computed wherever a model is made.
COMPUTED = {"marian": ("embed_positions",)}
INSTALL = "pip install transformers"


def transformers() -> Any:
    """The library.

    Raises:
        PretrainedError: where it does not import.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        msg = f"models of others need transformers, which does not import here ({error}): {INSTALL}"
        raise PretrainedError(msg) from error


class PaddedConfig(Config, Protocol):
    """Sizes of a model whose sequences are padded with a token of its own."""

    @property
    def pad(self) -> int:
        """Token that fills what is past a sequence's end."""


class PretrainedSeq2Seq(Model):
    """A `transformers` encoder-decoder behind our calls, its own cache as the state of decoding.

    Its state_dict has each weight once, where the library repeats shared ones, and nothing that is `COMPUTED`.

    The state has `memory`, (1, batch, source steps, hidden_size), and `inside`, (1, batch, source steps) int64; after
    the first step also, for each decoder layer, keys and values of the steps so far as `self0`, ..., and of the
    source as `source0`, ..., (2, batch, heads, steps, features of a head).

    Args:
        model: as `AutoModelForSeq2SeqLM` gives it.
        config: its sizes (`huggingface_config.PretrainedConfig`).
    """

    config: PaddedConfig

    def __init__(self, model: Any, config: PaddedConfig) -> None:
        super().__init__()
        self.config = config
        for key, module in model.named_modules():
            if key.rpartition(".")[2] in COMPUTED.get(model.config.model_type, ()):
                value = module.weight.detach()
                del module.weight
                module.register_buffer("weight", value, persistent=False)
        self.model = model
        # Asked for its hidden states, the library takes a lock, which breaks the graphs of torch.compile.
        model.get_output_embeddings().register_forward_pre_hook(_keep)
        # Looked up here, not in calls, which torch.compile traces.
        library = transformers()
        self._caches = library.EncoderDecoderCache, library.DynamicCache
        self._memory = library.modeling_outputs.BaseModelOutput
        named = inspect.signature(type(model).forward).parameters
        # What it is called since 5.20; the other name warns from then on.
        self._cache_name = "cache" if "cache" in named else "past_key_values"
        first: dict[int, str] = {}
        self._repeated: dict[str, str] = {}
        for key, value in super().state_dict(keep_vars=True).items():
            if id(value) in first:
                self._repeated[key] = first[id(value)]
            first.setdefault(id(value), key)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the state_dict with each weight once."""
        found = super().state_dict(*args, **kwargs)
        for key in self._repeated:
            found.pop(kwargs.get("prefix", "") + key, None)
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state_dict that has each weight once."""
        repeated = {key: state_dict[once] for key, once in self._repeated.items() if once in state_dict}
        return super().load_state_dict({**state_dict, **repeated}, strict, assign)

    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode a target that begins with `config.begin`.

        Returns:
            Outputs (batch, target steps, output_size), zeros past a target's length; what the head reads at each
            target's last step, and the encoder gives at each source's, (1, batch, hidden_size).
        """
        if target is None:
            target, target_lengths = source, source_lengths if target_lengths is None else target_lengths
        inside, within = self._valid("source", source, source_lengths), self._valid("target", target, target_lengths)
        found = self._call(
            input_ids=self._blank(source, inside),
            attention_mask=inside.long(),
            decoder_input_ids=self._blank(target, within),
            use_cache=False,
        )
        outputs = torch.where(within[..., None], found.logits, 0.0)
        hidden = _last(self._read(), within)
        return outputs, hidden, _last(found.encoder_last_hidden_state, inside)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Outputs of the encoder; the decoder's keys and values of it are made by the first step and kept."""
        inside = self._valid("source", source, lengths)
        encoder = self.model.get_encoder()
        with self._unrounded():
            found = encoder(input_ids=self._blank(source, inside), attention_mask=inside.long())
        return {"memory": found.last_hidden_state[None], "inside": inside.long()[None]}

    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one token of each sequence."""
        both, one = self._caches
        kept = sum(name.startswith("self") for name in state)
        if kept:
            # Keys and values of one layer after the other: of the steps so far, then of the source.
            layers = [(*state[f"self{number}"], *state[f"source{number}"]) for number in range(kept)]
            cache = both(layers)
        else:
            cache = both(one(), one())
        found = self._call(
            encoder_outputs=self._memory(last_hidden_state=state["memory"][0]),
            attention_mask=state["inside"][0],
            decoder_input_ids=value[:, None],
            use_cache=True,
            **{self._cache_name: cache},
        )
        self._read()
        after = {"memory": state["memory"], "inside": state["inside"]}
        # The library writes into the cache that it is given.
        own, crossed = cache.self_attention_cache.layers, cache.cross_attention_cache.layers
        for number, (self_layer, source_layer) in enumerate(zip(own, crossed, strict=True)):
            after[f"self{number}"] = torch.stack([self_layer.keys, self_layer.values])
            # Projected once, and then handed on as it is.
            name = f"source{number}"
            after[name] = state[name] if kept else torch.stack([source_layer.keys, source_layer.values])
        return found.logits[:, -1], after

    def _call(self, **inputs: Any) -> Any:
        with self._unrounded():
            return self.model(**inputs)

    def _read(self) -> Tensor:
        """Input of the head in the last call; not kept, since all of its graph would stay with it."""
        head: Any = self.model.get_output_embeddings()
        read: Tensor = head.read
        head.read = None
        return read

    def _unrounded(self) -> contextlib.AbstractContextManager[Any]:
        """In float64, what keeps the library from casting to float32."""
        wide = next(self.parameters()).dtype == torch.float64
        return Unrounded() if wide else contextlib.nullcontext()

    def _valid(self, name: str, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Mask of the steps that belong to a sequence, (batch, steps) bool; raises for wrong tokens or lengths."""
        check_steps(name, tokens, 0, tokens=True)
        check_lengths(f"{name}_lengths", lengths, tokens)
        if lengths is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return valid_mask(tokens, lengths)

    def _blank(self, tokens: Tensor, inside: Tensor) -> Tensor:
        """Padding past the end, whatever stood there."""
        return torch.where(inside, tokens, self.config.pad)


def _keep(head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Have a head remember what it reads; a function of no model, so that copies of a model do not share it."""
    head.read = inputs[0]


def _last(value: Tensor, inside: Tensor) -> Tensor:
    """The last valid step of each sequence, (1, batch, features)."""
    return value[torch.arange(value.size(0), device=value.device), inside.sum(1) - 1][None]
