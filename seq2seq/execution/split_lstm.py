"""nn.LSTM in the form in which cuDNN is at its fastest: one call a layer and direction, batch a multiple of 8.

cuDNN's persistent algorithm is taken only for one layer in one direction with a batch that is a multiple of 8
(`use_rnn_persist_small_h` and `get_algo` in ATen's native/cudnn/RNN.cpp). Splitting and padding costs a few small
operations and is what an expert does before calling cuDNN slow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

BATCH_MULTIPLE = 8

State = tuple[Tensor, Tensor]


class SplitLSTM(nn.LSTM):
    """`torch.nn.LSTM` with its parameters and results, run layer by layer on a padded batch.

    Takes (batch, steps, features) tensors with `batch_first=True`; no packed sequences, no projection.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.batch_first or self.proj_size:
            msg = "SplitLSTM takes batch_first=True and proj_size=0; use torch.nn.LSTM for anything else"
            raise ValueError(msg)

    def flatten_parameters(self) -> None:
        """Lay each layer's weights out in one chunk, as cuDNN wants them per call."""
        if not getattr(self, "all_weights", None) or self.proj_size:
            return
        first = self.all_weights[0][0]
        if first.device.type != "cuda" or not torch.backends.cudnn.is_acceptable(first):
            return
        mode = 2  # LSTM, in cuDNN's own numbering
        with torch.no_grad():
            for parameters in self.all_weights:
                weights: list[Tensor] = list(parameters)
                features = weights[0].size(1)
                torch._cudnn_rnn_flatten_weight(  # noqa: SLF001 - what nn.LSTM itself calls
                    weights, len(weights), features, mode, self.hidden_size, 0, 1, self.batch_first, False
                )

    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Call it as torch.nn.LSTM with a padded x (batch, steps, features); h, c (layers * directions, batch, H)."""
        if isinstance(x, PackedSequence):
            msg = "SplitLSTM takes a (batch, steps, features) tensor, not a PackedSequence; use torch.nn.LSTM"
            raise TypeError(msg)
        batch = x.size(0)
        padding = -batch % BATCH_MULTIPLE
        directions = 2 if self.bidirectional else 1
        if hx is None:
            zeros = x.new_zeros(self.num_layers * directions, batch, self.hidden_size)
            hx = (zeros, zeros)
        if padding:
            x = functional.pad(x, (0, 0, 0, 0, 0, padding))
            hx = (functional.pad(hx[0], (0, 0, 0, padding)), functional.pad(hx[1], (0, 0, 0, padding)))
        hidden, cell = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                output, h, c = self._call(x.flip(1) if direction else x, hx, index)
                outputs.append(output.flip(1) if direction else output)
                hidden.append(h)
                cell.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        final = (torch.cat(hidden)[:, :batch], torch.cat(cell)[:, :batch])
        return x[:batch], final

    def _call(self, x: Tensor, hx: State, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in one direction: output (batch, steps, H), h and c (1, batch, H)."""
        state = [hx[0][index : index + 1].contiguous(), hx[1][index : index + 1].contiguous()]
        weights: list[Tensor] = list(self.all_weights[index])
        result: tuple[Tensor, Tensor, Tensor] = torch._VF.lstm(  # noqa: SLF001 - what nn.LSTM itself calls
            x, state, weights, self.bias, 1, 0.0, self.training, False, self.batch_first
        )
        return result
