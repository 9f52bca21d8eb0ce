"""Decoding: outputs of a model that is fed with its own outputs.

Greedy and beam search for tokens, `forecast` for values; all use nothing but `encode`, `step` and `select`, so
they work for every family. Sequences are decoded together, and finished ones leave the batch.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from seq2seq.data.tokens import BEGIN, END, PAD
from seq2seq.decoding.beams import Beams
from seq2seq.decoding.result import Decoded, Limit, is_end
from seq2seq.layers.likelihoods import central, draw, widened
from seq2seq.models.base import State, select


class Decoder(Protocol):
    """Interface that decoding needs of a model: `seq2seq.models.base.Model`, or a replacement for one."""

    config: Any

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> State:
        """See `Model.encode`."""

    def step(self, value: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Model.step`."""


def first_token(config: Any) -> int:
    """The token that decoding is fed first: a pre-trained model's config says it, all others begin with `BEGIN`."""
    return BEGIN if config.begin is None else int(config.begin)


@torch.no_grad()
def greedy(  # noqa: PLR0913 - every option of decoding
    model: Decoder,
    source: Tensor,
    lengths: Tensor | None = None,
    *,
    begin: int | None = None,
    end: int | None = END,
    max_steps: int | None = None,
    max_ratio: float | None = None,
    drop: bool = True,
) -> Decoded:
    """The likeliest token at each step.

    Args:
        model: in evaluation mode.
        source: as for `Model.encode`.
        lengths: valid steps of each source, (batch,) int64 on the CPU; all when absent.
        begin: token that the first step is fed; that of `first_token` when None.
        end: token that ends a sequence; None when nothing does but the limit.
        max_steps: tokens of a sequence at most.
        max_ratio: the same for each step of its source; with both, the less counts.
        drop: whether finished sequences leave the batch. The results are the same; without, shapes never change.

    Raises:
        ValueError: without a limit.
    """
    bounds = Limit(max_steps, max_ratio).of(source, lengths)
    shortest, longest = int(bounds.min()), int(bounds.max())
    bounds = bounds.to(source.device)
    found = Decoded.room(bounds, longest)
    state = model.encode(source, lengths)
    rows = torch.arange(source.size(0), device=source.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    value = torch.full_like(rows, first_token(model.config) if begin is None else begin)
    history, scores = found.tokens.clone(), torch.zeros_like(found.scores)
    for step in range(longest):
        outputs, state = model.step(value, state)
        outputs = widened(outputs)
        likeliest, value = outputs.max(-1)
        history[:, step], scores = value, scores + (likeliest - outputs.logsumexp(-1))
        if end is None and step + 1 < shortest:
            continue
        ended = alive & (is_end(value, end) | (bounds[rows] <= step + 1))
        if not bool(ended.any()):
            continue
        found.write(rows[ended], history[ended], step + 1, scores[ended])
        alive &= ~ended
        if not bool(alive.any()):
            break
        if drop:
            kept = alive.nonzero().squeeze(1)
            rows, alive, value, history, scores = (t[kept] for t in (rows, alive, value, history, scores))
            state = select(state, kept)
    return found.trimmed()


@torch.no_grad()
def beam_search(  # noqa: PLR0913 - every option of a beam search
    model: Decoder,
    source: Tensor,
    lengths: Tensor | None = None,
    *,
    beam: int,
    length_penalty: float = 0.0,
    begin: int | None = None,
    end: int | None = END,
    max_steps: int | None = None,
    max_ratio: float | None = None,
    drop: bool = True,
    trace: bool = False,
) -> Decoded:
    """The best hypothesis of a beam search, one per sequence: of highest log-probability over length penalty.

    A hypothesis that ends leaves the beam, which continues with one place less (Sutskever et al. 2014). A sequence is
    done when its beam is empty, or when no hypothesis in it can overtake the best that ended. One that was cut off by
    the limit counts only where none ended.

    At most `beam` hypotheses of a sequence are kept. `length_penalty` is the exponent of the function of that name: 0
    compares log-probabilities, 0.6 to 1 is usual. With `trace` it returns how the hypotheses came about, for a search
    in which nothing ends before the limit. All other arguments are those of `greedy`, which is `beam=1`.

    Raises:
        ValueError: without a limit, for a beam below 1 or a negative penalty.
    """
    if beam < 1 or not 0 <= length_penalty < math.inf:
        msg = f"beam is {beam}, length_penalty {length_penalty}; expected at least 1 hypothesis, and 0 or more"
        raise ValueError(msg)
    bounds = Limit(max_steps, max_ratio).of(source, lengths)
    shortest, longest = int(bounds.min()), int(bounds.max())
    bounds = bounds.to(source.device)
    found, search = Decoded.room(bounds, longest), Beams(bounds, beam, length_penalty, end)
    sequences = source.size(0)
    state = model.encode(source, lengths)
    # A hypothesis has a place, sequence * beam + rank; without dropping every place has its row from the start.
    places = torch.arange(0, sequences * beam, beam if drop else 1, device=source.device)
    if not drop and beam > 1:
        state = select(state, places // beam)
    value = torch.full_like(places, first_token(model.config) if begin is None else begin)
    history = found.tokens.new_full((places.size(0), longest), PAD)
    scores = torch.where(places % beam == 0, 0.0, -math.inf).double()
    traced: list[tuple[Tensor, Tensor]] = []
    for step in range(longest):
        outputs, state = model.step(value, state)
        scores, parents, tokens = search.candidates(widened(outputs), scores, places)
        traced.append((parents, tokens))
        # A row for every place, those without a hypothesis included; `going` marks the others.
        history = history[parents]
        history[:, step] = tokens
        going = scores > -math.inf
        if end is not None or step + 1 >= shortest:
            going = search.end(found, step + 1, scores, tokens, history)
            if not bool(going.any()):
                break
        if drop:
            places = going.nonzero().squeeze(1)
            parents, value, history, scores = parents[places], tokens[places], history[places], scores[places]
        else:
            places = torch.arange(sequences * beam, device=source.device)
            value, scores = tokens, scores.masked_fill(~going, -math.inf)
        if beam > 1 or parents.size(0) < outputs.size(0):
            state = select(state, parents)
    if not trace:
        return found.trimmed()
    all_parents, all_tokens = (torch.stack(each) for each in zip(*traced, strict=True))
    return dataclasses.replace(found.trimmed(), parents=all_parents, chosen=all_tokens)


@torch.no_grad()
def forecast(
    model: Decoder,
    source: Tensor,
    target: Tensor,
    lengths: Tensor | None = None,
    *,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Values of a model that is fed with its own: the first `output_size` features of each step but the first.

    Args:
        model: in evaluation mode, for real-valued targets.
        source: as for `Model.encode`.
        target: (batch, steps, target_size), what the decoder reads with teacher forcing. Of the first `output_size`
            features only the first step is read; the others are covariates, known in advance.
        lengths: valid steps of each source, (batch,) int64 on the CPU; all when absent.
        samples: paths drawn from the likelihood head, each going on from its own (ancestral sampling, Salinas et al.
            2020); None for one path of means.
        generator: of the samples, on the target's device; torch's own when None.

    Returns:
        (batch, steps, output_size), or (samples, batch, steps, output_size); float32 or wider.

    Raises:
        ValueError: for a target that does not fit, or samples of a model without a likelihood.
    """
    config = model.config
    size, likelihood = config.output_size, config.likelihood
    if config.target_vocabulary or target.dim() != 3 or target.size(2) != config.target_size or target.size(2) < size:  # noqa: PLR2004
        msg = (
            f"target has shape {tuple(target.shape)}; expected (batch, steps, {config.target_size}) values, of which "
            f"the first {size} are the model's own"
        )
        raise ValueError(msg)
    if samples is not None and (not likelihood or samples < 1):
        msg = f"{samples} samples of a model with likelihood {likelihood!r}; expected at least 1, and a likelihood"
        raise ValueError(msg)
    state = model.encode(source, lengths)
    batch, steps = target.size(0), target.size(1)
    if samples is not None:
        every = torch.arange(batch, device=target.device).repeat(samples)
        state, target = select(state, every), target[every]
    value, found = target[:, 0, :size], []
    for step in range(steps):
        outputs, state = model.step(torch.cat([value, target[:, step, size:]], -1), state)
        own = central(likelihood, outputs) if samples is None else draw(likelihood, outputs, generator)
        # A copy: a step that runs in a captured graph reuses its memory.
        found.append(own.clone())
        value = own.to(target.dtype)
    path = torch.stack(found, 1)
    return path if samples is None else path.view(samples, batch, steps, size)
