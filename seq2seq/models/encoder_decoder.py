"""The Seq2Seq of the seed: an encoder LSTM, a decoder LSTM started from its final state, and a linear head.

Beyond the seed: token inputs, several layers, a bidirectional encoder, dropout, and sequences of different lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from seq2seq.models.base import Extent, Model, Stack, StreamedLSTM, checked_target, embedding, make_lstm
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.field_checks import check_bool, check_ints, check_likelihood, check_probability


@dataclass(frozen=True)
class Seq2SeqConfig(FamilyDefaults):
    """Sizes of a `Seq2Seq`.

    Attributes:
        input_size: features of a source step; for tokens the size of their embedding.
        hidden_size: hidden size of the encoder, per direction.
        output_size: features of an output step; for tokens the size of the target vocabulary.
        num_layers: encoder layers.
        bidirectional: whether the encoder reads both ways.
        dropout: probability of dropping a value between layers, in training.
        decoder_input_size: features of a decoder step; `input_size` when None.
        decoder_hidden_size: hidden size of the decoder; `hidden_size` when None.
        decoder_layers: decoder layers; `num_layers` when None. They start from the encoder's topmost layers.
        source_vocabulary: tokens of the source language; 0 for real-valued sources.
        target_vocabulary: tokens fed to the decoder; 0 for real-valued targets.
        likelihood: key of `LIKELIHOODS`; where it is not "", outputs are the parameters of that distribution for each
            of the `output_size` values, and the loss is the negative log likelihood (Salinas et al. 2020, DeepAR), or
            of `quantile` the quantiles `QUANTILES`, and the loss is the pinball loss (Lim et al. 2021, TFT).

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for a size, count or probability out of range, or more decoder than encoder layers.
    """

    input_size: int
    hidden_size: int
    output_size: int
    num_layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    decoder_input_size: int | None = None
    decoder_hidden_size: int | None = None
    decoder_layers: int | None = None
    source_vocabulary: int = 0
    target_vocabulary: int = 0
    likelihood: str = ""

    family: ClassVar[str] = "lstm"
    decodes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ints(self, 1, "input_size", "hidden_size", "output_size", "num_layers")
        check_ints(self, 1, "decoder_input_size", "decoder_hidden_size", "decoder_layers")
        check_ints(self, 0, "source_vocabulary", "target_vocabulary")
        check_bool("bidirectional", self.bidirectional)
        check_probability("dropout", self.dropout)
        check_likelihood(self)
        most = self.most_decoder_layers
        if self.decoder_layers is not None and most is not None and self.decoder_layers > most:
            msg = (
                f"decoder_layers is {self.decoder_layers} but the encoder has {self.num_layers}; "
                "each decoder layer starts from the state of an encoder layer, so give at most as many"
            )
            raise ValueError(msg)

    @property
    def most_decoder_layers(self) -> int | None:
        """Number of decoder layers that find a state to start from; None for any number."""
        return self.num_layers

    @property
    def bridged(self) -> bool:
        """Return whether the encoder's state must be projected to fit the decoder."""
        return self.bidirectional or self.decoder_hidden_size not in {None, self.hidden_size}

    @property
    def target_size(self) -> int:
        """Features of a step that the decoder is fed."""
        return self.decoder_input_size or self.input_size

    @property
    def dense_parameters(self) -> int:
        """Values of the weights of bridge and head."""
        encoded, decoded = self._state_sizes
        return self.head_size * (decoded + 1) + (2 * decoded * (encoded + 1) if self.bridged else 0)

    def dense_products(self, extent: Extent, *, backward: bool) -> int:
        """FLOPs of the products of bridge and head."""
        encoded, decoded = self._state_sizes
        states = 2 * self.stacks[-1].num_layers * extent.sequences
        forward = 2 * decoded * self.head_size * extent.target_steps
        forward += 2 * encoded * decoded * states if self.bridged else 0
        return forward * (2 if backward else 1)

    def state_values(self, extent: Extent) -> int:
        """Values of the decoder's final h and c."""
        decoder = self.stacks[-1]
        return 2 * decoder.num_layers * extent.sequences * decoder.hidden_size

    @property
    def _state_sizes(self) -> tuple[int, int]:
        """Size of the encoder's state, both directions together, and of the decoder's."""
        encoder, decoder = self.stacks
        return encoder.hidden_size * encoder.directions, decoder.hidden_size

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """LSTMs of the model, encoder first."""
        decoder = (
            self.target_size,
            self.decoder_hidden_size or self.hidden_size,
            self.decoder_layers or self.num_layers,
        )
        return (
            Stack(
                "encoder",
                self.input_size,
                self.hidden_size,
                self.num_layers,
                2 if self.bidirectional else 1,
                embedded=self.source_vocabulary > 0,
            ),
            Stack("decoder", *decoder, decodes=True, embedded=self.target_vocabulary > 0),
        )

    def build(self, lstm: Callable[..., nn.RNNBase]) -> Seq2Seq:
        """The model of these sizes."""
        return Seq2Seq(self, lstm)


class Seq2Seq(Model):
    """Encoder LSTM, decoder LSTM started from the encoder's final state, linear head; batch first.

    The seed builds its decoder for `hidden_dim` input features but feeds it the source, which has `input_dim`, so
    its own example raises. Here the decoder is built for what it is fed: `decoder_input_size` features, which
    default to `input_size`. As in the seed, `model(x)` feeds the source to the decoder again; with `target`, the
    decoder is fed that instead (teacher forcing).

    With a bidirectional encoder, or a decoder of another size, one linear map for h and one for c brings the
    encoder's state to the decoder's size (See et al. 2017, without their ReLU).

    Args:
        config: the sizes.
        lstm: makes both LSTMs, with the parameters of `torch.nn.LSTM`. `torch.nn.LSTM` itself, and any drop-in
            for it, gets packed sequences where lengths are given; one with `takes_lengths`, as
            `kernels.reference.LoopLSTM`, gets the padded ones and the lengths.

    Raises:
        TypeError, ValueError: from `forward`, for inputs of the wrong dtype or shape.
    """

    # Read by TorchScript, which then compiles only the branch taken.
    __constants__ = (
        "padded",
        "source_features",
        "target_features",
        "source_tokens",
        "target_tokens",
        "directions",
        "decoder_layers",
        "rearranged",
        "steps_in_place",
    )

    def __init__(self, config: Seq2SeqConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        decoder_hidden = config.decoder_hidden_size or config.hidden_size
        decoder_layers = config.decoder_layers or config.num_layers
        self.source_features = config.input_size
        self.target_features = config.target_size
        self.source_tokens = config.source_vocabulary > 0
        self.target_tokens = config.target_vocabulary > 0
        self.directions = 2 if config.bidirectional else 1
        self.decoder_layers = decoder_layers
        self.rearranged = config.bidirectional or decoder_layers != config.num_layers

        self.embed_source = embedding(config.source_vocabulary, config.input_size)
        self.embed_target = embedding(config.target_vocabulary, config.target_size)
        encoder, decoder = config.stacks
        self.encoder = make_lstm(lstm, encoder, config.dropout)
        self.padded: bool = getattr(self.encoder, "takes_lengths", False)
        encoded = config.hidden_size * self.directions
        self.bridge_hidden = nn.Linear(encoded, decoder_hidden) if config.bridged else nn.Identity()
        self.bridge_cell = nn.Linear(encoded, decoder_hidden) if config.bridged else nn.Identity()
        self.decoder = make_lstm(lstm, decoder, config.dropout)
        # One step without the work that a whole sequence asks for, as `kernels.LSTM` and `CellLSTM` have it.
        self.steps_in_place = callable(getattr(self.decoder, "step", None))
        self.fc = nn.Linear(decoder_hidden, config.head_size)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode with teacher forcing. Outputs past a target's length are those of a zero state."""
        sizes, tokens = (self.source_features, self.target_features), (self.source_tokens, self.target_tokens)
        fed, lengths = checked_target(source, target, source_lengths, target_lengths, sizes, tokens)
        outputs, state = self.decode(fed, self.encode(source, source_lengths), lengths)
        return outputs, state["hidden"], state["cell"]

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """State that the decoder starts from: `hidden` and `cell`, (decoder layers, batch, decoder hidden size)."""
        embedded = self.embed_source(source)
        if lengths is None:
            _, (hidden, cell) = self.encoder(embedded)
        elif self.padded:
            _, (hidden, cell) = self.encoder(embedded, None, lengths)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            _, (hidden, cell) = self.encoder(packed)
        hidden, cell = self._start(hidden, cell)
        return {"hidden": hidden, "cell": cell}

    @torch.jit.export
    def decode(
        self, target: Tensor, state: dict[str, Tensor], lengths: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode several steps from a state: outputs (batch, steps, head_size), and the state after them."""
        embedded = self.embed_target(target)
        start = (state["hidden"], state["cell"])
        if lengths is None:
            outputs, (hidden, cell) = self.decoder(embedded, start)
        elif self.padded:
            outputs, (hidden, cell) = self.decoder(embedded, start, lengths)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            packed_outputs, (hidden, cell) = self.decoder(packed, start)
            outputs, _ = pad_packed_sequence(packed_outputs, batch_first=True, total_length=target.size(1))
        return self.fc(outputs), {"hidden": hidden, "cell": cell}

    @torch.jit.export
    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one step."""
        if self.steps_in_place:  # noqa: SIM102 - TorchScript leaves out only a branch on a constant
            if not torch.is_grad_enabled():
                hidden, cell = state["hidden"].clone(), state["cell"].clone()
                outputs = self.decoder.step(self.embed_target(value), (hidden, cell))  # type: ignore[operator]
                return self.fc(outputs), {"hidden": hidden, "cell": cell}
        outputs, state = self.decode(value.unsqueeze(1), state, None)
        return outputs.squeeze(1), state

    @torch.jit.unused
    def streams(self) -> tuple[StreamedLSTM, ...]:
        """Encoder and decoder, where the encoder reads one way."""
        if self.directions > 1:
            return ()
        return (
            StreamedLSTM(self.encoder, "source", self.embed_source),
            StreamedLSTM(self.decoder, "target", self.embed_target, self.fc, self._start),
        )

    def _start(self, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """The decoder's first h and c from the encoder's last."""
        if self.rearranged:
            hidden = arranged(hidden, self.directions, self.decoder_layers)
            cell = arranged(cell, self.directions, self.decoder_layers)
        return self.bridge_hidden(hidden), self.bridge_cell(cell)


def arranged(state: Tensor, directions: int, layers: int) -> Tensor:
    """Encoder state (layers * directions, batch, hidden) -> (decoder layers, batch, directions * hidden)."""
    if directions == 2:  # noqa: PLR2004 - forward and backward
        state = state.view(-1, 2, state.size(1), state.size(2)).transpose(1, 2).flatten(2)
    return state[state.size(0) - layers :].contiguous()
