"""Encoder and prenet of Tacotron 2, written anew and small (Shen et al. 2018; NVIDIA/tacotron2 model.py).

What is awkward about it: the prenet drops in inference too, by design, and the decoder's LSTM is an nn.LSTMCell.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Tacotron(nn.Module):
    """Characters and the frames so far to the next frames."""

    def __init__(self, *, always_drops):
        super().__init__()
        self.always_drops = always_drops
        self.embedding = nn.Embedding(30, 8)
        self.conv = nn.Sequential(nn.Conv1d(8, 8, 5, padding=2), nn.BatchNorm1d(8), nn.ReLU())
        self.lstm = nn.LSTM(8, 6, 1, batch_first=True, bidirectional=True)
        self.prenet = nn.Linear(4, 12)
        self.attention_rnn = nn.LSTMCell(24, 10)
        self.projection = nn.Linear(10, 4)

    def forward(self, text, lengths, frames):
        """Text (batch, characters), frames (steps, batch, 4) to frames of the same shape."""
        features = self.conv(self.embedding(text).transpose(1, 2)).transpose(1, 2)
        packed = pack_padded_sequence(features, lengths, batch_first=True)
        memory = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0].mean(1)
        # "The dropout in the prenet is on in inference too", as the paper has it.
        entered = functional.dropout(self.prenet(frames), 0.5, training=self.always_drops or self.training)
        state, found = None, []
        for frame in entered:
            state = self.attention_rnn(torch.cat([frame, memory], 1), state)
            found.append(self.projection(state[0]))
        return torch.stack(found)


def build():
    """As published."""
    return Tacotron(always_drops=True)


def build_quiet():
    """With a prenet that can be measured."""
    return Tacotron(always_drops=False)


def example_inputs():
    """Three texts, longest first."""
    return torch.randint(30, (3, 7)), torch.tensor([7, 5, 2]), torch.randn(4, 3, 4)
