"""VARIANTS: the ways to execute a Seq2Seq, each a few lines of data.

All take one state_dict and one batch, so any two can be compared. To add one, add an entry; if it brings an LSTM of
its own, add that to `LSTMS`. Nothing else in the project needs to know its name.
"""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kernels.reference import LoopLSTM
from seq2seq.split_lstm import SplitLSTM
from seq2seq.workloads import Workload

#: LSTM classes by the name that a variant gives; each has the parameters of torch.nn.LSTM under the same names.
LSTMS: dict[str, Callable[..., nn.RNNBase]] = {"nn": nn.LSTM, "loop": LoopLSTM, "split": SplitLSTM}

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: A requirement says why a variant cannot run on (device, mode, workload), or None when it can.
Requirement = Callable[[str, str, Workload], str | None]


@dataclass(frozen=True)
class Variant:
    """One way to execute a model.

    Attributes:
        name: what it is called.
        summary: one line for people.
        lstm: key of `LSTMS`.
        lstm_options: arguments of that class beside those of torch.nn.LSTM.
        vendor_lstm: whether torch may hand the LSTM to oneDNN or cuDNN.
        precision: key of `DTYPES`.
        autocast: whether a lower precision comes from autocast over fp32 weights; otherwise, in inference, the
            weights are stored in that precision. Training always keeps fp32 weights under autocast.
        compiler: None, `dynamo` (torch.compile) or `torchscript`.
        compile_options: arguments of torch.compile.
        allow_rnn: whether Dynamo may trace nn.LSTM (`torch._dynamo.config.allow_rnn`).
        reuses_outputs: whether a call's results live in memory that the next call overwrites, as in CUDA graphs.
        devices: where it exists.
        requirements: what else it needs, checked before anything is built.
    """

    name: str
    summary: str
    lstm: str = "nn"
    lstm_options: Mapping[str, Any] = field(default_factory=dict)
    vendor_lstm: bool = True
    precision: str = "fp32"
    autocast: bool = False
    compiler: str | None = None
    compile_options: Mapping[str, Any] = field(default_factory=dict)
    allow_rnn: bool = False
    reuses_outputs: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    requirements: tuple[Requirement, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the precision."""
        return DTYPES[self.precision]

    @property
    def compiles_long(self) -> bool:
        """Whether torch.compile traces the LSTM itself, step by step, instead of skipping it."""
        return self.compiler == "dynamo" and (self.allow_rnn or self.lstm != "nn")

    def make_lstm(self, *sizes: int, **options: Any) -> nn.RNNBase:
        """An LSTM of its kind; takes the arguments of torch.nn.LSTM."""
        return LSTMS[self.lstm](*sizes, **self.lstm_options, **options)

    def stores_low(self, mode: str) -> bool:
        """Whether the weights themselves are stored in a lower precision than float32."""
        return self.dtype != torch.float32 and not self.autocast and mode == "inference"

    def why_not(self, device: str, mode: str, workload: Workload) -> str | None:
        """Why this variant cannot run there, or None when nothing speaks against it."""
        if device not in self.devices:
            return f"exists on {' and '.join(self.devices)} only"
        if device == "cuda" and not torch.cuda.is_available():
            return "needs an NVIDIA GPU; this torch sees none (torch.cuda.is_available() is false)"
        for requirement in self.requirements:
            reason = requirement(device, mode, workload)
            if reason:
                return reason
        return None


def _needs_vendor_lstm(dtype: torch.dtype) -> Requirement:
    """On a CPU: oneDNN must have an LSTM of this type here, forward and, for training, backward."""

    def check(device: str, mode: str, workload: Workload) -> str | None:
        del workload
        return _onednn_refusal(dtype, mode) if device == "cpu" else None

    return check


@functools.cache
def _onednn_refusal(dtype: torch.dtype, mode: str) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    try:
        # The answer is kept, so it must not depend on the settings around the first question.
        with (
            torch.random.fork_rng(devices=[]),
            torch.backends.mkldnn.flags(enabled=True),
            torch.inference_mode(mode == "inference"),
            torch.set_grad_enabled(mode != "inference"),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            output, _ = nn.LSTM(16, 16, batch_first=True)(torch.zeros(2, 3, 16))
            if mode != "inference":
                output.float().sum().backward()
    except RuntimeError as error:
        # The first sentence says it; the rest is advice on how to debug oneDNN.
        first = str(error).split(". ", maxsplit=1)[0].splitlines()[0]
        return f"oneDNN has no {str(dtype).removeprefix('torch.')} LSTM for {mode} on this CPU: {first}"
    return None


def _needs_no_vendor_bf16(device: str, mode: str, workload: Workload) -> str | None:
    """The detour around oneDNN is of use only where oneDNN cannot do it."""
    del workload
    if device == "cpu" and _onednn_refusal(torch.bfloat16, mode) is None:
        return "oneDNN has a bfloat16 LSTM on this CPU, which amp-bf16 uses; this is the way where it has none"
    return None


def _needs_compiler(device: str, mode: str, workload: Workload) -> str | None:
    """Inductor turns graphs into C++ on a CPU, into Triton on a GPU."""
    del mode, workload
    if device == "cpu":
        names = ("cl",) if sys.platform == "win32" else ("g++", "clang++")
        if not any(shutil.which(name) for name in names):
            return f"torch.compile needs a C++ compiler, none of {', '.join(names)} is on the PATH: install one"
        return None
    try:
        import triton  # noqa: F401, PLC0415 - only asked whether it is there
    except ImportError:
        return "torch.compile needs Triton on a GPU, which is not installed: pip install triton"
    return None


def _needs_compiler_beside_lstm(device: str, mode: str, workload: Workload) -> str | None:
    """Dynamo skips nn.LSTM, so only what brings the encoder's state to the decoder is compiled at all."""
    return _needs_compiler(device, mode, workload) if workload.config.bridged else None


def _needs_compilable_training(device: str, mode: str, workload: Workload) -> str | None:
    """Traced nn.LSTM becomes oneDNN's operator, whose workspace the compiled backward needs."""
    if device != "cpu" or mode != "training" or workload.has_lengths or not torch.backends.mkldnn.is_available():
        return None
    return _missing_workspace()


@functools.cache
def _missing_workspace() -> str | None:
    """Run the operator as compiled code does, without gradients, and see whether it gives what that code expects.

    torch 2.13 returns None, and Inductor's code then raises `expected Tensor() for op`.
    """
    weights = [torch.zeros(16, 4), torch.zeros(16, 4), torch.zeros(16), torch.zeros(16)]
    state = torch.zeros(2, 4)
    with torch.no_grad():
        *_, workspace = torch.ops.aten.mkldnn_rnn_layer(
            torch.zeros(3, 2, 4), *weights, state, state, False, [], 2, 4, 1, True, False, False, True
        )
    if workspace is None:
        return "torch.compile cannot train through oneDNN's LSTM on this torch: the operator returns no workspace"
    return None


def _needs_fixed_length(device: str, mode: str, workload: Workload) -> str | None:
    del device, mode
    if workload.has_lengths:
        return "cuDNN's fast algorithm takes no packed sequences, and this workload's sequences differ in length"
    return None


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("reference", "eager fp32, ATen's own LSTM, vendor library off", vendor_lstm=False),
        Variant("loop", "explicit loop over time in Python, eager fp32", lstm="loop"),
        Variant(
            "onednn",
            "nn.LSTM through oneDNN, eager fp32: what a CPU user gets by default",
            devices=("cpu",),
            requirements=(_needs_vendor_lstm(torch.float32),),
        ),
        Variant("cudnn", "nn.LSTM through cuDNN, eager fp32 without TF32", devices=("cuda",)),
        Variant(
            "cudnn-fair",
            "cuDNN at its fairest: fp16, one call a layer, batch padded to a multiple of 8",
            lstm="split",
            precision="fp16",
            devices=("cuda",),
            requirements=(_needs_fixed_length,),
        ),
        Variant(
            "compile",
            "torch.compile(model) as a user writes it",
            compiler="dynamo",
            requirements=(_needs_compiler_beside_lstm,),
        ),
        Variant(
            "compile-loop",
            "torch.compile of the loop",
            lstm="loop",
            compiler="dynamo",
            requirements=(_needs_compiler,),
        ),
        Variant(
            "compile-graphs",
            "torch.compile of the loop with CUDA graphs (mode='reduce-overhead')",
            lstm="loop",
            compiler="dynamo",
            compile_options={"mode": "reduce-overhead"},
            reuses_outputs=True,
            devices=("cuda",),
            requirements=(_needs_compiler,),
        ),
        Variant(
            "compile-rnn",
            "torch.compile of nn.LSTM with torch._dynamo.config.allow_rnn",
            compiler="dynamo",
            allow_rnn=True,
            requirements=(_needs_compiler, _needs_compilable_training),
        ),
        Variant(
            "amp-bf16",
            "autocast to bf16, LSTM through the vendor library",
            precision="bf16",
            autocast=True,
            requirements=(_needs_vendor_lstm(torch.bfloat16),),
        ),
        Variant(
            "amp-bf16-native",
            "autocast to bf16, ATen's own LSTM: the way where oneDNN has no bf16 LSTM",
            vendor_lstm=False,
            precision="bf16",
            autocast=True,
            devices=("cpu",),
            requirements=(_needs_no_vendor_bf16,),
        ),
        Variant(
            "amp-fp16",
            "autocast to fp16, with GradScaler in training",
            precision="fp16",
            autocast=True,
            requirements=(_needs_vendor_lstm(torch.float16),),
        ),
        Variant("tf32", "nn.LSTM through cuDNN, eager fp32 with TF32 allowed", precision="tf32", devices=("cuda",)),
        Variant("torchscript", "torch.jit.script, LSTM through the vendor library", compiler="torchscript"),
    )
}

#: Speedups are relative to this variant.
REFERENCE = VARIANTS["reference"]
