"""The CRNN for reading text in images, written anew (Shi, Bai and Yao 2015; meijieru/crnn.pytorch models/crnn.py).

What is awkward about it: two LSTMs inside nested modules, batch norm whose buffers change in training, ReLUs, and CTC.
"""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional


class BidirectionalLSTM(nn.Module):
    """An LSTM and a linear layer."""

    def __init__(self, features, hidden_size, outputs):
        super().__init__()
        self.rnn = nn.LSTM(features, hidden_size, bidirectional=True)
        self.embedding = nn.Linear(hidden_size * 2, outputs)

    def forward(self, x):
        """(steps, batch, features) to (steps, batch, outputs)."""
        recurrent, _ = self.rnn(x)
        steps, batch, features = recurrent.size()
        return self.embedding(recurrent.view(steps * batch, features)).view(steps, batch, -1)


class CRNN(nn.Module):
    """Images of lines to logarithms of probabilities of characters, (steps, batch, classes)."""

    def __init__(self, classes, hidden_size):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.MaxPool2d((8, 2)),
        )
        self.rnn = nn.Sequential(
            BidirectionalLSTM(8, hidden_size, hidden_size), BidirectionalLSTM(hidden_size, hidden_size, classes)
        )

    def forward(self, images):
        """Images (batch, 1, 8, width)."""
        features = self.cnn(images).squeeze(2).permute(2, 0, 1)
        return functional.log_softmax(self.rnn(features), dim=2)


def build():
    """A small one."""
    return CRNN(11, 16)


def example_inputs():
    """Images of width 24 with three characters each."""
    return SimpleNamespace(args=(torch.randn(3, 1, 8, 24),), targets=torch.randint(1, 11, (3, 3)))


def loss(output, inputs):
    """CTC."""
    steps = torch.full((output.size(1),), output.size(0))
    return functional.ctc_loss(output, inputs.targets, steps, torch.full((len(inputs.targets),), 3))
