"""torch's own LSTM (cuDNN, oneDNN or ATen) on the parameters of a `kernels.LSTM`: for all that no kernel serves."""

from __future__ import annotations

import functools
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

State = tuple[Tensor, Tensor]


def run(lstm: nn.RNNBase, x: Tensor, hx: State | None, batch_sizes: Tensor | None = None) -> tuple[Tensor, State]:
    """Run it on padded input, or on packed data with its batch sizes.

    Args:
        lstm: holds the parameters and options.
        x: three dimensions as `lstm.batch_first` says, or packed data.
        hx: h and c, three dimensions each; zeros when None.
        batch_sizes: (steps,) int64 on the CPU, as in a `PackedSequence`.

    Returns:
        Output, laid out as x, and the final h and c.
    """
    lstm._update_flat_weights()  # noqa: SLF001 - what nn.LSTM does before each call
    if hx is None:
        batch = x.size(0 if lstm.batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
        states = lstm.num_layers * (2 if lstm.bidirectional else 1)
        hidden = x.new_zeros(states, batch, lstm.proj_size or lstm.hidden_size)
        hx = (hidden, x.new_zeros(states, batch, lstm.hidden_size))
    options = (lstm._flat_weights, lstm.bias, lstm.num_layers, lstm.dropout, lstm.training, lstm.bidirectional)  # noqa: SLF001
    function: Any = torch._VF.lstm  # noqa: SLF001 - what nn.LSTM itself calls
    if batch_sizes is None:
        output, h_n, c_n = function(x, hx, *options, lstm.batch_first)
    else:
        output, h_n, c_n = function(x, batch_sizes, hx, *options)
    return output, (h_n, c_n)


def run_padded(lstm: nn.RNNBase, x: Tensor, hx: State | None, lengths: Tensor) -> tuple[Tensor, State]:
    """Run it on padded input with lengths, which it takes packed and with at least one step each.

    Args:
        lstm: as for `run`.
        x: as for `run`, padded.
        hx: as for `run`.
        lengths: (batch,), from 0; read on the CPU.

    Returns:
        Output, laid out as x and zero past the lengths, and the final h and c.
    """
    lengths = lengths.cpu()
    steps_dim = 1 if lstm.batch_first else 0
    # The one step that a sequence of no steps is given instead must be harmless too.
    x = torch.where(valid_mask(lengths.to(x.device), x, lstm.batch_first), x, 0.0)
    packed = pack_padded_sequence(x, lengths.clamp(min=1), batch_first=lstm.batch_first, enforce_sorted=False)
    data, state = run(lstm, packed.data, permuted(hx, packed.sorted_indices), packed.batch_sizes)
    output, _ = pad_packed_sequence(
        packed._replace(data=data), batch_first=lstm.batch_first, total_length=x.size(steps_dim)
    )
    empty = (lengths == 0).to(x.device)[:, None]  # (batch, 1)
    output = torch.where(empty.unsqueeze(steps_dim), 0.0, output)
    h_n, c_n = permuted(state, packed.unsorted_indices)
    h0, c0 = (torch.zeros_like(h_n), torch.zeros_like(c_n)) if hx is None else hx
    return output, (torch.where(empty, h0, h_n), torch.where(empty, c0, c_n))


def valid_mask(lengths: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    """Mask of the steps of padded x that belong to a sequence: bool, its first two dimensions and 1."""
    steps = torch.arange(x.size(1 if batch_first else 0), device=x.device)
    valid = steps < lengths[:, None] if batch_first else steps[:, None] < lengths
    return valid.unsqueeze(2)


def copies(lstm: nn.Module) -> Collection[Tensor]:
    """Weights of a replica of torch.nn.DataParallel, which are no parameters of it; of another module nothing."""
    found: Collection[Tensor] = lstm.__dict__.get("_former_parameters", {}).values()
    return found


def permuted(hx: Any, indices: Tensor | None) -> Any:
    """State with its sequences in another order."""
    if hx is None or indices is None:
        return hx
    return hx[0].index_select(1, indices), hx[1].index_select(1, indices)


@functools.cache
def onednn_refusal(dtype: torch.dtype, *, training: bool) -> str | None:
    """Reason why oneDNN has no LSTM of a type on this CPU, or None where it has; the answer is kept.

    Args:
        dtype: float32, or the type of autocast, which calls oneDNN whether it has such an LSTM or not.
        training: whether it runs backward too.
    """
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    # In a thread of its own, the caller's hooks of saved tensors, modes and settings are not there: they neither see
    # this nor change the answer, which is kept.
    with ThreadPoolExecutor(1) as thread:
        said = thread.submit(_onednn_error, dtype, training=training).result()
    mode = "training" if training else "inference"
    return said and f"oneDNN has no {str(dtype).removeprefix('torch.')} LSTM for {mode} on this CPU: {said}"


def _onednn_error(dtype: torch.dtype, *, training: bool) -> str | None:
    """First sentence of oneDNN's error for a small LSTM, or None where it runs."""
    # What else can be set there is left as it is: torch warns of one that only Intel's GPUs have.
    settings = {"deterministic": None, "allow_tf32": None, "fp32_precision": None}
    with (
        torch.backends.mkldnn.flags(enabled=True, **settings),
        torch.inference_mode(not training),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        # Weights that are not drawn move no other thread's random numbers.
        shapes = ((64, 16), (64, 16), (64,), (64,))
        weights = [torch.zeros(shape, device="cpu", dtype=torch.float32, requires_grad=training) for shape in shapes]
        x, state = (torch.zeros(shape, device="cpu", dtype=torch.float32) for shape in ((2, 3, 16), (1, 2, 16)))
        function: Any = torch._VF.lstm  # noqa: SLF001 - what nn.LSTM itself calls
        try:
            output, _, _ = function(x, (state, state), weights, True, 1, 0.0, training, False, True)
            if training:
                output.float().sum().backward()
        except RuntimeError as error:
            # The rest is advice on how to debug oneDNN.
            return str(error).split(". ", maxsplit=1)[0].splitlines()[0]
    return None
