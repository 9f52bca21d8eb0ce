"""Pre-trained models: fine-tuning one with parts frozen and rates by layer, and other people's behind our calls.

Theirs are encoder-decoders of the transformers library (Marian, T5, BART), loaded by its own code. They train and
decode as ours do; the benchmark does not measure them, whose sizes and work only their library knows.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2seq.contract import Model, Stack, check_lengths, check_steps

#: By how much a layer's rate is lower than that of the layer above it (Howard & Ruder 2018, section 3.2).
RATE_FACTOR = 2.6
#: Number of a layer in the name of a parameter: of a list of layers, or within one nn.LSTM.
_LAYER = re.compile(r"\.(\d+)\.|_l(\d+)(?:_reverse)?$")


class PretrainedError(ValueError):
    """A model that cannot be loaded or fine-tuned as asked; the message is one line."""


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Keep parameters from training, and let all others train.

    Args:
        model: any.
        patterns: of parameters' names, with * and ? as in file names: `encoder.*`, `embed_*`.

    Returns:
        Names of the frozen parameters.

    Raises:
        PretrainedError: for a pattern that no name fits, and when nothing would be left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    check_patterns(names, patterns)
    frozen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if len(frozen) == len(names):
        msg = f"{', '.join(map(repr, patterns))} would freeze all parameters, and leave nothing to train"
        raise PretrainedError(msg)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return frozen


def check_patterns(names: Sequence[str], patterns: Iterable[str]) -> None:
    """Raise PretrainedError for a pattern that none of the parameters' names fits."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            msg = f"no parameter's name fits {pattern!r}; names begin with {', '.join(_parts(names))}"
            raise PretrainedError(msg)


def layer_groups(model: nn.Module) -> list[list[str]]:
    """Names of the parameters, layer by layer in the order in which the model defines them: what it reads with first.

    A layer is one of a list, or of the layers within an LSTM, or else a part of the model as a whole.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name, _ in model.named_parameters():
        layer = _LAYER.search(name)
        # What stands before the number tells encoder from decoder in models that wrap both in one part.
        part = name[: layer.start()] if layer else ".".join(name.split(".")[:-1])
        part = part.split(".weight")[0].split(".bias")[0]
        groups.setdefault((part, int(layer[1] or layer[2]) if layer else 0), []).append(name)
    return list(groups.values())


def parameter_groups(
    model: nn.Module, rate: float, *, factor: float = RATE_FACTOR, layers: Sequence[Sequence[str]] | None = None
) -> list[dict[str, Any]]:
    """Parameters with a rate a layer, for a torch optimizer: the topmost gets `rate`, each below it `factor` less.

    Args:
        model: frozen parameters of it are left out; their layers keep their place.
        rate: of the topmost layer.
        factor: between neighbouring layers; 1 for one rate (Howard & Ruder 2018).
        layers: patterns of names, as for `freeze`, for each layer from the lowest up; `layer_groups` when None.

    Returns:
        Groups with `params`, `lr` and `names`, lowest layer first.

    Raises:
        PretrainedError: for a rate or factor out of range, and for a parameter in no layer or in two.
    """
    if not rate > 0 or not factor >= 1:
        msg = f"rate is {rate} and factor {factor}, expected a rate above 0 and a factor of at least 1"
        raise PretrainedError(msg)
    parameters = dict(model.named_parameters())
    if layers is None:
        chosen = layer_groups(model)
    else:
        chosen = [[n for n in parameters if any(fnmatch.fnmatchcase(n, p) for p in patterns)] for patterns in layers]
    for name in parameters:
        found = sum(name in names for names in chosen)
        if found != 1:
            msg = f"{name} is in {found} layers, expected each parameter in one"
            raise PretrainedError(msg)
    groups = []
    for depth, names in enumerate(reversed(chosen)):
        trained = [name for name in names if parameters[name].requires_grad]
        if trained:
            values = [parameters[name] for name in trained]
            groups.append({"params": values, "lr": rate / factor**depth, "names": trained})
    return groups[::-1]


@dataclass(frozen=True)
class PretrainedConfig:
    """What is known of a model of the transformers library.

    Attributes:
        name: folder or hub name that it came from.
        architecture: its `model_type`, such as `marian` or `t5`.
        hidden_size: of its layers.
        output_size: tokens that it tells apart.
        num_layers: encoder layers.
        pad, begin, end: ids of its special tokens: padding, what decoding starts with, what ends a sequence.
    """

    name: str
    architecture: str
    hidden_size: int
    output_size: int
    num_layers: int
    pad: int
    begin: int
    end: int

    family: ClassVar[str] = "pretrained"
    decodes: ClassVar[bool] = True
    bridged: ClassVar[bool] = True
    stacks: ClassVar[tuple[Stack, ...]] = ()
    dropout: ClassVar[float] = 0.0

    @property
    def source_vocabulary(self) -> int:
        """One vocabulary for both sides."""
        return self.output_size

    target_vocabulary = source_vocabulary

    @property
    def head_size(self) -> int:
        """Values of an output step."""
        return self.output_size

    @property
    def input_size(self) -> int:
        """Size of an embedding."""
        return self.hidden_size

    target_size = input_size


def load_transformers(name: str | Path) -> tuple[PretrainedSeq2Seq, Any]:
    """An encoder-decoder of the transformers library, and its tokenizer, in evaluation mode.

    Args:
        name: a folder that its `save_pretrained` wrote, or a name on the Hugging Face hub.

    Raises:
        PretrainedError: when the library is not installed, or gives no such model.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        msg = f"models of others need transformers, which does not import here ({error}): pip install transformers"
        raise PretrainedError(msg) from error
    try:
        model = library.AutoModelForSeq2SeqLM.from_pretrained(name)
        tokenizer = library.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        msg = f"{name}: transformers does not load it: {' '.join(str(error).split())}"
        raise PretrainedError(msg) from error
    return PretrainedSeq2Seq(model, str(name)).eval(), tokenizer


class PretrainedSeq2Seq(Model):
    """A `transformers` encoder-decoder behind our calls, its own cache as the state of decoding.

    The state has `memory`, (1, batch, source steps, hidden_size), and `inside`, (1, batch, source steps) int64; after
    the first step also, for each decoder layer, keys and values of the steps so far as `self0`, ..., and of the
    source as `source0`, ..., (2, batch, heads, steps, features of a head).

    Args:
        model: as `AutoModelForSeq2SeqLM` gives it.
        name: where it came from.
    """

    def __init__(self, model: Any, name: str = "") -> None:
        super().__init__()
        theirs = model.config
        start = theirs.decoder_start_token_id
        self.config = PretrainedConfig(
            name,
            theirs.model_type,
            theirs.hidden_size,
            theirs.vocab_size,
            theirs.num_hidden_layers,
            theirs.pad_token_id,
            theirs.pad_token_id if start is None else start,
            theirs.eos_token_id,
        )
        self.model = model

    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher forcing.

        Args:
            source: (batch, source steps) int64 tokens.
            target: the same for the target, beginning with `config.begin`.
            source_lengths: valid steps of each source; all when absent.
            target_lengths: the same for the target.

        Returns:
            Outputs (batch, target steps, output_size), zeros past a target's length; what the head reads at each
            target's last step, and the encoder gives at each source's, (1, batch, hidden_size).

        Raises:
            TypeError, ValueError: for what is no tokens, or lengths that do not fit them.
        """
        if target is None:
            target, target_lengths = source, source_lengths if target_lengths is None else target_lengths
        inside, within = self._inside("source", source, source_lengths), self._inside("target", target, target_lengths)
        found = self.model(
            input_ids=self._blank(source, inside),
            attention_mask=inside.long(),
            decoder_input_ids=self._blank(target, within),
            output_hidden_states=True,
            use_cache=False,
        )
        outputs = torch.where(within[..., None], found.logits, 0.0)
        hidden = _last(found.decoder_hidden_states[-1], within)
        return outputs, hidden, _last(found.encoder_last_hidden_state, inside)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """What the encoder gives; the decoder's keys and values of it are made by the first step and kept."""
        inside = self._inside("source", source, lengths)
        encoder = self.model.get_encoder()
        found = encoder(input_ids=self._blank(source, inside), attention_mask=inside.long())
        return {"memory": found.last_hidden_state[None], "inside": inside.long()[None]}

    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one token of each sequence."""
        library = importlib.import_module("transformers")
        kept = sum(name.startswith("self") for name in state)
        if kept:
            layers = [(*state[f"self{number}"], *state[f"source{number}"]) for number in range(kept)]
            cache = library.EncoderDecoderCache(layers)
        else:
            cache = library.EncoderDecoderCache(library.DynamicCache(), library.DynamicCache())
        found = self.model(
            encoder_outputs=library.modeling_outputs.BaseModelOutput(last_hidden_state=state["memory"][0]),
            attention_mask=state["inside"][0],
            decoder_input_ids=value[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        after = {"memory": state["memory"], "inside": state["inside"]}
        given = found.past_key_values
        own, crossed = given.self_attention_cache.layers, given.cross_attention_cache.layers
        for number, (self_layer, source_layer) in enumerate(zip(own, crossed, strict=True)):
            after[f"self{number}"] = torch.stack([self_layer.keys, self_layer.values])
            # Projected once, and then handed on as it is.
            name = f"source{number}"
            after[name] = state[name] if kept else torch.stack([source_layer.keys, source_layer.values])
        return found.logits[:, -1], after

    def _inside(self, name: str, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """Which steps are not past their sequence's end, (batch, steps) bool."""
        check_steps(name, tokens, 0, tokens=True)
        check_lengths(f"{name}_lengths", lengths, tokens)
        if lengths is None:
            return torch.ones_like(tokens, dtype=torch.bool)
        return torch.arange(tokens.size(1), device=tokens.device) < lengths.to(tokens.device)[:, None]

    def _blank(self, tokens: Tensor, inside: Tensor) -> Tensor:
        """Padding past the end, whatever stood there."""
        return torch.where(inside, tokens, self.config.pad)


def _last(value: Tensor, inside: Tensor) -> Tensor:
    """The last valid step of each sequence, (1, batch, features)."""
    return value[torch.arange(value.size(0), device=value.device), inside.sum(1) - 1][None]


def _parts(names: Sequence[str]) -> list[str]:
    """First words of dotted names, each once."""
    return list(dict.fromkeys(name.split(".")[0] for name in names))
