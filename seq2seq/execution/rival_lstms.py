"""LSTMs of other projects for NVIDIA GPUs, with torch.nn.LSTM's parameters: TorchRL's in Triton, FlashRNN's in CUDA.

Each calls the function of an installed package, layer by layer; none of their code is in this project. Both run forward
in time only and take no lengths. Neither has been run on a GPU here yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, Tensor]


class RivalLSTM(nn.LSTM):
    """`torch.nn.LSTM` whose layers are run by `layer`; batch first, one direction, no projections, no packed sequences.

    Raises:
        ValueError: for other arguments.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.batch_first or self.bidirectional or self.proj_size or not self.bias:
            msg = f"{type(self).__name__} takes batch_first=True, one direction, biases and proj_size=0"
            raise ValueError(msg)

    def flatten_parameters(self) -> None:
        """Leave the parameters as they are: cuDNN does not read them."""

    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Call it as torch.nn.LSTM with x (batch, steps, features); h and c (layers, batch, H)."""
        if isinstance(x, PackedSequence):
            msg = f"{type(self).__name__} takes a (batch, steps, features) tensor, not a PackedSequence"
            raise TypeError(msg)
        hidden, cell = [], []
        for number, parameters in enumerate(self.all_weights):
            if number and self.dropout:
                x = functional.dropout(x, self.dropout, self.training)
            if hx is None:
                h0 = c0 = x.new_zeros(x.size(0), self.hidden_size)
            else:
                h0, c0 = hx[0][number], hx[1][number]
            x, h_n, c_n = self.layer(x, h0, c0, parameters)
            hidden.append(h_n)
            cell.append(c_n)
        return x, (torch.stack(hidden), torch.stack(cell))

    def layer(self, x: Tensor, h0: Tensor, c0: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        """Run a layer from states (batch, H): output (batch, steps, H), and h and c after the last step (batch, H)."""
        raise NotImplementedError


class TorchRLLSTM(RivalLSTM):
    """TorchRL's Triton kernels as `LSTMModule(recurrent_backend="triton")` calls them in float32 with TF32 products.

    Below 512 hidden units, one launch runs the whole sequence; from there on, there is one launch per step. TorchRL's
    module takes a TensorDict, so the function that it calls is called here.
    """

    def layer(self, x: Tensor, h0: Tensor, c0: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        """See `RivalLSTM.layer`. States are passed for all steps; only the first is read, since no step is a reset."""
        batch, steps, _ = x.shape
        shape = batch, steps, self.hidden_size
        begins = torch.zeros(batch, steps, dtype=torch.bool, device=x.device)
        output, _, h_n, c_n = torchrl_function()(
            x, h0.unsqueeze(1).expand(shape), c0.unsqueeze(1).expand(shape), *parameters, begins,
            input_precision="tf32",
        )  # fmt: skip
        return output, h_n, c_n


class FlashRNNLSTM(RivalLSTM):
    """FlashRNN's LSTM with one head, which is torch.nn.LSTM's recurrence; the projection is torch's.

    With its backend `vanilla`, in plain PyTorch on a CPU, results differ from torch.nn.LSTM's by 3e-7 (flashrnn 1.0.8).

    Args:
        backend: `cuda_fused`, all steps in one launch with the weights on chip, or `cuda`, a product and a kernel a
            step.
    """

    def __init__(self, *args: Any, backend: str = "cuda_fused", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend

    def layer(self, x: Tensor, h0: Tensor, c0: Tensor, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor, Tensor]:
        """See `RivalLSTM.layer`. In the type of the projection, which is autocast's where that is on."""
        weight_ih, weight_hh, bias_ih, bias_hh = parameters
        gates = functional.linear(x, weight_ih, bias_ih)
        dtype, hidden = gates.dtype, self.hidden_size
        # Gates by heads by units, in nn.LSTM's order of gates; states by batch, steps, heads and units.
        states, last = flashrnn_function()(
            gates.unflatten(-1, (4, 1, hidden)),
            weight_hh.to(dtype).view(4, 1, hidden, hidden),
            bias_hh.to(dtype).view(4, 1, hidden),
            states=torch.stack([h0, c0]).to(dtype).view(2, -1, 1, 1, hidden),
            function="lstm",
            backend=self.backend,
            dtype=str(dtype).removeprefix("torch."),
        )
        return states[0].squeeze(2), last[0].flatten(1), last[1].flatten(1)


def torchrl_function() -> Callable[..., Any]:
    """TorchRL's LSTM in Triton.

    Raises:
        ImportError, AttributeError: if torchrl is missing, or no longer has this function.
    """
    function: Callable[..., Any] = importlib.import_module("torchrl.modules.tensordict_module._rnn_triton").lstm_triton
    return function


def flashrnn_function() -> Callable[..., Any]:
    """FlashRNN's function.

    Raises:
        ImportError: where flashrnn is missing, or does not load.
    """
    function: Callable[..., Any] = importlib.import_module("flashrnn").flashrnn
    return function
