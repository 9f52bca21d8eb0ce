"""Decoding of a CTC model's outputs: the likeliest alignment, or the likeliest labels by prefix beam search.

An alignment has a label or the blank at each step; removing repeats and then blanks gives
the labels. Sequences are decoded together without influencing each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seq2seq.data.tokens import PAD
from seq2seq.decoding.result import Decoded
from seq2seq.layers.padding import valid_mask


@torch.no_grad()
def best_path(outputs: Tensor, lengths: Tensor | None = None, *, blank: int = 0) -> Decoded:
    """The labels of the likeliest alignment; other labels may be likelier, by more alignments (Graves et al. 2006).

    Args:
        outputs: (batch, steps, labels) scores of a `CTCModel`.
        lengths: (batch,) int64 valid steps; all when absent.
        blank: which label is the blank.

    Returns:
        The labels; `scores` are log-probabilities of the alignment alone.
    """
    logarithms = _logarithms(outputs, lengths, blank)
    scores, path = logarithms.max(-1)
    before = torch.cat([path.new_full((path.size(0), 1), blank), path[:, :-1]], 1)
    # Stable: what is kept stays in its order, before what is not.
    kept = (path != blank) & (path != before)
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
    counts = kept.sum(1)
    return _cut(path.gather(1, order), counts, scores.sum(1))


@torch.no_grad()
def prefix_beam_search(outputs: Tensor, lengths: Tensor | None = None, *, beam: int, blank: int = 0) -> Decoded:
    """The likeliest labels found by going on from the likeliest prefixes (Graves 2012; Hannun et al. 2014).

    A prefix has the probability of all its alignments so far that went through kept prefixes, so that the result's is
    never above the true one, and with a beam wider than there are prefixes it is that. No language model takes part.

    Args:
        outputs: (batch, steps, labels) scores of a `CTCModel`.
        lengths: (batch,) int64 valid steps; all when absent.
        beam: most prefixes of a sequence that are kept.
        blank: which label is the blank.

    Returns:
        The labels; `scores` are their log-probabilities by the alignments that were found.

    Raises:
        ValueError: for a beam below 1.
    """
    if beam < 1:
        msg = f"beam is {beam}, expected at least 1 prefix"
        raise ValueError(msg)
    logarithms = _logarithms(outputs, lengths, blank)
    prefixes = _Prefixes.empty(logarithms, beam)
    for step in range(logarithms.size(1)):
        prefixes = prefixes.advance(logarithms[:, step], blank)
    total, best = prefixes.total.max(1)
    rows = torch.arange(best.size(0), device=best.device)
    return _cut(prefixes.labels[rows, best], prefixes.counts[rows, best], total)


@dataclass(frozen=True)
class _Prefixes:
    """The prefixes that are kept of each sequence; those of no probability are room that is not used yet.

    Attributes:
        blanked: (batch, beam) log-probability of the alignments that end in a blank.
        spoken: the same of those that end in the last label.
        labels: (batch, beam, steps) int64; those of the prefix come first.
        counts: (batch, beam) how many those are.
        begins: (batch, beam, beam) whether the one prefix, by row, is the beginning of the other or the other itself.
    """

    blanked: Tensor
    spoken: Tensor
    labels: Tensor
    counts: Tensor
    begins: Tensor

    @classmethod
    def empty(cls, logarithms: Tensor, beam: int) -> _Prefixes:
        """Before the first step: the empty prefix, which is certain."""
        batch, steps, _ = logarithms.shape
        nothing = logarithms.new_full((batch, beam), -math.inf)
        blanked = nothing.clone()
        blanked[:, 0] = 0.0
        counts = torch.zeros((batch, beam), dtype=torch.int64, device=logarithms.device)
        labels = counts.new_full((batch, beam, steps), PAD)
        same = torch.eye(beam, dtype=torch.bool, device=logarithms.device)
        return cls(blanked, nothing, labels, counts, same.expand(batch, beam, beam))

    @property
    def total(self) -> Tensor:
        """Log-probability of each: (batch, beam)."""
        return torch.logaddexp(self.blanked, self.spoken)

    def advance(self, logarithms: Tensor, blank: int) -> _Prefixes:
        """The likeliest prefixes after one more step, whose log-probabilities are (batch, labels)."""
        total, last = self.total, self._at(self.counts - 1)
        # One label longer; the label said last needs a blank between.
        longer = total[..., None] + logarithms[:, None]
        again = (self.blanked + logarithms.gather(1, last))[..., None]
        place = last[..., None]
        # The empty prefix has no last label.
        said = (self.counts > 0)[..., None]
        longer = longer.scatter(2, place, torch.where(said, again, longer.gather(2, place)))
        longer[..., blank] = -math.inf
        blanked = total + logarithms[:, blank, None]
        spoken = torch.where(self.counts > 0, self.spoken + logarithms.gather(1, last), -math.inf)
        spoken, longer = self._merge(spoken, longer, last)
        beam, choices = longer.size(1), longer.size(2)
        every = torch.cat([torch.logaddexp(blanked, spoken), longer.flatten(1)], 1)
        best, index = every.topk(beam, 1)
        grown = index >= beam
        parent = torch.where(grown, (index - beam) // choices, index)
        label = (index - beam) % choices
        return self._chosen(
            parent,
            grown,
            label,
            blanked.gather(1, parent).masked_fill(grown, -math.inf),
            torch.where(grown, best, spoken.gather(1, parent)),
        )

    def _merge(self, spoken: Tensor, longer: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Give what becomes a prefix that is kept already to that one, and take it from the longer ones.

        Args:
            spoken: (batch, beam) of the prefixes that stay.
            longer: (batch, beam, labels) of those that grow.
            last: (batch, beam) last label of each.
        """
        # By row the parent, by column the child; what has no probability may be twice, and takes none.
        child = self.begins & (self.counts[:, :, None] + 1 == self.counts[:, None]) & (self.total > -math.inf)[:, None]
        given = longer.gather(2, last[:, None].expand_as(child)).masked_fill(~child, -math.inf)
        spoken = torch.logaddexp(spoken, given.logsumexp(1))
        taken = torch.zeros_like(longer, dtype=torch.int64).scatter_add(2, last[:, None].expand_as(child), child.long())
        return spoken, longer.masked_fill(taken > 0, -math.inf)

    def _chosen(self, parent: Tensor, grown: Tensor, label: Tensor, blanked: Tensor, spoken: Tensor) -> _Prefixes:
        """Continuations: their parents, whether each is one label longer, and by which label."""
        counts = self.counts.gather(1, parent)
        labels = self.labels.gather(1, parent[..., None].expand_as(self.labels))
        beam = parent.size(1)
        rows = parent[:, :, None].expand(-1, beam, beam)
        columns = parent[:, None].expand(-1, beam, beam)
        begins = self.begins.gather(1, rows).gather(2, columns)
        # One that grew begins another if its parent does, and the other continues with the same label.
        following = labels.gather(2, counts[:, None].expand(-1, beam, beam).clamp(max=labels.size(2) - 1))
        goes_on = (following.transpose(1, 2) == label[..., None]) & (counts[:, :, None] < counts[:, None])
        same = torch.eye(beam, dtype=torch.bool, device=parent.device)
        begins = torch.where(grown[..., None], begins & goes_on, begins) | same
        place = counts[..., None].clamp(max=labels.size(2) - 1)
        labels = labels.scatter(2, place, torch.where(grown[..., None], label[..., None], labels.gather(2, place)))
        return _Prefixes(blanked, spoken, labels, counts + grown, begins)

    def _at(self, place: Tensor) -> Tensor:
        """The label of each prefix at a place, (batch, beam)."""
        return self.labels.gather(2, place.clamp(min=0)[..., None]).squeeze(2)


def _logarithms(outputs: Tensor, lengths: Tensor | None, blank: int) -> Tensor:
    """Log-probabilities (batch, steps, labels) in float64; past the lengths the blank is certain, which adds nothing.

    Raises:
        ValueError: for outputs that are not scores of that many labels.
    """
    if outputs.dim() != 3 or not 0 <= blank < outputs.size(2):  # noqa: PLR2004
        msg = f"outputs have shape {tuple(outputs.shape)}, blank is {blank}; expected (batch, steps, labels) with it"
        raise ValueError(msg)
    logarithms = outputs.double().log_softmax(-1)
    if lengths is None:
        return logarithms
    certain = torch.full_like(logarithms[:1, :1], -math.inf)
    certain[..., blank] = 0.0
    return torch.where(valid_mask(outputs, lengths)[..., None], logarithms, certain)


def _cut(labels: Tensor, counts: Tensor, scores: Tensor) -> Decoded:
    """The first labels of each sequence, padded to the longest of all."""
    longest = int(counts.max())
    found = labels[:, :longest]
    return Decoded(found.masked_fill(~valid_mask(found, counts), PAD), counts, scores)
