"""A model as ONNX, with true LSTM nodes: what ONNX Runtime and OpenVINO are built from.

torch's older exporter is asked for it: the newer one, by torch.export, unrolls nn.LSTM over time, and nobody who wants
speed would feed a runtime hundreds of copies of a cell.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.host.output import replacing
from seq2seq.models.base import Model
from seq2seq.runtimes.onnx_lstm import with_lengths
from seq2seq.runtimes.runtime import ARGUMENTS, RESULTS, Inputs, Results, Runtime

#: The highest that both ends of the range of torch releases export to.
OPSET = 17
#: Exports kept in memory: of the timed weights and of those of both gates, as they are and quantised.
KEPT = 6
#: Larger ones are kept in no file: a few of them would fill a small disk.
MOST_BYTES = 256 * 2**20


@dataclass
class Exports:
    """Serialised models by the digest of all that they depend on, so that none is exported twice.

    Attributes:
        folder: where they are kept for other processes with the same code; None keeps them only in memory.
    """

    folder: Path | None = None
    _newest: dict[str, bytes] = field(default_factory=dict, init=False)

    def get(self, key: str, export: Callable[[], bytes], *, shared: bool = True) -> bytes:
        """The export of a key, made where neither this process nor another one has made it.

        Args:
            key: digest of all that it depends on.
            export: makes it.
            shared: whether the key means the same in every process.
        """
        if key not in self._newest:
            found = self._filed(key, export) if shared and self.folder is not None else export()
            for oldest in list(self._newest)[: max(0, len(self._newest) + 1 - KEPT)]:
                del self._newest[oldest]
            self._newest[key] = found
        return self._newest[key]

    def _filed(self, key: str, export: Callable[[], bytes]) -> bytes:
        assert self.folder is not None  # noqa: S101 - asked before
        path = self.folder / f"{key}.onnx"
        if path.exists():
            return path.read_bytes()
        made = export()
        if len(made) <= MOST_BYTES:
            # A full disk costs other processes an export of their own, and this one nothing.
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(path, synced=False) as file:
                    file.write(made)
        return made


#: Those of this process.
EXPORTS = Exports()


def key_of(*parts: object) -> str:
    """Digest of what an export depends on."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class ExportedRun(nn.Module):
    """`run` under the name that the exporter calls."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        # A new module is in training mode, and the exporter puts the mode that it finds back, for the model within too.
        self.train(model.training)

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Results:
        """Call `Model.run`."""
        return self.model.run(source, target, source_lengths, target_lengths)


def exported(runtime: Runtime, digest: bytes) -> bytes:
    """The runtime's model as serialised ONNX; made once for the same weights, model and shapes.

    Inputs are those of `ARGUMENTS` that are given, under these names; outputs are `RESULTS`.

    Args:
        runtime: gives the model and the shapes.
        digest: of the model's weights.
    """
    # Two variants may have the same weights in modules of other classes.
    classes = [f"{type(module).__module__}.{type(module).__qualname__}" for module in runtime.model.modules()]
    key = key_of(digest, runtime.model.config, runtime.signature, classes, torch.__version__)
    # The name of a user's model holds its address, and a user's class may hold values that no weight shows.
    known = all(name.split(".", maxsplit=1)[0] in {"seq2seq", "kernels", "torch"} for name in classes)
    return EXPORTS.get(key, lambda: _export(runtime), shared=known and not hasattr(runtime.model, "onnx"))


def _export(runtime: Runtime) -> bytes:
    # A user's model exports itself.
    if hasattr(runtime.model, "onnx"):
        own: bytes = cast("Any", runtime.model).onnx()
        return own
    return to_onnx(runtime.model, runtime.example())


def to_onnx(model: Model, example: Inputs, *, dynamic: bool = False) -> bytes:
    """`run` of a model as serialised ONNX, with the names of `ARGUMENTS` and `RESULTS`.

    Args:
        model: in fp32 on the CPU.
        example: the arguments that are inputs, the others None.
        dynamic: whether batch and steps are left open, as far as the model's operators let them be; otherwise the
            shapes are those of the example.
    """
    # The exporter's annotations allow only paths, but it writes to anything that is open.
    file: Any = io.BytesIO()
    given = {name: value for name, value in zip(ARGUMENTS, example, strict=True) if value is not None}
    # Lengths have only a batch dimension; in a state, the batch is the second dimension.
    axes = {name: dict(enumerate(("batch", f"{name}_steps")[: value.dim()])) for name, value in given.items()}
    axes |= {"outputs": {0: "batch", 1: "steps"}, "hidden": {1: "batch"}, "cell": {1: "batch"}}
    # The exporter warns that it is old, that shapes are fixed and that the checks of inputs are not exported: all true.
    # What it prints, a graph of hundreds of lines when it fails, it does not raise; what it raises says why.
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False), unprinted():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            ExportedRun(with_lengths(model) if example[2] is not None and model.config.stacks else model),
            example,
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=list(given),
            output_names=list(RESULTS),
            dynamic_axes=axes if dynamic else None,
        )
    content: bytes = file.getvalue()
    return content


@contextlib.contextmanager
def unprinted() -> Iterator[None]:
    """Silence standard output and error inside the block, also for C++, which does not know sys.stdout."""
    with contextlib.ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "wb"))  # noqa: PTH123 - no path of ours
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(nothing.fileno(), number)
        yield
