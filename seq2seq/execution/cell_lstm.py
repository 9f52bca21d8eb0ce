"""nn.LSTM as a loop over the cell that nn.LSTMCell calls, as code that decodes step by step is often written."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference import LoopLSTM


class CellLSTM(LoopLSTM):
    """A `LoopLSTM` whose step is `torch.lstm_cell`, nn.LSTMCell's own call: both products in each step, none before.

    nn.LSTMCell names its parameters differently, so its operator is called with those of nn.LSTM.
    """

    def step(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        """One step of all layers, without gradients and in one direction; overwrites the state.

        Args:
            x: (batch, input_size).
            state: h and c, each (num_layers, batch, hidden_size).

        Returns:
            h of the last layer, (batch, hidden_size).
        """
        hidden, cell = state
        for layer, weights in enumerate(self.all_weights):
            x, c = torch.lstm_cell(x, (hidden[layer], cell[layer]), *weights)
            hidden[layer], cell[layer] = x, c
        return x

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, index: int, inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights: list[Tensor] = list(self.all_weights[index])
        inputs = x.unbind(1)
        backward = self.bidirectional and index % 2
        outputs = list(inputs)
        for step in range(len(inputs) - 1, -1, -1) if backward else range(len(inputs)):
            h_new, c_new = torch.lstm_cell(inputs[step], (h, c), *weights)
            if inside is None:
                h, c = h_new, c_new
                outputs[step] = h
            else:
                keep = inside[step]
                h, c = torch.where(keep, h_new, h), torch.where(keep, c_new, c)
                outputs[step] = torch.where(keep, h_new, torch.zeros_like(h_new))
        return torch.stack(outputs, dim=1), h, c
