"""`LSTM`: torch.nn.LSTM's parameters, arguments and results, with the recurrence run by a kernel of this package.

Per layer: one product projects the input of all steps, the operator of `kernels.ops` walks over time, and
`kernels.dispatch` says which kernel that is. What no kernel serves goes to torch's own LSTM, and `choices` says so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import dispatch, layers
from .common.fast_path import autocast_dtype, exported
from .common.recurrence import placed, problem_on
from .cpu import fused
from .dispatch import IMPLEMENTATIONS, PADDED, VENDORS, Choice
from .lstm_arguments import (
    NO_RESETS_WITH_PROJECTIONS,
    Lengths,
    batched_state,
    check_call,
    check_options,
    checked_lengths,
    checked_resets,
    refuse_export,
)
from .torch_lstm import State, copies

#: Attributes with what earlier calls settled: for inference and for training, each without and under autocast.
_KEPT = (*layers.KEPT_FOR_INFERENCE, *layers.KEPT_FOR_TRAINING)


class LSTM(nn.RNNBase):
    """Drop-in for `torch.nn.LSTM`: same parameters, state_dict, initialisation, arguments, results and errors.

    It is not a subclass of `nn.LSTM`, since torch.compile refuses to trace those; so `isinstance(m, nn.LSTM)` is false.

    What differs:

    - The cell state is float32 inside whatever the type (float64 for float64), and returned in the type of the input.
    - Under autocast all results come in autocast's type. torch.nn.LSTM gives that on a CPU through oneDNN, float32 on
      a CPU without it, and float16 on a GPU whatever type was asked for.
    - Dropout between layers draws other random numbers than torch's fused call does.
    - There are no gradients of gradients and none in forward mode (jvp); asking for them raises NotImplementedError.
    - vmap, torch.func.grad of many samples and batched gradients work as a loop over the samples. Under vmap alone
      torch's own LSTM raises, which `auto` takes for other types than float32 on a CPU; `loop` serves them there.
    - On a CPU the kernel keeps packed weights until they change. In inference of few rows (batch * steps below 32 a
      thread) with more than 64K weights in a matrix, it looks for changes that torch does not count (through `.data`,
      NumPy or shared memory) in 128 samples: a few single elements written so may go unnoticed there.
    - Without a state, `cpu-fused` has no recurrent product in the first step, so a NaN or an infinity in `weight_hh`
      does not reach that step's results. torch.nn.LSTM multiplies zeros by it and returns NaN.
    - torch.compile and torch.export see the whole of it for padded input, with dynamic batch and steps; a
      `PackedSequence` and `vendor` break the graph, as nn.LSTM does. TorchScript cannot compile it, and
      torch.fx.symbolic_trace needs it named as a leaf.
    - torch.jit.trace and torch.onnx.export record torch's own LSTM in its place, whatever the implementation, so that
      the file runs anywhere.
    - A `PackedSequence` is padded, run with lengths and packed again, which costs two copies and computes what is
      then thrown away; giving `lengths` with a padded batch spares the copies.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as
            for `torch.nn.LSTM`.
        implementation: `auto`; `cpu-fused`, the kernel for CPUs (float32, and autocast to bfloat16); `triton`, the
            fastest of the kernels for GPUs; one of these, `cell`, `sequence` or `persistent`; `loop`, plain torch
            operations on any device; or torch's own LSTM (cuDNN, oneDNN or ATen): `vendor`, or `vendor-padded`, with
            sizes and batch rounded up as cuDNN likes them, the weights padded at each call. What was asked for by name
            runs or raises. `auto` may choose the last two, unless compiling; with `proj_size`, `vendor`.
        fp32_precision: how the recurrence multiplies float32 on a GPU, `ieee` or `tf32`. None, the default, follows
            `torch.backends.cuda.matmul.fp32_precision` at each call (under torch.compile: when it is traced), so that
            projection and recurrence agree. A given value holds for the recurrence alone: torch has only a global
            switch for products, and a module that flips it would change what other threads compute. `vendor`
            follows `torch.backends.cudnn.rnn.fp32_precision` in any case.
        weight_storage: how `cpu-fused` keeps its weights between calls: `fp32`, `bf16`, `int8` with a scale per row,
            `w8a8`, which rounds the input to 8 bits too (without VNNI to 7) and needs AVX2, or `split`, each weight as
            the sum of two bf16 numbers, which needs AMX.
            Where the processor has AVX512-BF16, it multiplies bf16 weights in bf16 with float32 sums. Where it has
            AVX2, it multiplies int8 weights in integers with exact sums: with VNNI x is rounded to 16 bits and h to 8,
            without it h to 7, and x to fewer than 16 beyond 516 columns, by the largest value of each row. Elsewhere
            the weights are widened and multiplied in float32. `choices` names the instructions. For inference in
            eager code; needs `implementation="cpu-fused"`.

    Attributes:
        choices: what ran in the last call, one `Choice` a layer; not kept up to date by compiled code.

    Raises:
        TypeError, ValueError: as `torch.nn.LSTM`; ValueError for an unknown implementation or precision, and for
            `proj_size` together with a kernel.
    """

    #: Tells a model to hand over lengths with the padded sequences, where it would pack them for torch.nn.LSTM.
    takes_lengths = True
    #: Tells a model to hand over where sequences begin anew, where it would split them for torch.nn.LSTM.
    takes_resets = True
    implementation: str = "auto"
    fp32_precision: str | None = None
    weight_storage: str = "fp32"
    choices: tuple[Choice, ...] = ()
    weight_ih_l0: Tensor
    _packed = layers.run_packed

    def __init__(  # noqa: PLR0913, PLR0917 - torch.nn.LSTM's
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str = "auto",
        fp32_precision: str | None = None,
        weight_storage: str = "fp32",
    ) -> None:
        check_options(implementation, fp32_precision, proj_size, weight_storage)
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.implementation = implementation
        self.fp32_precision = fp32_precision
        self.weight_storage = weight_storage

    def forward(  # noqa: C901, PLR0912 - one decision after the other
        self,
        input: Tensor | PackedSequence,  # noqa: A002 - torch.nn.LSTM's name
        hx: State | None = None,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Run all layers and directions.

        Args:
            input: (steps, batch, input_size), (batch, steps, input_size) if `batch_first`, (steps, input_size) for
                one sequence, or a `PackedSequence`.
            hx: h and c, each (num_layers * directions, batch, hidden_size), without batch for one sequence (h has
                `proj_size` if that is set); zeros when absent.
            lengths: valid steps of each padded sequence, from 0; all when absent. A tensor (batch,) of integers on any
                device, a NumPy array or a sequence of integers. Past them the output is zero, the state is held, and
                what the input holds does not count. Values are checked only on a CPU, and not while compiling or
                under vmap; elsewhere, what is larger than the steps counts as all of them. To capture a CUDA graph,
                give them on the GPU: a copy from the CPU would be captured with its values.
            resets: bool, shaped as the input without features: true where a step is the first of a new sequence
                (TorchRL's `is_init`). Before it h and c of that row become zero in all layers, and no gradient passes:
                the results are those of each part alone, also of the backward direction, which comes out of a part at
                its first step. Not looked at past a length. `cpu-fused`, `cell` and `loop` serve it.

        Returns:
            Output, shaped and packed as the input with directions * hidden_size features, and the final h and c.

        Raises:
            TypeError, ValueError, RuntimeError: as `torch.nn.LSTM` for wrong shapes and types; for wrong lengths; for
                a kernel asked for by name that does not serve this call.
        """
        if lengths is None and resets is None and not torch.compiler.is_compiling():
            slots = layers.KEPT_FOR_INFERENCE
            if torch.is_grad_enabled():
                slots = layers.KEPT_FOR_TRAINING[torch.is_autocast_enabled("cpu")], "_kept"
            for slot in slots:
                kept = self.__dict__.get(slot)
                found = kept and kept.at_once(self._parameters, input, hx, self.batch_first)
                if found is not None:
                    results, self.__dict__["choices"] = found
                    return results  # type: ignore[no-any-return]
        if isinstance(input, PackedSequence):
            if lengths is not None or resets is not None:
                msg = "a PackedSequence brings its own lengths; give lengths and resets with a padded tensor only"
                raise ValueError(msg)
            if torch.compiler.is_compiling():
                packed: tuple[PackedSequence, State] = layers.torch_runner().run_packed(self, input, hx)
                return packed
            return self._packed(input, hx)
        if input.dim() not in {2, 3}:
            msg = f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead"
            raise ValueError(msg)
        batched = input.dim() == 3  # noqa: PLR2004
        batch_dim = 0 if self.batch_first else 1
        if hx is not None:
            hx = batched_state(hx, batched)
        x = input if batched else input.unsqueeze(batch_dim)
        check_call(self, x, hx, x.size(batch_dim))
        if not x.size(1 - batch_dim):
            msg = "Expected sequence length to be larger than 0 in RNN"
            raise RuntimeError(msg)
        valid = checked_lengths(lengths, x.size(batch_dim), x.size(1 - batch_dim))
        resets = checked_resets(resets, input.shape[:-1])
        anew = resets is not None
        name = self._choose(x, hx, x.size(batch_dim), x.size(1 - batch_dim), masked=valid is not None, resets=anew)
        if name not in VENDORS:
            output, state = layers.run(self, x, hx, valid, name, resets, batch_first=self.batch_first)
        else:
            output, state = layers.torchs_own(self, x, hx, valid, name)
        if batched:
            return output, state
        return output.squeeze(batch_dim), (state[0].squeeze(1), state[1].squeeze(1))

    def step(self, input: Tensor, state: State, resets: Tensor | None = None) -> Tensor:  # noqa: A002 - as forward's
        """One step of all layers, their state updated in place: what a loop that generates calls, without gradients.

        On a CPU with `cpu-fused` all layers are one native call. Everything else goes through `forward`, and the state
        is copied: other implementations, a state that is not contiguous, the first call, and all calls where the entry
        to the kernel cannot be built from torch's headers.
        `explain(..., step=True)` says which. Hooks of the module do not run.

        Args:
            input: (batch, input_size).
            state: h and c, each (num_layers, batch, hidden_size) in memory of its own; overwritten. torch's version
                counters see that, as they see any change in place.
            resets: (batch,) bool: rows that begin a new sequence, whose state becomes zero before the step; for servers
                whose rows join and leave.

        Returns:
            Output (batch, hidden_size), which is h of the last layer, in memory of its own.

        Raises:
            TypeError: for resets that are not bool.
            ValueError: for a bidirectional module, input that is not 2-D, h and c in the same memory, and resets of
                another shape.
            RuntimeError: where gradients would be needed; and as `forward`.
        """
        hidden, cell = state
        if not torch.compiler.is_compiling():
            kept: Any = self.__dict__.get("_kept")
            found = kept and kept.step(self._parameters, input, hidden, cell, resets)
            if found is not None:
                output, self.__dict__["choices"] = found
                return output  # type: ignore[no-any-return]
        return layers.step_through_forward(self, input, hidden, cell, resets)

    def explain(  # noqa: PLR0913 - what decides
        self,
        batch: int,
        steps: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        training: bool | None = None,
        masked: bool = False,
        resets: bool = False,
        step: bool = False,
    ) -> Choice:
        """Explain what would run for a batch, without running it.

        Args:
            batch: sequences of the input.
            steps: its steps.
            dtype: of the input, or autocast's; when None, autocast's if it is on there, else that of the weights.
            device: of the input; that of the weights when None.
            training: whether gradients will be needed; `self.training` when None.
            masked: whether sequences differ in length.
            resets: whether rows begin anew in the middle of the steps.
            step: whether it is a call of `step`, which serves resets whatever runs.

        Raises:
            RuntimeError, ValueError: when the implementation asked for by name cannot run there.
        """
        weight = self.weight_ih_l0
        where = weight.device if device is None else torch.device(device)
        saves = (self.training if training is None else training) and not step
        kind = dtype or layers.computed_dtype(where, weight.dtype)
        autocast = (where.type, kind, weight.dtype) == ("cpu", torch.bfloat16, torch.float32)
        choice = self._choice(
            where,
            kind,
            batch,
            steps,
            saves=saves,
            masked=masked,
            resets=resets and not step,
            autocast=autocast and self.weight_storage == "fp32",
        )
        why = "which only cpu-fused does not" if choice.implementation != dispatch.CPU else fused.no_entry()
        if step and why:
            reason = f"{choice.reason}; step goes through forward and copies the state, {why}"
            choice = dataclasses.replace(choice, reason=reason)
        return choice

    def extra_repr(self) -> str:
        """Arguments as torch.nn.LSTM shows them, followed by those that it does not have."""
        text = super().extra_repr()
        if self.implementation != "auto":
            text += f", implementation={self.implementation!r}"
        if self.fp32_precision is not None:
            text += f", fp32_precision={self.fp32_precision!r}"
        if self.weight_storage != "fp32":
            text += f", weight_storage={self.weight_storage!r}"
        return text

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        for name in ("choices", *_KEPT):
            state.pop(name, None)
        return state

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute and drop what was prepared for the CPU kernel, since it depends on most attributes."""
        super().__setattr__(name, value)
        for kept in _KEPT:
            self.__dict__.pop(kept, None)

    def __prepare_scriptable__(self) -> Any:
        """Called by torch.jit.script, which would otherwise fail with an obscure error deep inside this module."""
        msg = (
            "TorchScript cannot compile kernels.LSTM; script a torch.nn.LSTM with the same state_dict, or use "
            "torch.export"
        )
        raise TypeError(msg)

    def _choice(  # noqa: PLR0913 - what decides
        self,
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
        steps: int,
        *,
        saves: bool,
        masked: bool,
        resets: bool,
        autocast: bool = False,
    ) -> Choice:
        if self.proj_size:
            if resets:
                raise ValueError(NO_RESETS_WITH_PROJECTIONS)
            reason = "no kernel has projections, so proj_size goes to torch's own LSTM"
            return Choice("vendor", reason, dict.fromkeys(IMPLEMENTATIONS[1:-1], "has no projections (proj_size)"))
        directions, tf32 = 2 if self.bidirectional else 1, self.tf32(device, dtype)
        problem = problem_on(
            placed(device), dtype, batch, steps, self.hidden_size, directions, saves, masked, tf32, resets, autocast,
            self.weight_storage,
        )  # fmt: skip
        choice = dispatch.choose(problem, self.implementation)
        if self.implementation == "auto" and (why := layers.left_over(choice, problem, self.weight_ih_l0.dtype)):
            refused = choice.refused
            choice = dispatch.choose(dataclasses.replace(problem, autocast=False), compiling=True)
            choice = dataclasses.replace(choice, refused={**choice.refused, **refused, **dict.fromkeys(VENDORS, why)})
        if choice.implementation == dispatch.CPU and not (saves or autocast) and (detour := fused.no_entry()):
            choice = dataclasses.replace(choice, detour=detour)
        return choice

    def _choose(
        self, x: Tensor, hx: State | None, batch: int, steps: int, *, masked: bool, resets: bool = False
    ) -> str:
        """Name of what runs; all layers are the same problem. Keeps the choice for later calls."""
        if exported():
            refuse_export(self.weight_storage, masked=masked, resets=resets)
            choice = Choice("vendor", "a trace or an ONNX file holds torch's own LSTM", {})
            self.__dict__["choices"] = (choice,) * self.num_layers
            return "vendor"
        if torch.compiler.is_compiling():
            # Sizes may be symbols here, so `auto` is resolved when the operator runs.
            name = "vendor" if self.proj_size else self.implementation
            if resets and name in VENDORS:
                raise ValueError(NO_RESETS_WITH_PROJECTIONS if self.proj_size else dispatch.VENDOR_HAS_NO_RESETS)
            if masked and name == PADDED:
                raise ValueError(dispatch.PADDED_HAS_NO_LENGTHS)
            return name
        saves = torch.is_grad_enabled() and (
            x.requires_grad
            or any(value is not None and value.requires_grad for value in self._parameters.values() or copies(self))
            or (self._modules and any(parameter.requires_grad for parameter in self.parameters()))
            or (hx is not None and (hx[0].requires_grad or hx[1].requires_grad))
        )
        dtype = layers.computed_dtype(x.device, x.dtype)
        casts = autocast_dtype(x.device) == torch.bfloat16 and layers.casts_itself(self, x, hx)
        choice = self._choice(x.device, dtype, batch, steps, saves=saves, masked=masked, resets=resets, autocast=casts)
        # Not by nn.Module's own __setattr__, which takes longer than all of the above.
        self.__dict__["choices"] = (choice,) * self.num_layers
        # What serves only with converted operands is left to the operator.
        return "auto" if choice.implementation in choice.refused else choice.implementation

    def tf32(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Return whether the recurrence rounds its float32 factors to TF32 there."""
        if device.type != "cuda" or dtype != torch.float32:
            return False
        return (self.fp32_precision or layers.matmul_precision()) == "tf32"

    def _parameters_of(self, layer: int) -> list[tuple[Tensor, ...]]:
        """Of each direction of a layer weight_ih (4H, features), weight_hh (4H, H) and the biases (4H,), if any.

        By name and not from `_flat_weights`, which functional_call and parametrizations leave behind.
        """
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        names = [f"l{layer}", f"l{layer}_reverse"][: 2 if self.bidirectional else 1]
        return [tuple(getattr(self, f"{kind}_{name}") for kind in kinds) for name in names]
