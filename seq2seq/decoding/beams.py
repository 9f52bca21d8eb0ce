"""The book-keeping of a beam search: which hypotheses continue, which have ended, and when nothing better can come."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seq2seq.decoding.result import Decoded, is_end


def length_penalty(length: int, alpha: float) -> float:
    """Divisor of a log-probability, so that long hypotheses can win: ((5 + length) / 6) ** alpha.

    Source: Wu et al. 2016 (GNMT), equation 14.
    """
    return float(((5 + length) / 6) ** alpha)


class Beams:
    """State of all sequences' beams: how many hypotheses each still looks for, and its best that ended.

    Hypotheses have places here, sequence * beam + rank, best first.
    """

    def __init__(self, bounds: Tensor, beam: int, alpha: float, end: int | None) -> None:
        self.sequences, self.bounds, self.beam, self.alpha, self.end_token = bounds.size(0), bounds, beam, alpha, end
        self.width = torch.full_like(bounds, beam)
        self.best = torch.full(bounds.shape, -math.inf, dtype=torch.float64, device=bounds.device)
        #: Divisor of a hypothesis as long as its sequence may become: none can rank better than with it.
        self.largest = ((5 + bounds.double()) / 6) ** alpha
        self.ranks = torch.arange(beam, device=bounds.device)

    def candidates(self, outputs: Tensor, scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations of each sequence: their scores, the rows that they continue, and their tokens.

        All are (sequences * beam,); where there are fewer, scores are minus infinity.

        Args:
            outputs: (rows, vocabulary) of the model.
            scores: (rows,) of the hypotheses so far.
            places: (rows,) of the same.
        """
        # The best of a sequence are among the best of its rows.
        best, tokens = outputs.topk(min(self.beam, outputs.size(-1)), -1)
        best = scores[:, None] + (best - outputs.logsumexp(-1, keepdim=True))
        kept = best.size(1)
        grid = best.new_full((self.sequences * self.beam, kept), -math.inf).index_copy_(0, places, best)
        row_of = places.new_zeros(self.sequences * self.beam)
        row_of[places] = torch.arange(places.size(0), device=places.device)
        found, index = grid.view(self.sequences, -1).topk(self.beam, -1)
        first = self.beam * torch.arange(self.sequences, device=places.device)
        parents = row_of[(first[:, None] + index // kept).flatten()]
        return found.flatten(), parents, tokens[parents, (index % kept).flatten()]

    def end(self, found: Decoded, length: int, scores: Tensor, tokens: Tensor, history: Tensor) -> Tensor:
        """Take out hypotheses that ended and keep the best; return which places continue, (sequences * beam,) bool.

        Args:
            found: where the best are written.
            length: tokens of every hypothesis now.
            scores: (sequences * beam,) of the candidates.
            tokens: (sequences * beam,) their last ones.
            history: (sequences * beam, longest) all of them.
        """
        grid = scores.view(self.sequences, self.beam)
        inside = (grid > -math.inf) & (self.ranks < self.width[:, None])
        said = inside & is_end(tokens.view_as(grid), self.end_token)
        at_limit = self.bounds <= length
        self._keep(found, length, grid.masked_fill(~said, -math.inf), scores, history)
        nothing_ended = self.best == -math.inf
        cut = inside & ~said & (at_limit & nothing_ended)[:, None]
        self._keep(found, length, grid.masked_fill(~cut, -math.inf), scores, history)
        self.width -= said.sum(1)
        hope = grid.masked_fill(~inside | said, -math.inf).amax(1) / self.largest
        done = at_limit | (self.best >= hope)
        return (inside & ~said & ~done[:, None]).flatten()

    def _keep(self, found: Decoded, length: int, ended: Tensor, scores: Tensor, history: Tensor) -> None:
        """Write the best of what ended, (sequences, beam), where it is better than what ended before."""
        best, rank = ended.max(1)
        best = best / length_penalty(length, self.alpha)
        better = (best > self.best).nonzero().squeeze(1)
        places = better * self.beam + rank[better]
        self.best[better] = best[better]
        found.write(better, history[places], length, scores[places])
