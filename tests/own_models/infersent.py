"""The BiLSTM-max sentence encoder of InferSent, written anew (Conneau et al. 2017; facebookresearch/InferSent).

What is awkward about it: one argument that is a tuple, lengths in a NumPy array, and sorting in the model itself.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Encoder(nn.Module):
    """Sentences as embedded words to one vector each."""

    def __init__(self, features, hidden_size):
        super().__init__()
        self.enc_lstm = nn.LSTM(features, hidden_size, 1, bidirectional=True, dropout=0)

    def forward(self, sentences):
        """Sentences: embedded words (steps, batch, features) and their lengths, a NumPy array."""
        words, lengths = sentences
        order = np.argsort(-lengths, kind="stable")
        back = np.argsort(order)
        packed = pack_padded_sequence(words[:, order], torch.from_numpy(lengths[order].copy()))
        outputs = pad_packed_sequence(self.enc_lstm(packed)[0])[0][:, back]
        # Padding must not win the maximum.
        outputs = torch.where(outputs == 0, torch.full_like(outputs, -1e9), outputs)
        return outputs.max(0)[0]


def build():
    """A small one."""
    return Encoder(12, 16)


def example_inputs():
    """Five sentences of 2 to 7 words."""
    lengths = np.array([3, 7, 2, 5, 7])
    words = torch.randn(7, 5, 12)
    for place, length in enumerate(lengths):
        words[length:, place] = 0
    # A tuple holds the arguments, so the one that is a tuple itself is in another.
    return ((words, lengths),)
