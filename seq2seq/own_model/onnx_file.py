"""An ONNX file as a module: its weights are parameters, and its own call is ONNX's reference implementation in numpy.

That call is the truth of the gate, in float64 where the weights are; nothing is timed by it. ONNX Runtime and OpenVINO
get the file's graph with the weights that the module has now.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seq2seq.own_model.errors import OwnModelError

#: Inputs and attributes of an LSTM node that the reference implementation ignores or does otherwise.
_LENGTHS, _PEEPHOLES = 4, 7
_ATTRIBUTES = {"activations", "activation_alpha", "activation_beta", "clip", "input_forget"}
#: ONNX's numbers of float and double.
_FLOAT, _DOUBLE = 1, 11


class OnnxModel(nn.Module):
    """An ONNX model: tensors in by position or name, a dict of tensors out.

    Args:
        path: of the file.

    Raises:
        OwnModelError: for a file that is not ONNX, holds no real weights, or has LSTMs whose truth cannot be computed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            onnx = importlib.import_module("onnx")
        except ImportError as error:
            msg = f"{path}: reading it needs the package onnx, which is not installed: pip install onnx"
            raise OwnModelError(msg) from error
        try:
            self._proto = onnx.load(str(path))
            onnx.checker.check_model(self._proto)
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            msg = f"{path} is not a valid ONNX model: {lines[0]}"
            raise OwnModelError(msg) from error
        self._helper = importlib.import_module("onnx.numpy_helper")
        for node in self._proto.graph.node:
            if node.op_type == "LSTM" and (reason := _unknown(node)):
                msg = (
                    f"{path}: the LSTM {node.name} has {reason}, which ONNX's reference implementation lacks, so there "
                    "is no truth to compare with; give the model's code"
                )
                raise OwnModelError(msg)
        weights = [held for held in self._proto.graph.initializer if held.data_type == _FLOAT and held.dims]
        self._names = {f"weight_{place}": held.name for place, held in enumerate(weights)}
        for name, held in zip(self._names, weights, strict=True):
            value = torch.from_numpy(self._helper.to_array(held).copy())
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))
        held_names = {held.name for held in self._proto.graph.initializer}
        self.inputs = [given for given in self._proto.graph.input if given.name not in held_names]
        self.results = [result.name for result in self._proto.graph.output]
        self.training = False

    def train(self, mode: bool = True) -> OnnxModel:
        """Return itself: a file has the mode in which it was exported."""
        del mode
        return self

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Compute the outputs by ONNX's reference implementation, in the type of the weights."""
        reference = importlib.import_module("onnx.reference")
        named = dict(zip(self.named(args, kwargs), (*args, *kwargs.values()), strict=True))
        double = any(value.dtype == torch.float64 for value in self.parameters())
        found = reference.ReferenceEvaluator(self._with_weights(double=double)).run(
            None, {name: np.ascontiguousarray(value.numpy()) for name, value in named.items()}
        )
        return {name: torch.from_numpy(np.array(value)) for name, value in zip(self.results, found, strict=True)}

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
        """Return the file's names of the arguments of a call.

        Raises:
            OwnModelError: for other arguments than the file's inputs.
        """
        names = [given.name for given in self.inputs]
        found = [*names[: len(args)], *kwargs]
        if sorted(found) != sorted(names) or not all(isinstance(v, Tensor) for v in (*args, *kwargs.values())):
            msg = f"the file's inputs are {', '.join(names)}; give one tensor for each, in this order or by name"
            raise OwnModelError(msg)
        return found

    def serialized(self, names: Mapping[str, str]) -> bytes:
        """Return the file with the weights that the module has, and inputs renamed.

        Args:
            names: new names of inputs by the file's.
        """
        proto = self._with_weights(double=False)
        for given in proto.graph.input:
            given.name = names.get(given.name, given.name)
        for node in proto.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        found: bytes = proto.SerializeToString()
        return found

    def _with_weights(self, *, double: bool) -> Any:
        """The file's graph with the weights that the module has, on request in float64."""
        proto = type(self._proto)()
        proto.CopyFrom(self._proto)
        values = {theirs: getattr(self, own) for own, theirs in self._names.items()}
        for held in proto.graph.initializer:
            if held.name in values:
                value = values[held.name].detach().numpy()
                held.CopyFrom(self._helper.from_array(np.ascontiguousarray(value), held.name))
        for node in proto.graph.node if double else ():
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
                    attribute.i = _DOUBLE
                elif attribute.HasField("t") and attribute.t.data_type == _FLOAT:
                    value = self._helper.to_array(attribute.t).astype(np.float64)
                    attribute.t.CopyFrom(self._helper.from_array(value, attribute.t.name))
        return proto

    def lstms(self) -> list[dict[str, Any]]:
        """Describe the LSTM nodes as `Use.facts` describes modules; what the file does not say is None."""
        shapes = {held.name: tuple(held.dims) for held in self._proto.graph.initializer}
        found: list[dict[str, Any]] = []
        for node in self._proto.graph.node:
            if node.op_type == "LSTM":
                # Of the weights: directions, four gates of the hidden size, inputs.
                directions, gates, inputs = shapes.get(node.input[1], (None, None, None))
                found.append(
                    {
                        "name": node.name or f"node {len(found) + 1}",
                        "kind": "LSTM node",
                        "input_size": inputs,
                        "hidden_size": None if gates is None else gates // 4,
                        "num_layers": 1,
                        "bidirectional": directions == 2,  # noqa: PLR2004
                        "proj_size": 0,
                        "calls": 1,
                        "batch": None,
                        "steps": None,
                        "packed": False,
                        "from_zeros": None,
                    }
                )
        return found

    def drawn_inputs(self, advice: str) -> Callable[[], Any]:
        """Return a function that draws inputs of the shapes that the file states.

        Raises:
            OwnModelError: where it leaves a size open, or takes values that cannot be drawn.
        """
        shapes: dict[str, list[int]] = {}
        for given in self.inputs:
            kind = given.type.tensor_type
            sizes = [size.dim_value for size in kind.shape.dim]
            if kind.elem_type != _FLOAT or not all(sizes):
                what = "is not of floats" if kind.elem_type != _FLOAT else "leaves a size open"
                msg = f"the input {given.name} of the file {what}, so inputs cannot be drawn for it; {advice}"
                raise OwnModelError(msg)
            shapes[given.name] = sizes
        return lambda: SimpleNamespace(args=tuple(torch.randn(sizes) for sizes in shapes.values()))


def _unknown(node: Any) -> str:
    """Describe what the reference implementation does not compute of an LSTM node; empty if it computes all."""
    given = list(node.input) + [""] * 8
    if given[_LENGTHS]:
        return "sequence lengths"
    if given[_PEEPHOLES]:
        return "peepholes"
    named = {attribute.name for attribute in node.attribute} & _ATTRIBUTES
    return f"the attribute {min(named)}" if named else ""
