"""The gradient of the recurrent weights: one product over all steps, in torch operations that a compiler can see."""

from __future__ import annotations

import torch
from torch import Tensor

from .common.recurrence import LayerOptions


def weight_gradient(
    grad_gates: Tensor,
    output: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
) -> Tensor:
    """Gradient of weight_hh, (D, 4H, H): at every step the gates' gradient times the h before it.

    Args:
        grad_gates: (B, T, D, 4H) if `batch_first`, else (T, B, D, 4H); zero past the lengths.
        output: (B, T, D, H), or with steps first; zero past the lengths.
        h0: (D, B, H), or None for zeros.
        lengths: (B,), or None.
        resets: (D, T, B) bool, or None.
        batch_first: order of the first two dimensions.
    """
    flat = grad_gates.flatten(0, 1)
    gradients = []
    for direction in range(output.size(2)):
        own = None if h0 is None else h0[direction]
        anew = None if resets is None else resets[direction]
        before = hidden_before(output[:, :, direction], own, lengths, batch_first, reverse=direction == 1, resets=anew)
        gradients.append(flat[:, direction].t() @ before.flatten(0, 1))
    return torch.stack(gradients)


def hidden_before(
    output: Tensor,
    h0: Tensor | None,
    lengths: Tensor | None,
    batch_first: bool,
    *,
    reverse: bool,
    resets: Tensor | None = None,
) -> Tensor:
    """The h that each step of a direction started from, where the gradient of weight_hh looks at it.

    Args:
        output: (B, T, H) if `batch_first`, else (T, B, H); zero past the lengths.
        h0: (B, H), or None for zeros.
        lengths: (B,), or None.
        batch_first: order of the first two dimensions.
        reverse: whether the direction walks backward in time.
        resets: (T, B) bool: steps of this direction that start from zeros; or None.

    Returns:
        As the output, contiguous.
    """
    if resets is not None:
        before = hidden_before(output, h0, lengths, batch_first, reverse=reverse)
        return torch.where((resets.t() if batch_first else resets).unsqueeze(2), 0.0, before)
    time = 1 if batch_first else 0
    steps = output.size(time)
    first = (torch.zeros_like(output.select(time, 0)) if h0 is None else h0).unsqueeze(time)
    if not reverse:
        return torch.cat([first, output.narrow(time, 0, steps - 1)], time)
    # From the step after. Where a shorter sequence begins there, that output is zero.
    before = torch.cat([output.narrow(time, 1, steps - 1), first], time)
    if h0 is None or lengths is None:
        return before
    # A sequence of no steps has no gradient anywhere, so where its h0 is put does not matter.
    last = (lengths.long() - 1).clamp(0, steps - 1)[:, None].unsqueeze(time)
    return before.scatter(time, last.expand_as(first), first)


def direction_gradient(
    grad_gates: Tensor, output: Tensor, h0: Tensor | None, lengths: Tensor | None, options: LayerOptions, direction: int
) -> Tensor:
    """Gradient of one direction's weight_hh, (4H, H): each step's gates' gradient times the h before it.

    One product of rows shifted against each other by a step, where `hidden_before` would copy the output: past a length
    both are zero. With the batch first in memory a shift by one row pairs the step at which a sequence begins with its
    neighbour's last, so the gates' gradients there are overwritten with zeros.

    Args:
        grad_gates: as x, (directions, 4H) at each step, contiguous; may be written to.
        output: as x, directions * H at each step.
        h0: (directions, batch, H), or None for zeros.
        lengths: (batch,), or None for all steps.
        options: of the layer.
        direction: 0, or 1 for the one that walks backward.
    """
    hidden, backward, batch_first = options.hidden, direction == 1, options.batch_first
    own, h = grad_gates.view(-1, options.directions * 4 * hidden), output.flatten(0, 1)
    if options.directions > 1:
        own, h = own.unflatten(1, (-1, 4 * hidden))[:, direction], h.unflatten(1, (-1, hidden))[:, direction]
    start = None if h0 is None else h0[direction].to(output.dtype)
    if backward and start is not None and lengths is not None:
        # Each sequence begins at another step.
        before = hidden_before(h.view(*output.shape[:2], hidden), start, lengths, batch_first, reverse=True)
        return own.t() @ before.flatten(0, 1)
    if batch_first:
        shift, steps = 1, output.size(1)
        first = own[steps - 1 if backward else 0 :: steps]
    else:
        shift = output.size(1)
        first = own[own.size(0) - shift :] if backward else own[:shift]
    found = None if start is None else first.t() @ start
    if batch_first:
        first.zero_()
    rest = own.size(0) - shift
    own, h = (own[:rest], h[shift:]) if backward else (own[shift:], h[:rest])
    return own.t() @ h if found is None else found.addmm_(own.t(), h)
