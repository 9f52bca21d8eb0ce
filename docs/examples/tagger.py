"""A part-of-speech tagger: bidirectional LSTM over packed sentences, scores of 45 tags a word, no CRF.

The sizes of the BI-LSTM of Huang, Xu and Yu 2015 (embedding 50, hidden 300). A server gets single short questions and
now and then a batch of documents; `served.jsonl` is a made-up log of such calls, one line a shape with its count.

    python -m bench run --model docs/examples/tagger.py:build --loss docs/examples/tagger.py:loss \
        --inputs docs/examples/tagger.py:example_inputs --inputs docs/examples/served.jsonl
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

WORDS, TAGS, IGNORED = 20_000, 45, -100


class Tagger(nn.Module):
    """Scores of tags, (batch, steps, tags), as a dict."""

    def __init__(self, words: int, embedding: int, hidden_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden_size, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden_size, TAGS)

    def forward(self, words, lengths):
        """Read padded sentences (batch, steps) of these lengths."""
        packed = pack_padded_sequence(self.embed(words), lengths, batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=words.size(1))
        return {"scores": self.head(outputs)}


def build(words: int = WORDS, embedding: int = 50, hidden_size: int = 300) -> Tagger:
    """The model."""
    return Tagger(words, embedding, hidden_size)


def example_inputs(batch: int = 16, steps: int = 30, seed: int = 0):
    """Sentences of different lengths, and their tags for the loss; another seed gives other sentences."""
    generator = torch.Generator().manual_seed(seed)
    # The shapes are the same for every seed: one sentence fills all steps.
    lengths = torch.randint(1, steps + 1, (batch,), generator=generator)
    lengths[0] = steps
    inside = torch.arange(steps) < lengths[:, None]
    words = torch.randint(1, WORDS, (batch, steps), generator=generator)
    tags = torch.randint(TAGS, (batch, steps), generator=generator)
    call = {"words": torch.where(inside, words, 0), "lengths": lengths}
    return SimpleNamespace(kwargs=call, tags=torch.where(inside, tags, IGNORED))


def loss(output, inputs):
    """Cross entropy of the tags, padding left out."""
    return functional.cross_entropy(output["scores"].flatten(0, 1), inputs.tags.flatten(), ignore_index=IGNORED)


def accuracy(output, inputs) -> float:
    """Share of words with the right tag."""
    inside = inputs.tags != IGNORED
    return float((output["scores"].argmax(-1) == inputs.tags)[inside].float().mean())
