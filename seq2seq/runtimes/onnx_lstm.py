"""`torch.nn.LSTM` over padded sequences of different lengths, as ONNX has it: one LSTM node a layer, with lengths.

torch's exporter makes such nodes of packed sequences too, by rewriting what packing left in the graph. That fails for
some models, with an index error for one layer of real values, and sorts every batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.models.base import Model


class SequenceLSTM(nn.LSTM):
    """An LSTM with the same parameters that takes padded sequences and their lengths; only for export, batch first."""

    takes_lengths = True

    def forward(  # type: ignore[override]
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Take the arguments that `seq2seq.layers.padding.Reader` passes; outputs are zero past the lengths."""
        if lengths is None:
            found: tuple[Tensor, tuple[Tensor, Tensor]] = super().forward(x, state)
            return found
        directions = 2 if self.bidirectional else 1
        if state is None:
            zeros = x.new_zeros(directions * self.num_layers, x.size(0), self.hidden_size)
            state = zeros, zeros
        outputs, hiddens, cells = x, [], []
        for layer in range(self.num_layers):
            own = slice(layer * directions, (layer + 1) * directions)
            names = [f"_l{layer}{ending}" for ending in ("", "_reverse")[:directions]]
            weights = [
                torch.stack([getattr(self, kind + name) for name in names]) for kind in ("weight_ih", "weight_hh")
            ]
            biases = [torch.stack([getattr(self, kind + name) for name in names]) for kind in ("bias_ih", "bias_hh")]
            outputs, hidden, cell = _Node.apply(outputs, lengths, state[0][own], state[1][own], *weights, *biases)
            hiddens.append(hidden)
            cells.append(cell)
        return outputs, (torch.cat(hiddens), torch.cat(cells))


def with_lengths(model: Model) -> Model:
    """Return a copy of the model for export, whose LSTMs take lengths instead of packed sequences."""
    twin: Model = model.config.build(SequenceLSTM).eval()
    twin.load_state_dict(model.state_dict())
    return twin


class _Node(torch.autograd.Function):
    """One layer, all its directions, as one node. The exporter asks only for shapes, so nothing is computed."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - an operator's inputs
        x: Tensor, lengths: Tensor, hidden: Tensor, cell: Tensor, weight_ih: Tensor, weight_hh: Tensor,
        bias_ih: Tensor, bias_hh: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Outputs (batch, steps, directions * hidden size), final h and c (directions, batch, hidden size).

        Args:
            x: (batch, steps, features).
            lengths: (batch,) int64.
            hidden: the state before, (directions, batch, hidden size).
            cell: the same.
            weight_ih: (directions, 4 * hidden size, features), gates in torch's order.
            weight_hh: (directions, 4 * hidden size, hidden size), in the same order.
            bias_ih: (directions, 4 * hidden size), in the same order.
            bias_hh: the same.
        """
        del lengths, weight_ih, weight_hh, bias_ih, bias_hh
        size = hidden.size(0) * hidden.size(2)
        return x.new_zeros(x.size(0), x.size(1), size), torch.zeros_like(hidden), torch.zeros_like(cell)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: it has no gradient."""

    @staticmethod
    def symbolic(  # noqa: PLR0913, PLR0917 - the same
        g: Any, x: Any, lengths: Any, hidden: Any, cell: Any, weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any
    ) -> tuple[Any, Any, Any]:
        """ONNX's LSTM: steps before the batch, gates in the order i, o, f, c, directions apart."""
        directions, _, size = weight_hh.type().sizes()  # the state has the batch, which is open

        def gates(value: Any) -> Any:
            order = g.op("Constant", value_t=torch.arange(4 * size).view(4, size)[[0, 3, 1, 2]].flatten())
            return g.op("Gather", value, order, axis_i=1)

        outputs, hidden, cell = g.op(
            "LSTM",
            g.op("Transpose", x, perm_i=[1, 0, 2]),
            gates(weight_ih),
            gates(weight_hh),
            g.op("Concat", gates(bias_ih), gates(bias_hh), axis_i=1),
            g.op("Cast", lengths, to_i=torch.onnx.TensorProtoDataType.INT32),
            hidden,
            cell,
            hidden_size_i=size,
            direction_s="bidirectional" if directions == 2 else "forward",  # noqa: PLR2004
            outputs=3,
        )
        # (steps, directions, batch, hidden size)
        swapped = g.op("Transpose", outputs, perm_i=[2, 0, 1, 3])
        shape = g.op("Constant", value_t=torch.tensor([0, 0, -1]))
        return g.op("Reshape", swapped, shape), hidden, cell
