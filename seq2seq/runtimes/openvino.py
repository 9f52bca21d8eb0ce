"""OpenVINO on the CPU: compiled for latency, with as many threads as torch has.

Its own precision is what the processor has fast products for, which may be bf16: a variant that leaves the choice to
it is judged in that precision, so the choice has to be known before anything is compiled.
"""

from __future__ import annotations

import collections
import functools
import importlib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from seq2seq.runtimes import signal_stack
from seq2seq.runtimes.export import exported
from seq2seq.runtimes.runtime import Inputs, Ran, Results, Runtime, count

PRECISION = "INFERENCE_PRECISION_HINT"
#: What it calls the types, and what people do.
_TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8", "f64": "fp64"}
#: Layers of a compiled model whose type is the precision that did the work.
_PRODUCTS = {"RNNSeq", "RNNCell", "FullyConnected", "MatMul"}
_LOOPS = {"TensorIterator", "Loop"}
_BOOKKEEPING = {"Const", "Input", "Output"}


class OpenVino(Runtime):
    """A compiled model and one request; inputs are read where they lie, outputs are copied out of the request."""

    def convert(self, digest: bytes) -> None:
        """Export and compile."""
        import openvino  # noqa: PLC0415 - optional

        core = openvino.Core()
        model = core.read_model(io.BytesIO(exported(self, digest)))
        wanted = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        with signal_stack.kept():
            self._compiled = core.compile_model(model, "CPU", wanted | dict(self.options))
        if PRECISION not in self.options and _hint(self._compiled.get_property(PRECISION)) != default_precision():
            msg = (
                f"OpenVINO compiled for {_hint(self._compiled.get_property(PRECISION))}, but its default here is said "
                f"to be {default_precision()}, by which its results would be judged; report it with the CPU's name"
            )
            raise RuntimeError(msg)
        self._request = self._compiled.create_infer_request()
        self._tensor = openvino.Tensor
        # By name, since the exporter leaves out what no operator reads.
        places = {name: place for place, value in enumerate(self._compiled.inputs) for name in value.get_names()}
        self._places = [(n, places[name]) for n, name in enumerate(self.arguments) if name in places]

    def run(self, inputs: Inputs) -> Results:
        """Set the inputs, infer, copy the outputs: the request's next call overwrites them."""
        request = self._request
        for number, place in self._places:
            value = inputs[number]
            assert value is not None  # noqa: S101 - converted for these inputs
            request.set_input_tensor(place, self._tensor(value.numpy(), shared_memory=True))
        request.infer()
        results = range(len(self._compiled.outputs))
        return tuple(torch.from_numpy(request.get_output_tensor(place).data.copy()) for place in results)

    def ran(self) -> Ran:
        """By the compiled model's own graph."""
        layers = [{key: str(_plain(value)) for key, value in layer.get_rt_info().items()} for layer in self._layers()]
        threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))
        chose = "" if PRECISION in self.options else _hint(self._compiled.get_property(PRECISION))
        return digest_layers(layers, _version(), threads, chose)

    def _layers(self) -> Iterable[Any]:
        found: Iterable[Any] = self._compiled.get_runtime_model().get_ordered_ops()
        return found


def digest_layers(layers: Iterable[Mapping[str, str]], version: str, threads: int, chose: str) -> Ran:
    """Read what a compiled model's layers are.

    Args:
        layers: `layerType`, `primitiveType` and `runtimePrecision` of each.
        version: of OpenVINO.
        threads: that it was compiled for.
        chose: the precision that it chose; empty where the variant sets one.
    """
    operators = collections.Counter(layer["layerType"] for layer in layers if layer["layerType"] not in _BOOKKEEPING)
    precisions: collections.Counter[str] = collections.Counter()
    primitives = dict[str, None]()
    for layer in layers:
        if layer["layerType"] in _PRODUCTS:
            precisions[_TYPES.get(layer["runtimePrecision"], layer["runtimePrecision"])] += 1
        if layer["layerType"].startswith("RNN"):
            primitives[layer["primitiveType"]] = None
    lstms = sum(number for name, number in operators.items() if name.startswith("RNN"))
    loops = sum(number for name, number in operators.items() if name in _LOOPS)
    shapes = [f"{count(lstms, 'LSTM layer')} ({', '.join(primitives)})"] if lstms or not loops else []
    # Where sequences differ in length it runs no LSTM as a layer, and reports no precision inside the loop.
    shapes += [f"LSTMs as {count(loops, 'loop')} over single steps"] if loops else []
    parts = [f"OpenVINO {version} ran {' and '.join(shapes)}"]
    if chose:
        parts.append(f"{chose} by its own choice")
    parts.append(count(threads, "thread"))
    heaviest = sorted(operators, key=lambda name: (name not in _PRODUCTS | _LOOPS, -operators[name]))
    found = tuple(name for name, _ in precisions.most_common())
    return Ran({name: operators[name] for name in heaviest}, found, threads, ", ".join(parts))


@functools.cache
def default_precision() -> str:
    """Precision that it computes in on this CPU when it is left the choice; fp32 where it does not run at all."""
    try:
        return _hint(importlib.import_module("openvino").Core().get_property("CPU", PRECISION))
    except (ImportError, RuntimeError):
        return "fp32"


def _hint(value: Any) -> str:
    name = str(value.to_string())
    return _TYPES.get(name, name)


def _plain(value: Any) -> Any:
    """Value of an entry that some releases wrap."""
    return value.value if hasattr(value, "value") else value


def _version() -> str:
    return str(importlib.import_module("openvino").__version__).partition("-")[0]
