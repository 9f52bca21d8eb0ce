"""Problems of the gate for losses with a kink.

The gradient of a pinball loss jumps where an error is zero: rounding decides on which side an output falls, and one
such output moves a gradient by far more than rounding does. Both gradients are right there. So the gate asks elsewhere:
what is expected is moved away from truth's outputs, for the variant, the reference and truth alike.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from seq2seq.data.batch import Batch
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.layers.likelihoods import QUANTILES
from seq2seq.models.base import Config
from seq2seq.models.weights import Weights

#: Least distance of what is expected from an output, in root mean squares of the outputs: ten times the error of right
#: variants in bf16, which is less than 1e-2.
MARGIN = 0.1


def moved_away(batch: Batch, config: Config, weights: Weights, device: str) -> Batch:
    """The batch, what is expected moved where the model's loss has kinks; as it is for any other loss.

    Args:
        batch: on the CPU; it is left as it is.
        config: sizes of the model.
        weights: fp32.
        device: where truth is computed.
    """
    if config.likelihood != "quantile":
        return batch
    executable = Executable(VARIANTS["loop"], config, "inference", device, weights)
    executable.model.double()
    with executable.context():
        outputs = executable.forward(batch.to(device, torch.float64)).outputs.cpu()
    return dataclasses.replace(batch, expected=apart(batch.expected, outputs))


def apart(expected: Tensor, outputs: Tensor) -> Tensor:
    """Expected values, at least `MARGIN` from all quantiles: nearer ones go to the nearer side of all of them.

    Args:
        expected: (batch, steps, values).
        outputs: (batch, steps, quantiles * values).
    """
    values = torch.stack(outputs.chunk(len(QUANTILES), -1))
    margin = MARGIN * outputs.square().mean().sqrt()
    lowest, highest = values.amin(0) - 2 * margin, values.amax(0) + 2 * margin
    beyond = torch.where(expected - lowest < highest - expected, lowest, highest)
    near = ((values - expected).abs() < margin).any(0)
    return torch.where(near, beyond.to(expected.dtype), expected)
