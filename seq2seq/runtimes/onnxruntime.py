"""ONNX Runtime on the CPU: LSTM nodes, as many threads inside an operator as torch has, one operator at a time.

The model is in fp32, or quantised by ONNX Runtime's own tool: int8 weights, inputs rounded to 8 bits call by call.
Everything else is as its users find it, graph optimisation and the busy waiting of its threads after a call included.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from kernels.cpu.build import cpu_flags
from seq2seq.runtimes.export import EXPORTS, exported, key_of, unprinted
from seq2seq.runtimes.runtime import Inputs, Ran, Results, Runtime, count

#: Operators whose input type is the precision that did the work, those that round their input to 8 bits themselves, and
#: what its profiler calls the types.
_PRODUCTS = {"LSTM", "MatMul", "Gemm", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
_ROUNDING = {"DynamicQuantizeLSTM", "DynamicQuantizeMatMul"}
_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "int8": "int8", "uint8": "int8"}


class OnnxRuntime(Runtime):
    """An inference session; inputs are read where they lie, outputs are new."""

    def convert(self, digest: bytes) -> None:
        """Export and make a session."""
        self._model = self._prepared(exported(self, digest))
        self._session = _session(self._model)
        assert self.signature is not None  # noqa: S101 - the first call set it
        # The exporter leaves out what no operator reads.
        read = {value.name for value in self._session.get_inputs()}
        given = zip(self.arguments, self.signature, strict=True)
        self._names = [(name, n) for n, (name, value) in enumerate(given) if value is not None and name in read]

    def _prepared(self, model: bytes) -> bytes:
        """The exported model as it will run."""
        return model

    def run(self, inputs: Inputs) -> Results:
        """One `InferenceSession.run`. Binding inputs and outputs by hand was not faster."""
        feed = {name: inputs[place].numpy() for name, place in self._names}  # type: ignore[union-attr]
        return tuple(torch.from_numpy(found) for found in self._session.run(None, feed))

    def ran(self) -> Ran:
        """By its profiler, which a session of its own has to be made for."""
        example = self.example()
        with tempfile.TemporaryDirectory() as folder:
            session = _session(self._model, str(Path(folder) / "profile"))
            session.run(None, {name: example[place].numpy() for name, place in self._names})  # type: ignore[union-attr]
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        return digest_profile(events, importlib.import_module("onnxruntime").__version__)


class QuantisedOnnxRuntime(OnnxRuntime):
    """ONNX Runtime with weights in int8, a scale for each row, and inputs of products rounded to 8 bits in each call.

    Where no instruction adds products of bytes in 32 bits, they saturate at 16 bits, and a seed's outputs were off by a
    tenth. There weights get 7 bits, as its documentation advises.
    """

    def _prepared(self, model: bytes) -> bytes:
        narrow = not _adds_products_of_bytes()
        key = key_of("int8", narrow, hashlib.blake2b(model).digest())
        return EXPORTS.get(key, lambda: _quantised(model, narrow=narrow))


def _quantised(model: bytes, *, narrow: bool) -> bytes:
    """A serialised model with weights in int8, or in 7 bits."""
    import onnx  # noqa: PLC0415 - optional
    from onnxruntime import quantization  # noqa: PLC0415 - optional

    graph = onnx.load_from_string(model)
    _unshare(graph.graph)
    with tempfile.TemporaryDirectory() as folder, unprinted():
        file = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(graph, file, per_channel=True, reduce_range=narrow)
        return file.read_bytes()


def _unshare(graph: Any) -> None:
    """Give each LSTM node weights of its own.

    The tool reshapes the weights of one node and leaves those that share them, by name or by an Identity, without.
    """
    weights = {value.name: value for value in graph.initializer}
    same = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    seen = set[str]()
    for node in graph.node:
        for place, name in enumerate(node.input[1:3] if node.op_type == "LSTM" else (), 1):
            source = same.get(name, name)
            if source in seen and source in weights:
                copy = graph.initializer.add()
                copy.CopyFrom(weights[source])
                node.input[place] = copy.name = f"{source}.{len(graph.initializer)}"
            seen.add(source)


def _adds_products_of_bytes() -> bool:
    return bool({"avx512_vnni", "avx_vnni", "asimddp"}.intersection(cpu_flags().split()))


def digest_profile(events: list[dict[str, Any]], version: str) -> Ran:
    """Read a profile of one call.

    Args:
        events: of the profile.
        version: of ONNX Runtime.
    """
    spent: collections.Counter[str] = collections.Counter()
    operators: collections.Counter[str] = collections.Counter()
    precisions: collections.Counter[str] = collections.Counter()
    threads, providers = 1, dict[str, None]()
    for event in events:
        facts = event.get("args", {})
        if event.get("cat") != "Node" or "op_name" not in facts:
            continue
        name = facts["op_name"]
        operators[name] += 1
        spent[name] += event.get("dur", 0)
        # Of a single thread there are no statistics but an empty text.
        if isinstance(scheduled := facts.get("thread_scheduling_stats"), dict):
            threads = max(threads, 1 + len(scheduled.get("sub_threads", {})))
        if name in _PRODUCTS | _ROUNDING:
            providers[facts.get("provider", "an unknown provider")] = None
            kinds = [kind for given in facts.get("input_type_shape", []) for kind in given]
            # Their weights are packed and not among the inputs; what the zero of the weights' scale is, they are.
            kinds = [kind for kind in kinds if kind in {"int8", "uint8"}][:1] if name in _ROUNDING else kinds[:1]
            precisions.update(_TYPES.get(kind, kind) for kind in kinds)
    lstms = sum(number for name, number in operators.items() if name.endswith("LSTM"))
    words = f"ONNX Runtime {version} ran {count(lstms, 'LSTM node')} by {' and '.join(providers) or 'no provider'}"
    return Ran(
        {name: operators[name] for name, _ in spent.most_common()},
        tuple(name for name, _ in precisions.most_common()),
        threads,
        f"{words}, {count(threads, 'thread')}",
    )


def _session(model: bytes, profile: str | None = None) -> Any:
    import onnxruntime  # noqa: PLC0415 - optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Its warnings are about what the exporter leaves in the graph.
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
