"""Heads that forecast a distribution instead of a value, as DeepAR does (Salinas et al. 2020).

The last dimension of the outputs is the distribution's parameters, each for all values in turn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, StudentT
from torch.nn import functional

#: Added to every scale, in units of the normalised series: a likelihood has no bound where a scale goes to zero.
LEAST_SCALE = 1e-3
#: Least degrees of freedom: above 2, so that the variance is finite.
LEAST_FREEDOM = 2.01

#: Distributions that a head may give the parameters of, and how many those are; "" for the values themselves.
LIKELIHOODS = {"": 1, "gaussian": 2, "student": 3}
#: What is learnt with each, in words.
LOSSES = {
    "": "squared error (normalised values)",
    "gaussian": "negative log likelihood (nats a value)",
    "student": "negative log likelihood (nats a value)",
}


def distribution(likelihood: str, outputs: Tensor) -> Distribution:
    """What the outputs are the parameters of.

    Args:
        likelihood: `gaussian` or `student`.
        outputs: (..., parameters * values) floats; computed in float32 or wider.

    Returns:
        A distribution of batch shape (..., values).

    Raises:
        ValueError: for an unknown likelihood.
    """
    if outputs.dtype in {torch.float16, torch.bfloat16}:
        outputs = outputs.float()
    parameters = outputs.chunk(LIKELIHOODS.get(likelihood, 1), -1)
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


def negative_log_likelihood(
    likelihood: str, outputs: Tensor, expected: Tensor, lengths: Tensor | None = None
) -> Tensor:
    """Mean over valid steps and values, in nats.

    Args:
        likelihood: `gaussian` or `student`.
        outputs: (batch, steps, parameters * values).
        expected: (batch, steps, values).
        lengths: (batch,) valid steps; all when absent.
    """
    found = distribution(likelihood, outputs)
    if lengths is None:
        return -found.log_prob(expected).mean()
    inside = (torch.arange(expected.size(1), device=outputs.device) < lengths.to(outputs.device)[:, None])[..., None]
    # Chosen, not multiplied: what stands in the padding need not be finite.
    logarithms = torch.where(inside, found.log_prob(torch.where(inside, expected, 0.0)), 0.0)
    return -logarithms.sum() / (inside.sum() * expected.size(2))


def draw(likelihood: str, outputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample of each distribution that the outputs are the parameters of: (..., values).

    Args:
        likelihood: `gaussian` or `student`.
        outputs: as for `distribution`.
        generator: on the outputs' device; torch's own when None, which is what torch's distributions draw from.
    """
    # Any: torch's base class has neither location nor scale.
    found: Any = distribution(likelihood, outputs)
    location: Tensor = found.loc
    scale: Tensor = found.scale
    noise = torch.randn(location.shape, dtype=location.dtype, device=location.device, generator=generator)
    if isinstance(found, StudentT):
        # A normal over the root of an independent chi-squared that is divided by its degrees of freedom.
        squares = 2 * torch._standard_gamma(found.df / 2, generator=generator)  # noqa: SLF001 - alone takes a generator
        noise *= (found.df / squares).sqrt()
    return location + scale * noise
