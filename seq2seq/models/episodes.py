"""One LSTM over unrolls of reinforcement learning, in which episodes end and begin in the middle of the steps.

A feature of each step says whether an episode begins there, as environments report it. An LSTM that takes `resets`
gets them as they are. For any other the batch is split into its episodes, as RL libraries do for cuDNN: each is a
sequence of its own, and what the LSTM gives for it goes back to its place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seq2seq.layers.padding import Reader
from seq2seq.models.base import Extent, Model, Stack, StreamedLSTM, make_lstm
from seq2seq.models.family_defaults import FamilyDefaults


@dataclass(frozen=True)
class EpisodesConfig(FamilyDefaults):
    """Sizes of an `EpisodesLSTM`.

    Attributes:
        hidden_size: of the LSTM.
        features: of a step, besides the one that says where an episode begins; `hidden_size` when None.
        num_layers: layers.
    """

    hidden_size: int
    features: int | None = None
    num_layers: int = 1

    family: ClassVar[str] = "lstm-episodes"
    decodes: ClassVar[bool] = False
    bridged: ClassVar[bool] = False
    resets: ClassVar[bool] = True

    @property
    def input_size(self) -> int:
        """Features of a step, the one that says where an episode begins included."""
        return (self.features or self.hidden_size) + 1

    @property
    def output_size(self) -> int:
        """Features of an output step: h."""
        return self.hidden_size

    def state_values(self, extent: Extent) -> int:
        """Values of the final h and c."""
        return 2 * self.num_layers * extent.sequences * self.hidden_size

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The model's only LSTM."""
        return (Stack("lstm", self.input_size - 1, self.hidden_size, self.num_layers),)

    def build(self, lstm: Callable[..., nn.RNNBase]) -> EpisodesLSTM:
        """The model of these sizes."""
        return EpisodesLSTM(self, lstm)


class EpisodesLSTM(Model):
    """An LSTM, batch first, whose state becomes zero wherever an episode begins.

    Args:
        config: the sizes.
        lstm: class of the LSTM, with the parameters of `torch.nn.LSTM`.
    """

    # Read by TorchScript, which then compiles only the branch taken.
    __constants__ = ("resets",)

    def __init__(self, config: EpisodesConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = dataclasses.replace(config)
        made = make_lstm(lstm, config.stacks[0])
        self.resets: bool = getattr(made, "takes_resets", False)
        self.lstm = Reader(made)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read a batch of unrolls, each from a state of zeros; the other arguments of `Seq2Seq.run` must be None.

        Args:
            source: (batch, steps, input_size) floats; the last feature is above 0.5 where an episode begins.
            target: not taken.
            source_lengths: not taken.
            target_lengths: not taken.

        Returns:
            Outputs (batch, steps, hidden_size), h and c, each (layers, batch, hidden_size).

        Raises:
            ValueError: for a target or lengths.
        """
        if target is not None or source_lengths is not None or target_lengths is not None:
            # A literal message: TorchScript compiles this too.
            raise ValueError("an LSTM over episodes takes a source and nothing else; use Seq2Seq")  # noqa: EM101, TRY003
        begins = source[:, :, -1] > 0.5  # noqa: PLR2004 - documented above
        x = source[:, :, :-1]
        if self.resets:
            outputs, (hidden, cell) = self.lstm.lstm(x, None, None, begins)
            return outputs, hidden, cell
        return self._by_episode(x, begins)

    def _by_episode(self, x: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model with one sequence per episode, padded to the longest."""
        batch, steps = x.size(0), x.size(1)
        begins = begins.clone()
        begins[:, 0] = True
        # Episodes in the order of the rows, and of the steps inside a row.
        starts = begins.flatten().nonzero().squeeze(1)
        ends = torch.cat([starts[1:], starts.new_full((1,), batch * steps)])
        lengths = ends - starts
        # How long the longest is decides the shape, so the host waits for the device, as it does in RL libraries.
        on_host = lengths.cpu()
        longest = int(on_host.max())
        place = torch.arange(longest, device=x.device)
        inside = place < lengths[:, None]
        index = torch.where(inside, starts[:, None] + place, 0)
        padded = torch.where(inside[:, :, None], x.flatten(0, 1)[index], 0.0)
        found, hidden, cell = self.lstm(padded, None, on_host)
        # Row-major, the steps inside of all episodes are the steps of all rows.
        outputs = found[inside].view(batch, steps, -1)
        last = begins.sum(1).cumsum(0) - 1
        return outputs, hidden[:, last], cell[:, last]

    @torch.jit.unused
    def streams(self) -> tuple[StreamedLSTM, ...]:
        """None: a step needs to know whether an episode begins."""
        return ()
