"""ONNX Runtime on the CPU: LSTM nodes, as many threads inside an operator as torch has, one operator at a time.

Everything else is as its users find it, graph optimisation and the busy waiting of its threads after a call included.
"""

from __future__ import annotations

import collections
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from seq2seq.runtimes.export import exported
from seq2seq.runtimes.runtime import Inputs, Ran, Results, Runtime, count

#: Operators whose input type is the precision that did the work, and what its profiler calls the types.
_PRODUCTS = {"LSTM", "MatMul", "Gemm", "FusedMatMul", "DynamicQuantizeLSTM", "MatMulInteger"}
_TYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "int8": "int8", "uint8": "int8"}


class OnnxRuntime(Runtime):
    """An inference session; inputs are read where they lie, outputs are new."""

    def convert(self, digest: bytes) -> None:
        """Export and make a session."""
        self._model = exported(self, digest)
        self._session = _session(self._model)
        assert self.signature is not None  # noqa: S101 - the first call set it
        given = zip(self.arguments, self.signature, strict=True)
        self._names = [(name, place) for place, (name, value) in enumerate(given) if value is not None]

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
        if name in _PRODUCTS:
            providers[facts.get("provider", "an unknown provider")] = None
            kinds = [kind for given in facts.get("input_type_shape", [])[:1] for kind in given]
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
