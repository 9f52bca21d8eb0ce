"""Forecasts that feed on themselves: paths of many steps for windows of one value, the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.decoding.search import forecast
from seq2seq.models.base import Model

#: The samples of an evaluation are the same every time.
SAMPLING_SEED = 0


def sample_paths(model: Model, batch: Batch, samples: int, seed: int = SAMPLING_SEED) -> Tensor:
    """All paths of all windows at once.

    Args:
        model: in evaluation mode, on the batch's device. Without a likelihood its outputs are the one path.
        batch: windows.
        samples: paths for each window.
        seed: of the samples; the global random state has no part in them.

    Returns:
        (samples, batch, steps) float32 on the CPU, in the units of the batch; samples is 1 without a likelihood.
    """
    if batch.target is None:
        msg = "the batch has no target to take the known features from; forecasting windows have one"
        raise ValueError(msg)
    if not model.config.likelihood:
        return forecast(model, batch.source, batch.target)[None, ..., 0].float().cpu()
    generator = torch.Generator(batch.source.device).manual_seed(seed)
    paths = forecast(model, batch.source, batch.target, samples=samples, generator=generator)
    return paths[..., 0].float().cpu()
