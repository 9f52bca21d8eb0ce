"""Seq2Seq with attention: the decoder reads all outputs of the encoder, not only its final state.

Without feeding, its decoder is one call of one LSTM over the whole target, which is what fast kernels serve; fed with
what it looked at the step before, it is a call per step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from seq2seq.layers.padding import Reader, blank, last, valid_mask
from seq2seq.models.attention_layer import ATTENTIONS, Attention, attention_parameters, attention_products
from seq2seq.models.base import Extent, Model, Stack, checked_target, embedding, make_lstm
from seq2seq.models.encoder_decoder import Seq2SeqConfig, arranged
from seq2seq.models.field_checks import check_bool, check_choice, check_ints

#: What a decoder may be fed; see `AttentionConfig`.
FEEDS = ("", "attention", "context")


@dataclass(frozen=True)
class AttentionConfig(Seq2SeqConfig):
    """Sizes of an `AttentionSeq2Seq`: those of a `Seq2Seq`, and what it looks at and how.

    Attributes:
        decoder_hidden_size: as for `Seq2SeqConfig`; but with `dot`, whose sizes must be equal, that of the encoder's
            outputs when None.
        decoder_layers: at most `num_layers`; or as many as the encoder has layers and directions, if the hidden sizes
            are equal: each direction of a layer is then what one layer of the decoder starts from, as in
            tensorflow/nmt. Any number where the decoder starts from zeros.
        attention: one of `ATTENTIONS`.
        scaled: whether the scores have a learned scale; see `Attention`.
        attention_size: size that `bahdanau` compares in; the decoder's hidden size when None.
        feeds: what each step of the decoder gets besides its input: "" nothing; `attention`, what was found and
            decoded the step before (input feeding, Luong et al. 2015); `context`, what was found alone (Chan et al.
            2016; See et al. 2017).
        starts_from_zeros: whether the decoder starts from zeros instead of the encoder's final state.
        combine_bias: whether the layer that combines context and decoder's output has a bias, which makes it and the
            head the two layers of kaituoxu/Listen-Attend-Spell; Luong et al. 2015 have none.

    Raises:
        TypeError, ValueError: as `Seq2SeqConfig`; ValueError for unknown names, or sizes that `dot` cannot compare.
    """

    attention: str = "general"
    scaled: bool = False
    attention_size: int | None = None
    feeds: str = ""
    starts_from_zeros: bool = False
    combine_bias: bool = False

    family: ClassVar[str] = "attention"
    #: Scores and contexts run between the LSTMs, whatever the sizes.
    bridged: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("attention", self.attention, ATTENTIONS)
        check_choice("feeds", self.feeds, FEEDS)
        for name in ("scaled", "starts_from_zeros", "combine_bias"):
            check_bool(name, getattr(self, name))
        check_ints(self, 1, "attention_size")
        if self.attention_size is not None and self.attention != "bahdanau":
            msg = f"attention_size is for bahdanau, but attention is {self.attention!r}: leave it out"
            raise ValueError(msg)
        if self.attention == "dot" and self.decoder_size != self.memory_size:
            msg = (
                f"dot compares equal sizes, but decoder_hidden_size is {self.decoder_size} and the encoder's outputs "
                f"have {self.memory_size}: leave it out, or use attention='general'"
            )
            raise ValueError(msg)

    @property
    def most_decoder_layers(self) -> int | None:
        """Number of decoder layers that find a state to start from."""
        if self.starts_from_zeros:
            return None
        return self.num_layers * 2 if self._passes_as_it_is else self.num_layers

    @property
    def memory_size(self) -> int:
        """Features of an encoder's output."""
        return self.hidden_size * (2 if self.bidirectional else 1)

    @property
    def decoder_size(self) -> int:
        """Hidden size of the decoder."""
        return self.decoder_hidden_size or (self.memory_size if self.attention == "dot" else self.hidden_size)

    @property
    def depth(self) -> int:
        """Layers of the decoder."""
        return self.decoder_layers or self.num_layers

    @property
    def fed_size(self) -> int:
        """Features that a decoder step gets besides its input."""
        return {"": 0, "attention": self.decoder_size, "context": self.memory_size}[self.feeds]

    @property
    def compared(self) -> tuple[str, int, int, int]:
        """The first arguments of `Attention`."""
        return self.attention, self.decoder_size, self.memory_size, self.attention_size or self.decoder_size

    @property
    def _passes_as_it_is(self) -> bool:
        return self.bidirectional and self.depth == 2 * self.num_layers and self.decoder_size == self.hidden_size

    @property
    def projects_state(self) -> bool:
        """Return whether the encoder's state is brought to the decoder's size by a linear map."""
        if self.starts_from_zeros or self._passes_as_it_is:
            return False
        return self.bidirectional or self.decoder_size != self.hidden_size

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """LSTMs of the model, encoder first."""
        encoder = Seq2SeqConfig.stacks.fget(self)[0]  # type: ignore[attr-defined]
        decoder = Stack(
            "decoder",
            self.target_size + self.fed_size,
            self.decoder_size,
            self.depth,
            decodes=True,
            embedded=self.target_vocabulary > 0,
            from_zeros=self.starts_from_zeros,
            stepwise=bool(self.feeds),
        )
        return encoder, decoder

    @property
    def dense_parameters(self) -> int:
        """Values of the weights of bridge, attention, what combines it with the decoder's outputs, and head."""
        found = self.head_size * (self.decoder_size + 1) + self.decoder_size * (self.memory_size + self.decoder_size)
        found += attention_parameters(*self.compared, scaled=self.scaled) + self.combine_bias * self.decoder_size
        return found + (2 * self.decoder_size * (self.memory_size + 1) if self.projects_state else 0)

    def dense_products(self, extent: Extent, *, backward: bool) -> int:
        """FLOPs of the products of the same; where the decoder is fed, less those with the zeros fed first."""
        forward = attention_products(*self.compared, extent)
        forward += 2 * (self.memory_size + self.decoder_size) * self.decoder_size * extent.target_steps
        forward += 2 * self.decoder_size * self.head_size * extent.target_steps
        if self.projects_state:
            forward += 4 * self.memory_size * self.decoder_size * self.depth * extent.sequences
        fed = 8 * self.decoder_size * self.fed_size
        if not backward:
            return forward - fed * extent.sequences
        # The weight's gradient needs none of the first step's. The input's does not either: where it is counted for
        # the whole input (embedded tokens) that step's is taken off, and else the other steps' are added.
        into = -extent.sequences if self.target_vocabulary else extent.target_steps - extent.sequences
        return 2 * forward + fed * (into - extent.sequences)

    def build(self, lstm: Callable[..., nn.RNNBase]) -> AttentionSeq2Seq:  # type: ignore[override]
        """The model of these sizes."""
        return AttentionSeq2Seq(self, lstm)


class AttentionSeq2Seq(Model):
    """Encoder LSTM, decoder LSTM, and attention from the decoder's outputs to the encoder's; batch first.

    A step's output is head(tanh(W [context; h] + b)), b only with `combine_bias`, with h the decoder's output and
    context what it found (Luong et al. 2015, "global attention"), whatever the kind of attention. Dropout acts between
    the layers of the LSTMs and before the head.

    The state of decoding: `hidden` and `cell`, (decoder layers, batch, decoder size); `memory`, (1, batch, source
    steps, memory size); `keys`, the same projected, but for `dot`; `mask`, (1, batch, source steps) bool, where
    lengths were given; `fed`, (1, batch, fed size), where the decoder is fed.

    Args:
        config: the sizes.
        lstm: makes both LSTMs, as for `Seq2Seq`.

    Raises:
        TypeError, ValueError: from `forward`, for inputs of the wrong dtype or shape.
    """

    __constants__ = (
        "sizes", "tokens", "directions", "depth", "from_zeros", "rearranged", "feeds", "feeds_context", "fed_size",
        "decoder_size",
    )  # fmt: skip

    def __init__(self, config: AttentionConfig, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.config = config = dataclasses.replace(config)
        self.sizes = (config.input_size, config.target_size)
        self.tokens = (config.source_vocabulary > 0, config.target_vocabulary > 0)
        self.directions = 2 if config.bidirectional else 1
        self.depth, self.decoder_size = config.depth, config.decoder_size
        self.from_zeros = config.starts_from_zeros
        self.rearranged = config.projects_state or config.depth < config.num_layers
        self.feeds, self.feeds_context = bool(config.feeds), config.feeds == "context"
        self.fed_size = config.fed_size

        encoder, decoder = config.stacks
        self.embed_source = embedding(config.source_vocabulary, config.input_size)
        self.embed_target = embedding(config.target_vocabulary, config.target_size)
        self.encoder = Reader(make_lstm(lstm, encoder, config.dropout))
        bridge = (config.memory_size, config.decoder_size)
        self.bridge_hidden = nn.Linear(*bridge) if config.projects_state else nn.Identity()
        self.bridge_cell = nn.Linear(*bridge) if config.projects_state else nn.Identity()
        self.decoder = Reader(make_lstm(lstm, decoder, config.dropout))
        self.attention = Attention(*config.compared, scaled=config.scaled)
        combined = config.memory_size + config.decoder_size
        self.combine = nn.Linear(combined, config.decoder_size, bias=config.combine_bias)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(config.decoder_size, config.head_size)

    @torch.jit.export
    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode with teacher forcing; as `Seq2Seq.run`.

        Returns:
            The fields of `Seq2SeqResult`. Outputs past a target's length are the head's bias.
        """
        fed, lengths = checked_target(source, target, source_lengths, target_lengths, self.sizes, self.tokens)
        outputs, state = self.decode(fed, self.encode(source, source_lengths), lengths)
        return outputs, state["hidden"], state["cell"]

    @torch.jit.export
    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The state that decoding starts from; see the class."""
        memory, hidden, cell = self.encoder(self.embed_source(source), None, lengths)
        if self.from_zeros:
            hidden = memory.new_zeros(self.depth, memory.size(0), self.decoder_size)
            cell = torch.zeros_like(hidden)
        elif self.rearranged:
            hidden = arranged(hidden, self.directions, self.depth)
            cell = arranged(cell, self.directions, self.depth)
        state = {
            "hidden": self.bridge_hidden(hidden),
            "cell": self.bridge_cell(cell),
            "memory": memory.unsqueeze(0),
        }
        if self.attention.projected:
            state["keys"] = self.attention.key(memory).unsqueeze(0)
        if lengths is not None:
            state["mask"] = valid_mask(memory, lengths).unsqueeze(0)
        if self.feeds:
            state["fed"] = memory.new_zeros(1, memory.size(0), self.fed_size)
        return state

    @torch.jit.export
    def decode(
        self, target: Tensor, state: dict[str, Tensor], lengths: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode several steps from a state: outputs (batch, steps, head_size), and the state after them."""
        x = self.embed_target(target)
        after = state.copy()
        if self.feeds:
            decoded = self._step_by_step(x, after, lengths)
        else:
            found, hidden, cell = self.decoder(x, (state["hidden"], state["cell"]), lengths)
            decoded = self._combined(found, self._look(found, state))
            after["hidden"], after["cell"] = hidden, cell
        return self.fc(self.dropout(blank(decoded, lengths))), after

    @torch.jit.export
    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one step."""
        outputs, after = self.decode(value.unsqueeze(1), state, None)
        return outputs.squeeze(1), after

    def _step_by_step(self, x: Tensor, state: dict[str, Tensor], lengths: Tensor | None) -> Tensor:
        """All steps, each fed what the one before found; the state is brought to their end.

        It is not held past a sequence's end, but read off there afterwards: that takes one operation, not one per step.
        """
        hidden, cell, fed = state["hidden"], state["cell"], state["fed"].squeeze(0)
        hiddens, cells, feds, decoded = [hidden], [cell], [fed], [fed]
        for step in blank(x, lengths).unbind(1):
            found, hidden, cell = self.decoder(torch.cat([step, fed], -1).unsqueeze(1), (hidden, cell), None)
            context = self._look(found, state)
            combined = self._combined(found, context).squeeze(1)
            fed = context.squeeze(1) if self.feeds_context else combined
            decoded.append(combined)
            if lengths is not None:
                hiddens.append(hidden)
                cells.append(cell)
                feds.append(fed)
        if lengths is not None:
            hidden = last(torch.stack(hiddens[1:], 1).transpose(0, 2), lengths).transpose(0, 1).contiguous()
            cell = last(torch.stack(cells[1:], 1).transpose(0, 2), lengths).transpose(0, 1).contiguous()
            fed = last(torch.stack(feds[1:], 1), lengths)
        state["hidden"], state["cell"], state["fed"] = hidden, cell, fed.unsqueeze(0)
        return torch.stack(decoded[1:], 1)

    def _look(self, queries: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Context of each of (batch, steps, decoder size) queries in the memory."""
        memory = state["memory"].squeeze(0)
        keys = state["keys"].squeeze(0) if self.attention.projected else memory
        mask: Tensor | None = None
        if "mask" in state:
            mask = state["mask"].squeeze(0)
        found: Tensor = self.attention(queries, memory, keys, mask)
        return found

    def _combined(self, found: Tensor, context: Tensor) -> Tensor:
        combined: Tensor = self.combine(torch.cat([context, found], -1))
        return torch.tanh(combined)
