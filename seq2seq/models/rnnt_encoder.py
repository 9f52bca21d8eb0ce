"""The encoder of a speech transducer (RNN-T): LSTM layers, then steps stacked by two, then more LSTM layers.

Alone, as `lstm-alone` is: it is where a transducer spends most of its time, and its decoder is not a Seq2Seq's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from seq2seq.layers.padding import blank, last
from seq2seq.models.base import Extent, Model, Stack, check_lengths, check_steps, make_lstm
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.field_checks import check_ints


@dataclass(frozen=True)
class StackedConfig(FamilyDefaults):
    """Sizes of a `StackedEncoder`.

    Attributes:
        input_size: features of a step.
        hidden_size: of all layers; a multiple of `stack`.
        num_layers: layers below the stacking.
        upper_layers: layers above it.
        stack: steps that are made one.

    Raises:
        TypeError, ValueError: for sizes that are not integers or out of range.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 2
    upper_layers: int = 3
    stack: int = 2

    family: ClassVar[str] = "rnnt-encoder"
    decodes: ClassVar[bool] = False
    #: Stacking runs between the two LSTMs.
    bridged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ints(self, 1, *(field.name for field in dataclasses.fields(self)))
        if self.hidden_size % self.stack:
            msg = f"hidden_size is {self.hidden_size}, expected a multiple of the {self.stack} steps stacked"
            raise ValueError(msg)

    @property
    def output_size(self) -> int:
        """Features of an output step; see `StackedEncoder`."""
        return self.hidden_size // self.stack

    def state_values(self, extent: Extent) -> int:
        """Values of the last output of either LSTM."""
        return 2 * extent.sequences * self.hidden_size

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's two LSTMs."""
        hidden = self.hidden_size
        return (
            Stack("lower", self.input_size, hidden, self.num_layers),
            Stack("upper", self.stack * hidden, hidden, self.upper_layers, embedded=True, every=self.stack),
        )

    def build(self, lstm: Callable[..., nn.RNNBase]) -> StackedEncoder:
        """The model of these sizes."""
        return StackedEncoder(self, lstm)


class StackedEncoder(Model):
    """Two LSTMs from states of zeros, the upper on `stack` outputs of the lower at a time; batch first.

    An upper step stands for `stack` steps of the source, and is given back as `stack` steps of hidden_size / stack
    features: outputs have the source's steps and lengths, and no value is left out or added.

    Both read forward, so that what comes after a sequence's end changes nothing before it: they run over the whole
    padded batch, as MLPerf's model does.

    Args:
        config: the sizes.
        lstm: makes both LSTMs, with the parameters of `torch.nn.LSTM`.
    """

    __constants__ = ("input_size", "stack")

    def __init__(self, config: StackedConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        self.input_size, self.stack = config.input_size, config.stack
        self.lower, self.upper = (make_lstm(lstm, stack) for stack in config.stacks)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read a source (batch, steps, input_size); a target is refused.

        Returns:
            Outputs (batch, steps, hidden_size / stack), zero past the lengths; the last valid output of the lower and
            of the upper LSTM, (1, batch, hidden_size) each.
        """
        if target is not None or target_lengths is not None:
            raise ValueError("an encoder takes a source and nothing else; use Seq2Seq")  # noqa: EM101, TRY003
        check_steps("source", source, self.input_size, tokens=False)
        check_lengths("source_lengths", source_lengths, source)
        lower, _ = self.lower(blank(source, source_lengths))
        lower = blank(lower, source_lengths)
        rest = (self.stack - source.size(1) % self.stack) % self.stack
        stacked = functional.pad(lower, (0, 0, 0, rest)).reshape(source.size(0), -1, self.stack * lower.size(2))
        upper, _ = self.upper(stacked)
        ends = source_lengths
        if ends is not None:
            ends = torch.div(ends + (self.stack - 1), self.stack, rounding_mode="floor")
        outputs = upper.reshape(source.size(0), -1, lower.size(2) // self.stack)[:, : source.size(1)]
        finals = last(lower, source_lengths).unsqueeze(0), last(upper, ends).unsqueeze(0)
        return blank(outputs, source_lengths), finals[0], finals[1]
