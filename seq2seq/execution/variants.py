"""VARIANTS: the ways to execute a Seq2Seq, each a few lines of data.

All take one state_dict and one batch, so any two can be compared. To add one, add an entry; if it brings an LSTM of
its own, add that to `seq2seq.execution.variant.LSTMS`. Nothing else in the project needs to know its name.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from kernels.cpu import decoder, shortlist
from seq2seq.execution import rival_lstms
from seq2seq.execution.requirements import (
    compile_kernel_for,
    compile_kernel_for_autocast,
    needs_compilable_training,
    needs_compiler,
    needs_compiler_beside_lstm,
    needs_cpu_kernel,
    needs_fixed_length,
    needs_generated_tokens,
    needs_instructions,
    needs_kernel,
    needs_no_vendor_bf16,
    needs_own_model,
    needs_rival,
    needs_vendor_lstm,
    not_by_autocast,
)
from seq2seq.execution.runtime_requirements import inference_only, needs_int8, needs_packages
from seq2seq.execution.tuning import TUNINGS
from seq2seq.execution.variant import DTYPES, VARIANTS, Variant
from seq2seq.runtimes import openvino

__all__ = ["REFERENCE", "VARIANTS"]


def _kernels(name: str, summary: str, implementation: str, precision: str = "fp32", **fields: Any) -> Variant:
    """A variant that runs this project's LSTM on a GPU."""
    needs = needs_kernel(implementation, DTYPES[precision], tf32=precision == "tf32")
    return Variant(
        name,
        summary,
        lstm="kernels",
        lstm_options={"implementation": implementation},
        precision=precision,
        devices=("cuda",),
        requirements=(needs, *fields.pop("requirements", ())),
        **fields,
    )


VARIANTS |= {
    variant.name: variant
    for variant in (
        Variant("reference", "eager fp32, ATen's own LSTM, vendor library off", vendor_lstm=False),
        Variant(
            "aten",
            "ATen's own LSTM, vendor library off: for own models, whose reference runs as its user runs it",
            vendor_lstm=False,
            devices=("cpu",),
            requirements=(needs_own_model,),
        ),
        Variant("loop", "explicit loop over time in Python, eager fp32", lstm="loop"),
        Variant(
            "onednn",
            "nn.LSTM through oneDNN, eager fp32: what a CPU user gets by default",
            devices=("cpu",),
            requirements=(needs_vendor_lstm(torch.float32),),
        ),
        Variant(
            "cpu-fused",
            "our kernels for CPUs, eager fp32: kernels.LSTM, and a decoder with attention in one call",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused"},
            decoder="fused",
            devices=("cpu",),
            requirements=(needs_cpu_kernel,),
            builds=compile_kernel_for("fp32", decoder.hindrance),
        ),
        Variant(
            "cpu-fused-bf16",
            "our kernel for CPUs, weights in bf16, multiplied in bf16 where the processor can",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused", "weight_storage": "bf16"},
            precision="bf16-weights",
            devices=("cpu",),
            requirements=(inference_only, needs_cpu_kernel),
            builds=compile_kernel_for("bf16"),
        ),
        Variant(
            "cpu-fused-split",
            "our kernel for CPUs, factors as sums of two bf16 numbers, multiplied by AMX: nearly as precise as fp32",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused", "weight_storage": "split"},
            precision="bf16-split",
            devices=("cpu",),
            requirements=(
                inference_only,
                needs_cpu_kernel,
                needs_instructions("weights split into two bf16 numbers need AMX (amx_bf16)", "amx_bf16"),
            ),
            builds=compile_kernel_for("split"),
        ),
        Variant(
            "cpu-fused-int8",
            "our kernel for CPUs, weights in int8 with a scale per row, multiplied as integers where the processor can",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused", "weight_storage": "int8"},
            precision="int8",
            devices=("cpu",),
            requirements=(inference_only, needs_cpu_kernel),
            builds=compile_kernel_for("int8"),
        ),
        Variant(
            "cpu-fused-w8a8",
            "our kernel for CPUs, weights and inputs in 8 bits (without VNNI inputs in 7), multiplied as integers",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused", "weight_storage": "w8a8"},
            precision="int8",
            devices=("cpu",),
            requirements=(
                inference_only,
                needs_cpu_kernel,
                needs_instructions("products of bytes need AVX2 (avx2)", "avx2"),
            ),
            builds=compile_kernel_for("w8a8"),
        ),
        Variant(
            "cpu-fused-head",
            "our kernel for CPUs in fp32, the head in int8 with the likeliest tokens computed again in fp32",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused"},
            decoder="fused",
            head="shortlist",
            precision="int8-head",
            devices=("cpu",),
            requirements=(needs_generated_tokens, needs_cpu_kernel),
            builds=compile_kernel_for("fp32", shortlist.hindrance, decoder.hindrance),
        ),
        Variant(
            "cpu-fused-int8-head",
            "cpu-fused-int8 with the head of cpu-fused-head: all large matrices in int8",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused", "weight_storage": "int8"},
            head="shortlist",
            precision="int8",
            devices=("cpu",),
            requirements=(needs_generated_tokens, needs_cpu_kernel),
            builds=compile_kernel_for("int8", shortlist.hindrance),
        ),
        Variant(
            "cpu-fused-amp",
            "autocast to bf16, our kernel for CPUs: products in bf16 with sums in fp32, gradients too",
            lstm="kernels",
            lstm_options={"implementation": "cpu-fused"},
            precision="bf16",
            autocast=True,
            devices=("cpu",),
            requirements=(
                needs_cpu_kernel,
                needs_instructions("our kernel runs autocast to bf16 by AVX512-BF16 (avx512_bf16)", "avx512_bf16"),
            ),
            builds=compile_kernel_for_autocast,
        ),
        Variant("cudnn", "nn.LSTM through cuDNN, eager fp32 without TF32", devices=("cuda",)),
        Variant(
            "cudnn-step-graph",
            "nn.LSTM through cuDNN, fp32 without TF32, a decoding step captured as one CUDA graph",
            captures_step=True,
            devices=("cuda",),
        ),
        Variant(
            "cudnn-default",
            "nn.LSTM through cuDNN, eager fp32 as a GPU user gets it by default: TF32 in the LSTM, not in products",
            precision="tf32",
            torch_tf32=True,
            devices=("cuda",),
        ),
        Variant(
            "cudnn-fair",
            "cuDNN at its best: fp16, one call per layer and direction, sizes padded to multiples of 128, batch to 8",
            lstm="split",
            precision="fp16",
            devices=("cuda",),
            requirements=(needs_fixed_length,),
        ),
        Variant(
            "compile",
            "torch.compile(model) as a user writes it",
            compiler="dynamo",
            requirements=(needs_compiler_beside_lstm,),
        ),
        Variant(
            "compile-loop",
            "torch.compile of the loop",
            lstm="loop",
            compiler="dynamo",
            requirements=(needs_compiler,),
        ),
        Variant(
            "compile-graphs",
            "torch.compile of the loop with CUDA graphs (mode='reduce-overhead')",
            lstm="loop",
            compiler="dynamo",
            compile_options={"mode": "reduce-overhead"},
            reuses_outputs=True,
            devices=("cuda",),
            requirements=(needs_compiler,),
        ),
        Variant(
            "compile-rnn",
            "torch.compile of nn.LSTM with torch._dynamo.config.allow_rnn",
            compiler="dynamo",
            allow_rnn=True,
            requirements=(needs_compiler, needs_compilable_training),
        ),
        Variant(
            "amp-bf16",
            "autocast to bf16, LSTM through the vendor library",
            precision="bf16",
            autocast=True,
            requirements=(needs_vendor_lstm(torch.bfloat16),),
        ),
        Variant(
            "amp-bf16-native",
            "autocast to bf16, ATen's own LSTM: the way where oneDNN has no bf16 LSTM",
            vendor_lstm=False,
            precision="bf16",
            autocast=True,
            devices=("cpu",),
            requirements=(needs_no_vendor_bf16,),
        ),
        Variant(
            "amp-fp16",
            "autocast to fp16, with GradScaler in training",
            precision="fp16",
            autocast=True,
            requirements=(needs_vendor_lstm(torch.float16),),
        ),
        Variant("lstmcell", "loop over nn.LSTMCell's own call, eager fp32", lstm="cell"),
        Variant(
            "onnxruntime",
            "ONNX Runtime: true LSTM nodes, fp32",
            runtime="onnxruntime",
            own_threads=True,
            devices=("cpu",),
            requirements=(inference_only, needs_packages("onnx", "onnxruntime")),
        ),
        Variant(
            "onnxruntime-int8",
            "ONNX Runtime: LSTM nodes quantised by its own tool, int8 weights, inputs rounded to 8 bits call by call",
            runtime="onnxruntime-int8",
            own_threads=True,
            precision="int8",
            devices=("cpu",),
            requirements=(inference_only, needs_packages("onnx", "onnxruntime")),
        ),
        Variant(
            "openvino",
            "OpenVINO compiled for latency, set to compute in fp32",
            runtime="openvino",
            own_threads=True,
            runtime_options={openvino.PRECISION: "f32"},
            devices=("cpu",),
            requirements=(inference_only, needs_packages("onnx", "openvino")),
        ),
        Variant(
            "openvino-default",
            "OpenVINO compiled for latency, in the precision that it chooses on this CPU",
            runtime="openvino",
            own_threads=True,
            own_precision=openvino.default_precision,
            devices=("cpu",),
            requirements=(inference_only, needs_packages("onnx", "openvino")),
        ),
        Variant(
            "int8-dynamic",
            "torch's dynamic quantisation: int8 weights, inputs rounded to 8 bits call by call",
            runtime="torch-int8",
            precision="int8",
            devices=("cpu",),
            requirements=(inference_only, needs_int8),
        ),
        Variant(
            "cudnn-fp16",
            "nn.LSTM through cuDNN, weights stored in fp16, as users call it; packed where lengths differ",
            precision="fp16",
            devices=("cuda",),
            requirements=(not_by_autocast,),
        ),
        Variant(
            "cudnn-bf16",
            "nn.LSTM through cuDNN, weights stored in bf16, as users call it; packed where lengths differ",
            precision="bf16",
            devices=("cuda",),
            requirements=(not_by_autocast,),
        ),
        Variant("tf32", "nn.LSTM through cuDNN, eager fp32 with TF32 allowed", precision="tf32", devices=("cuda",)),
        _kernels("triton", "kernels.LSTM, the fastest of our Triton kernels, eager fp32 without TF32", "triton"),
        _kernels("triton-tf32", "our Triton kernels, eager fp32 with TF32 allowed", "triton", "tf32"),
        _kernels("triton-fp16", "our Triton kernels, fp16: weights stored so, in training autocast", "triton", "fp16"),
        _kernels("triton-bf16", "our Triton kernels, bf16: weights stored so, in training autocast", "triton", "bf16"),
        _kernels(
            "triton-compile",
            "torch.compile(fullgraph=True) of the model with our Triton kernels in it, fp32",
            "triton",
            compiler="dynamo",
            compile_options={"fullgraph": True},
            requirements=(needs_compiler,),
        ),
        _kernels("triton-cell", "our kernel of one step, with a product a step, fp16", "cell", "fp16"),
        _kernels("triton-sequence", "our kernel of all steps, a program a tile of the batch, fp16", "sequence", "fp16"),
        _kernels("triton-persistent", "our kernel of all steps, programs share a sequence, fp16", "persistent", "fp16"),
        _kernels("auto", "kernels.LSTM as replace_lstm puts it in: our kernels or cuDNN, eager fp32", "auto"),
        _kernels("auto-fp16", "kernels.LSTM, our kernels or cuDNN, fp16 as triton-fp16", "auto", "fp16"),
        Variant(
            "torchrl",
            "TorchRL's LSTM in Triton, eager fp32 with TF32, as its module runs by default",
            lstm="torchrl",
            precision="tf32",
            devices=("cuda",),
            requirements=(needs_rival("torchrl", rival_lstms.torchrl_function),),
        ),
        Variant(
            "flashrnn",
            "FlashRNN's LSTM in CUDA, all steps in one launch, fp16: weights stored so, in training autocast",
            lstm="flashrnn",
            precision="fp16",
            devices=("cuda",),
            requirements=(needs_rival("flashrnn", rival_lstms.flashrnn_function),),
        ),
        Variant(
            "flashrnn-bf16",
            "FlashRNN's LSTM in CUDA, all steps in one launch, bf16: weights stored so, in training autocast",
            lstm="flashrnn",
            precision="bf16",
            devices=("cuda",),
            requirements=(needs_rival("flashrnn", rival_lstms.flashrnn_function),),
        ),
        Variant("torchscript", "torch.jit.script, LSTM through the vendor library", compiler="torchscript"),
    )
}

#: What a CPU user runs by default, and our own: each once more with every setting of its process.
for _name, _tuning in itertools.product(("onednn", "cpu-fused"), TUNINGS):
    _plain = VARIANTS[_name]
    VARIANTS[f"{_tuning.name}-{_name}"] = dataclasses.replace(
        _plain,
        name=f"{_tuning.name}-{_name}",
        summary=f"{_name}, {_tuning.summary}",
        environment=_tuning.environment,
        requirements=(*_plain.requirements, *_tuning.requirements),
    )

#: Speedups are relative to this variant.
REFERENCE = VARIANTS["reference"]
