"""Finds the LSTMs of a model, counts their work in a call and their share of its time, and replaces them."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from kernels.lstm import LSTM
from kernels.replace import replace_lstm
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.models.base import Stack
from seq2seq.own_model import leaves
from seq2seq.own_model.errors import OwnModelError

#: Most and fewest calls to measure a share from, and the seconds after which the fewest are enough.
_CALLS, _LEAST, _ENOUGH_S = 100, 3, 2.0
#: Short calls of one kind in a row.
_ROW = 5
_BATCHED = 3


@dataclass(frozen=True)
class CallLook:
    """The first look at a call of the user's model, eager and unchanged.

    Attributes:
        call_s: seconds that it takes.
        share: part of it that the LSTMs take, between 0 and 1; None where that is not known.
    """

    call_s: float
    share: float | None = None


@dataclass
class Use:
    """One LSTM of a model, and what one call asks of it.

    Attributes:
        name: of the module; empty for the model itself.
        module: itself.
        calls: in one call of the model.
        steps: valid time steps of all sequences, all calls together.
        longest: steps of the longest sequence of a call.
        batch: sequences of a call.
        packed: whether it reads a PackedSequence.
        from_zeros: whether its calls start from zeros.
        inputs: arguments of its calls, detached.
    """

    name: str
    module: nn.RNNBase
    calls: int = 0
    steps: int = 0
    longest: int = 0
    batch: int = 0
    packed: bool = False
    from_zeros: bool = True
    inputs: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def stack(self) -> Stack:
        """Sizes of the LSTM, in the form that the kernels take."""
        lstm = self.module
        return Stack(
            self.name or "model",
            lstm.input_size,
            lstm.hidden_size,
            lstm.num_layers,
            2 if lstm.bidirectional else 1,
            embedded=True,
            from_zeros=self.from_zeros,
            stepwise=self.longest == 1,
        )

    def facts(self) -> dict[str, Any]:
        """Sizes and use of the LSTM as plain values."""
        lstm = self.module
        return {
            "name": self.name or "(the model itself)",
            "kind": type(lstm).__name__,
            "input_size": lstm.input_size,
            "hidden_size": lstm.hidden_size,
            "num_layers": lstm.num_layers,
            "bidirectional": lstm.bidirectional,
            "proj_size": lstm.proj_size,
            "calls": self.calls,
            "batch": self.batch,
            "steps": self.longest,
            "packed": self.packed,
            "from_zeros": self.from_zeros,
        }


def find(model: nn.Module) -> list[Use]:
    """The LSTMs of a model, subclasses of torch.nn.LSTM and `kernels.LSTM` among them, each once.

    Raises:
        OwnModelError: when there is none.
    """
    found = [Use(name, module) for name, module in model.named_modules() if isinstance(module, (nn.LSTM, LSTM))]
    if not found:
        kinds = (nn.LSTMCell, nn.GRU, nn.RNN, torch.jit.ScriptModule)
        beside = {f"{type(m).__name__} {name!r}" for name, m in model.named_modules() if isinstance(m, kinds)}
        others = f"; it has {', '.join(sorted(beside))}, for which there are no variants" if beside else ""
        msg = f"{type(model).__name__} holds no torch.nn.LSTM{others}; expected a model with at least one"
        raise OwnModelError(msg)
    return found


def cells(model: nn.Module) -> list[str]:
    """Names of the nn.LSTMCell of a model, which no variant replaces."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.LSTMCell)]


def unregistered(model: nn.Module) -> list[str]:
    """Names of LSTMs that modules hold in plain lists or dicts, which makes them no part of the model."""
    parts = set(model.modules())
    found = []
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            # A module's own dicts, of parts and hooks, have names that begin so.
            if isinstance(value, (list, tuple, dict)) and not name.startswith("_"):
                for path, leaf in leaves.flatten(value, f"{prefix}.{name}" if prefix else name):
                    if isinstance(leaf, nn.LSTM) and leaf not in parts:
                        found.append(path)
    return found


@contextlib.contextmanager
def watched(uses: list[Use], *, keep: bool = False) -> Iterator[None]:
    """Count the calls of LSTMs inside this context.

    Args:
        uses: LSTMs to count; their counts start at zero.
        keep: whether to keep the arguments of the calls.
    """
    handles = []
    for use in uses:
        use.calls = use.steps = use.longest = 0
        use.packed, use.from_zeros = False, True
        use.inputs = []

        def before(_: nn.Module, args: Any, kwargs: Any, use: Use = use) -> None:
            _count(use, args, kwargs, keep=keep)

        handles.append(use.module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count(use: Use, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, keep: bool) -> None:
    value = args[0] if args else kwargs["input"]
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    use.calls += 1
    use.from_zeros &= state is None
    if keep:
        use.inputs.append((_detached(value), _detached(state)))
    if isinstance(value, PackedSequence):
        use.packed = True
        use.steps += int(value.batch_sizes.sum())
        use.longest = max(use.longest, len(value.batch_sizes))
        use.batch = int(value.batch_sizes[0])
        return
    sizes = tuple(value.shape[:-1])
    if value.dim() < _BATCHED:
        sizes = (sizes[0], 1)
    elif use.module.batch_first:
        sizes = sizes[::-1]
    use.steps += sizes[0] * sizes[1]
    use.longest, use.batch = max(use.longest, sizes[0]), sizes[1]


def _detached(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return PackedSequence(value.data.detach(), *value[1:])
    if isinstance(value, Tensor):
        return value.detach()
    return None if value is None else tuple(_detached(part) for part in value)


def look(call: Callable[[], object], uses: list[Use]) -> CallLook:
    """Time of a call in inference, and the share of it that its LSTMs take: what it saves if they take no time.

    Timing the LSTMs inside the call gives less, by a third for a call of 100 us: the hooks take time themselves, and
    what runs after an LSTM of a vendor's library finds its own code and data out of the caches.
    """
    row = _ROW if _seconds(call) < _ENOUGH_S / _CALLS else 1
    results = _results(call, uses)
    whole_s: list[float] = []
    rest_s: list[float] = []
    end_s = time.perf_counter() + _ENOUGH_S
    while len(whole_s) < _CALLS and (len(whole_s) < _LEAST or time.perf_counter() < end_s):
        # Several of a kind in a row, as a variant is timed too.
        whole_s += [_seconds(call) for _ in range(row)]
        for _ in range(row):
            with _for_free(uses, results):
                rest_s.append(_seconds(call))
    found = _calm(whole_s, rest_s)
    return CallLook(found.call_s, 1 - cast("float", found.share))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _results(call: Callable[[], object], uses: list[Use]) -> list[list[Any]]:
    """Results of each LSTM in one call of the model, in order, copied: the model may change them in place."""
    results: list[list[Any]] = [[] for _ in uses]

    def kept(forward: Callable[..., Any], found: list[Any]) -> Callable[..., Any]:
        def forward_and_keep(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            found.append(_copied(result))
            return result

        return forward_and_keep

    with _replaced_forwards(uses, [kept(use.module.forward, found) for use, found in zip(uses, results, strict=True)]):
        call()
    return results


@contextlib.contextmanager
def _for_free(uses: list[Use], results: list[list[Any]]) -> Iterator[None]:
    """Let LSTMs return at once what they returned before, for one call inside this context."""
    again = [iter([_copied(result) for result in found]) for found in results]
    with _replaced_forwards(uses, [lambda *_, found=found, **__: next(found) for found in again]):
        yield


@contextlib.contextmanager
def _replaced_forwards(uses: list[Use], forwards: list[Callable[..., Any]]) -> Iterator[None]:
    before = [dict(vars(use.module)) for use in uses]
    for use, forward in zip(uses, forwards, strict=True):
        use.module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for use, own in zip(uses, before, strict=True):
            del use.module.__dict__["forward"]
            if "forward" in own:
                use.module.__dict__["forward"] = own["forward"]


def _copied(result: Any) -> Any:
    return leaves.rebuilt(result, lambda _, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, "")


def training_look(step: Callable[[], object], uses: list[Use]) -> CallLook:
    """Time of a training step, and its LSTMs' share: timed alone, forward and backward, on the step's inputs."""
    with watched(uses, keep=True):
        step()
    whole_s: list[float] = []
    alone_s: list[float] = []
    end_s = time.perf_counter() + 2 * _ENOUGH_S
    while len(whole_s) < _CALLS and (len(whole_s) < _LEAST or time.perf_counter() < end_s):
        start = time.perf_counter()
        step()
        whole_s.append(time.perf_counter() - start)
        start = time.perf_counter()
        for use in uses:
            for value, state in use.inputs:
                _alone(use.module, value, state)
        alone_s.append(time.perf_counter() - start)
    for use in uses:
        use.inputs = []
    return _calm(whole_s, alone_s)


def _calm(whole_s: list[float], part_s: list[float]) -> CallLook:
    """Share of a part in the whole, over the fastest fifth of the calls of each: those that nothing disturbed.

    They are calls of their own, so a disturbance hits only one of the two. A run meets what is disturbed too, so the
    time of a call is that of all.
    """
    fifth = max(1, len(whole_s) // 5)
    share = statistics.median(sorted(part_s)[:fifth]) / statistics.median(sorted(whole_s)[:fifth])
    return CallLook(statistics.median(whole_s), min(1.0, share))


def _alone(module: nn.RNNBase, value: Any, state: Any) -> None:
    output, _ = module(value, state)
    data = output.data if isinstance(output, PackedSequence) else output
    parameters = [p for p in module.parameters() if p.requires_grad]
    if parameters:
        torch.autograd.grad(data, parameters, torch.ones_like(data))


def gain_limit(found: float) -> float:
    """Largest possible speedup of a call whose LSTMs take this share of it (Amdahl's law)."""
    return float("inf") if found >= 1 else 1 / (1 - found)


def replaced(model: nn.Module, variant: Variant) -> tuple[nn.Module, dict[str, str]]:
    """A model with the LSTMs that a variant names in place of its own, with the same parameters.

    Returns:
        The model (another object only where that itself is an LSTM), and why LSTMs were not replaced, by name.
    """
    if variant.lstm == "nn":
        return model, {}
    if variant.lstm == "kernels":
        result = replace_lstm(model, **variant.lstm_options)
        return result.model, {name or "model": reason for name, reason in result.kept.items()}
    kept = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.LSTM, LSTM)):
            continue
        plain = type(module) is nn.LSTM and module.bias and not module.proj_size
        # Weights that are computed from others are not parameters of the module.
        if not plain or set(module._parameters) != set(module._flat_weights_names):  # noqa: SLF001
            kept[name or "model"] = (
                "is not a plain torch.nn.LSTM: it has no biases, or has projections or computed weights"
            )
            continue
        twin = _twin(cast("nn.LSTM", module), variant)
        if not name:
            return twin, kept
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, twin)
    return model, kept


def _twin(lstm: nn.LSTM, variant: Variant) -> nn.Module:
    twin: nn.RNNBase = _drop_in(LSTMS[variant.lstm])(
        lstm.input_size,
        lstm.hidden_size,
        lstm.num_layers,
        batch_first=True,
        dropout=lstm.dropout,
        bidirectional=lstm.bidirectional,
        **variant.lstm_options,
    )
    for name, parameter in list(lstm.named_parameters()):
        setattr(twin, name, parameter)
    twin.outer_batch_first = lstm.batch_first
    return twin.train(lstm.training)


@functools.cache
def _drop_in(kind: Any) -> Any:
    """A class of LSTMs that are called as torch.nn.LSTM is, of one that takes padded sequences batch first."""

    class DropIn(kind):  # type: ignore[misc]
        outer_batch_first = True

        def forward(self, input: Any, hx: Any = None) -> Any:  # noqa: A002 - torch.nn.LSTM's name
            if isinstance(input, PackedSequence):
                return self._packed(input, hx)
            if input.dim() < _BATCHED:
                hx = None if hx is None else tuple(part.unsqueeze(1) for part in hx)
                output, state = super().forward(input.unsqueeze(0), hx)
                return output.squeeze(0), tuple(part.squeeze(1) for part in state)
            if self.outer_batch_first:
                return super().forward(input, hx)
            output, state = super().forward(input.transpose(0, 1), hx)
            # In torch.nn.LSTM's layout, since the caller may take a view of it.
            return output.transpose(0, 1).contiguous(), state

        def _packed(self, packed: PackedSequence, hx: Any) -> Any:
            padded, lengths = pad_packed_sequence(packed, batch_first=True)
            output, state = super().forward(padded, hx, lengths)
            order = packed.sorted_indices
            if order is not None:
                output, lengths = output.index_select(0, order), lengths.index_select(0, order.cpu())
            again = pack_padded_sequence(output, lengths, batch_first=True)
            return PackedSequence(again.data, again.batch_sizes, order, packed.unsorted_indices), state

    return DropIn
