"""WORKLOADS: named, citable problems. Each is a model's sizes, a batch, lengths and where all of that comes from."""

from __future__ import annotations

import dataclasses
from typing import Any

from seq2seq.data import windows
from seq2seq.data.lengths import LIBRISPEECH_CHARACTERS, LIBRISPEECH_FRAMES, WMT_ENGLISH, WMT_GERMAN
from seq2seq.models.attention import AttentionConfig
from seq2seq.models.ctc import CTCConfig
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.episodes import EpisodesConfig
from seq2seq.models.gnmt import GNMTConfig
from seq2seq.models.huggingface_config import marian
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.models.rnnt_encoder import StackedConfig
from seq2seq.models.transformer import TransformerConfig
from seq2seq.workloads.episodes import EpisodesWorkload
from seq2seq.workloads.workload import Workload, scaled

#: Batches of WMT, English to German.
_WMT: dict[str, Any] = {
    "data": "synthetic: random tokens, lengths of WMT English and German words",
    "batch": 128,
    "source_steps": 50,
    "target_steps": 50,
    "source_lengths": WMT_ENGLISH,
    "target_lengths": WMT_GERMAN,
}
#: Vocabularies of the scaled-down twins.
_THOUSAND_WORDS = {"output_size": 1000, "source_vocabulary": 1000, "target_vocabulary": 1000}

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
    "encoder and decoder alone: variable selection, gates and attention are left out), pinball loss of three quantiles",
    data="synthetic: random, as many features as TFT's LSTMs are given",
    config=Seq2SeqConfig(input_size=128, hidden_size=128, output_size=1, likelihood="quantile"),
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
        input_size=256, hidden_size=512, output_size=5893, num_layers=2, source_vocabulary=7853, target_vocabulary=5893
    ),
    batch=128,
    source_steps=50,
    target_steps=50,
    source_lengths=WMT_GERMAN,
    target_lengths=WMT_ENGLISH,
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
_MARIAN = Workload(
    name="translation-marian",
    summary="English to German by a Marian model of the transformers library, run by the library's own code",
    source="Helsinki-NLP/opus-mt-en-de: 6 + 6 layers, 512 hidden, 8 heads, feed-forward 2048, vocabulary 58,101, one "
    "matrix for both embeddings and the head; batch and steps as translation-small. Its weights are random, from a "
    "seed: sizes decide the time",
    config=marian(512, 6, 8, 2048, 58_101),
    **_WMT,
)
_IWSLT = Workload(
    name="translation-iwslt",
    summary="English to Vietnamese with attention, fed with what it found the step before",
    source="tensorflow/nmt iwslt15.json: encoder 2 x 512, which is one layer read both ways, decoder 2 x 512, scaled "
    "Luong attention with input feeding, embedding 512, batch 128, length up to 50, vocabularies of IWSLT'15",
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
    **_WMT,
)
_GNMT = Workload(
    name="translation-gnmt",
    summary="English to German by a deep model with residual layers and attention",
    source="NVIDIA DeepLearningExamples GNMT v2: encoder 4 x 1024, its first layer read both ways, decoder 4 x 1024, "
    "normed Bahdanau attention, embedding 1024, vocabulary 32k, batch 128, length up to 50",
    config=GNMTConfig(
        input_size=1024, hidden_size=1024, output_size=32_000, source_vocabulary=32_000, target_vocabulary=32_000
    ),
    **_WMT,
)
_SPEECH = Workload(
    name="speech-las",
    summary="filter-bank frames to characters with attention, bidirectional encoder, different lengths",
    source="kaituoxu/Listen-Attend-Spell aishell: in 240, 3 x bidirectional 256, decoder 512 from zeros, dot attention "
    "whose context is fed to the next step, a head of two layers, batch 32, 800 -> 150 (dropout is left out)",
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
        combine_bias=True,
    ),
    batch=32,
    source_steps=800,
    target_steps=150,
    source_lengths=LIBRISPEECH_FRAMES,
    target_lengths=LIBRISPEECH_CHARACTERS,
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
    source_lengths=LIBRISPEECH_FRAMES,
)
_CTC = Workload(
    name="speech-ctc",
    summary="filter-bank frames to characters by CTC: a deep bidirectional encoder and a loss over all alignments",
    source="srvk/eesen asr_egs/wsj/run_ctc_char.sh (Miao, Gowayyed and Metze 2015): in 120, which is 40 filter banks "
    "with deltas, 4 x bidirectional 320, batch 10 (its peepholes are left out; 60 labels with the blank are ours)",
    data="synthetic: random frames and labels, lengths of LibriSpeech dev-clean scaled to the longest",
    config=CTCConfig(input_size=120, hidden_size=320, output_size=60, num_layers=4),
    batch=10,
    source_steps=800,
    source_lengths=LIBRISPEECH_FRAMES,
    label_steps=150,
    label_lengths=LIBRISPEECH_CHARACTERS,
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
        scaled(_TFT, "forecast-tft-scaled", config={"input_size": 32, "hidden_size": 32}, batch=64),
        _TRANSLATION,
        scaled(
            _TRANSLATION,
            "translation-small-scaled",
            config={"input_size": 64, "hidden_size": 128, **_THOUSAND_WORDS},
            batch=16,
        ),
        _TRANSFORMER,
        # About as many parameters as translation-small-scaled.
        scaled(
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
        _MARIAN,
        # About as many parameters as translation-small-scaled.
        dataclasses.replace(
            scaled(_MARIAN, "translation-marian-scaled", config={}, batch=16), config=marian(96, 2, 4, 512, 1000)
        ),
        _IWSLT,
        scaled(
            _IWSLT,
            "translation-iwslt-scaled",
            config={"input_size": 64, "hidden_size": 128, **_THOUSAND_WORDS},
            batch=16,
            source_steps=25,
            target_steps=25,
        ),
        _GNMT,
        scaled(
            _GNMT,
            "translation-gnmt-scaled",
            config={"input_size": 128, "hidden_size": 128, **_THOUSAND_WORDS},
            batch=16,
            source_steps=25,
            target_steps=25,
        ),
        _SPEECH,
        scaled(
            _SPEECH,
            "speech-las-scaled",
            config={"hidden_size": 64, "output_size": 32, "decoder_input_size": 64, "target_vocabulary": 32},
            batch=8,
            source_steps=100,
            target_steps=40,
        ),
        _TRANSDUCER,
        scaled(
            _TRANSDUCER,
            "speech-rnnt-encoder-scaled",
            config={"input_size": 60, "hidden_size": 128},
            batch=8,
            source_steps=100,
        ),
        _CTC,
        scaled(
            _CTC,
            "speech-ctc-scaled",
            config={"input_size": 60, "hidden_size": 64, "output_size": 32, "num_layers": 2},
            batch=8,
            source_steps=100,
            label_steps=40,
        ),
        _SUMMARY,
        scaled(
            _SUMMARY,
            "summarize-pg-scaled",
            config={"input_size": 32, "hidden_size": 64, "attention_size": 128, **_THOUSAND_WORDS},
            batch=8,
            source_steps=100,
            target_steps=25,
        ),
        EpisodesWorkload(
            name="rl-impala",
            summary="one LSTM over unrolls of a learner in reinforcement learning, episodes begin in the middle",
            source="Espeholt et al. 2018, IMPALA, its table of hyperparameters for DMLab-30: LSTM of 256, batch 32, "
            "unroll of 100 steps; an episode of 50 steps on average is this project's",
            data="synthetic: random, each step begins an episode with probability 1/50; states start from zeros",
            config=EpisodesConfig(hidden_size=256),
            batch=32,
            source_steps=100,
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
