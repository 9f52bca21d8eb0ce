"""`ShortlistHead`: a linear layer over a large vocabulary, for generating text on a CPU.

It reads a quarter of the weights that torch.nn.Linear reads, and yet the largest outputs are those of float32.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from .common.fast_path import unwatched
from .cpu import shortlist

NOT_SERVED = (
    "kernels.ShortlistHead is for eager inference in float32 on a CPU, under torch.no_grad() or torch.inference_mode() "
    "and without autocast or torch.compile; use torch.nn.Linear elsewhere"
)
#: Largest `exact`: native code has 64 bits for it.
MOST_EXACT = 2**63 - 1


class ShortlistHead(nn.Linear):
    """Drop-in for `torch.nn.Linear` with the same parameters, of whose outputs a row's largest are exact.

    All outputs are computed in integers, each row of weights (8 bits) and of inputs (8 bits by VNNI, up to 16 without)
    with its scale. A bound on the error of each output says which may be among the `exact` largest of a row, and
    those are computed again in float32 from the parameters. So the `exact` largest outputs are the largest of float32,
    in their order, unless two are closer than float32's own rounding. All others are below them and off by their
    rounding to integers: what is computed from all of them, as the normaliser of a softmax, is approximate.

    Weights are packed at the first call and again where they have changed; see `kernels.cpu.shortlist.pack` for what
    is noticed. What cannot be scaled to integers is computed in float32 throughout: a row or weight with a NaN or an
    infinity, and a row whose largest magnitude is below 1e-30 or above 2.6e36 / in_features.

    Args:
        in_features, out_features, bias, device, dtype: as for `torch.nn.Linear`.
        exact: how many of a row's largest outputs are exact: 1 for greedy decoding, the beam for a beam search.

    Attributes:
        exact: as given; another number counts from the next call on.
        refined: outputs that the last call computed in float32, all rows together.

    Raises:
        ValueError: for `exact` below 1 or from 2**63 on, then and whenever it is set.
    """

    refined: int = 0
    _exact: int = 1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        exact: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.exact = exact

    @property
    def exact(self) -> int:
        """Number of a row's largest outputs that are exact."""
        return self._exact

    @exact.setter
    def exact(self, value: int) -> None:
        try:
            number = operator.index(value)
        except TypeError:  # a float, say
            number = 0
        if not 1 <= number <= MOST_EXACT:
            msg = (
                f"exact is {value!r}, expected an integer of at least 1 and below 2**63, the outputs of a row that "
                "have to be exact"
            )
            raise ValueError(msg)
        self._exact = number

    @classmethod
    def of(cls, linear: nn.Module, exact: int = 1) -> ShortlistHead:
        """Return the layer as a ShortlistHead that shares its parameters.

        Args:
            linear: gives the parameters.
            exact: as for the class.

        Raises:
            TypeError: for any other layer.
        """
        if not isinstance(linear, nn.Linear):
            msg = f"the head is a {type(linear).__name__}, expected a torch.nn.Linear"
            raise TypeError(msg)
        found = cls(linear.in_features, linear.out_features, bias=False, device="meta", exact=exact)
        found.weight, found.bias = linear.weight, linear.bias
        return found.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn.Linear's name
        """Compute the outputs.

        Args:
            input: (..., in_features), float32 on a CPU.

        Returns:
            (..., out_features).

        Raises:
            RuntimeError: for a call that needs gradients, for other types, devices and sizes, while something traces,
                compiles or intercepts operators, and on a processor without AVX2.
        """
        h, weight, offsets, packed = self._prepare(input)
        output, refined = shortlist.run(h, weight, offsets, packed, self._exact)
        # Not by nn.Module's own __setattr__, which takes longer.
        self.__dict__["refined"] = refined
        return output if h is input else output.view(*input.shape[:-1], weight.size(0))

    def error_bound(self, input: Tensor) -> Tensor:  # noqa: A002 - as for forward
        """Compute how far at most any output of a row is from that of float64, for a call with the same input.

        A row's logsumexp changes by no more than its outputs do, so this bounds its error too, and that of the
        log-probability of an exact output. The bound holds for the worst case, so usual errors are far below it.

        Args:
            input: as for `forward`.

        Returns:
            (...), float32. It is NaN or infinity where there is no bound: where the row or a parameter has a NaN or an
            infinity, or is too small or too large to be scaled to integers.

        Raises:
            RuntimeError: as for `forward`.
        """
        return shortlist.bounds(*self._prepare(input)).view(input.shape[:-1])

    def _prepare(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None, shortlist.PackedHead]:  # noqa: A002
        """Return the rows of h, the weights, the bias and the packed weights as native code takes them."""
        own, bias = self.weight, self.bias
        if reason := _refusal(input, own, bias):
            raise RuntimeError(reason)
        packed, weight = shortlist.pack(own, self.__dict__.get("_packed"))
        self.__dict__["_packed"] = packed
        # The number of rows is given, since -1 is ambiguous for an input without features.
        h = (input if input.dim() == 2 else input.reshape(input.shape[:-1].numel(), weight.size(1))).contiguous()  # noqa: PLR2004
        return h, weight, None if bias is None else bias.contiguous(), packed

    @property
    def instructions(self) -> str:
        """Name of the instructions that multiply, such as `avx512-vnni`.

        Raises:
            BuildError: where the head cannot run; the message says why.
        """
        return shortlist.instructions()

    def extra_repr(self) -> str:
        """Arguments as torch.nn.Linear shows them, and the number of exact outputs."""
        return f"{super().extra_repr()}, exact={self.exact}"

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        state.pop("_packed", None)
        return state


def _refusal(h: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Reason why a head cannot be run on its input, weight and bias; None where it can."""
    tensors = (h, weight) if bias is None else (h, weight, bias)
    if reason := shortlist.hindrance():
        return f"kernels.ShortlistHead cannot run here: {reason}; use torch.nn.Linear"
    gradients = torch.is_grad_enabled()
    for value in tensors:
        if value.dtype is not torch.float32 or not value.is_cpu or (gradients and value.requires_grad):
            return NOT_SERVED
    return _misfit(h, weight, bias) if unwatched(tensors) else NOT_SERVED


def _misfit(h: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Name the shape that does not fit, if one does not: parameters may have been replaced since the head was made."""
    if weight.dim() != 2:  # noqa: PLR2004
        return f"weight has shape {tuple(weight.shape)}, expected (out_features, in_features)"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])} as weight has rows"
    if h.shape[-1:] != weight.shape[1:]:
        return f"input has {h.size(-1) if h.dim() else 0} features, expected {weight.size(1)}"
    return None
