"""The weight-dropped LSTM of AWD-LSTM, written anew (Merity et al. 2018; salesforce/awd-lstm-lm weight_drop.py).

What is awkward about it: the recurrent weights are computed from others at each call, so the LSTM holds weights that
are no parameters, and no kernel may take its place.
"""

import torch
from torch import nn
from torch.nn import functional


class WeightDrop(nn.Module):
    """An LSTM whose recurrent weights are dropped in training."""

    def __init__(self, module, dropout):
        super().__init__()
        self.module, self.dropout = module, dropout
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        self.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
        self._set()

    def _set(self):
        mask = functional.dropout(torch.ones_like(self.weight_hh_l0_raw), p=self.dropout, training=self.training)
        # A tensor: as a parameter it would be one twice.
        self.module.weight_hh_l0 = self.weight_hh_l0_raw * mask

    def forward(self, *arguments):
        """As the LSTM."""
        self._set()
        return self.module(*arguments)


class Model(nn.Module):
    """Embedding, weight-dropped LSTM, head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(40, 12)
        self.rnn = WeightDrop(nn.LSTM(12, 12), 0.5)
        self.decoder = nn.Linear(12, 40)

    def forward(self, tokens, hidden):
        """Scores and the state."""
        output, hidden = self.rnn(self.encoder(tokens), hidden)
        return self.decoder(output), hidden


def build():
    """A small one."""
    return Model()


def example_inputs():
    """Seven steps of three texts, from a state."""
    return torch.randint(40, (7, 3)), (torch.zeros(1, 3, 12), torch.zeros(1, 3, 12))
