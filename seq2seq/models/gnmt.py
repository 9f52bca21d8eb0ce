"""A deep translation model in the manner of GNMT (Wu et al. 2016), as NVIDIA's DeepLearningExamples runs it.

Every layer is an LSTM of its own, called once over the whole sequence: attention asks with the decoder's first layer,
so that no step waits for what was found in the one before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seq2seq.layers.padding import Reader, blank, last, valid_mask
from seq2seq.models.attention_layer import Attention, attention_parameters, attention_products
from seq2seq.models.base import Extent, Model, Stack, checked_target, embedding, make_lstm
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.field_checks import check_ints, check_probability

LEAST_LAYERS = 2


@dataclass(frozen=True)
class GNMTConfig(FamilyDefaults):
    """Sizes of a `GNMT`.

    Attributes:
        input_size: features of a source step; for tokens the size of their embedding.
        hidden_size: of every layer, and of the attention; the encoder's first has it per direction.
        output_size: features of an output step; for tokens the size of the target vocabulary.
        num_layers: of the encoder and of the decoder, at least 2.
        dropout: probability of dropping a value of a layer's input, in training.
        decoder_input_size: features of a decoder step; `input_size` when None.
        source_vocabulary: tokens of the source language; 0 for real-valued sources.
        target_vocabulary: tokens fed to the decoder; 0 for real-valued targets.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for a size, count or probability out of range.
    """

    input_size: int
    hidden_size: int
    output_size: int
    num_layers: int = 4
    dropout: float = 0.0
    decoder_input_size: int | None = None
    source_vocabulary: int = 0
    target_vocabulary: int = 0

    family: ClassVar[str] = "gnmt"
    decodes: ClassVar[bool] = True
    bridged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ints(self, 1, "input_size", "hidden_size", "output_size")
        check_ints(self, LEAST_LAYERS, "num_layers")
        check_ints(self, 1, "decoder_input_size")
        check_ints(self, 0, "source_vocabulary", "target_vocabulary")
        check_probability("dropout", self.dropout)

    @property
    def target_size(self) -> int:
        """Features of a step that the decoder is fed."""
        return self.decoder_input_size or self.input_size

    @property
    def compared(self) -> tuple[str, int, int, int]:
        """The first arguments of `Attention`."""
        return "bahdanau", self.hidden_size, self.hidden_size, self.hidden_size

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """LSTM layers of the model, the encoder's first."""
        hidden = self.hidden_size
        encoder = [Stack("encoder.0", self.input_size, hidden, 1, 2, embedded=self.source_vocabulary > 0)]
        decoder = [Stack("decoder.0", self.target_size, hidden, 1, embedded=self.target_vocabulary > 0)]
        for layer in range(1, self.num_layers):
            features = 2 * hidden if layer == 1 else hidden
            encoder.append(Stack(f"encoder.{layer}", features, hidden, 1, embedded=True))
            decoder.append(Stack(f"decoder.{layer}", 2 * hidden, hidden, 1, embedded=True))
        decoder = [dataclasses.replace(stack, decodes=True, from_zeros=True) for stack in decoder]
        return (*encoder, *decoder)

    @property
    def dense_parameters(self) -> int:
        """Values of the weights of attention and head."""
        return attention_parameters(*self.compared, scaled=True) + self.output_size * (self.hidden_size + 1)

    def dense_products(self, extent: Extent, *, backward: bool) -> int:
        """FLOPs of the products of attention and head."""
        head = 2 * self.hidden_size * self.output_size * extent.target_steps
        return (attention_products(*self.compared, extent) + head) * (2 if backward else 1)

    def state_values(self, extent: Extent) -> int:
        """Values of each decoder layer's final h, and of the last context."""
        return (self.num_layers + 1) * extent.sequences * self.hidden_size

    def build(self, lstm: Callable[..., nn.RNNBase]) -> GNMT:
        """The model of these sizes."""
        return GNMT(self, lstm)


class GNMT(Model):
    """Encoder of one bidirectional and further unidirectional layers, decoder of as many with attention; batch first.

    Normalised Bahdanau attention is asked by the output of the decoder's first layer; what it finds is joined to the
    input of every further layer. From the third layer on, a layer's input is added to its output, in the encoder and
    the decoder. The decoder starts from zeros.

    Only the encoder's first layer needs to know where a sequence ends: the others read forward, so that what comes
    after the end changes nothing before it, and run over the whole padded batch.

    The state of decoding: `hidden` and `cell`, (layers, batch, hidden size), one layer of the decoder each; `memory`
    and `keys`, (1, batch, source steps, hidden size); `mask`, (1, batch, source steps) bool, where lengths were given.

    Args:
        config: the sizes.
        lstm: makes the layers, as for `Seq2Seq`.

    Raises:
        TypeError, ValueError: from `forward`, for inputs of the wrong dtype or shape.
    """

    __constants__ = ("sizes", "tokens", "depth", "hidden_size")

    def __init__(self, config: GNMTConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = config = dataclasses.replace(config)
        self.sizes = (config.input_size, config.target_size)
        self.tokens = (config.source_vocabulary > 0, config.target_vocabulary > 0)
        self.depth, self.hidden_size = config.num_layers, config.hidden_size

        self.embed_source = embedding(config.source_vocabulary, config.input_size)
        self.embed_target = embedding(config.target_vocabulary, config.target_size)
        layers = [Reader(make_lstm(lstm, stack)) for stack in config.stacks]
        self.encoder: Any = nn.ModuleList(layers[: config.num_layers])
        self.decoder: Any = nn.ModuleList(layers[config.num_layers :])
        self.attention = Attention(*config.compared, scaled=True)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(config.hidden_size, config.head_size)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode with teacher forcing; as `Seq2Seq.run`.

        Returns:
            Outputs (batch, target steps, output_size), past a target's length the head's bias; each layer's final h,
            (layers, batch, hidden size); and what attention found last, (1, batch, hidden size).
        """
        fed, lengths = checked_target(source, target, source_lengths, target_lengths, self.sizes, self.tokens)
        state = self.encode(source, source_lengths)
        outputs, hiddens, _, context = self._decode(fed, state, lengths)
        finals = [last(hidden, lengths) for hidden in hiddens]
        return outputs, torch.stack(finals), last(context, lengths).unsqueeze(0)

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The state that decoding starts from; see the class."""
        x = self.embed_source(source)
        for layer, reader in enumerate(self.encoder):
            residual = x
            x, _, _ = reader(self.dropout(x), None, lengths if layer == 0 else None)
            if layer > 1:
                x = x + residual
        zeros = x.new_zeros(self.depth, x.size(0), self.hidden_size)
        memory = blank(x, lengths)
        state = {
            "hidden": zeros,
            "cell": zeros,
            "memory": memory.unsqueeze(0),
            "keys": self.attention.key(memory).unsqueeze(0),
        }
        if lengths is not None:
            state["mask"] = valid_mask(memory, lengths).unsqueeze(0)
        return state

    @torch.jit.export
    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one step."""
        outputs, hiddens, cells, _ = self._decode(value.unsqueeze(1), state, None)
        after = state.copy()
        after["hidden"] = torch.cat(hiddens, 1).transpose(0, 1).contiguous()
        after["cell"] = torch.cat(cells)
        return outputs.squeeze(1), after

    def _decode(
        self, target: Tensor, state: dict[str, Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Outputs, and of each layer the h of all steps (batch, steps, hidden) and the last c; what attention found."""
        mask: Tensor | None = None
        if "mask" in state:
            mask = state["mask"].squeeze(0)
        x = blank(self.embed_target(target), lengths)
        context = x
        hiddens: list[Tensor] = []
        cells: list[Tensor] = []
        for layer, reader in enumerate(self.decoder):
            start = (state["hidden"][layer : layer + 1], state["cell"][layer : layer + 1])
            residual, given = x, self.dropout(x)
            if layer > 0:
                given = torch.cat([given, self.dropout(context)], -1)
            x, _, cell = reader(given, start, None)
            hiddens.append(x)
            cells.append(cell)
            if layer == 0:
                context = self.attention(x, state["memory"].squeeze(0), state["keys"].squeeze(0), mask)
            if layer > 1:
                x = x + residual
        return self.fc(blank(x, lengths)), hiddens, cells, context
