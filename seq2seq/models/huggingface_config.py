"""Sizes of an encoder-decoder of the transformers library: what it is built from, and the least work of its calls.

The sizes that the arithmetic needs are fields; everything else of the library's own configuration is kept as it is.
Nothing here imports the library but `build`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from seq2seq.models.base import Extent, Stack
from seq2seq.models.cost import layer_products
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.field_checks import check_ints
from seq2seq.models.huggingface import PretrainedSeq2Seq, transformers
from seq2seq.models.layer_groups import PretrainedError

#: Names of our fields in the library's configurations, by its `model_type`. Its other types load, train and decode, but
#: their work is not counted, so they are not workloads.
FIELDS: dict[str, dict[str, str]] = {
    "marian": {
        "hidden_size": "d_model",
        "num_layers": "encoder_layers",
        "decoder_layers": "decoder_layers",
        "feedforward": "encoder_ffn_dim",
        "decoder_feedforward": "decoder_ffn_dim",
        "output_size": "vocab_size",
        "positions": "max_position_embeddings",
    },
    "t5": {
        "hidden_size": "d_model",
        "num_layers": "num_layers",
        "decoder_layers": "num_decoder_layers",
        "feedforward": "d_ff",
        "output_size": "vocab_size",
    },
}
#: What of a configuration says nothing of the model's function, or is for the one who builds it to say.
_LEFT_OUT = ("transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path", "use_cache")


@dataclass(frozen=True)
class PretrainedConfig(FamilyDefaults):
    """A Marian or T5 model of the transformers library, or what is known of another of its encoder-decoders.

    Attributes:
        architecture: the library's `model_type`.
        hidden_size: of its layers and embeddings.
        output_size: tokens of the vocabulary, on both sides.
        num_layers: encoder layers.
        feedforward: units between the two products of an encoder layer's feed-forward part; 0 where that is not known.
        decoder_layers: `num_layers` when None.
        decoder_feedforward: `feedforward` when None.
        positions: steps that it has positions for; None when any number will do.
        pad, begin, end: ids of its special tokens: padding, what decoding starts with, what ends a sequence.
        others: the rest of the library's configuration, as JSON.
        name: folder or hub name that it came from.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for one out of range.
    """

    architecture: str
    hidden_size: int
    output_size: int
    num_layers: int
    feedforward: int = 0
    decoder_layers: int | None = None
    decoder_feedforward: int | None = None
    positions: int | None = None
    pad: int = 0
    begin: int = 0
    end: int = 1
    others: str = "{}"
    name: str = ""

    family: ClassVar[str] = "pretrained"
    decodes: ClassVar[bool] = True
    bridged: ClassVar[bool] = True
    scriptable: ClassVar[bool] = False
    stacks: ClassVar[tuple[Stack, ...]] = ()

    def __post_init__(self) -> None:
        check_ints(self, 1, "hidden_size", "output_size", "num_layers")
        check_ints(self, 0, "pad", "begin")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = self._other(name, 1)
            if self.architecture == "marian" and self.hidden_size % heads:
                msg = f"hidden_size is {self.hidden_size}, expected a multiple of the {heads} {name}"
                raise ValueError(msg)

    @classmethod
    def of(cls, theirs: Any, name: str = "") -> Self:
        """Read a configuration of the library.

        Args:
            theirs: `model.config` of an encoder-decoder.
            name: where it came from.

        Raises:
            PretrainedError: where it says none that can be, in one line.
        """
        try:
            return cls._of(theirs, name)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = " ".join(str(error).split())
            msg = f"{name or theirs.model_type}: the sizes of the model cannot be read from its configuration: {what}"
            raise PretrainedError(msg) from error

    @classmethod
    def _of(cls, theirs: Any, name: str) -> Self:
        """The same, with whatever error a configuration gives that is not what it should be."""
        content = theirs.to_dict()
        known = FIELDS.get(theirs.model_type, {})
        start = theirs.decoder_start_token_id
        sizes = {ours: content[name] for ours, name in known.items()}
        if not known:
            sizes = {
                "hidden_size": theirs.hidden_size,
                "output_size": theirs.vocab_size,
                "num_layers": theirs.num_hidden_layers,
            }
        left = {"model_type", *_LEFT_OUT, *known.values()}
        others = {name: value for name, value in sorted(content.items()) if name not in left}
        return cls(
            theirs.model_type,
            **sizes,
            pad=theirs.pad_token_id,
            begin=theirs.pad_token_id if start is None else start,
            end=theirs.eos_token_id,
            others=json.dumps(others),
            name=name,
        )

    def as_measured(self) -> Self:
        """The same model that drops nothing in training, its matrices drawn wide where weights are drawn.

        Drawn with the library's deviation of 0.02, Marian's attention looks everywhere alike, and the gradients of what
        asks nearly cancel: in bf16 the gate refused a right one in 1 of 12 problems, and drawn wide in none (at most
        0.36 of the limit).
        """
        others = {name: 0.0 if _drops(name, value) else value for name, value in json.loads(self.others).items()}
        if self.architecture == "marian":
            others["init_std"] = self.hidden_size**-0.5
        return dataclasses.replace(self, others=json.dumps(others))

    @property
    def dropout(self) -> float:
        """The largest of its probabilities of dropping a value or a layer, in training."""
        found = [float(value) for name, value in json.loads(self.others).items() if _drops(name, value)]
        return max(found, default=0.0)

    @property
    def uncounted(self) -> str | None:
        """Reason why its parameters and work are not known here; None when they are."""
        if self.architecture not in FIELDS:
            return f"the work of the architecture {self.architecture!r} is not counted, expected {' or '.join(FIELDS)}"
        if not self._other("share_encoder_decoder_embeddings", True):
            return "its sides have vocabularies of their own, whose work is not counted: expected one for both"
        return None

    @property
    def kinked(self) -> bool:
        """Return whether its activation has a discontinuous gradient, as T5's does.

        Training a right T5 with ReLUs, the gate refused none of 36 problems in fp32, 7 of 80 with autocast to bf16 and
        12 of 36 to fp16; with its smooth activation none of as many.
        """
        names = ("activation_function", "feed_forward_proj")
        return any("relu" in str(self._other(name, "")) for name in names)

    @property
    def source_vocabulary(self) -> int:
        """One vocabulary for both sides."""
        return self.output_size

    target_vocabulary = source_vocabulary

    @property
    def shared_embedding(self) -> str:
        """Parts that share one matrix of embeddings: both `sides`, or the `head` too."""
        return "head" if self._other("tie_word_embeddings", True) else "sides"

    @property
    def input_size(self) -> int:
        """Size of an embedding."""
        return self.hidden_size

    @property
    def layers(self) -> tuple[int, int]:
        """Layers of encoder and decoder."""
        return self.num_layers, self.decoder_layers or self.num_layers

    @property
    def attention_size(self) -> int:
        """Features of all heads of an attention together."""
        if self.architecture == "t5":
            return int(self._other("num_heads", 8) * self._other("d_kv", 64))
        return self.hidden_size

    @property
    def dense_parameters(self) -> int:
        """Values of all weights but the embeddings; an embedding that the head shares is among them."""
        hidden, inner, (encoder, decoder) = self.hidden_size, self.attention_size, self.layers
        attention, norm = 4 * hidden * inner, hidden
        narrow, wide = (self._products * hidden * units for units in self._units)
        head, beside = hidden * self.output_size, 0
        if self.architecture == "marian":
            attention, norm = attention + 3 * inner + hidden, 2 * hidden
            narrow, wide = narrow + self._units[0] + hidden, wide + self._units[1] + hidden
        else:
            # A bias a bucket of distances and head, on each side one for all layers, and a last norm.
            beside = 2 * self._other("relative_attention_num_buckets", 32) * self._other("num_heads", 8) + 2 * norm
        return encoder * (attention + narrow + 2 * norm) + decoder * (2 * attention + wide + 3 * norm) + head + beside

    def dense_products(self, extent: Extent, *, backward: bool) -> int:
        """FLOPs of the layers (`layer_products`) and the head; T5 adds its biases of positions, without products."""
        hidden = self.hidden_size
        narrow, wide = (2 * self._products * hidden * units for units in self._units)
        forward = layer_products(extent, self.layers, hidden, self.attention_size, (narrow, wide))
        forward += 2 * hidden * self.output_size * extent.target_steps
        return forward * (2 if backward else 1)

    def state_values(self, extent: Extent) -> int:
        """Values of the last steps of decoder and encoder."""
        return 2 * extent.sequences * self.hidden_size

    def theirs(self) -> dict[str, Any]:
        """The library's own configuration, as a dictionary."""
        content: dict[str, Any] = json.loads(self.others)
        values = {name: getattr(self, name) for name in FIELDS.get(self.architecture, {})}
        values |= {"decoder_layers": self.layers[1], "decoder_feedforward": self._units[1]}
        content |= {name: values[ours] for ours, name in FIELDS.get(self.architecture, {}).items()}
        return content | {"pad_token_id": self.pad, "decoder_start_token_id": self.begin, "eos_token_id": self.end}

    def build(self, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> PretrainedSeq2Seq:
        """The model of these sizes, weights drawn as the library draws them; it has no LSTM to make.

        Raises:
            PretrainedError: where the library is not installed, or does not build it.
        """
        del lstm
        if self.uncounted:
            raise PretrainedError(self.uncounted)
        library = transformers()
        theirs = library.AutoConfig.for_model(self.architecture, **self.theirs())
        model = library.AutoModelForSeq2SeqLM.from_config(theirs)
        # Parts of a model that is made without memory, only for its sizes, do not share what they otherwise share.
        model.tie_weights()
        return PretrainedSeq2Seq(model, type(self).of(model.config, self.name))

    @property
    def _units(self) -> tuple[int, int]:
        """Units of a feed-forward part in encoder and decoder."""
        return self.feedforward, self.decoder_feedforward or self.feedforward

    @property
    def _products(self) -> int:
        """Products of a feed-forward part: a gate is a third."""
        return 3 if str(self._other("feed_forward_proj", "")).startswith("gated") else 2

    def _other(self, name: str, default: Any) -> Any:
        return json.loads(self.others).get(name, default)


def _drops(name: str, value: object) -> bool:
    """Return whether an entry of a configuration is a probability of dropping something."""
    return "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool)


def marian(hidden_size: int, layers: int, heads: int, feedforward: int, vocabulary: int) -> PretrainedConfig:
    """The sizes of a Marian model as Helsinki-NLP's are: SiLU, scaled embeddings, one matrix for both sides and head.

    Args:
        hidden_size: of every layer.
        layers: of encoder and of decoder.
        heads: of every attention; they divide the hidden size.
        feedforward: units of every feed-forward part.
        vocabulary: tokens, the last of which is the padding.
    """
    others = {
        "activation_function": "swish",
        "scale_embedding": True,
        "static_position_embeddings": True,
        "tie_word_embeddings": True,
        "share_encoder_decoder_embeddings": True,
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "decoder_vocab_size": vocabulary,
        "dropout": 0.0,
    }
    return PretrainedConfig(
        "marian",
        hidden_size,
        vocabulary,
        layers,
        feedforward,
        positions=512,
        pad=vocabulary - 1,
        begin=vocabulary - 1,
        end=0,
        others=json.dumps(others),
    ).as_measured()
