"""Code shared by the tasks whose targets are tokens: padded batches, their order, and decoding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seq2seq.data.batch import Batch
from seq2seq.data.bucketing import bucketed
from seq2seq.data.tokens import BEGIN, END, PAD
from seq2seq.decoding.result import Decoded
from seq2seq.decoding.search import beam_search, greedy
from seq2seq.models.base import IGNORE_TOKEN, Model

#: What steers decoding when beams are asked for: Wu et al. 2016 found 0.6 to 0.7 best.
LENGTH_PENALTY = 0.6

_Example = TypeVar("_Example")


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def padded(sequences: Sequence[Tensor | Sequence[int]], padding: int = PAD) -> tuple[Tensor, Tensor]:
    """Sequences, of int64 tokens where they are no tensors, as (batch, longest, ...); their lengths (batch,) int64."""
    rows = [row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.int64) for row in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=padding), torch.tensor([len(row) for row in rows])


def collate(pairs: Sequence[tuple[Tensor | Sequence[int], Sequence[int]]]) -> Batch:
    """One batch of (source tokens or steps, target tokens), padded to its longest.

    The decoder reads BEGIN and the target; expected are the target and END, with `IGNORE_TOKEN` past them.
    """
    source, source_lengths = padded([source for source, _ in pairs])
    target, target_lengths = padded([[BEGIN, *target] for _, target in pairs])
    expected, _ = padded([[*target, END] for _, target in pairs], IGNORE_TOKEN)
    return Batch(source, target, source_lengths, target_lengths, expected)


def examples_of(split: str, examples: Mapping[str, list[_Example]], name: str) -> list[_Example]:
    """The examples of a split.

    Raises:
        ValueError: for an unknown split, or a task without data; `name` is the task's.
    """
    if split not in {"train", "validation"}:
        msg = f"split is {split!r}, expected 'train' or 'validation'"
        raise ValueError(msg)
    if split not in examples:
        msg = f"this {name} task was restored without data and can only predict; load it with data"
        raise ValueError(msg)
    return examples[split]


def batch_places(split: str, lengths: Sequence[tuple[int, int]], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Places of the examples of each batch: those of `train` of like length, shuffled; others in their order.

    Raises:
        ValueError: for a batch below 1.
    """
    check_batch(batch)
    if split == "train":
        return bucketed(lengths, batch, seed, epoch)
    return [list(range(len(lengths)))[start : start + batch] for start in range(0, len(lengths), batch)]


def check_batch(batch: int) -> None:
    """Raise ValueError for a batch below 1."""
    if batch < 1:
        msg = f"batch is {batch}, expected at least 1"
        raise ValueError(msg)


def search(model: Model, source: Tensor, lengths: Tensor, beam: int, **limit: Any) -> Decoded:
    """Decode greedily, or where `beam` is above 1 by beam search."""
    if beam == 1:
        return greedy(model, source, lengths, **limit)
    return beam_search(model, source, lengths, beam=beam, length_penalty=LENGTH_PENALTY, **limit)


def texts_of(
    model: Model,
    sources: Sequence[Tensor | Sequence[int]],
    batch: int,
    device: str,
    search: Callable[[Tensor, Tensor], Decoded],
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """The text that is decoded of each source, in their order; sources of like length are decoded together.

    Args:
        model: on the device.
        sources: tokens or steps.
        batch: sources in a batch.
        device: the model's.
        search: decodes padded sources, given with their lengths.
        decode: the text of tokens.
    """
    check_batch(batch)
    order = sorted(range(len(sources)), key=lambda place: len(sources[place]))
    texts = [""] * len(sources)
    with evaluating(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            source, lengths = padded([sources[place] for place in chosen])
            for place, tokens in zip(chosen, search(source.to(device), lengths).lists(), strict=True):
                texts[place] = decode(tokens)
    return texts
