"""Synthetic batches of cited sizes, for uses whose real corpus cannot be installed from a package index.

The values are random; the lengths follow the distribution of a real corpus, since it decides how much of a batch is
padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.data.lengths import Lengths
from seq2seq.layers.padding import valid_mask
from seq2seq.models.base import IGNORE_TOKEN, Config


def random_batch(
    config: Config,
    batch: int,
    source_steps: int,
    target_steps: int | None,
    seed: int,
    source_lengths: Lengths | None = None,
    target_lengths: Lengths | None = None,
) -> Batch:
    """Random floats (normal) or tokens (uniform), with lengths from the given distributions.

    Long sources go with long targets: both lengths of a pair are read off at the same probability.

    Args:
        config: sizes of the model, which decide what is drawn.
        batch: sequences.
        source_steps: longest source.
        target_steps: longest target; None when there is none, as in the seed, whose decoder reads the source.
        seed: of the generator; equal seeds give equal batches.
        source_lengths: distribution of the sources' lengths; all fill all steps when None.
        target_lengths: the same for the targets.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(batch, generator=generator)

    def steps(count: int, size: int, vocabulary: int) -> Tensor:
        if vocabulary:
            return torch.randint(vocabulary, (batch, count), generator=generator)
        return torch.randn((batch, count, size), generator=generator)

    source = steps(source_steps, config.input_size, config.source_vocabulary)
    source_valid = None if source_lengths is None else source_lengths.at(rank, source_steps)
    if target_steps is None:
        target, target_valid, decoded = None, source_valid, source_steps
    else:
        target = steps(target_steps, config.target_size, config.target_vocabulary)
        target_valid = None if target_lengths is None else target_lengths.at(rank, target_steps)
        decoded = target_steps
    if config.target_vocabulary:
        expected = torch.randint(config.output_size, (batch, decoded), generator=generator)
        if target_valid is not None:
            expected[~valid_mask(expected, target_valid)] = IGNORE_TOKEN
    else:
        expected = torch.randn((batch, decoded, config.output_size), generator=generator)
    return Batch(source, target, source_valid, target_valid if target is not None else None, expected)


def labelled_batch(
    config: Config,
    batch: int,
    source_steps: int,
    label_steps: int,
    seed: int,
    source_lengths: Lengths | None = None,
    label_lengths: Lengths | None = None,
) -> Batch:
    """Random floats (normal) and labels (uniform, no blanks) for a model that gets no places of them (CTC).

    As with `random_batch` long sources go with many labels. There are never more than fit into half of a source's
    steps, so that they fit whatever they are: two that are alike need a blank between them.

    Args:
        config: sizes of the model.
        batch: sequences.
        source_steps: longest source.
        label_steps: most labels of a sequence.
        seed: of the generator; equal seeds give equal batches.
        source_lengths: distribution of the sources' lengths; all fill all steps when None.
        label_lengths: distribution of the labels' number; as many as there may be when None.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = torch.rand(batch, generator=generator)
    source = torch.randn((batch, source_steps, config.input_size), generator=generator)
    valid = None if source_lengths is None else source_lengths.at(rank, source_steps)
    count = torch.full((batch,), label_steps) if label_lengths is None else label_lengths.at(rank, label_steps)
    count = count.minimum((torch.full((batch,), source_steps) if valid is None else valid).add(1) // 2)
    expected = torch.randint(config.output_size - 1, (batch, label_steps), generator=generator)
    # Labels from the blank on move up by one.
    expected += expected >= config.blank
    expected[~valid_mask(expected, count)] = IGNORE_TOKEN
    return Batch(source, None, valid, None, expected)
