"""A single LSTM behind the interface of the Seq2Seq: for sizes that are published for a layer and not for a model.

Its outputs are the LSTM's own, so that nothing but the LSTM is in the time of a forward pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seq2seq.models.base import Extent, Model, Stack, StreamedLSTM, make_lstm
from seq2seq.models.family_defaults import FamilyDefaults


@dataclass(frozen=True)
class SingleConfig(FamilyDefaults):
    """Sizes of a `SingleLSTM`.

    Attributes:
        hidden_size: per direction.
        features: of a step; `hidden_size` when None.
        num_layers: layers.
        bidirectional: whether it reads both ways.
    """

    hidden_size: int
    features: int | None = None
    num_layers: int = 1
    bidirectional: bool = False

    family: ClassVar[str] = "lstm-alone"
    #: What a Seq2Seq has besides its LSTMs, and this has not.
    decodes: ClassVar[bool] = False
    bridged: ClassVar[bool] = False

    @property
    def input_size(self) -> int:
        """Features of a step."""
        return self.features or self.hidden_size

    @property
    def output_size(self) -> int:
        """Features of an output step: h of all directions."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    def state_values(self, extent: Extent) -> int:
        """Values of the final h and c."""
        return 2 * self.num_layers * extent.sequences * self.output_size

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's only LSTM."""
        return (Stack("lstm", self.input_size, self.hidden_size, self.num_layers, 2 if self.bidirectional else 1),)

    def build(self, lstm: Callable[..., nn.RNNBase]) -> SingleLSTM:
        """The model of these sizes."""
        return SingleLSTM(self, lstm)


class SingleLSTM(Model):
    """An LSTM from a state of zeros, batch first.

    Args:
        config: the sizes.
        lstm: class of the LSTM, with the parameters of `torch.nn.LSTM`.
    """

    def __init__(self, config: SingleConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        self.lstm = make_lstm(lstm, config.stacks[0])

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read a source (batch, steps, input_size); the other arguments must be None.

        Returns:
            Outputs (batch, steps, directions * hidden_size), h and c, each (layers * directions, batch, hidden_size).
        """
        if target is not None or source_lengths is not None or target_lengths is not None:
            # A literal message: TorchScript compiles this too.
            raise ValueError("a single LSTM takes a source and nothing else; use Seq2Seq")  # noqa: EM101, TRY003
        outputs, (hidden, cell) = self.lstm(source)
        return outputs, hidden, cell

    @torch.jit.unused
    def streams(self) -> tuple[StreamedLSTM, ...]:
        """Itself, where it reads one way."""
        if self.config.bidirectional:
            return ()
        return (StreamedLSTM(self.lstm, "source", nn.Identity(), nn.Identity()),)
