"""WORKLOADS: named, citable problems. Each is a model's sizes, a batch, lengths and where all of that comes from.

A name may carry overrides: `seed@batch=64,hidden=128` is the workload `seed` with those sizes changed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seq2seq.attention import AttentionConfig
from seq2seq.contract import Config
from seq2seq.gnmt import GNMTConfig
from seq2seq.model import Seq2SeqConfig
from seq2seq.single import SingleConfig
from seq2seq.stacked import StackedConfig
from seq2seq.tasks import synthetic, windows
from seq2seq.tasks.batch import Batch
from seq2seq.transformer import TransformerConfig

#: Sizes that an override may change.
AXES = ("batch", "hidden", "length", "layers", "beam")


class UnknownWorkloadError(ValueError):
    """No workload of that name, or an override it does not take."""


@dataclass(frozen=True)
class Workload:
    """A problem to measure.

    Attributes:
        name: what it is called, overrides included.
        summary: one line for people.
        source: who uses these sizes.
        data: `real: ...` or `synthetic: ...`.
        config: sizes of the model. Dropout is off: its random stream differs between implementations, so results
            could not be compared.
        batch: sequences in a batch.
        source_steps: longest source.
        target_steps: longest target; None when there is none, as in the seed, whose decoder reads the source.
        source_lengths, target_lengths: length distributions; None when every sequence fills all steps.
        beam: hypotheses of a sequence in the mode `decode`; 1 is greedy.
        temperatures: whether the batches are windows of the Seattle temperatures.
    """

    name: str
    summary: str
    source: str
    data: str
    config: Config
    batch: int
    source_steps: int
    target_steps: int | None = None
    source_lengths: synthetic.Lengths | None = None
    target_lengths: synthetic.Lengths | None = None
    temperatures: bool = False
    beam: int = 1

    @property
    def has_lengths(self) -> bool:
        """Whether sequences differ in length."""
        return self.source_lengths is not None or self.target_lengths is not None

    @property
    def decoded_steps(self) -> int | None:
        """Longest sequence that a decoder reads; None for an LSTM alone."""
        return (self.target_steps or self.source_steps) if self.config.decodes else None

    def make_batch(self, seed: int) -> Batch:
        """The batch of a seed, on the CPU; equal seeds give equal batches.

        Raises:
            DataUnavailableError: when real data is not installed.
        """
        if self.temperatures:
            return windows.temperature_batch(self.batch, self.source_steps, self.target_steps or 1, seed)
        return synthetic.random_batch(
            self.config,
            self.batch,
            self.source_steps,
            self.target_steps,
            seed,
            self.source_lengths,
            self.target_lengths,
        )


def _scaled(base: Workload, name: str, *, config: Mapping[str, Any], **sizes: Any) -> Workload:
    """A smaller twin of a workload, named as such, with other sizes of the model and of the batch."""
    return dataclasses.replace(
        base,
        name=name,
        summary=f"{base.name} scaled down for 2 cores: {base.summary}",
        source=f"scaled down from: {base.source}",
        config=dataclasses.replace(base.config, **config),
        **sizes,
    )


_SEED = Workload(
    name="seed",
    summary="the seed's example: random series in, random series out",
    source="the seed: X 16x10x5, y 16x10x1, hidden 16",
    data="synthetic: random, as the seed says",
    config=Seq2SeqConfig(input_size=5, hidden_size=16, output_size=1),
    batch=16,
    source_steps=10,
)
_DEEPAR = Workload(
    name="forecast-deepar",
    summary="a week of hourly temperatures in, the next day out",
    source="zhykoties/TimeSeries params.json: 3 layers x 40, 168 -> 24, batch 64, Gaussian likelihood",
    data="real: 8,759 hourly temperatures of Seattle (vega_datasets), normalised, windows of the first 80 %",
    config=Seq2SeqConfig(
        input_size=windows.FEATURES, hidden_size=40, output_size=1, num_layers=3, likelihood="gaussian"
    ),
    batch=64,
    source_steps=168,
    target_steps=24,
    temperatures=True,
)
_TFT = Workload(
    name="forecast-tft",
    summary="a week of hourly consumption to three quantiles of the next day, the LSTMs alone",
    source="NVIDIA DeepLearningExamples TFT, electricity: LSTM 128, 168 -> 24, batch 1024 (of the model its LSTM "
    "encoder and decoder alone: variable selection, gates and attention are left out)",
    data="synthetic: random, as many features as TFT's LSTMs are given",
    config=Seq2SeqConfig(input_size=128, hidden_size=128, output_size=3),
    batch=1024,
    source_steps=168,
    target_steps=24,
)
_TRANSLATION = Workload(
    name="translation-small",
    summary="German to English, tokens, different lengths, packed",
    source="bentrevett/pytorch-seq2seq notebook 1: 2 layers x 512, embedding 256, batch 128, vocabularies of Multi30k",
    data="synthetic: random tokens, lengths of WMT German and English words",
    config=Seq2SeqConfig(
        input_size=256,
        hidden_size=512,
        output_size=5893,
        num_layers=2,
        source_vocabulary=7853,
        target_vocabulary=5893,
    ),
    batch=128,
    source_steps=50,
    target_steps=50,
    source_lengths=synthetic.WMT_GERMAN,
    target_lengths=synthetic.WMT_ENGLISH,
)
_TRANSFORMER = dataclasses.replace(
    _TRANSLATION,
    name="translation-transformer",
    summary="German to English by a Transformer: the LSTMs' rival on the data of translation-small",
    source="Vaswani et al. 2017, base: 6 layers, 512 hidden, 8 heads, feed-forward 2048; here with GELU, norms "
    "first and no shared embedding; data and batch as translation-small",
    config=TransformerConfig(
        hidden_size=512,
        output_size=_TRANSLATION.config.output_size,
        source_vocabulary=_TRANSLATION.config.source_vocabulary,
        target_vocabulary=_TRANSLATION.config.target_vocabulary,
    ),
)
_IWSLT = Workload(
    name="translation-iwslt",
    summary="English to Vietnamese with attention, fed with what it found the step before",
    source="tensorflow/nmt iwslt15.json: encoder 2 x 512, which is one layer read both ways, decoder 2 x 512, scaled "
    "Luong attention with input feeding, embedding 512, batch 128, length up to 50, vocabularies of IWSLT'15",
    data="synthetic: random tokens, lengths of WMT English and German words",
    config=AttentionConfig(
        input_size=512,
        hidden_size=512,
        output_size=7709,
        bidirectional=True,
        decoder_layers=2,
        source_vocabulary=17191,
        target_vocabulary=7709,
        attention="general",
        scaled=True,
        feeds="attention",
    ),
    batch=128,
    source_steps=50,
    target_steps=50,
    source_lengths=synthetic.WMT_ENGLISH,
    target_lengths=synthetic.WMT_GERMAN,
)
_GNMT = Workload(
    name="translation-gnmt",
    summary="English to German by a deep model with residual layers and attention",
    source="NVIDIA DeepLearningExamples GNMT v2: encoder 4 x 1024, its first layer read both ways, decoder 4 x 1024, "
    "normed Bahdanau attention, embedding 1024, vocabulary 32k, batch 128, length up to 50",
    data="synthetic: random tokens, lengths of WMT English and German words",
    config=GNMTConfig(
        input_size=1024,
        hidden_size=1024,
        output_size=32_000,
        source_vocabulary=32_000,
        target_vocabulary=32_000,
    ),
    batch=128,
    source_steps=50,
    target_steps=50,
    source_lengths=synthetic.WMT_ENGLISH,
    target_lengths=synthetic.WMT_GERMAN,
)
_SPEECH = Workload(
    name="speech-las",
    summary="filter-bank frames to characters with attention, bidirectional encoder, different lengths",
    source="kaituoxu/Listen-Attend-Spell aishell: in 240, 3 x bidirectional 256, decoder 512 from zeros, dot attention "
    "whose context is fed to the next step, batch 32, 800 -> 150",
    data="synthetic: random frames and tokens, lengths of LibriSpeech dev-clean scaled to the longest",
    config=AttentionConfig(
        input_size=240,
        hidden_size=256,
        output_size=4233,
        num_layers=3,
        bidirectional=True,
        decoder_input_size=512,
        decoder_layers=1,
        target_vocabulary=4233,
        attention="dot",
        feeds="context",
        starts_from_zeros=True,
    ),
    batch=32,
    source_steps=800,
    target_steps=150,
    source_lengths=synthetic.LIBRISPEECH_FRAMES,
    target_lengths=synthetic.LIBRISPEECH_CHARACTERS,
)
_TRANSDUCER = Workload(
    name="speech-rnnt-encoder",
    summary="filter-bank frames through the encoder of a speech transducer, which stacks steps by two",
    source="mlcommons/inference rnnt.toml: in 240, 2 x 1024, stack 2, 3 x 1024 (prediction and joint networks are left "
    "out; batch 32 is ours)",
    data="synthetic: random frames, lengths of LibriSpeech dev-clean at 30 ms a frame",
    config=StackedConfig(input_size=240, hidden_size=1024),
    batch=32,
    source_steps=1088,
    source_lengths=synthetic.LIBRISPEECH_FRAMES,
)
_SUMMARY = Workload(
    name="summarize-pg",
    summary="a news article's first 400 words to a summary of 100, with attention",
    source="abisee/pointer-generator: bidirectional 256, embedding 128, Bahdanau attention of 512 whose context is fed "
    "to the next step, 400 -> 100, vocabulary 50k, batch 16 (its pointer and coverage are left out)",
    data="synthetic: random tokens; articles are cut at 400 words, so all sequences fill all steps",
    config=AttentionConfig(
        input_size=128,
        hidden_size=256,
        output_size=50_000,
        bidirectional=True,
        source_vocabulary=50_000,
        target_vocabulary=50_000,
        attention="bahdanau",
        attention_size=512,
        feeds="context",
    ),
    batch=16,
    source_steps=400,
    target_steps=100,
)
_SCALING = Workload(
    name="scaling",
    summary="one layer each way, to be swept in batch, hidden size and length",
    source="this project: the middle of the cited sizes",
    data="synthetic: random",
    config=Seq2SeqConfig(input_size=64, hidden_size=128, output_size=16),
    batch=16,
    source_steps=32,
    target_steps=32,
)
_DEEPBENCH = Workload(
    name="deepbench",
    summary="one LSTM layer alone, of the sizes that hardware vendors publish",
    source="baidu-research/DeepBench code/kernels/rnn_problems.h: hidden 256 to 4096, as many features, batch 8 to "
    "128, 25 to 150 steps",
    data="synthetic: random; batch first, as everywhere here",
    config=SingleConfig(hidden_size=1024),
    batch=64,
    source_steps=25,
)

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _SEED,
        _DEEPAR,
        _TFT,
        _scaled(_TFT, "forecast-tft-scaled", config={"input_size": 32, "hidden_size": 32}, batch=64),
        _TRANSLATION,
        _scaled(
            _TRANSLATION,
            "translation-small-scaled",
            config={
                "input_size": 64,
                "hidden_size": 128,
                "output_size": 1000,
                "source_vocabulary": 1000,
                "target_vocabulary": 1000,
            },
            batch=16,
        ),
        _TRANSFORMER,
        # About as many parameters as translation-small-scaled.
        _scaled(
            _TRANSFORMER,
            "translation-transformer-scaled",
            config={
                "hidden_size": 96,
                "output_size": 1000,
                "num_layers": 2,
                "heads": 4,
                "feedforward": 256,
                "source_vocabulary": 1000,
                "target_vocabulary": 1000,
            },
            batch=16,
        ),
        _IWSLT,
        _scaled(
            _IWSLT,
            "translation-iwslt-scaled",
            config={
                "input_size": 64,
                "hidden_size": 128,
                "output_size": 1000,
                "source_vocabulary": 1000,
                "target_vocabulary": 1000,
            },
            batch=16,
            source_steps=25,
            target_steps=25,
        ),
        _GNMT,
        _scaled(
            _GNMT,
            "translation-gnmt-scaled",
            config={
                "input_size": 128,
                "hidden_size": 128,
                "output_size": 1000,
                "source_vocabulary": 1000,
                "target_vocabulary": 1000,
            },
            batch=16,
            source_steps=25,
            target_steps=25,
        ),
        _SPEECH,
        _scaled(
            _SPEECH,
            "speech-las-scaled",
            config={
                "hidden_size": 64,
                "output_size": 32,
                "decoder_input_size": 64,
                "target_vocabulary": 32,
            },
            batch=8,
            source_steps=100,
            target_steps=40,
        ),
        _TRANSDUCER,
        _scaled(
            _TRANSDUCER,
            "speech-rnnt-encoder-scaled",
            config={"input_size": 60, "hidden_size": 128},
            batch=8,
            source_steps=100,
        ),
        _SUMMARY,
        _scaled(
            _SUMMARY,
            "summarize-pg-scaled",
            config={
                "input_size": 32,
                "hidden_size": 64,
                "output_size": 1000,
                "source_vocabulary": 1000,
                "target_vocabulary": 1000,
                "attention_size": 128,
            },
            batch=8,
            source_steps=100,
            target_steps=25,
        ),
        _SCALING,
        _DEEPBENCH,
        dataclasses.replace(
            _DEEPBENCH,
            name="flashrnn",
            summary="one LSTM layer alone over a long sequence",
            source="NX-AI/flashrnn, the plot of its speed: batch 16, 1024 steps, hidden 768",
            config=SingleConfig(hidden_size=768),
            batch=16,
            source_steps=1024,
        ),
    )
}


def find_workload(name: str) -> Workload:
    """The workload of a name, with its overrides applied.

    Raises:
        UnknownWorkloadError: for a name or override that does not exist, or a size out of range.
    """
    base, at, overrides = name.partition("@")
    if base not in WORKLOADS:
        msg = f"no workload is called {base!r}; there are {', '.join(WORKLOADS)}"
        raise UnknownWorkloadError(msg)
    workload = WORKLOADS[base]
    given: set[str] = set()
    for part in overrides.split(",") if at else ():
        match = re.fullmatch(r"(\w+)=(\d+)", part)
        if not match or match[1] not in AXES or int(match[2]) < 1:
            msg = f"override {part!r} of {base}: expected AXIS=NUMBER with AXIS one of {', '.join(AXES)}, NUMBER >= 1"
            raise UnknownWorkloadError(msg)
        if match[1] in given:
            msg = f"override {match[1]} of {base} is given twice; give it once"
            raise UnknownWorkloadError(msg)
        given.add(match[1])
        try:
            workload = _override(workload, match[1], int(match[2]))
        except ValueError as error:
            msg = f"override {part!r} of {base}: {error}"
            raise UnknownWorkloadError(msg) from error
    return dataclasses.replace(workload, name=name)


def _override(workload: Workload, axis: str, value: int) -> Workload:
    if axis == "batch":
        return dataclasses.replace(workload, batch=value)
    if axis == "beam":
        return dataclasses.replace(workload, beam=value)
    if axis == "hidden":
        return dataclasses.replace(workload, config=dataclasses.replace(workload.config, hidden_size=value))
    if axis == "layers":
        return dataclasses.replace(workload, config=dataclasses.replace(workload.config, num_layers=value))
    # Length: the target keeps its proportion to the source.
    target = workload.target_steps
    if target is not None:
        target = max(1, round(target * value / workload.source_steps))
    return dataclasses.replace(workload, source_steps=value, target_steps=target)
