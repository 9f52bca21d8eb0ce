"""The Seq2Seq of the seed: an encoder LSTM, a decoder LSTM started from its final state, and a linear head.

Beyond the seed: token inputs, several layers, a bidirectional encoder, dropout, and sequences of different lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

#: Target value that the loss leaves out: the places past the end of a token sequence.
IGNORE_TOKEN = -100


@dataclass(frozen=True)
class Stack:
    """The sizes of one LSTM of a model: what its work is counted by, and what kernels are asked about.

    Attributes:
        name: of the module.
        input_size, hidden_size, num_layers: as those of `torch.nn.LSTM`.
        directions: 1, or 2 when it reads both ways.
        decodes: whether it reads the target from a state that it is given; otherwise the source from zeros.
        embedded: whether it reads embedded tokens, so that gradients go on into its input.
    """

    name: str
    input_size: int
    hidden_size: int
    num_layers: int
    directions: int = 1
    decodes: bool = False
    embedded: bool = False


@dataclass(frozen=True)
class Seq2SeqConfig:
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

    family: ClassVar[str] = "lstm"
    #: Whether a linear head makes the outputs.
    headed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "output_size", "num_layers"):
            _check_int(name, getattr(self, name), 1)
        for name in ("decoder_input_size", "decoder_hidden_size", "decoder_layers"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for name in ("source_vocabulary", "target_vocabulary"):
            _check_int(name, getattr(self, name), 0)
        _check_bool("bidirectional", self.bidirectional)
        _check_probability("dropout", self.dropout)
        if self.decoder_layers is not None and self.decoder_layers > self.num_layers:
            msg = (
                f"decoder_layers is {self.decoder_layers} but the encoder has {self.num_layers}; "
                "each decoder layer starts from the state of an encoder layer, so give at most as many"
            )
            raise ValueError(msg)

    @property
    def bridged(self) -> bool:
        """Whether the encoder's state must be projected to fit the decoder."""
        return self.bidirectional or self.decoder_hidden_size not in {None, self.hidden_size}

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Its LSTMs, encoder first."""
        decoder = (
            self.decoder_input_size or self.input_size,
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


class Seq2SeqResult(NamedTuple):
    """What a pass computes: outputs (batch, target steps, output_size), final decoder h and c."""

    outputs: Tensor
    hidden: Tensor  # (decoder layers, batch, decoder hidden size)
    cell: Tensor  # (decoder layers, batch, decoder hidden size)


class Seq2Seq(nn.Module):
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

    # Read by TorchScript, which then compiles the branch taken alone.
    __constants__ = (
        "padded",
        "source_features",
        "target_features",
        "source_tokens",
        "target_tokens",
        "directions",
        "decoder_layers",
        "rearranged",
    )

    def __init__(self, config: Seq2SeqConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        options: dict[str, Any] = {"batch_first": True}
        decoder_input = config.decoder_input_size or config.input_size
        decoder_hidden = config.decoder_hidden_size or config.hidden_size
        decoder_layers = config.decoder_layers or config.num_layers
        self.source_features = config.input_size
        self.target_features = decoder_input
        self.source_tokens = config.source_vocabulary > 0
        self.target_tokens = config.target_vocabulary > 0
        self.directions = 2 if config.bidirectional else 1
        self.decoder_layers = decoder_layers
        self.rearranged = config.bidirectional or decoder_layers != config.num_layers

        self.embed_source = (
            nn.Embedding(config.source_vocabulary, config.input_size) if self.source_tokens else nn.Identity()
        )
        self.embed_target = (
            nn.Embedding(config.target_vocabulary, decoder_input) if self.target_tokens else nn.Identity()
        )
        # Dropout acts between layers; torch warns when it is asked for where there is only one.
        self.encoder = lstm(
            config.input_size,
            config.hidden_size,
            config.num_layers,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
            bidirectional=config.bidirectional,
            **options,
        )
        self.padded: bool = getattr(self.encoder, "takes_lengths", False)
        encoded = config.hidden_size * self.directions
        self.bridge_hidden = nn.Linear(encoded, decoder_hidden) if config.bridged else nn.Identity()
        self.bridge_cell = nn.Linear(encoded, decoder_hidden) if config.bridged else nn.Identity()
        self.decoder = lstm(
            decoder_input,
            decoder_hidden,
            decoder_layers,
            dropout=config.dropout if decoder_layers > 1 else 0.0,
            **options,
        )
        self.fc = nn.Linear(decoder_hidden, config.output_size)

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Outputs of `run`: (batch, target steps, output_size)."""
        return self.run(source, target, source_lengths, target_lengths)[0]

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode with teacher forcing.

        Args:
            source: (batch, source steps, input_size) floats, or (batch, source steps) int64 tokens.
            target: what the decoder reads, (batch, target steps, decoder_input_size) floats or
                (batch, target steps) int64 tokens; the source again when absent.
            source_lengths: (batch,) int64 on the CPU, each from 1 to the source steps; all steps when absent.
            target_lengths: the same for the target; `source_lengths` when the target is absent too.

        Returns:
            The fields of `Seq2SeqResult`. Outputs past a target's length are those of a zero state.
        """
        if target is None:
            target = source
            if target_lengths is None:
                target_lengths = source_lengths
        _check_steps("source", source, self.source_features, self.source_tokens)
        _check_steps("target", target, self.target_features, self.target_tokens)
        if source.size(0) != target.size(0):
            raise ValueError(f"source has batch {source.size(0)} but target has {target.size(0)}; give both the same")
        _check_lengths("source_lengths", source_lengths, source)
        _check_lengths("target_lengths", target_lengths, target)

        hidden, cell = self.encode(source, source_lengths)
        return self.decode(target, hidden, cell, target_lengths)

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """State that the decoder starts from: h and c, each (decoder layers, batch, decoder hidden size)."""
        embedded = self.embed_source(source)
        if lengths is None:
            _, (hidden, cell) = self.encoder(embedded)
        elif self.padded:
            _, (hidden, cell) = self.encoder(embedded, None, lengths)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            _, (hidden, cell) = self.encoder(packed)
        if self.rearranged:
            hidden, cell = self._arrange(hidden), self._arrange(cell)
        return self.bridge_hidden(hidden), self.bridge_cell(cell)

    @torch.jit.export
    def decode(
        self, target: Tensor, hidden: Tensor, cell: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode from a state; returns outputs, h and c, so that a caller may also go step by step."""
        embedded = self.embed_target(target)
        if lengths is None:
            outputs, (hidden, cell) = self.decoder(embedded, (hidden, cell))
        elif self.padded:
            outputs, (hidden, cell) = self.decoder(embedded, (hidden, cell), lengths)
        else:
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            packed_outputs, (hidden, cell) = self.decoder(packed, (hidden, cell))
            outputs, _ = pad_packed_sequence(packed_outputs, batch_first=True, total_length=target.size(1))
        return self.fc(outputs), hidden, cell

    def _arrange(self, state: Tensor) -> Tensor:
        """Encoder state (layers * directions, batch, hidden) -> (decoder layers, batch, directions * hidden)."""
        if self.directions == 2:  # noqa: PLR2004 - forward and backward
            state = state.view(-1, 2, state.size(1), state.size(2)).transpose(1, 2).flatten(2)
        return state[state.size(0) - self.decoder_layers :].contiguous()


def loss_of(outputs: Tensor, expected: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean loss per valid step, in float32 or wider whatever the outputs are.

    Args:
        outputs: (batch, steps, output_size).
        expected: (batch, steps) int64 tokens with `IGNORE_TOKEN` past the end, for cross entropy; or
            (batch, steps, output_size) floats, for mean squared error.
        lengths: (batch,) valid steps of each sequence; all when absent. Not needed for tokens.
    """
    if outputs.dtype in {torch.float16, torch.bfloat16}:
        outputs = outputs.float()
    if not expected.is_floating_point():
        return functional.cross_entropy(outputs.flatten(0, 1), expected.flatten(), ignore_index=IGNORE_TOKEN)
    if lengths is None:
        return functional.mse_loss(outputs, expected.to(outputs.dtype))
    inside = torch.arange(outputs.size(1), device=outputs.device) < lengths.to(outputs.device)[:, None]
    # Chosen, not multiplied: what stands in the padding need not be finite.
    difference = torch.where(inside[..., None], outputs - expected.to(outputs.dtype), 0.0)
    return difference.square().mean(-1).sum() / inside.sum()


def _check_int(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{name} is {value!r}, expected an integer"
        raise TypeError(msg)
    if value < least:
        msg = f"{name} is {value}, expected at least {least}"
        raise ValueError(msg)


def _check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        msg = f"{name} is {value!r}, expected True or False"
        raise TypeError(msg)


def _check_probability(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        msg = f"{name} is {value!r}, expected a number"
        raise TypeError(msg)
    if not 0 <= value < 1:
        msg = f"{name} is {value}, expected a probability of at least 0 and below 1"
        raise ValueError(msg)


# The checks below are compiled by TorchScript too, which knows no `msg` variables in `raise`, hence the noqa.
def _check_steps(name: str, value: Tensor, features: int, tokens: bool) -> None:
    if tokens:
        if value.dim() != 2:  # noqa: PLR2004
            raise ValueError(f"{name} has {value.dim()} dimensions, expected (batch, steps) tokens")
        if value.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}, expected int64 tokens")
    else:
        if value.dim() != 3:  # noqa: PLR2004
            raise ValueError(f"{name} has {value.dim()} dimensions, expected (batch, steps, {features})")
        if value.size(2) != features:
            raise ValueError(f"{name} has {value.size(2)} features, expected {features}")
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point type")
    if value.size(0) == 0 or value.size(1) == 0:
        raise ValueError(f"{name} is empty, expected at least one sequence of at least one step")


def _check_lengths(name: str, lengths: Tensor | None, value: Tensor) -> None:
    if lengths is None:
        return
    if lengths.dim() != 1 or lengths.size(0) != value.size(0):
        raise ValueError(f"{name} must have one length a sequence, (batch,) = ({value.size(0)},)")
    if lengths.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {lengths.dtype}, expected int64")
    if lengths.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where packing reads them")
    # Reading values would break the graph of torch.compile; there the caller's lengths are trusted.
    if torch.compiler.is_compiling():
        return
    if int(lengths.min()) < 1 or int(lengths.max()) > value.size(1):
        raise ValueError(f"{name} must lie between 1 and the {value.size(1)} steps given")
