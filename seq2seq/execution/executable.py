"""From a variant to something that runs: builds the model, and holds the one timed call of each mode.

Nothing here knows a variant by name; everything follows from its fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kernels.common.cudnn_precision import cudnn_precision, wanted_precision
from seq2seq.data.batch import Batch
from seq2seq.decoding.cuda_graph import CapturedStep
from seq2seq.decoding.fixed_length import Steps, forced, free_running
from seq2seq.decoding.search import Decoder
from seq2seq.execution.variant import DECODERS, HEADS, Variant
from seq2seq.models.base import Config, Model, Seq2SeqResult
from seq2seq.models.weights import Weights
from seq2seq.runtimes.registry import RUNTIMES
from seq2seq.runtimes.runtime import Runtime

LEARNING_RATE = 1e-3
MODES = ("inference", "training", "decode")


class Executable:
    """A variant built for one model, mode and device.

    Attributes:
        variant, mode, device: what it was built for, the variant in its precision here.
        model: holds the weights; `run` may be a compiled form of it that shares them.
        runtime: what runs a converted copy of the model in its place, where the variant names one.
        scaler: scales the loss of fp16; of no effect otherwise.

    Args:
        variant: the way to execute.
        config: sizes of the model.
        mode: of `MODES`.
        device: `cpu` or `cuda`.
        weights: fp32 state_dict to start from.
        stored: whether the weights are stored in the variant's precision. By default they are in inference, when
            the variant is of lower precision without autocast.
        beam: hypotheses of a sequence, in the mode `decode`.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(
        self,
        variant: Variant,
        config: Config,
        mode: str,
        device: str,
        weights: Weights,
        *,
        stored: bool | None = None,
        beam: int = 1,
    ) -> None:
        if mode not in MODES:
            msg = f"mode is {mode!r}, expected one of {', '.join(MODES)}"
            raise ValueError(msg)
        variant = variant.here()
        self.variant, self.mode, self.device, self.beam = variant, mode, device, beam
        self._stored = variant.stores_low(mode) if stored is None else stored
        self._autocast = variant.dtype != torch.float32 and not self._stored and variant.runtime is None
        self.model: Model = self._build(config)
        # What a module keeps besides tensors stays as it was built.
        extra = {name: value for name, value in self.model.state_dict().items() if not isinstance(value, Tensor)}
        self.model.load_state_dict(extra | weights)
        self.model.to(device, variant.dtype if self._stored else None)
        self.model.train(mode == "training")
        self.runtime = self._make_runtime()
        self._run = self._compile(self.model)
        self._steps = self._compile_steps(self.model)
        self._optimizer: torch.optim.Optimizer | None = None
        # torch's own start of 2**16 lets the first steps overflow and be skipped; this one holds from the start.
        self.scaler = torch.amp.GradScaler(
            device, init_scale=2.0**10, enabled=variant.precision == "fp16" and mode == "training"
        )

    def _build(self, config: Config) -> Any:
        """The model with the variant's LSTMs and head, its weights as they come."""
        model = config.build(self.variant.make_lstm)
        if self.variant.head != "nn":
            model.fc = HEADS[self.variant.head](model.fc, self.beam)
        DECODERS[self.variant.decoder](model)
        return model

    def _make_runtime(self) -> Runtime | None:
        """Return the runtime that the variant names, which converts the model; None without one."""
        make = RUNTIMES[self.variant.runtime] if self.variant.runtime is not None else None
        return make(self.model, self.variant.runtime_options) if make else None

    def _compile(self, model: Model) -> Callable[..., Any]:
        if self.runtime is not None:
            return self.runtime
        if self.mode == "decode":
            return model.run
        if self.variant.compiler == "torchscript":
            scripted: Callable[..., Any] = torch.jit.script(model).run
            return scripted
        if self.variant.compiler == "dynamo":
            compiled: Callable[..., Any] = torch.compile(own_code(model.run), **self.variant.compile_options)
            return compiled
        return model.run

    def _compile_steps(self, model: Model) -> Decoder:
        """Calls of decoding: encoder and step, compiled as the variant says."""
        if self.mode != "decode":
            return model
        if self.variant.compiler == "torchscript":
            scripted: Any = torch.jit.script(model)
            return Steps(model.config, scripted.encode, scripted.step)
        steps: Decoder = model
        if self.variant.compiler == "dynamo":
            steps = Steps(
                model.config,
                torch.compile(own_code(model.encode), **self.variant.compile_options),
                torch.compile(own_code(model.step), **self.variant.compile_options),
            )
        return CapturedStep(steps) if self.variant.captures_step else steps

    def prepare(self, batch: Batch) -> Batch:
        """The batch on this executable's device, in the type that its model reads."""
        return batch.to(self.device, self.variant.dtype if self._stored else None)

    @property
    def loss_scale(self) -> float:
        """Factor of the loss before the backward pass; it shrinks with each step that overflows."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else 1.0

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Settings that hold while calls run: which LSTM torch may take, TF32, gradients, Dynamo's `allow_rnn`."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(backends(self.variant, self.device))
            if self.mode != "training":
                stack.enter_context(torch.inference_mode())
            if self.variant.allow_rnn:
                stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))  # noqa: SLF001 - no public name
            yield

    def casting(self) -> contextlib.AbstractContextManager[object]:
        """Autocast if the variant asks for it, else a null context: a disabled autocast costs time, too."""
        return torch.autocast(self.device, self.variant.dtype) if self._autocast else contextlib.nullcontext()

    def forward(self, batch: Batch) -> Seq2SeqResult:
        """One pass, under autocast where the variant says so; call it inside `context`."""
        with self.casting():
            return Seq2SeqResult(*self._run(batch.source, batch.target, batch.source_lengths, batch.target_lengths))

    def loss(self, result: Any, batch: Batch) -> Tensor:
        """The loss of what `forward` returned."""
        found: Tensor = self.model.loss(result.outputs, batch.expected, batch.decoded_lengths)
        return found

    def named(self, result: Any) -> dict[str, Tensor]:
        """Values that `call` returned, by name."""
        if self.mode == "decode":
            return dict(result)
        return {"loss": result} if self.mode == "training" else dict(zip(Seq2SeqResult._fields, result, strict=True))

    def completed(self, found: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Named values of a call with what the gate compares beside them and follows from them: the loss."""
        if "loss" in found:
            return found
        return found | {"loss": self.model.loss(found["outputs"], batch.expected, batch.decoded_lengths)}

    def remarks(self, batch: Batch) -> dict[str, Any]:
        """Fields of a record that only this kind of model has; called inside `context`, outside of timing."""
        del batch
        return {}

    def words(self) -> list[str]:
        """Remarks for the record, besides what ran."""
        return []

    def decode(self, batch: Batch) -> dict[str, Tensor]:
        """Decode a batch, under autocast where the variant says so; see `free_running`. Call it inside `context`."""
        with self.casting():
            return free_running(self._steps, batch, self.beam)

    def call(self, batch: Batch) -> object:
        """The timed unit: a forward pass, a whole training step, or the decoding of the whole batch."""
        if self.mode == "inference":
            return self.forward(batch)
        if self.mode == "decode":
            return self.decode(batch)
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        return self.step(batch, self._optimizer)[0]

    def step(
        self, batch: Batch, optimizer: torch.optim.Optimizer, clip: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """One training step; call it inside `context`.

        Args:
            batch: prepared for this executable.
            optimizer: over the model's parameters.
            clip: largest norm of all gradients together; they are left as they are when None.

        Returns:
            The loss, and where gradients are clipped their norm before.
        """
        optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.forward(batch), batch)
        self.scaler.scale(loss).backward()
        norm = None
        if clip is not None:
            self.scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        return loss, norm

    def quantities(self, batch: Batch, *, together: bool = False, of_inputs: bool = True) -> dict[str, Tensor]:
        """Everything the gate compares, by name: outputs, hidden, cell, loss and, in training, all gradients.

        In the mode `decode`: the outputs of all steps along the target, and what free running gives.

        Gradients are those of every parameter and of the real-valued inputs. Raises whatever the model raises.

        Args:
            batch: prepared for this executable.
            together: take both kinds of gradients in one pass: quicker, for what is only compared with.
            of_inputs: whether gradients of inputs are taken: a timed training step takes none.
        """
        # Aliases, so the batch itself is left as it is.
        inputs = _inputs_of(batch)
        batch = dataclasses.replace(batch, **inputs)
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        with self.context():
            if self.mode == "decode":
                with self.casting():
                    outputs = forced(self._steps, batch, self.beam)
                return {n: value.clone() for n, value in ({"outputs": outputs} | self.decode(batch)).items()}
            if self.mode == "training" and together:
                for value in inputs.values():
                    value.requires_grad_()
                return self._quantities(batch, parameters | inputs)
            found = self._quantities(batch, parameters)
            # A pass of its own: compiled for inputs that take gradients, a model is another graph than the one timed.
            if self.mode == "training" and inputs and of_inputs:
                for value in inputs.values():
                    value.requires_grad_()
                again = self._quantities(batch, inputs)
                found |= {f"grad {name}": again[f"grad {name}"] for name in inputs}
        return found

    def _quantities(self, batch: Batch, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results of one pass and, in training, the gradients of the given leaves."""
        result = self.forward(batch)
        loss = self.loss(result, batch)
        found = {"outputs": result.outputs, "hidden": result.hidden, "cell": result.cell, "loss": loss}
        if self.mode == "training":
            found |= self._gradients(loss, leaves)
        # Copies: a variant that runs in a captured graph may reuse its output memory.
        return {name: value.detach().clone() for name, value in found.items()}

    def _gradients(self, loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        return {
            f"grad {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / self.loss_scale
            for name, leaf in leaves.items()
        }

    def load(self, weights: Weights) -> None:
        """Overwrite the weights in place, as an optimizer would; nothing is rebuilt but a runtime's copy of them."""
        with torch.no_grad():
            for name, value in self.model.state_dict(keep_vars=True).items():
                if isinstance(value, Tensor):
                    value.copy_(weights[name])
        if self.runtime is not None:
            self.runtime.reload()

    def restart(self, weights: Weights) -> None:
        """Load weights and forget the optimizer's state: the next training step is a first one."""
        self.load(weights)
        self._optimizer = None

    def weights(self) -> Weights:
        """A copy of the current weights in fp32, on the CPU."""
        return {name: value.detach().float().cpu().clone() for name, value in self.model.state_dict().items()}


@functools.singledispatch
def execute(
    workload: Any, variant: Variant, mode: str, device: str, weights: Weights, *, stored: bool | None = None
) -> Executable:
    """A variant built for a workload; the arguments are those of `Executable`.

    A kind of workload whose models are built in another way registers its own class for it.
    """
    return Executable(variant, workload.config, mode, device, weights, stored=stored, beam=workload.beam)


def own_code(method: Any) -> Any:
    """A method, or a function in the place of one, with a code object of its own.

    Dynamo keeps what it compiled per code object: variants that shared one would check each other's guards on every
    call and use up each other's recompile limit. What has no code, as a `functools.partial`, is returned as it is.
    """
    function = getattr(method, "__func__", method)
    if not isinstance(function, types.FunctionType):
        return method
    twin = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__,
        function.__defaults__, function.__closure__,
    )  # fmt: skip
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin if function is method else types.MethodType(twin, method.__self__)


@contextlib.contextmanager
def backends(variant: Variant, device: str) -> Iterator[None]:
    """Say which library torch may hand the LSTM to, and on CUDA whether fp32 may use TF32, if the variant says so."""
    # torch's stubs know these modules without their settings, hence Any.
    backend: Any = torch.backends.cudnn if device == "cuda" else torch.backends.mkldnn
    products: Any = torch.backends.cuda.matmul
    enabled, previous = backend.enabled, products.fp32_precision
    backend.enabled = variant.vendor_lstm
    # torch's defaults differ between the two (products without TF32, cuDNN's LSTM with it): both are set.
    sets = device == "cuda" and not variant.torch_tf32
    tf32 = variant.precision == "tf32"
    try:
        with cudnn_precision(wanted_precision(variant.dtype, tf32=tf32)) if sets else contextlib.nullcontext():
            if sets:
                products.fp32_precision = "tf32" if tf32 else "ieee"
            yield
    finally:
        backend.enabled = enabled
        if sets:
            products.fp32_precision = previous


def _inputs_of(batch: Batch) -> dict[str, Tensor]:
    """Aliases of the batch's real-valued inputs, by name."""
    candidates = {"source": batch.source, "target": batch.target}
    return {
        name: value.detach() for name, value in candidates.items() if value is not None and value.is_floating_point()
    }
