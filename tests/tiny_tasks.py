"""Tasks so small that a test can train on them: reversed tokens, and the next values of sines."""

# ruff: noqa: ARG002 - the arguments are those of every task

from __future__ import annotations

import math

import torch

from seq2seq.data.batch import Batch
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.models.encoder_decoder import Seq2SeqConfig


class Reverse:
    """Sequences of 1 to 5 tokens out of 4, and the same backwards; as `seq2seq.tasks.task.Task`."""

    name = "reverse"
    quality = "accuracy"
    higher_is_better = True

    def __init__(self, train=22, validation=8, dropout=0.0):
        self.sizes = {"train": train, "validation": validation}
        self.dropout = dropout

    def model_config(self, model, size):
        """One size for all."""
        return Seq2SeqConfig(
            input_size=6,
            hidden_size=10,
            output_size=8,
            num_layers=2,
            dropout=self.dropout,
            source_vocabulary=8,
            target_vocabulary=8,
        )

    def batches(self, split, batch, seed, epoch):
        """Padded token batches with lengths."""
        generator = torch.Generator().manual_seed(7 if split == "train" else 8)
        lengths = torch.randint(1, 6, (self.sizes[split],), generator=generator)
        tokens = torch.randint(4, 8, (self.sizes[split], 5), generator=generator)
        order = torch.arange(self.sizes[split])
        if split == "train":
            order = torch.randperm(len(order), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for chosen in order.split(batch):
            yield self.batch(tokens[chosen], lengths[chosen])

    @staticmethod
    def batch(tokens, lengths):
        """Sources, and their reverse after a token that says begin."""
        inside = torch.arange(tokens.size(1)) < lengths[:, None]
        source = torch.where(inside, tokens, 0)
        backwards = torch.stack(
            [torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(source, lengths.tolist(), strict=True)]
        )
        target = torch.cat([torch.full((len(tokens), 1), 2), backwards[:, :-1]], 1)
        return Batch(source, target, lengths, lengths, torch.where(inside, backwards, IGNORE_TOKEN))

    def evaluate(self, model, batch, device):
        """Share of tokens that are right with teacher forcing."""
        right = total = 0
        for found in self.batches("validation", batch, 0, 0):
            with torch.inference_mode():
                chosen = model(found.source, found.target, found.source_lengths, found.target_lengths).argmax(-1)
            inside = found.expected != IGNORE_TOKEN
            right += int((chosen == found.expected)[inside].sum())
            total += int(inside.sum())
        return {"accuracy": right / total}

    def state(self):
        """Nothing is needed to use it again."""
        return {}


class Sines:
    """The next 4 values of a sine after 8, of random phase; as `seq2seq.tasks.task.Task`."""

    name = "sines"
    quality = "error"
    higher_is_better = False

    def __init__(self, train=24, scale=1.0, likelihood=""):
        self.train, self.scale, self.likelihood = train, scale, likelihood

    def model_config(self, model, size):
        """One size for all."""
        return Seq2SeqConfig(input_size=1, hidden_size=12, output_size=1, likelihood=self.likelihood)

    def batches(self, split, batch, seed, epoch):
        """Windows of sines."""
        number = 1000 * seed + epoch if split == "train" else 77
        generator = torch.Generator().manual_seed(number)
        for chosen in torch.arange(self.train if split == "train" else 8).split(batch):
            if not len(chosen):
                return
            phase = 2 * math.pi * torch.rand(len(chosen), 1, generator=generator)
            values = self.scale * torch.sin(phase + 0.5 * torch.arange(13.0))[..., None]
            yield Batch(values[:, :8], values[:, 8:12], None, None, values[:, 9:])

    def evaluate(self, model, batch, device):
        """Mean absolute error with teacher forcing, and that of repeating the last value."""
        found = next(self.batches("validation", 8, 0, 0))
        with torch.inference_mode():
            outputs = model(found.source, found.target)[..., :1]
        return {
            "error": float((outputs - found.expected).abs().mean()),
            "naive": float((found.target - found.expected).abs().mean()),
        }

    def state(self):
        """Factor of its values."""
        return {"scale": self.scale}
