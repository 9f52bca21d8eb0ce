"""Requirements of variants: functions that give the reason why one cannot run here in one line, or None.

They are asked before anything is built, and probe the machine where a version number is not enough.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable

import torch

from kernels.cpu import build, fused
from kernels.cpu.packing import TRAINED
from kernels.dispatch import BY_ESTIMATE
from kernels.lstm import LSTM
from kernels.torch_lstm import onednn_refusal
from seq2seq.workloads.workload import Workload

#: Says why a variant cannot run on (device, mode, workload), or None when it can.
Requirement = Callable[[str, str, Workload], str | None]


def cannot_decode(mode: str, workload: Workload) -> str | None:
    """A model that decodes is fed its own output; a beam is of tokens, and only of that mode."""
    config, beam = workload.config, workload.beam
    if mode != "decode":
        return None if beam == 1 else f"beam={beam} means something only in the mode decode: leave it out"
    if not config.decodes or workload.target_steps is None:
        why = "its decoder reads the source" if config.decodes else "it has no decoder"
        return f"cannot be fed its own output: {why}"
    room = config.target_vocabulary or config.target_size
    if config.output_size > room:
        return f"cannot be fed its own output: {config.output_size} outputs, but the decoder reads {room}"
    if beam > 1 and not config.target_vocabulary:
        return f"beam={beam} is for tokens, and this model gives values"
    if beam > max(config.output_size, 1):
        return f"beam={beam} is more than the {config.output_size} tokens there are"
    return None


def needs_vendor_lstm(dtype: torch.dtype) -> Requirement:
    """On a CPU: oneDNN must have an LSTM of this type here, forward and, for training, backward."""

    def check(device: str, mode: str, workload: Workload) -> str | None:
        return (
            onednn_refusal(dtype, training=mode == "training") if device == "cpu" and workload.config.stacks else None
        )

    return check


def needs_no_vendor_bf16(device: str, mode: str, workload: Workload) -> str | None:
    """The detour around oneDNN is of use only where oneDNN cannot do it."""
    del workload
    if device == "cpu" and onednn_refusal(torch.bfloat16, training=mode == "training") is None:
        return "oneDNN has a bfloat16 LSTM on this CPU, which amp-bf16 uses; this is the way where it has none"
    return None


def needs_compiler(device: str, mode: str, workload: Workload) -> str | None:
    """Inductor turns graphs into C++ on a CPU, into Triton on a GPU."""
    del mode, workload
    if device == "cpu":
        names = ("cl",) if sys.platform == "win32" else ("g++", "clang++")
        if not any(shutil.which(name) for name in names):
            return f"torch.compile needs a C++ compiler, none of {', '.join(names)} is on the PATH: install one"
        return None
    return no_triton("torch.compile")


def no_triton(who: str) -> str | None:
    """Reason why Triton's kernels cannot be measured, or None when they can."""
    if os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}:
        return "Triton's interpreter is switched on (TRITON_INTERPRET=1): unset it to measure kernels"
    try:
        import triton  # noqa: F401, PLC0415 - only asked whether it is there
    except ImportError:
        return f"{who} needs Triton on a GPU, which is not installed: pip install triton"
    return None


def needs_kernel(implementation: str, dtype: torch.dtype, *, tf32: bool = False) -> Requirement:
    """A kernel of `kernels.LSTM` must serve every LSTM of the workload on this GPU."""

    def check(device: str, mode: str, workload: Workload) -> str | None:
        if reason := no_triton("kernels.LSTM"):
            return reason
        reasons = set()
        for stack in workload.config.stacks:
            module = LSTM(
                stack.input_size,
                stack.hidden_size,
                stack.num_layers,
                bidirectional=stack.directions > 1,
                device="meta",
                implementation=implementation,
                fp32_precision="tf32" if tf32 else "ieee",
            )
            steps = (workload.decoded_steps if stack.decodes else None) or workload.source_steps
            one = stack.stepwise or (stack.decodes and mode == "decode")
            steps = 1 if one else -(-steps // stack.every)
            training, resets = mode == "training", workload.config.resets
            masked = workload.has_lengths and not one and not resets
            try:
                choice = module.explain(
                    workload.batch, steps, dtype=dtype, device=device, training=training, masked=masked, resets=resets
                )
            except (RuntimeError, ValueError) as error:
                return f"{stack.name}: {' '.join(str(error).split())}"
            reasons.add(choice.reason.startswith(BY_ESTIMATE))
        if implementation == "auto" and reasons == {True}:
            return (
                "nothing was measured on this GPU, so `auto` would be `triton` again, which never is cuDNN: run "
                "`python -m kernels tune`"
            )
        return None

    return check


def needs_rival(name: str, function: Callable[[], object]) -> Requirement:
    """An LSTM of another project must load, and serve the workload: one direction, all sequences of one length.

    Args:
        name: of its package.
        function: imports it.
    """

    def check(device: str, mode: str, workload: Workload) -> str | None:
        del device, mode
        try:
            function()
        except Exception as error:  # noqa: BLE001 - a package for another torch or without a toolkit fails in many ways
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            why = "which is not installed" if missing else f"which does not load here ({' '.join(str(error).split())})"
            return f"needs {name}, {why}: pip install {name}"
        if both := next((stack.name for stack in workload.config.stacks if stack.directions > 1), None):
            return f"{name}'s LSTM runs only forward, and the {both} reads both ways"
        if differ := _differ_in_length(workload):
            return f"{name}'s LSTM takes no lengths, and {differ}"
        return None

    return check


def needs_cpu_kernel(device: str, mode: str, workload: Workload) -> str | None:
    """The fused CPU kernel must have a compiler; whether that compiles it, `compile_kernel_for` finds out."""
    del device, mode, workload
    return build.missing()


def needs_instructions(what: str, *flags: str) -> Requirement:
    """The processor must have one of some instructions; what the fused CPU kernel says is known once it is compiled.

    Args:
        what: what needs which of them, as the reason begins.
        flags: their names, as Linux has them.
    """

    def check(device: str, mode: str, workload: Workload) -> str | None:
        del device, mode, workload
        if set(flags).isdisjoint(build.cpu_flags().split()):
            return f"{what}, which this processor does not have"
        return None

    return check


def compile_kernel_for(storage: str, *beside: Callable[[], str | None]) -> Callable[[str], str | None]:
    """A function of the mode that compiles the fused CPU kernel; it returns why weights cannot be kept so, or None.

    It compiles the native entry too, so that no call has to wait for that. Without one the kernel runs all the same,
    and each choice of it says why calls take longer (`Choice.detour`), which is part of a row's evidence.

    Args:
        storage: key of `kernels.cpu.packing.KEPT`, whose part of the kernel it compiles.
        beside: what else is compiled and has to be there, as `decoder.hindrance`.
    """

    def compile_it(mode: str) -> str | None:
        del mode
        return _cannot_keep(storage) or next(filter(None, (other() for other in beside)), None)

    return compile_it


def compile_kernel_for_autocast(mode: str) -> str | None:
    """Compile the fused CPU kernel for autocast to bf16: training has a part of its own, inference that of bf16."""
    return _cannot_keep(TRAINED if mode == "training" else "bf16") or fused.storage_hindrance(TRAINED)


def _cannot_keep(storage: str) -> str | None:
    try:
        fused.compile_for(storage)
        return fused.storage_hindrance(storage)
    except build.BuildError as error:
        return str(error)


def needs_generated_tokens(device: str, mode: str, workload: Workload) -> str | None:
    """A head whose largest outputs alone are exact serves those who take the largest: decoding of tokens by LSTMs."""
    del device
    if mode != "decode" or not workload.config.target_vocabulary:
        return "only the largest outputs of its head are exact: for the mode decode with tokens only"
    return None


def needs_compiler_beside_lstm(device: str, mode: str, workload: Workload) -> str | None:
    """Dynamo skips nn.LSTM, so only what brings the encoder's state to the decoder is compiled at all."""
    return needs_compiler(device, mode, workload) if workload.config.bridged else None


def needs_compilable_training(device: str, mode: str, workload: Workload) -> str | None:
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


def needs_own_model(device: str, mode: str, workload: Workload) -> str | None:
    """For the suite's own workloads `reference` is it already."""
    del device, mode
    return None if workload.config.family == "own" else "this would be `reference` again: for a model of your own"


def not_by_autocast(device: str, mode: str, workload: Workload) -> str | None:
    """Weights stored in a lower type are for inference; training keeps them in float32 under autocast."""
    del device, workload
    reason = "weights stored in a lower type are for inference; in training autocast hands cuDNN float16: amp-fp16"
    return reason if mode == "training" else None


def needs_fixed_length(device: str, mode: str, workload: Workload) -> str | None:
    """No packed sequences."""
    del device, mode
    differ = _differ_in_length(workload)
    return f"cuDNN's fast algorithm takes no packed sequences, and {differ}" if differ else None


def _differ_in_length(workload: Workload) -> str | None:
    """Say how sequences differ in length; None where they do not."""
    if workload.config.resets:
        return "this workload's sequences are split into episodes, which differ in length"
    return "this workload's sequences differ in length" if workload.has_lengths else None
