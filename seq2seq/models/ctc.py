"""Connectionist temporal classification: an LSTM encoder, a linear head, and a loss over all alignments.

There is no decoder: at each step of the source the head gives a label or the blank, and the loss sums over all ways to
spread the labels over the steps (Graves et al. 2006). What the outputs say is found by `seq2seq.decoding.ctc`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from seq2seq.layers.padding import Reader, blank
from seq2seq.models.base import IGNORE_TOKEN, Extent, Model, Stack, check_lengths, check_steps, make_lstm
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.field_checks import check_bool, check_ints, check_probability


@dataclass(frozen=True)
class CTCConfig(FamilyDefaults):
    """Sizes of a `CTCModel`.

    Attributes:
        input_size: features of a step.
        hidden_size: of the encoder, per direction.
        output_size: labels, the blank among them.
        num_layers: layers of the encoder.
        bidirectional: whether it reads both ways.
        dropout: probability of dropping a value between layers, in training.
        blank: which of the labels is the blank.

    Raises:
        TypeError: for a size that is not an integer.
        ValueError: for a size, label or probability out of range.
    """

    input_size: int
    hidden_size: int
    output_size: int
    num_layers: int = 1
    bidirectional: bool = True
    dropout: float = 0.0
    blank: int = 0

    family: ClassVar[str] = "ctc"
    decodes: ClassVar[bool] = False
    bridged: ClassVar[bool] = False
    unaligned: ClassVar[bool] = True
    loss_name: ClassVar[str] = "CTC loss (nats a label)"

    def __post_init__(self) -> None:
        check_ints(self, 1, "input_size", "hidden_size", "num_layers")
        check_ints(self, 2, "output_size")
        check_ints(self, 0, "blank")
        check_bool("bidirectional", self.bidirectional)
        check_probability("dropout", self.dropout)
        if self.blank >= self.output_size:
            msg = f"blank is {self.blank}, expected one of the {self.output_size} labels, which count from 0"
            raise ValueError(msg)

    @property
    def dense_parameters(self) -> int:
        """Values of the head's weights."""
        return self.output_size * (self._encoded + 1)

    def dense_products(self, extent: Extent, *, backward: bool) -> int:
        """FLOPs of the head's products."""
        return 2 * self._encoded * self.output_size * extent.source_steps * (2 if backward else 1)

    def state_values(self, extent: Extent) -> int:
        """Values of the encoder's final h and c."""
        return 2 * self.num_layers * extent.sequences * self._encoded

    @property
    def _encoded(self) -> int:
        """Features of an encoded step, both directions together."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's only LSTM."""
        directions = 2 if self.bidirectional else 1
        return (Stack("encoder", self.input_size, self.hidden_size, self.num_layers, directions),)

    def build(self, lstm: Callable[..., nn.RNNBase]) -> CTCModel:
        """The model of these sizes."""
        return CTCModel(self, lstm)


class CTCModel(Model):
    """An LSTM from a state of zeros and a linear head on each of its steps, batch first.

    Args:
        config: the sizes.
        lstm: makes the LSTM, with the parameters of `torch.nn.LSTM`; with lengths, see `seq2seq.layers.padding.Reader`.
    """

    __constants__ = ("input_size",)

    def __init__(self, config: CTCConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        self.input_size = config.input_size
        stack = config.stacks[0]
        self.encoder = Reader(make_lstm(lstm, stack, config.dropout))
        self.fc = nn.Linear(stack.hidden_size * stack.directions, config.output_size)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read a source; a target is refused, since nothing is fed with it.

        Returns:
            Scores of the labels (batch, steps, output_size), whose softmax are probabilities; past the lengths those of
            a zero state. h and c of the encoder's end, each (layers * directions, batch, hidden_size).
        """
        if target is not None or target_lengths is not None:
            raise ValueError("a CTC model takes a source and its lengths, no target: give that to the loss")  # noqa: EM101, TRY003
        check_steps("source", source, self.input_size, tokens=False)
        check_lengths("source_lengths", source_lengths, source)
        encoded, hidden, cell = self.encoder(source, None, source_lengths)
        return self.fc(encoded), hidden, cell

    @torch.jit.unused
    def loss(self, outputs: Tensor, expected: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean loss per label; see `ctc_loss`."""
        return ctc_loss(outputs, expected, lengths, self.config.blank)


def ctc_loss(outputs: Tensor, expected: Tensor, lengths: Tensor | None = None, blank_label: int = 0) -> Tensor:
    """Negative log likelihood of all sequences' labels together, over the number of labels (Graves et al. 2006).

    Computed in float64: the sums over alignments run through all steps, and in float32 they leave gradients that err by
    a thousandth at 800 steps, more than whatever executes the model.

    Args:
        outputs: (batch, steps, labels) scores, the blank's among them; what stands past the lengths has no part.
        expected: (batch, most labels) int64 labels without blanks, with `IGNORE_TOKEN` past their end.
        lengths: (batch,) valid steps of the outputs; all when absent.
        blank_label: which label is the blank.

    Returns:
        A scalar in float32, or wider where the outputs are. Where no sequence has a label, the sum itself.

    Raises:
        ValueError: for labels that cannot be, or that do not fit the steps of their sequence. That has no probability,
            and its infinite loss would leave gradients that are not numbers.
    """
    labels = expected.cpu()
    valid = torch.full((outputs.size(0),), outputs.size(1)) if lengths is None else lengths.cpu()
    _check(labels, valid, outputs, blank_label)
    counts = (labels != IGNORE_TOKEN).sum(1)
    total = functional.ctc_loss(
        blank(outputs, lengths).double().log_softmax(-1).transpose(0, 1),
        expected.clamp(min=0),
        valid,
        counts,
        blank=blank_label,
        reduction="sum",
    )
    mean = total / int(counts.sum().clamp(min=1))
    return mean.to(torch.promote_types(outputs.dtype, torch.float32))


def steps_needed(labels: Tensor) -> Tensor:
    """Fewest steps that labels fit into: one each, and a blank between two that are alike; (batch,) int64.

    Args:
        labels: (batch, most labels) int64 with `IGNORE_TOKEN` past the end.
    """
    given = labels != IGNORE_TOKEN
    return given.sum(1) + (given[:, 1:] & (labels[:, 1:] == labels[:, :-1])).sum(1)


def _check(labels: Tensor, valid: Tensor, outputs: Tensor, blank_label: int) -> None:
    """Raise ValueError for the first sequence whose labels cannot be."""
    if labels.dim() != 2 or labels.size(0) != outputs.size(0):  # noqa: PLR2004
        msg = f"expected has shape {tuple(labels.shape)}; expected ({outputs.size(0)}, most labels)"
        raise ValueError(msg)
    given = labels != IGNORE_TOKEN
    known = (labels >= 0) & (labels < outputs.size(2)) & (labels != blank_label)
    whole = (known | ~given).all(1) & (given[:, 1:] <= given[:, :-1]).all(1)
    if not bool(whole.all()):
        row = int((~whole).nonzero()[0])
        msg = (
            f"the labels of sequence {row} are {labels[row].tolist()}; expected labels below {outputs.size(2)} but the "
            f"blank, {blank_label}, and {IGNORE_TOKEN} only past their end"
        )
        raise ValueError(msg)
    needed = steps_needed(labels)
    if bool((needed > valid).any()):
        row = int((needed > valid).nonzero()[0])
        msg = (
            f"sequence {row} has {int(valid[row])} steps, but its labels need {int(needed[row])} (one each, and a "
            "blank between two alike): leave it out, or make one step of fewer frames"
        )
        raise ValueError(msg)
