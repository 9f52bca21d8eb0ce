"""Forecasts that feed on themselves: paths of many steps out of a model that knows one step."""

from __future__ import annotations

import torch
from torch import Tensor

from seq2seq.contract import Model, select
from seq2seq.probabilistic import distribution
from seq2seq.tasks.batch import Batch


def sample_paths(model: Model, batch: Batch, samples: int, seed: int) -> Tensor:
    """Ancestral sampling as in DeepAR (Salinas et al. 2020, section 3.2), all paths of all windows at once.

    The first feature of a decoder step is the value before it: the first step's is taken from the batch, every later
    one is the sample just drawn. The other features are known in advance and taken from the batch.

    Args:
        model: in evaluation mode, on the batch's device. Without a likelihood its outputs are the one path.
        batch: windows; targets (batch, steps, 1 + known features).
        samples: paths for each window.
        seed: of the samples; the global random state is left as it was.

    Returns:
        (samples, batch, steps) float32 on the CPU, in the units of the batch; samples is 1 without a likelihood.

    Raises:
        ValueError: for a batch without a target.
    """
    if batch.target is None:
        msg = "the batch has no target to take the known features from; forecasting windows have one"
        raise ValueError(msg)
    # A family that knows no likelihood forecasts values.
    likelihood = getattr(model.config, "likelihood", "")
    samples = samples if likelihood else 1
    target = batch.target.repeat(samples, 1, 1)
    devices = [target.device] if target.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        everything = torch.arange(batch.size, device=target.device).repeat(samples)
        state = select(model.encode(batch.source, batch.source_lengths), everything)
        value, path = target[:, 0, :1], []
        for step in range(target.size(1)):
            outputs, state = model.step(torch.cat([value, target[:, step, 1:]], -1), state)
            drawn = distribution(likelihood, outputs).sample() if likelihood else outputs.float()
            value = drawn.to(target.dtype)
            path.append(drawn[:, 0])
    return torch.stack(path, 1).view(samples, batch.size, target.size(1)).float().cpu()
