"""Decoders that are fed what they found, problems for them, their truth in float64, and their distance from it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch
from cpu_builds import built_for
from hypothesis import strategies as st
from planted_kernels import planted_sources
from torch import Tensor

from kernels.cpu import build, decoder
from kernels.lstm import LSTM
from seq2seq.execution.fused_decoder import FusedDecoder
from seq2seq.layers.padding import valid_mask
from seq2seq.models.attention import AttentionConfig, AttentionSeq2Seq

#: Some tens of roundings of float32, relative to the norm. A defect below makes 30 times as much or more.
CLOSE = 4e-6
#: The same of gradients, which are sums over the steps of both passes.
CLOSE_BACK = 1e-5
Found = dict[str, Tensor]
LUONG = AttentionConfig(
    9, 20, 3, bidirectional=True, attention="bahdanau", scaled=True, feeds="attention", combine_bias=True,
    decoder_layers=1, decoder_input_size=6,
)  # fmt: skip
#: One of each kind, whose sizes leave a part of a vector and more than one group of columns.
KINDS = {
    "dot": AttentionConfig(
        9, 35, 3, attention="dot", scaled=True, feeds="context", combine_bias=True, decoder_layers=1, bidirectional=True
    ),
    "general": AttentionConfig(
        9, 20, 3, num_layers=2, attention="general", scaled=True, feeds="attention", decoder_layers=2,
        decoder_hidden_size=33,
    ),
    "bahdanau": AttentionConfig(
        9, 20, 3, attention="bahdanau", scaled=True, feeds="context", combine_bias=True, attention_size=70,
        decoder_layers=1, bidirectional=True,
    ),
}  # fmt: skip


@contextlib.contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Fill memory that torch does not initialise with NaN, as it does where it is deterministic."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def decoder_built_for(target: str, threads: int) -> Iterator[None]:
    """Run decoder and LSTM as built for a target, by a team of a size."""
    with built_for(target, threads), mock.patch.object(decoder, "library", functools.partial(decoder.library, target)):
        yield


def planted_decoder(defects: Mapping[str, tuple[str, str]], folder: Path) -> ctypes.CDLL:
    """The decoder with some defects, as `planted_sources` takes them, of which none is chosen yet."""
    source = planted_sources(defects, folder, decoder.SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SOURCE", source)
        patch.setenv("SEQ2SEQ_KERNEL_CACHE", str(folder))
        found = decoder.library.__wrapped__(f"{build.NATIVE} -Og")
    assert isinstance(found, ctypes.CDLL)
    return found


@st.composite
def fed_configs(draw: st.DrawFn) -> AttentionConfig:
    """Decoders of every kind that are fed, in sizes around those of vectors."""
    sizes = st.sampled_from([1, 2, 7, 15, 16, 17, 33, 65])
    kind, both, zeros = draw(st.sampled_from(["dot", "general", "bahdanau"])), draw(st.booleans()), draw(st.booleans())
    return AttentionConfig(
        draw(sizes), draw(sizes), 3, num_layers=2, bidirectional=both, attention=kind, scaled=draw(st.booleans()),
        decoder_hidden_size=None if kind == "dot" else draw(sizes), decoder_layers=draw(st.integers(1, 2)),
        attention_size=draw(st.none() | sizes) if kind == "bahdanau" else None, starts_from_zeros=zeros,
        feeds=draw(st.sampled_from(["attention", "context"])), combine_bias=draw(st.booleans()),
        decoder_input_size=draw(st.none() | sizes),
    )  # fmt: skip


def model_of(config: AttentionConfig, seed: int = 0) -> AttentionSeq2Seq:
    """Return a model in float32 with our LSTM, whose steps run in one native call where they can."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = config.build(functools.partial(LSTM, implementation="cpu-fused", dtype=torch.float32)).float().eval()
    for scale in () if model.attention.scale is None else (model.attention.scale,):
        torch.nn.init.constant_(scale, 1.7)
    FusedDecoder.into(model)
    return model


def problem(config: AttentionConfig, batch: int, steps: int, seed: int, *, differ: bool) -> tuple[Tensor | None, ...]:
    """Source, target and their lengths."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(batch, 5, config.input_size, generator=generator, dtype=torch.float32)
    target = torch.randn(batch, steps, config.target_size, generator=generator, dtype=torch.float32)
    if not differ:
        return source, target, None, None
    ends = (
        torch.randint(1, 6, (batch,), generator=generator),
        torch.randint(1, steps + 1, (batch,), generator=generator),
    )
    # What is past a length is no number, and must not be read.
    return source, target.masked_fill(~valid_mask(target, ends[1])[..., None], math.nan), *ends


def decoded(model: AttentionSeq2Seq, given: tuple[Tensor | None, ...]) -> Found:
    """Outputs and the state that a model leaves."""
    source, target, read, lengths = given
    outputs, state = model.decode(target, model.encode(source, read), lengths)
    return {"outputs": outputs} | {name: state[name] for name in ("hidden", "cell", "fed")}


def truth(model: AttentionSeq2Seq, given: tuple[Tensor | None, ...]) -> Found:
    """The same by the model's own loop in float64."""
    exact = model.config.build(torch.nn.LSTM).double().eval()
    exact.load_state_dict(model.state_dict())
    wide = [v.double() if v is not None and v.is_floating_point() else v for v in given]
    with torch.no_grad():
        return decoded(exact, tuple(wide))


def worst(found: Found, true: Found) -> float:
    """Largest error as a share of a quantity's norm, or of a tenth a number where that is more: sums may cancel."""
    errors = []
    for name, value in true.items():
        size = max(float(torch.linalg.vector_norm(value)), 0.1 * value.numel() ** 0.5)
        if name == "grad attention.scale":
            # One number, whose terms cancel where those of what is scored do not. Of this size torch's own float32 errs
            # by 3e-6 at most in 120 problems and the native call by 3e-6; of the size above by 2.1e-5 and 1.6e-5.
            size = max(size, 0.2 * float(torch.linalg.vector_norm(true["grad memory"])))
        errors.append(float(torch.linalg.vector_norm(found[name].double() - value)) / size)
    return max(error if math.isfinite(error) else math.inf for error in errors)


def by_own_loop(model: AttentionSeq2Seq, given: tuple[Tensor | None, ...]) -> Found:
    """Quantities that the model gives without the native call."""
    fused = vars(model).pop("_step_by_step")
    try:
        return decoded(model, given)
    finally:
        vars(model)["_step_by_step"] = fused
