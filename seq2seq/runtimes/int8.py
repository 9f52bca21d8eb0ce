"""Dynamic quantisation: weights in int8, and inputs of the products rounded to 8 bits in each call.

torch's own implementation is used although it is deprecated, because its successor, torchao, has no LSTM: its
`quantize_` silently skips nn.LSTM, and raises if nn.LSTM is named (torchao 0.18 on torch 2.13).

`RoundedLSTM`, `round_inputs` and `rounded_weights` do the same rounding in plain fp32, to find how large the error of
int8 is by nature.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.reference import LoopLSTM, State, lstm_cell
from seq2seq.runtimes.runtime import Inputs, Ran, Results, Runtime, count

#: Dimensions of a weight that is multiplied with.
MATRIX = 2


class DynamicInt8(Runtime):
    """`torch.ao.quantization.quantize_dynamic` of the model, with its own choice of layers: LSTMs and linear ones."""

    def convert(self, digest: bytes) -> None:
        """Quantise a copy."""
        del digest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._quantized: nn.Module = torch.ao.quantization.quantize_dynamic(self.model)

    def run(self, inputs: Inputs) -> Results:
        """The copy's `run`."""
        results: Results = self._quantized.run(*inputs)  # type: ignore[operator]
        return results

    def ran(self) -> Ran:
        """Report which layers the copy consists of; its operators are torch's, so torch's profiler sees them."""
        dynamic = torch.ao.nn.quantized.dynamic
        found = [module for module in self._quantized.modules() if isinstance(module, (dynamic.LSTM, dynamic.Linear))]
        lstms = sum(isinstance(module, dynamic.LSTM) for module in found)
        kinds = {_precision(module) for module in found}
        kept = [module for module in self._quantized.modules() if type(module) in {nn.LSTM, nn.Linear}]
        threads = torch.get_num_threads()
        words = f"torch quantised {count(lstms, 'LSTM')}, engine {torch.backends.quantized.engine}"
        return Ran({}, (*sorted(kinds), *(["fp32"] if kept else [])), threads, f"{words}, {count(threads, 'thread')}")


def _rounded_cell(gates_input: Tensor, hidden: Tensor, cell: Tensor, weight_hh: Tensor, bias_hh: Tensor) -> State:
    return lstm_cell(gates_input, _rounded_input(hidden), cell, weight_hh, bias_hh)


class RoundedLSTM(LoopLSTM):
    """The loop with what goes into its products rounded as dynamic quantisation does; for `rounded_weights`.

    The inputs of linear layers that follow are rounded there, by `round_inputs`.
    """

    cell = staticmethod(_rounded_cell)

    def _direction(
        self, x: Tensor, h: Tensor, c: Tensor, index: int, inside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return super()._direction(_rounded_input(x), h, c, index, inside)


def round_inputs(model: nn.Module) -> None:
    """From now on, round the inputs of all linear layers of a model as dynamic quantisation does."""

    def rounded(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        del module
        return _rounded_input(inputs[0])

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounded)


def rounded_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices rounded to a grid of 255 steps, symmetric around 0, as wide as their largest value; others unchanged."""
    return {
        name: _on_grid(value, 2 * float(value.abs().max()) / 255)
        if value.dim() == MATRIX and not name.startswith("embed")
        else value
        for name, value in weights.items()
    }


def _rounded_input(value: Tensor) -> Tensor:
    """Values on a grid of 127 steps over their range and zero: for old processors, torch leaves one bit unused."""
    least, most = value.detach().aminmax()
    return _on_grid(value, (max(0.0, float(most)) - min(0.0, float(least))) / 127)


def _on_grid(value: Tensor, step: float) -> Tensor:
    return (value / step).round() * step if step else value


def why_not() -> str | None:
    """Reason why this torch cannot do it, or None."""
    if not hasattr(torch.ao, "quantization") or not hasattr(torch.ao.quantization, "quantize_dynamic"):
        return "this torch has no torch.ao.quantization.quantize_dynamic any more; torch 2.13 has it"
    if torch.backends.quantized.engine in {"", "none"}:
        return "this torch has no engine for quantised products on this CPU"
    return None


def _precision(module: nn.Module) -> str:
    """`int8` where the packed weights are."""
    kind: Any = module.dtype if hasattr(module, "dtype") else module.weight().dtype  # type: ignore[operator]
    return {torch.qint8: "int8", torch.float16: "fp16"}.get(kind, str(kind).removeprefix("torch."))
