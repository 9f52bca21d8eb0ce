"""Hypothesis strategies: LSTMs and Seq2Seq problems small enough to run by the hundred, with odd sizes among them.

What is drawn is sizes and a seed, never values: a failing example shrinks to its smallest sizes and can be read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.models.attention import FEEDS, AttentionConfig
from seq2seq.models.attention_layer import ATTENTIONS
from seq2seq.models.base import IGNORE_TOKEN, Config
from seq2seq.models.ctc import CTCConfig
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.gnmt import GNMTConfig
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.models.rnnt_encoder import StackedConfig

SEEDS = st.integers(0, 2**16)


@dataclass(frozen=True)
class Shape:
    """Sizes of one LSTM and of what it is run on.

    Attributes:
        lengths: valid steps of each sequence, from 1 to `steps`; None when all fill all steps.
    """

    batch: int
    steps: int
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    seed: int
    lengths: tuple[int, ...] | None = None

    @property
    def directions(self) -> int:
        """1, or 2 when the LSTM reads both ways."""
        return 2 if self.bidirectional else 1

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of torch.nn.LSTM and its drop-ins."""
        return {
            "input_size": self.input_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "batch_first": True,
        }

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Random x (batch, steps, input_size), and h and c (layers * directions, batch, hidden_size)."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.batch, self.steps, self.input_size, dtype=dtype, generator=generator)
        state = (self.num_layers * self.directions, self.batch, self.hidden_size)
        hidden = torch.randn(state, dtype=dtype, generator=generator)
        return x, (hidden, torch.randn(state, dtype=dtype, generator=generator))


@st.composite
def shapes(draw: st.DrawFn, *, with_lengths: bool = False) -> Shape:
    """LSTMs of up to three layers; with lengths, at least one sequence may end early."""
    batch, steps = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    return Shape(
        batch=batch,
        steps=steps,
        input_size=draw(st.integers(1, 7)),
        hidden_size=draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        seed=draw(SEEDS),
        lengths=draw(_lengths(batch, steps)) if with_lengths else None,
    )


@dataclass(frozen=True)
class Problem:
    """A model's sizes and those of a batch for it.

    Attributes:
        target_steps: None when the decoder reads the source.
        source_lengths, target_lengths: valid steps of each sequence; None when all fill all steps.
    """

    config: Config
    batch: int
    source_steps: int
    target_steps: int | None
    source_lengths: tuple[int, ...] | None
    target_lengths: tuple[int, ...] | None
    seed: int

    @property
    def decoded_lengths(self) -> tuple[int, ...]:
        """Valid steps of what the decoder reads, one per sequence."""
        if self.target_steps is None:
            return self.source_lengths or (self.source_steps,) * self.batch
        return self.target_lengths or (self.target_steps,) * self.batch

    def make_batch(self, dtype: torch.dtype = torch.float64) -> Batch:
        """Random values of these sizes; tokens expected where the decoder reads tokens."""
        config, generator = self.config, torch.Generator().manual_seed(self.seed)

        def draw(steps: int, features: int, vocabulary: int) -> Tensor:
            if vocabulary:
                return torch.randint(vocabulary, (self.batch, steps), generator=generator)
            return torch.randn(self.batch, steps, features, dtype=dtype, generator=generator)

        source = draw(self.source_steps, config.input_size, config.source_vocabulary)
        if isinstance(config, CTCConfig):
            return Batch(source, None, _tensor(self.source_lengths), None, self._labels(config, generator))
        target, decoded = None, self.source_steps
        if self.target_steps is not None:
            target, decoded = draw(self.target_steps, config.target_size, config.target_vocabulary), self.target_steps
        expected = draw(decoded, config.output_size, config.output_size if config.target_vocabulary else 0)
        if config.target_vocabulary:
            expected[past(self.decoded_lengths, decoded)] = IGNORE_TOKEN
        return Batch(source, target, _tensor(self.source_lengths), _tensor(self.target_lengths), expected)

    def _labels(self, config: CTCConfig, generator: torch.Generator) -> Tensor:
        """Labels that are no blanks, for each sequence as many as fit into its steps whatever they are, or fewer."""
        most = (torch.tensor(self.decoded_lengths) + 1) // 2
        counts = (torch.rand(self.batch, generator=generator) * (most + 1)).long()
        labels = torch.randint(config.output_size - 1, (self.batch, int(most.max())), generator=generator)
        labels += labels >= config.blank
        return labels.masked_fill(past(tuple(counts.tolist()), labels.size(1)), IGNORE_TOKEN)


@st.composite
def problems(draw: st.DrawFn, *, with_lengths: bool | None = None, real_source: bool = False) -> Problem:
    """Models of every kind: values or tokens, one direction or two, decoders of other sizes and fewer layers.

    Args:
        draw: given by hypothesis.
        with_lengths: whether sequences differ in length; either when None.
        real_source: whether the source must be real-valued.
    """
    batch, source_steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    layers, input_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    source_vocabulary = 0 if real_source else draw(st.sampled_from([0, 7]))
    sizes: dict[str, Any] = {"num_layers": layers, "bidirectional": draw(st.booleans())}
    sizes["decoder_hidden_size"] = draw(st.none() | st.integers(1, 5))
    sizes["decoder_layers"] = draw(st.none() | st.integers(1, layers))
    target_steps = draw(st.none() | st.integers(1, 6))
    if target_steps is not None:
        sizes["decoder_input_size"] = draw(st.none() | st.integers(1, 4))
        sizes["target_vocabulary"] = draw(st.sampled_from([0, 7]))
    else:
        # The decoder reads the source, so its input must be of the same kind.
        sizes["target_vocabulary"] = source_vocabulary
    config = Seq2SeqConfig(
        input_size, draw(st.integers(1, 5)), draw(st.integers(1, 3)), source_vocabulary=source_vocabulary, **sizes
    )
    return draw(_around(config, batch, source_steps, target_steps, with_lengths))


@st.composite
def attentive(draw: st.DrawFn, *, with_lengths: bool | None = None, own_target: bool | None = None) -> Problem:
    """Models with attention of every kind, fed or not, and GNMT-like ones.

    Args:
        draw: given by hypothesis.
        with_lengths: whether sequences differ in length; either when None.
        own_target: whether the decoder reads something else than the source; either when None.
    """
    batch, source_steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    own = draw(st.booleans()) if own_target is None else own_target
    target_steps = draw(st.integers(1, 6)) if own else None
    sizes: dict[str, Any] = {"source_vocabulary": draw(st.sampled_from([0, 7]))}
    sizes["target_vocabulary"] = draw(st.sampled_from([0, 7])) if own else sizes["source_vocabulary"]
    sizes["decoder_input_size"] = draw(st.none() | st.integers(1, 4)) if own else None
    plain = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    config: Config
    if draw(st.integers(0, 3)) == 0:
        config = GNMTConfig(*plain, num_layers=draw(st.integers(2, 4)), **sizes)
    else:
        layers, both, kind = draw(st.integers(1, 2)), draw(st.booleans()), draw(st.sampled_from(ATTENTIONS))
        zeros, as_it_is = draw(st.booleans()), both and kind != "dot" and draw(st.booleans())
        sizes["decoder_hidden_size"] = None if kind == "dot" or as_it_is else draw(st.none() | st.integers(1, 5))
        sizes["decoder_layers"] = 2 * layers if as_it_is else draw(st.integers(1, 3 if zeros else layers))
        config = AttentionConfig(
            *plain,
            num_layers=layers,
            bidirectional=both,
            attention=kind,
            scaled=draw(st.booleans()),
            attention_size=draw(st.none() | st.integers(1, 4)) if kind == "bahdanau" else None,
            feeds=draw(st.sampled_from(FEEDS)),
            starts_from_zeros=zeros,
            **sizes,
        )
    return draw(_around(config, batch, source_steps, target_steps, with_lengths))


@st.composite
def _around(
    draw: st.DrawFn, config: Config, batch: int, source_steps: int, target_steps: int | None, with_lengths: bool | None
) -> Problem:
    """A problem of these sizes, with lengths or without."""
    differ = draw(st.booleans()) if with_lengths is None else with_lengths
    return Problem(
        config=config,
        batch=batch,
        source_steps=source_steps,
        target_steps=target_steps,
        source_lengths=draw(_lengths(batch, source_steps)) if differ else None,
        target_lengths=draw(_lengths(batch, target_steps)) if differ and target_steps is not None else None,
        seed=draw(SEEDS),
    )


@st.composite
def stacked(draw: st.DrawFn, *, with_lengths: bool | None = None, whole: bool = False) -> Problem:
    """Encoders of transducers, of any number of steps or, if whole, of such as the stacking leaves no rest of."""
    stack = draw(st.integers(1, 3))
    config = StackedConfig(
        draw(st.integers(1, 4)),
        stack * draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        stack,
    )
    steps = stack * draw(st.integers(1, 3)) if whole else draw(st.integers(1, 7))
    return draw(_around(config, draw(st.integers(1, 4)), steps, None, with_lengths))


@st.composite
def labelled(draw: st.DrawFn, *, with_lengths: bool | None = None) -> Problem:
    """CTC models: up to three layers, one direction or two, any label as the blank."""
    labels = draw(st.integers(2, 4))
    config = CTCConfig(
        draw(st.integers(1, 4)),
        draw(st.integers(1, 5)),
        labels,
        draw(st.integers(1, 3)),
        bidirectional=draw(st.booleans()),
        blank=draw(st.integers(0, labels - 1)),
    )
    return draw(_around(config, draw(st.integers(1, 4)), draw(st.integers(1, 6)), None, with_lengths))


@st.composite
def singles(draw: st.DrawFn) -> Problem:
    """LSTMs alone: up to three layers, one direction or two, as many features as units or not."""
    config = SingleConfig(
        draw(st.integers(1, 5)), draw(st.none() | st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.booleans())
    )
    return Problem(config, draw(st.integers(1, 4)), draw(st.integers(1, 6)), None, None, None, draw(SEEDS))


def past(lengths: tuple[int, ...], steps: int) -> Tensor:
    """Which places lie past the end of their sequence: (batch, steps) bool."""
    return torch.arange(steps) >= torch.tensor(lengths)[:, None]


def _lengths(batch: int, steps: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(1, steps)] * batch)


def _tensor(lengths: tuple[int, ...] | None) -> Tensor | None:
    return None if lengths is None else torch.tensor(lengths)
