"""nn.LSTM in the form in which cuDNN is at its fastest: one call per layer and direction, sizes rounded up with zeros.

What is padded and why nothing comes of it is in `kernels.padded_vendor`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from kernels import padded_vendor

State = tuple[Tensor, Tensor]


class SplitLSTM(nn.LSTM):
    """`torch.nn.LSTM` with its parameters and results, run layer by layer on padded sizes.

    Takes (batch, steps, features) tensors with `batch_first=True`; no packed sequences, no projection. Without
    gradients the padded weights are kept, as an expert would do it: after a change through `.data`, which torch does
    not count, call `flatten_parameters`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._padded_weights: padded_vendor.Kept = {}
        if not self.batch_first or self.proj_size:
            msg = "SplitLSTM takes batch_first=True and proj_size=0; use torch.nn.LSTM for anything else"
            raise ValueError(msg)

    def flatten_parameters(self) -> None:
        """Lay each layer's weights out in one chunk, as cuDNN wants them per call."""
        self.__dict__.get("_padded_weights", {}).clear()
        if getattr(self, "all_weights", None) and not self.proj_size:
            padded_vendor.flatten(self)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_padded_weights": {}}  # type: ignore[no-any-return]

    def forward(self, x: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Call it as torch.nn.LSTM with a padded x (batch, steps, features); h, c (layers * directions, batch, H)."""
        if isinstance(x, PackedSequence):
            msg = "SplitLSTM takes a (batch, steps, features) tensor, not a PackedSequence; use torch.nn.LSTM"
            raise TypeError(msg)
        if not x.size(0):
            return super().forward(x, hx)
        return padded_vendor.run(self, x, hx, kept=self._padded_weights)
