"""A model that knows the answer to some sources by heart, for tests of what is made of its answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seq2seq.data.tokens import BEGIN, END
from seq2seq.models.base import Model
from seq2seq.models.encoder_decoder import Seq2SeqConfig

#: Logit of the token that it is sure of; all others have 0.
SURE = 50.0


class MemoryModel(Model):
    """Answers a known source with its target and an unknown one with nothing; it never errs on what it knows.

    Args:
        pairs: source tokens and target tokens.
        vocabulary: tokens.
    """

    def __init__(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.config = Seq2SeqConfig(1, 1, vocabulary, target_vocabulary=vocabulary)
        self.answers = {tuple(source): [*target, END] for source, target in pairs}
        self.longest = max((len(answer) for answer in self.answers.values()), default=1)

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """State: the answer (1, batch, longest), and the place in it (1, batch)."""
        valid = [source.size(1)] * source.size(0) if lengths is None else lengths.tolist()
        rows = [self.answers.get(tuple(row[:steps]), [END]) for row, steps in zip(source.tolist(), valid, strict=True)]
        answer = torch.tensor([row + [END] * (self.longest - len(row)) for row in rows])
        return {"answer": answer[None], "place": torch.zeros(1, len(rows), dtype=torch.int64)}

    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The next token of the answer, whatever was read; what it reads first must be BEGIN."""
        place, answer = state["place"][0], state["answer"][0]
        assert bool((value[place == 0] == BEGIN).all())
        token = answer.gather(1, place.clamp(max=self.longest - 1)[:, None])
        outputs = torch.zeros(len(place), self.vocabulary).scatter(1, token, SURE)
        return outputs, {"answer": state["answer"], "place": state["place"] + 1}

    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,  # noqa: ARG002 - the contract's
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Its answer, as long as the target is."""
        assert target is not None
        answer = self.encode(source, source_lengths)["answer"][0]
        short = target.size(1) - self.longest
        answer = torch.cat([answer, torch.full((len(answer), max(0, short)), END)], 1)[:, : target.size(1)]
        outputs = torch.zeros(*answer.shape, self.vocabulary).scatter(2, answer[..., None], SURE)
        return outputs, answer, answer
