"""A classifier that speaks as the models of the transformers library do, written anew (ModelOutput, signatures).

What is awkward about it: keyword arguments, an output object that is dict and dataclass at once, None in it, a loss
that the model computes itself, masked scores of minus infinity, and one LSTM used by two names.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional


class ModelOutput(OrderedDict):
    """A dict of the fields that are not None, which are attributes as well."""

    def __post_init__(self):
        """Fill the dict."""
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclass
class TokenOutput(ModelOutput):
    """Scores of tokens."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class Classifier(nn.Module):
    """Scores of labels for each token."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(50, 16)
        self.encoder = nn.LSTM(16, 16, batch_first=True)
        self.shared = self.encoder
        self.classifier = nn.Linear(16, 5)

    def forward(self, input_ids=None, attention_mask=None, labels=None, output_hidden_states=False):
        """As `BertForTokenClassification.forward`, with what it needs of that."""
        hidden, _ = self.encoder(self.embeddings(input_ids))
        again, _ = self.shared(hidden)
        logits = self.classifier(again)
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[..., None] == 0, float("-inf")).index_fill(
                2, torch.tensor([0]), 0.0
            )
        loss = None if labels is None else functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenOutput(loss=loss, logits=logits, hidden_states=(hidden, again) if output_hidden_states else None)


def build():
    """A small one."""
    return Classifier()


def example_inputs():
    """Two sentences, the second one padded; padding is labelled 0, the only label that it may have."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    return {
        "input_ids": torch.randint(50, (2, 6)),
        "attention_mask": mask,
        "labels": torch.randint(5, (2, 6)) * mask,
        "output_hidden_states": True,
    }
