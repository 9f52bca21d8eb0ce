"""A word-level language model: two LSTM layers of 650, one matrix for embedding and softmax, state carried on.

Sizes of the medium model of Zaremba et al. 2014 (batch 20, 35 steps, vocabulary of the Penn Treebank), with the tied
weights of Press and Wolf 2017. In truncated backpropagation each chunk of text starts from the state in which the one
before ended, so the state goes in and comes out.

    python -m bench run --model docs/examples/word_language_model.py:build \
        --loss docs/examples/word_language_model.py:loss --metric docs/examples/word_language_model.py:perplexity
"""

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional


class LanguageModel(nn.Module):
    """Next-word scores (steps, batch, vocabulary), and the state after the last step."""

    def __init__(self, vocabulary: int, hidden_size: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden_size)
        self.dropout = nn.Dropout(0.5)
        self.lstm = nn.LSTM(hidden_size, hidden_size, num_layers=2, dropout=0.5)
        self.head = nn.Linear(hidden_size, vocabulary)
        self.head.weight = self.embed.weight

    def forward(self, tokens, state):
        """Read a chunk (steps, batch) from the state in which the one before ended."""
        outputs, state = self.lstm(self.dropout(self.embed(tokens)), state)
        return self.head(self.dropout(outputs)), state


def build(vocabulary: int = 10_000, hidden_size: int = 650) -> LanguageModel:
    """The model; a trained one would load its weights here."""
    model = LanguageModel(vocabulary, hidden_size)
    nn.init.uniform_(model.embed.weight, -0.1, 0.1)
    return model


def example_inputs(vocabulary: int = 10_000, hidden_size: int = 650, steps: int = 35, batch: int = 20):
    """One chunk: `args` and `kwargs` are the call, and what else the object holds is for the loss."""
    text = torch.randint(vocabulary, (steps + 1, batch))
    # `detach`: backpropagation is cut at the chunk's beginning.
    state = tuple(torch.randn(2, batch, hidden_size).tanh().detach() for _ in "hc")
    return SimpleNamespace(args=(text[:-1], state), targets=text[1:])


def loss(output, inputs):
    """Cross entropy of the next word."""
    scores, _ = output
    return functional.cross_entropy(scores.flatten(0, 1), inputs.targets.flatten())


def perplexity(output, inputs) -> float:
    """Exponential of the loss; lower is better."""
    return math.exp(loss(output, inputs))
