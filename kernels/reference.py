"""The LSTM's equations in plain torch ops, any dtype: the truth in float64, and the loop that a compiler can see.

`LoopLSTM` holds the parameters of `torch.nn.LSTM` under the same names, so one state_dict serves both, and walks
over time in Python as a textbook writes it. It takes lengths instead of a `PackedSequence`: past the end of a
sequence the state is held and the output is zero, which is what packing computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

State = tuple[Tensor, Tensor]


def lstm_cell(gates_input: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> State:
    """One LSTM step after the input projection.

    Args:
        gates_input: `x_t @ weight_ih.T + bias_ih`, (batch, 4 * hidden_size), gates in the order i, f, g, o.
        hidden: h of the step before, (batch, hidden_size).
        cell: c of the step before, (batch, hidden_size).
        weight_hh: (4 * hidden_size, hidden_size).
        bias_hh: (4 * hidden_size,).

    Returns:
        h and c of this step, each (batch, hidden_size).

    Source: Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000, as documented for torch.nn.LSTM.
    """
    gates = gates_input + functional.linear(hidden, weight_hh, bias_hh)
    i, f, g, o = gates.chunk(4, dim=1)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


class LoopLSTM(nn.RNNBase):
    """`torch.nn.LSTM` as an explicit loop over time, with its parameters, state_dict and initialisation.

    Only `forward` differs: lengths instead of a `PackedSequence`, only `batch_first`, no projection. It is no
    subclass of `nn.LSTM`, since torch.compile refuses to trace those.

    Raises:
        ValueError: for `batch_first=False` or `proj_size`, which it does not take.
    """

    #: Tells a model to hand over lengths with the padded sequences, where it would pack them for torch.nn.LSTM.
    takes_lengths = True
    #: One step; a class attribute, so that a copy can be given another.
    cell = staticmethod(lstm_cell)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = True,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        if not batch_first or proj_size:
            msg = "LoopLSTM takes batch_first=True and proj_size=0; use torch.nn.LSTM for anything else"
            raise ValueError(msg)
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, batch_first=True, dropout=dropout, bidirectional=bidirectional
        )

    def forward(self, x: Tensor, hx: State | None = None, lengths: Tensor | None = None) -> tuple[Tensor, State]:
        """Run all layers and directions.

        Args:
            x: (batch, steps, input_size).
            hx: h and c, each (num_layers * directions, batch, hidden_size); zeros when absent.
            lengths: (batch,) int64, valid steps of each sequence; all when absent.

        Returns:
            Output (batch, steps, directions * hidden_size), zero past the lengths, and the final h and c,
            each (num_layers * directions, batch, hidden_size).
        """
        directions = 2 if self.bidirectional else 1
        if hx is None:
            zeros = x.new_zeros(self.num_layers * directions, x.size(0), self.hidden_size)
            hx = (zeros, zeros)
        # (steps, batch, 1) of 1 where the step is inside the sequence.
        inside = None if lengths is None else _inside(lengths.to(x.device), x.size(1))
        if inside is not None:
            # The backward pass would multiply the padding by zero, which gives NaN where it is not finite.
            x = torch.where(inside.transpose(0, 1), x, torch.zeros_like(x))
        hidden, cell = [], []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                output, h, c = self._direction(x, hx[0][index], hx[1][index], index, inside)
                outputs.append(output)
                hidden.append(h)
                cell.append(c)
            x = outputs[0] if directions == 1 else torch.cat(outputs, dim=-1)
        return x, (torch.stack(hidden), torch.stack(cell))

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, index: int, inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run one direction of one layer: its output (batch, steps, hidden_size) and final h and c."""
        directions = 2 if self.bidirectional else 1
        suffix = f"l{index // directions}" + ("_reverse" if index % directions else "")
        weight_hh, bias_hh = getattr(self, f"weight_hh_{suffix}"), getattr(self, f"bias_hh_{suffix}")
        gates_input = functional.linear(x, getattr(self, f"weight_ih_{suffix}"), getattr(self, f"bias_ih_{suffix}"))
        # One projection for all steps, split once: indexing per step would cost a select and its backward each.
        per_step = gates_input.unbind(1)
        order = range(len(per_step) - 1, -1, -1) if index % directions else range(len(per_step))
        outputs = list(per_step)
        for step in order:
            h_new, c_new = self.cell(per_step[step], h, c, weight_hh, bias_hh)
            if inside is None:
                h, c = h_new, c_new
                outputs[step] = h
            else:
                keep = inside[step]
                h, c = torch.where(keep, h_new, h), torch.where(keep, c_new, c)
                outputs[step] = torch.where(keep, h_new, torch.zeros_like(h_new))
        return torch.stack(outputs, dim=1), h, c


def _inside(lengths: Tensor, steps: int) -> Tensor:
    """Mark the valid steps: (steps, batch, 1) bool."""
    return (torch.arange(steps, device=lengths.device)[:, None] < lengths[None, :])[..., None]
