"""A forecaster of the suite's own as a model of your own: a week of hourly temperatures in, the next day out.

The workload `forecast-deepar` (3 layers of 40, Gaussian likelihood), here with random weights. A model that was trained
by `python -m seq2seq train forecasting` is measured in the same way: return what `trained` returns.

    python -m bench run --model docs/examples/forecaster.py:build --loss docs/examples/forecaster.py:loss
"""

from types import SimpleNamespace

from torch import nn

from seq2seq.layers.likelihoods import head_loss
from seq2seq.models.checkpoint import from_pretrained
from seq2seq.workloads.registry import WORKLOADS

WORKLOAD = WORKLOADS["forecast-deepar"]


def build() -> nn.Module:
    """The model, its weights drawn anew."""
    return WORKLOAD.config.build(nn.LSTM)


def trained(folder: str = "results/training/temperatures/model") -> nn.Module:
    """The model of a training run; its sizes are those of that training."""
    return from_pretrained(folder).model


def example_inputs(seed: int = 0):
    """Windows of the temperatures of Seattle: history and, for teacher forcing, the day after."""
    batch = WORKLOAD.make_batch(seed)
    return SimpleNamespace(args=(batch.source, batch.target), expected=batch.expected)


def loss(output, inputs):
    """Negative log-likelihood of the day after."""
    return head_loss(WORKLOAD.config.likelihood, output, inputs.expected)
