"""A variant: one way to execute a model, as data, and the LSTM classes that it may name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernels.head import ShortlistHead
from kernels.lstm import LSTM
from kernels.reference import LoopLSTM
from seq2seq.execution.cell_lstm import CellLSTM
from seq2seq.execution.fused_decoder import FusedDecoder
from seq2seq.execution.requirements import (
    Requirement,
    cannot_decode,
)
from seq2seq.execution.rival_lstms import FlashRNNLSTM, TorchRLLSTM
from seq2seq.execution.split_lstm import SplitLSTM
from seq2seq.runtimes.int8 import RoundedLSTM
from seq2seq.workloads.workload import Workload

#: LSTM classes by the name that a variant gives; each has the parameters of torch.nn.LSTM under the same names.
LSTMS: dict[str, Callable[..., nn.RNNBase]] = {
    "nn": nn.LSTM,
    "loop": LoopLSTM,
    "cell": CellLSTM,
    "split": SplitLSTM,
    "rounded": RoundedLSTM,
    "kernels": LSTM,
    "torchrl": TorchRLLSTM,
    "flashrnn": FlashRNNLSTM,
}

#: Heads by the name that a variant gives: each makes one of a model's linear head and the number of tokens that
#: decoding takes of a step's outputs.
HEADS: dict[str, Callable[[Any, int], nn.Module]] = {
    "nn": lambda linear, _: linear,
    "shortlist": ShortlistHead.of,
}

#: What runs a decoder that is fed what it found, by the name that a variant gives; each changes a model in place.
DECODERS: dict[str, Callable[[nn.Module], None]] = {
    "nn": lambda _: None,
    "fused": FusedDecoder.into,
}

#: Runtimes that read a model as ONNX, and their package.
CONVERTING = {"onnxruntime": "onnxruntime", "onnxruntime-int8": "onnxruntime", "openvino": "openvino"}
#: Types of torch's tensors by precision; what is quantised to int8 goes in and comes out as fp32.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.float32,
    "bf16-weights": torch.float32,
    "bf16-split": torch.float32,
    "int8-head": torch.float32,
}
#: Bytes of a weight where it is kept in fewer than its type has.
KEPT_BYTES = {"int8": 1, "bf16-weights": 2, "bf16-split": 4, "int8-head": 1}


@dataclass(frozen=True)
class Variant:
    """One way to execute a model.

    Attributes:
        name: what it is called.
        summary: one line for people.
        lstm: key of `LSTMS`.
        lstm_options: arguments of that class besides those of torch.nn.LSTM.
        head: key of `HEADS`, what a model's linear head becomes.
        decoder: key of `DECODERS`, what runs the steps of a decoder that is fed what it found.
        vendor_lstm: whether torch may hand the LSTM to oneDNN or cuDNN.
        precision: key of `DTYPES`.
        autocast: whether a lower precision comes from autocast over fp32 weights; otherwise, in inference, the
            weights are stored in that precision. Training always keeps fp32 weights under autocast.
        torch_tf32: whether TF32 is left as torch has it by default (in cuDNN's LSTM, not in products); otherwise
            `precision` decides for both.
        compiler: None, `dynamo` (torch.compile) or `torchscript`.
        compile_options: arguments of torch.compile.
        allow_rnn: whether Dynamo may trace nn.LSTM (`torch._dynamo.config.allow_rnn`).
        captures_step: whether a decoding step runs as one captured CUDA graph.
        reuses_outputs: whether a call's results live in memory that the next call overwrites, as in CUDA graphs.
        runtime: key of `runtimes.registry.RUNTIMES` for what runs without torch's own execution; None for torch.
        runtime_options: the runtime's own.
        own_precision: gives the precision where the runtime chooses it by the machine; see `here`.
        own_threads: whether it brings threads besides torch's, which continue to spin after a call.
        environment: environment variables that its process must be started with.
        devices: where it exists.
        requirements: what else it needs, checked before anything is built.
        builds: compiles what it needs before its first call in a mode, or says why it cannot.
        make: makes what is called in place of an own model, given that model; None for every other variant.
    """

    name: str
    summary: str
    lstm: str = "nn"
    lstm_options: Mapping[str, Any] = field(default_factory=dict)
    head: str = "nn"
    decoder: str = "nn"
    vendor_lstm: bool = True
    precision: str = "fp32"
    autocast: bool = False
    torch_tf32: bool = False
    compiler: str | None = None
    compile_options: Mapping[str, Any] = field(default_factory=dict)
    allow_rnn: bool = False
    captures_step: bool = False
    reuses_outputs: bool = False
    runtime: str | None = None
    runtime_options: Mapping[str, Any] = field(default_factory=dict)
    own_precision: Callable[[], str] | None = None
    own_threads: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    requirements: tuple[Requirement, ...] = ()
    builds: Callable[[str], str | None] | None = None
    make: Callable[[nn.Module], Callable[..., Any]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the precision."""
        return DTYPES[self.precision]

    @property
    def compiles_long(self) -> bool:
        """Return whether torch.compile has the LSTM to compile, of which it skips torch's own."""
        return self.compiler == "dynamo" and (self.allow_rnn or self.lstm != "nn")

    @property
    def beside_lstm(self) -> tuple[Any, ...]:
        """Settings besides the model's LSTMs: variants equal in this are the same for a model without any."""
        # Weights kept in fewer bits, and torch's own TF32, are the LSTM's; `fullgraph` only refuses graph breaks.
        full = self.torch_tf32 or "weight_storage" in self.lstm_options
        how = self.compiler, self.compile_options.get("mode"), self.runtime, tuple(self.runtime_options.items())
        around = self.captures_step, self.head, tuple(self.environment.items())
        return "fp32" if full else self.precision, self.autocast, self.own_precision, *around, *how

    @property
    def alone(self) -> bool:
        """Return whether it takes its turns in a process of its own, rather than in one that the group shares."""
        return self.own_threads or bool(self.environment)

    @property
    def needs(self) -> tuple[str, ...]:
        """Requirements of the variant besides torch itself, in words for its user."""
        found = []
        if self.compiler == "dynamo":
            found.append("a C++ compiler (at every start)")
        if self.builds:
            found.append("a C++ compiler (once)")
        if self.lstm == "kernels":
            found.append("kernels.LSTM")
        if self.lstm in {"torchrl", "flashrnn"}:
            found.append(f"the package {self.lstm}")
        if self.runtime in CONVERTING:
            found += ["the package onnx", f"the package {CONVERTING[self.runtime]}"]
        return tuple(found)

    def make_lstm(self, *sizes: int, **options: Any) -> nn.RNNBase:
        """An LSTM of its kind; takes the arguments of torch.nn.LSTM."""
        return LSTMS[self.lstm](*sizes, **self.lstm_options, **options)

    def here(self) -> Variant:
        """Itself; where its runtime chooses the precision, with the one that it chooses on this machine."""
        return dataclasses.replace(self, precision=self.own_precision()) if self.own_precision else self

    def stores_low(self, mode: str) -> bool:
        """Return whether the weights themselves are stored in a lower precision than float32."""
        return self.dtype != torch.float32 and not self.autocast and self.runtime is None and mode != "training"

    def stored_bytes(self, mode: str) -> int:
        """Least size of a stored weight: runtimes and our kernels may keep a copy in the precision they compute in."""
        if self.precision in KEPT_BYTES:
            return KEPT_BYTES[self.precision]
        keeps_copy = self.runtime is not None or (self.autocast and self.lstm == "kernels" and mode != "training")
        low = keeps_copy or self.stores_low(mode)
        return self.dtype.itemsize if low else torch.float32.itemsize

    def why_not(self, device: str, mode: str, workload: Workload, *, build: bool = True) -> str | None:
        """Reason why this variant cannot run there, or None when nothing speaks against it.

        Args:
            device: `cpu` or `cuda`.
            mode: of the workload.
            workload: what it would run.
            build: whether to compile what it needs, to find out whether that can be done.
        """
        if device not in self.devices:
            return f"exists on {' and '.join(self.devices)} only"
        if device == "cuda" and not torch.cuda.is_available():
            return "needs an NVIDIA GPU; this torch sees none (torch.cuda.is_available() is false)"
        if reason := cannot_decode(mode, workload) or self._cannot_step(mode):
            return reason
        # A saved program of the user's has LSTMs, but as operators.
        without = not workload.config.stacks and workload.config.family != "own"
        if without and (reason := _only_lstm(self) or _not_for_theirs(self, mode, workload)):
            return reason
        reasons = (requirement(device, mode, workload) for requirement in self.requirements)
        if reason := next(filter(None, reasons), None) or workload.refuses(self, mode):
            return reason
        return self.builds(mode) if build and self.builds else None

    def _cannot_step(self, mode: str) -> str | None:
        """Reason why it has no single steps, or nothing but them."""
        if mode == "decode" and self.runtime is not None:
            return f"{self.runtime} runs whole passes here: its model has no single step to feed with its own output"
        if mode != "decode" and self.captures_step:
            return "captures a decoding step: only for the mode decode"
        return None


#: Every variant by name, in the order of preference among equals; `seq2seq.execution.variants` fills it.
VARIANTS: dict[str, Variant] = {}


def _not_for_theirs(variant: Variant, mode: str, workload: Workload) -> str | None:
    """Reason why code of another library cannot be compiled or judged, or None."""
    config = workload.config
    if variant.compiler == "torchscript" and not config.scriptable:
        return "the model is code of the transformers library, which TorchScript does not compile"
    if mode == "training" and variant.precision != "fp32" and config.kinked:
        return (
            f"the model has ReLUs, whose gradient is discontinuous: in {variant.precision} rounding decides which "
            "units have a gradient, so a correct result cannot be told from a wrong one"
        )
    return None


def _only_lstm(variant: Variant) -> str | None:
    """Reason why a variant is not a way of its own to execute a model without LSTMs, or None when it is one."""
    for other in VARIANTS.values():
        if other.name == variant.name:
            break
        if other.lstm == "nn" and other.beside_lstm == variant.beside_lstm:
            return f"the model has no LSTM, so this would be `{other.name}` again"
    if variant.captures_step:
        return "the model has no LSTM: its state grows from step to step, and what a captured step reads cannot"
    if variant.lstm != "nn" and variant.compiler is None:
        return "the model has no LSTM, and this variant is about its own LSTM"
    return None
