"""Heads that forecast more than a value: a distribution (Salinas et al. 2020), or quantiles (Lim et al. 2021).

The last dimension of the outputs is the distribution's parameters, or the quantiles, each for all values in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT
from torch.nn import functional

from seq2seq.layers.padding import valid_mask

#: Added to every scale, in units of the normalised series, because a likelihood is unbounded as its scale goes to zero.
LEAST_SCALE = 1e-3
#: Least degrees of freedom: above 2, so that the variance is finite.
LEAST_FREEDOM = 2.01

#: Quantiles of the head `quantile`: those of NVIDIA DeepLearningExamples TFT.
QUANTILES = (0.1, 0.5, 0.9)

#: What a head may give, and how many outputs a value takes: parameters of a distribution, quantiles, or, for "", the
#: value itself.
LIKELIHOODS = {"": 1, "gaussian": 2, "student": 3, "quantile": len(QUANTILES)}
#: What is learnt with each, in words.
LOSSES = {
    "": "squared error (normalised values)",
    "gaussian": "negative log likelihood (nats per value)",
    "student": "negative log likelihood (nats per value)",
    "quantile": "pinball loss (normalised values)",
}


def distribution(likelihood: str, outputs: Tensor) -> Distribution:
    """Distribution that the outputs are the parameters of.

    Args:
        likelihood: `gaussian` or `student`.
        outputs: (..., parameters * values) floats; computed in float32 or wider.

    Returns:
        A distribution of batch shape (..., values).

    Raises:
        ValueError: for an unknown likelihood.
    """
    parameters = widened(outputs).chunk(LIKELIHOODS.get(likelihood, 1), -1)
    if likelihood == "gaussian":
        location, scale = parameters
        return Normal(location, functional.softplus(scale) + LEAST_SCALE, validate_args=False)
    if likelihood == "student":
        freedom, location, scale = parameters
        return StudentT(
            functional.softplus(freedom) + LEAST_FREEDOM,
            location,
            functional.softplus(scale) + LEAST_SCALE,
            validate_args=False,
        )
    msg = f"likelihood is {likelihood!r}, expected gaussian or student"
    raise ValueError(msg)


def head_loss(likelihood: str, outputs: Tensor, expected: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean over valid steps and values: the negative log likelihood in nats, or the pinball loss.

    The pinball loss of a quantile q is q times what the value lies above it, or 1 - q times what it lies below (Koenker
    and Bassett 1978), summed over `QUANTILES`.

    Args:
        likelihood: key of `LIKELIHOODS` other than "".
        outputs: (batch, steps, parameters * values).
        expected: (batch, steps, values).
        lengths: (batch,) valid steps; all when absent.
    """
    if lengths is None:
        return _losses(likelihood, outputs, expected).mean()
    valid = valid_mask(outputs, lengths)[..., None]
    # Selected, not multiplied: values in the padding need not be finite.
    losses = torch.where(valid, _losses(likelihood, outputs, torch.where(valid, expected, 0.0)), 0.0)
    return losses.sum() / (valid.sum() * expected.size(2))


def _losses(likelihood: str, outputs: Tensor, expected: Tensor) -> Tensor:
    """Of each value: (batch, steps, values)."""
    if likelihood != "quantile":
        return -distribution(likelihood, outputs).log_prob(expected)
    losses = torch.zeros_like(expected, dtype=widened(outputs).dtype)
    for level, value in zip(QUANTILES, widened(outputs).chunk(len(QUANTILES), -1), strict=True):
        above = expected - value
        losses = losses + level * functional.relu(above) + (1 - level) * functional.relu(-above)
    return losses


def quantiles(outputs: Tensor) -> Tensor:
    """The quantiles `QUANTILES` that the head `quantile` gives, rising: (quantiles, ..., values).

    The outputs can cross, so they are sorted, which never increases the pinball loss (Chernozhukov et al. 2010).

    Args:
        outputs: (..., quantiles * values).
    """
    return torch.stack(widened(outputs).chunk(len(QUANTILES), -1)).sort(0).values


def central(likelihood: str, outputs: Tensor) -> Tensor:
    """The central value of the outputs, (..., values): the mean of a distribution, the median of quantiles."""
    if not likelihood:
        return widened(outputs)
    if likelihood == "quantile":
        return quantiles(outputs)[QUANTILES.index(0.5)]
    return distribution(likelihood, outputs).mean


def draw(likelihood: str, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of each distribution that the outputs are the parameters of: (..., values).

    Quantiles say nothing about the values between and beyond them. Samples are drawn as if the quantile function were
    linear between neighbours, and continued beyond the outer ones.

    Args:
        likelihood: key of `LIKELIHOODS` other than "".
        outputs: as for `head_loss`.
        generator: on the outputs' device; torch's own when None, which is what torch's distributions draw from.
    """
    if likelihood == "quantile":
        return _interpolated(quantiles(outputs), generator)
    # Any: torch's base class has neither location nor scale.
    found: Any = distribution(likelihood, outputs)
    location: Tensor = found.loc
    scale: Tensor = found.scale
    noise = torch.randn(location.shape, dtype=location.dtype, device=location.device, generator=generator)
    if isinstance(found, StudentT):
        # A normal over the root of an independent chi-squared that is divided by its degrees of freedom.
        squares = 2 * torch._standard_gamma(found.df / 2, generator=generator)  # noqa: SLF001 - the only one that takes a generator
        noise *= (found.df / squares).sqrt()
    return location + scale * noise


def _interpolated(known: Tensor, generator: torch.Generator | None) -> Tensor:
    """Samples by inversion: the quantile of a uniform number, on the lines through the known ones."""
    at = torch.rand(known.shape[1:], dtype=known.dtype, device=known.device, generator=generator)
    found = known[0]
    for left, right in zip(range(len(QUANTILES) - 1), range(1, len(QUANTILES)), strict=True):
        slope = (known[right] - known[left]) / (QUANTILES[right] - QUANTILES[left])
        line = known[left] + (at - QUANTILES[left]) * slope
        found = line if left == 0 else torch.where(at > QUANTILES[left], line, found)
    return found


def widened(outputs: Tensor) -> Tensor:
    """The outputs in float32 or wider."""
    return outputs.float() if outputs.dtype in {torch.float16, torch.bfloat16} else outputs
