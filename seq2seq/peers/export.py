"""A model as ONNX, with true LSTM nodes: what ONNX Runtime and OpenVINO are built from.

torch's older exporter is asked for it: the newer one, by torch.export, unrolls nn.LSTM over time, and nobody who wants
speed would feed a runtime hundreds of copies of a cell.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from seq2seq.contract import Model
from seq2seq.peers.runtime import ARGUMENTS, RESULTS, Results, Runtime

#: The highest that both ends of the range of torch releases export to.
OPSET = 17
#: Exports kept, newest last: the timed weights and those of both gates, which all runtimes of a process share.
KEPT = 3

_exported: dict[object, bytes] = {}


class _Run(nn.Module):
    """`run` under the name that the exporter calls."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Results:
        return self.model.run(source, target, source_lengths, target_lengths)


def exported(runtime: Runtime, digest: bytes) -> bytes:
    """The runtime's model as serialised ONNX; made once a process for the same weights and shapes.

    Inputs are those of `ARGUMENTS` that are given, under these names; outputs are `RESULTS`.

    Args:
        runtime: gives the model and the shapes.
        digest: of the model's weights.
    """
    key = (digest, runtime.model.config, runtime.signature)
    if key not in _exported:
        for oldest in list(_exported)[: len(_exported) + 1 - KEPT]:
            del _exported[oldest]
        _exported[key] = _export(runtime)
    return _exported[key]


def _export(runtime: Runtime) -> bytes:
    example = runtime.example()
    # The exporter's annotations know paths alone; it writes to anything that is open.
    file: Any = io.BytesIO()
    # The exporter warns that it is old, that shapes are fixed and that the checks of inputs are not exported: all true.
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Run(runtime.model),
            example,
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=[name for name, value in zip(ARGUMENTS, example, strict=True) if value is not None],
            output_names=list(RESULTS),
        )
    content: bytes = file.getvalue()
    return content
