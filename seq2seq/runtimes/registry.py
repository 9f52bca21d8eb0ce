"""RUNTIMES: what people run instead of torch, each behind one class, so that the benchmark can compare it with torch.

A variant names its runtime and the options that it gets; nothing is imported from a runtime before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from seq2seq.models.base import Model
from seq2seq.runtimes.int8 import DynamicInt8
from seq2seq.runtimes.onnxruntime import OnnxRuntime, QuantisedOnnxRuntime
from seq2seq.runtimes.openvino import OpenVino
from seq2seq.runtimes.runtime import Ran, Runtime

__all__ = ["RUNTIMES", "Ran", "Runtime"]

#: By the name that a variant gives: from a model and the runtime's own options to something that runs.
RUNTIMES: dict[str, Callable[[Model, Mapping[str, Any]], Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "onnxruntime-int8": QuantisedOnnxRuntime,
    "openvino": OpenVino,
    "torch-int8": DynamicInt8,
}
