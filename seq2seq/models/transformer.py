"""The Transformer as the LSTMs' rival: the same data and calls, attention in place of recurrence.

As the base model of Vaswani et al. 2017, but layers normalise first (Xiong et al. 2020). The products are nn.Linear and
the attention is torch's own `scaled_dot_product_attention`: one code for training and inference, whereas
`nn.TransformerEncoder` switches in inference to another that nothing here would show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from seq2seq.layers.padding import last, valid_mask
from seq2seq.layers.transformer_layers import DecoderLayer, EncoderLayer, positions
from seq2seq.models.base import Config, Extent, Model, Stack, check_lengths, check_steps, checked_target, embedding
from seq2seq.models.cost import layer_products, parameters
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.field_checks import check_ints, check_likelihood, check_probability

#: Positions that a model keeps; further ones are computed when they are asked for.
TABLE = 1024


@dataclass(frozen=True)
class TransformerConfig(FamilyDefaults):
    """Sizes of a `TransformerSeq2Seq`.

    Attributes:
        hidden_size: of every layer and embedding.
        output_size: features of an output step; for tokens the size of the target vocabulary.
        num_layers: encoder layers.
        heads: of every attention; each has hidden_size / heads features.
        feedforward: units between the two products of a layer's feed-forward part; 4 * hidden_size when None.
        decoder_layers: `num_layers` when None.
        dropout: probability of dropping a value of an embedding or of what a layer adds, in training.
        source_features, target_features: features of a real-valued step; not read for tokens. The target's default
            to the source's.
        source_vocabulary, target_vocabulary: as in `Seq2SeqConfig`.
        likelihood: as in `Seq2SeqConfig`.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for one out of range, or a hidden size that the heads do not divide.
    """

    hidden_size: int
    output_size: int
    num_layers: int = 6
    heads: int = 8
    feedforward: int | None = None
    decoder_layers: int | None = None
    dropout: float = 0.0
    source_features: int = 1
    target_features: int | None = None
    source_vocabulary: int = 0
    target_vocabulary: int = 0
    likelihood: str = ""

    family: ClassVar[str] = "transformer"
    decodes: ClassVar[bool] = True
    bridged: ClassVar[bool] = True
    stacks: ClassVar[tuple[Stack, ...]] = ()

    def __post_init__(self) -> None:
        check_ints(self, 1, "hidden_size", "output_size", "num_layers", "heads", "source_features")
        check_ints(self, 1, "feedforward", "decoder_layers", "target_features")
        check_ints(self, 0, "source_vocabulary", "target_vocabulary")
        check_probability("dropout", self.dropout)
        if self.hidden_size % self.heads:
            msg = f"hidden_size is {self.hidden_size}, expected a multiple of the {self.heads} heads"
            raise ValueError(msg)
        check_likelihood(self)

    @property
    def input_size(self) -> int:
        """Features of a source step; for tokens the size of their embedding."""
        return self.hidden_size if self.source_vocabulary else self.source_features

    @property
    def target_size(self) -> int:
        """Features of a step that the decoder is fed; for tokens the size of their embedding."""
        return self.hidden_size if self.target_vocabulary else self.target_features or self.source_features

    @property
    def feedforward_size(self) -> int:
        """Units between the two products of a feed-forward part."""
        return self.feedforward or 4 * self.hidden_size

    @property
    def layers(self) -> tuple[int, int]:
        """Layers of encoder and decoder."""
        return self.num_layers, self.decoder_layers or self.num_layers

    @property
    def dense_parameters(self) -> int:
        """Values of all weights but the embeddings."""
        hidden, (encoder, decoder) = self.hidden_size, self.layers
        attention = 4 * hidden * (hidden + 1)
        feedforward = 2 * hidden * self.feedforward_size + self.feedforward_size + hidden
        norm = 2 * hidden
        layers = encoder * (attention + feedforward + 2 * norm) + decoder * (2 * attention + feedforward + 3 * norm)
        read = 0 if self.source_vocabulary else hidden * (self.input_size + 1)
        read += 0 if self.target_vocabulary else hidden * (self.target_size + 1)
        return layers + 2 * norm + read + self.head_size * (hidden + 1)

    def dense_products(self, extent: Extent, *, backward: bool) -> int:
        """FLOPs of the layers, see `layer_products`, of what reads real values, and of the head."""
        hidden, source, target = self.hidden_size, extent.source_steps, extent.target_steps
        feedforward = 4 * hidden * self.feedforward_size
        forward = layer_products(extent, self.layers, hidden, hidden, (feedforward, feedforward))
        forward += 2 * hidden * self.head_size * target
        # Real values are inputs, which take no gradient.
        read = 0 if self.source_vocabulary else 2 * self.input_size * hidden * source
        read += 0 if self.target_vocabulary else 2 * self.target_size * hidden * target
        return forward * (2 if backward else 1) + read

    def state_values(self, extent: Extent) -> int:
        """Values of the last steps of decoder and encoder."""
        return 2 * extent.sequences * self.hidden_size

    def build(self, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> TransformerSeq2Seq:
        """The model of these sizes; it has no LSTM to make."""
        del lstm
        return TransformerSeq2Seq(self)


def rival(config: Config, heads: int = 4) -> TransformerConfig:
    """The Transformer for the same data whose parameter count is nearest to that of a model, with as many layers.

    Args:
        config: of the model that it is to compete with.
        heads: of every attention; the hidden size is a multiple of them.
    """

    def sized(hidden_size: int) -> TransformerConfig:
        return TransformerConfig(
            hidden_size,
            config.output_size,
            config.num_layers,
            heads,
            dropout=config.dropout,
            source_features=1 if config.source_vocabulary else config.input_size,
            target_features=None if config.target_vocabulary else config.target_size,
            source_vocabulary=config.source_vocabulary,
            target_vocabulary=config.target_vocabulary,
            likelihood=config.likelihood,
        )

    wanted, hidden_size = parameters(config), heads
    while parameters(sized(hidden_size)) < wanted:
        hidden_size += heads
    return min(
        (sized(size) for size in (hidden_size, hidden_size - heads) if size),
        key=lambda found: abs(parameters(found) - wanted),
    )


class TransformerSeq2Seq(Model):
    """Encoder and decoder of attention layers, linear head; batch first.

    As in `Seq2Seq`, the decoder reads the source where there is no target.

    The state of decoding has, for each decoder layer, `self0`, `self1`, ...: keys and values of the steps so far,
    (steps, batch, 2 * hidden_size), and `source0`, ...: those of the source, (source steps, batch, 2 * hidden_size);
    and, where lengths were given, `inside`, (1, batch, source steps) bool. A step appends to the former and projects
    nothing but itself.

    Args:
        config: the sizes.

    Raises:
        TypeError, ValueError: from `forward`, for inputs of the wrong dtype or shape.
    """

    if TYPE_CHECKING:  # TorchScript does not know these annotations
        table: Tensor
        decoder: Any

    # Read by TorchScript.
    __constants__ = ("hidden_size", "source_features", "target_features", "source_tokens", "target_tokens")

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        hidden = config.hidden_size
        self.hidden_size = hidden
        self.source_features, self.target_features = config.input_size, config.target_size
        self.source_tokens, self.target_tokens = config.source_vocabulary > 0, config.target_vocabulary > 0
        # Either an embedding or a product; the other passes its input on.
        self.embed_source = embedding(config.source_vocabulary, hidden)
        self.read_source = nn.Identity() if self.source_tokens else nn.Linear(self.source_features, hidden)
        self.embed_target = embedding(config.target_vocabulary, hidden)
        self.read_target = nn.Identity() if self.target_tokens else nn.Linear(self.target_features, hidden)
        encoder, decoder = config.layers
        sizes = hidden, config.heads, config.feedforward_size, config.dropout
        self.encoder = nn.ModuleList([EncoderLayer(*sizes) for _ in range(encoder)])
        self.encoder_norm = nn.LayerNorm(hidden)
        self.decoder = nn.ModuleList([DecoderLayer(*sizes) for _ in range(decoder)])
        self.decoder_norm = nn.LayerNorm(hidden)
        self.fc = nn.Linear(hidden, config.head_size)
        self.dropout = nn.Dropout(config.dropout)
        # No weight: it is made again wherever a model is.
        self.register_buffer("table", positions(0, TABLE, hidden, torch.device("cpu")), persistent=False)
        for name, parameter in self.named_parameters():
            if name.startswith("embed"):
                # Times the root of the hidden size (see `_read`), as large as a position.
                nn.init.normal_(parameter, std=hidden**-0.5)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode with teacher forcing.

        Returns:
            Outputs (batch, target steps, head_size), past a target's length those of a zero state; and what the head
            reads at each target's last step, and the encoder gives at each source's, both (1, batch, hidden_size).
        """
        sizes, tokens = (self.source_features, self.target_features), (self.source_tokens, self.target_tokens)
        fed, lengths = checked_target(source, target, source_lengths, target_lengths, sizes, tokens)
        inside = None if source_lengths is None else valid_mask(source, source_lengths)
        memory = self._encode(source, inside)
        mask = None if inside is None else inside[:, None, None, :]
        within = None if lengths is None else valid_mask(fed, lengths)
        x = self._read(self.read_target(self.embed_target(_blank(fed, within))), 0)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        x = _blank(self.decoder_norm(x), within)
        return self.fc(x), last(x, lengths)[None], last(memory, source_lengths)[None]

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """State that the decoder starts from: the source's keys and values for each layer, and none of its own."""
        check_steps("source", source, self.source_features, self.source_tokens)
        check_lengths("lengths", lengths, source)
        inside = None if lengths is None else valid_mask(source, lengths)
        memory = self._encode(source, inside)
        state: dict[str, Tensor] = {}
        for number, layer in enumerate(self.decoder):
            projected = layer.cross.keys_values(memory).transpose(0, 1)
            state[f"source{number}"] = projected
            state[f"self{number}"] = projected[:0]
        if inside is not None:
            state["inside"] = inside[None]
        return state

    @torch.jit.export
    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one step."""
        x = self._read(self.read_target(self.embed_target(value.unsqueeze(1))), state["self0"].size(0))
        mask = state["inside"][0][:, None, None, :] if "inside" in state else None
        after = dict(state)
        for number, layer in enumerate(self.decoder):
            x, after[f"self{number}"] = layer.step(x, state[f"self{number}"], state[f"source{number}"], mask)
        return self.fc(self.decoder_norm(x)).squeeze(1), after

    def _encode(self, source: Tensor, inside: Tensor | None) -> Tensor:
        """(batch, source steps, hidden_size); steps past a length are never read."""
        x = self._read(self.read_source(self.embed_source(_blank(source, inside))), 0)
        mask = None if inside is None else inside[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask)
        memory: Tensor = self.encoder_norm(x)
        return memory

    def _read(self, embedded: Tensor, start: int) -> Tensor:
        """Embeddings (batch, steps, hidden_size) at their positions from `start` on."""
        steps = embedded.size(1)
        if start + steps <= self.table.size(0):
            place = self.table[start : start + steps]
        else:
            place = positions(start, steps, self.hidden_size, embedded.device)
        placed: Tensor = self.dropout(embedded * math.sqrt(self.hidden_size) + place.to(embedded.dtype))
        return placed


def _blank(value: Tensor, inside: Tensor | None) -> Tensor:
    """Zeros past the end: selected, not multiplied, since values there need not be finite or tokens."""
    if inside is None:
        return value
    if value.dim() > inside.dim():
        inside = inside[..., None]
    return torch.where(inside, value, torch.zeros_like(value))
