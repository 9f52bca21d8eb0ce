"""Audit of what the gate cannot see: whether each timed call does all of its work before it returns.

The gate judges a variant on weights and inputs of its own, elsewhere in memory. The audit examines the timed call
itself, on the timed batch itself, whose content is changed in place. A result that was cached by address, by version or
from the first call is then wrong, and exceeds the gate's limits. A result that is right but was not computed, because
the same content came before, shows in the time: a call must not be faster on inputs that it has seen
(`repeated_inputs.py`).

Inputs are changed without changing their version counters, as callers do who use `tensor.data` or NumPy. Weights are
loaded in the way an optimizer changes them, so caching packed weights for as long as their version is unchanged is
honest.

Not checked: CPU time after the call has returned. OpenMP's own threads spin for a while after each parallel
region, and working ahead gains nothing unless the next call's input was seen before.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gate import repeated_inputs as seen
from bench.gate.parity import GRADIENT, ROUNDOFF, TOLERANCES, Gate, relative_error
from bench.machine import interference
from bench.timing import clock, seat
from seq2seq.data.batch import Batch
from seq2seq.execution.executable import LEARNING_RATE, Executable
from seq2seq.models.weights import Weights

#: Seconds after which results that were wrong at return are looked at again; this affects only the wording.
LATE_S = 0.25
#: Largest error of an optimizer step, as a share of the step; a step that was left out has 1.
STEP_SHARE = 0.01
#: Attempts at a step whose loss scale overflows, each with half the scale of the one before.
STEP_ATTEMPTS = 16
ADAM_EPSILON = 1e-8

#: Functions that read the clock or time calls, as they were before any variant was loaded: owner, attribute, value.
_TIMEKEEPERS: tuple[tuple[Any, str, Any], ...] = tuple(
    (owner, name, getattr(owner, name))
    for owner, names in (
        (time, ("perf_counter_ns", "perf_counter", "monotonic", "monotonic_ns", "time", "time_ns")),
        (torch.cuda, ("synchronize", "Event")),
        (torch.cuda.Event, ("record", "elapsed_time", "synchronize")),
        (clock, ("_now_ns", "_synchronize", "_Event", "_queued", "Block")),
        (clock, ("now_s", "synchronize", "time_once", "time_block")),
        (seat, ("time_once", "time_block", "now_s", "take_turn", "_cpu_s", "Turn")),
        (seat.Ready, ("turn",)),
        (interference, ("read", "judge", "_now_s", "read_delays", "longest_delay_s", "queued_s", "since")),
        (gc, ("disable", "enable", "isenabled")),
        (clock.time_once, ("__code__",)),
        (clock.time_block, ("__code__",)),
        (seat.take_turn, ("__code__",)),
    )
    for name in names
)


def restore_timekeepers() -> list[str]:
    """Restore every clock that was replaced since this module was imported; return their names."""
    changed = []
    for owner, name, value in _TIMEKEEPERS:
        if getattr(owner, name) is not value:
            setattr(owner, name, value)
            changed.append(f"{getattr(owner, '__name__', owner)}.{name}")
    return changed


@dataclass(frozen=True)
class AuditProblem:
    """Weights, a batch on the CPU, and how to get what belongs to them.

    Attributes:
        weights: fp32.
        batch: on the CPU.
        quantities: what they must give at a precision (`truth`: in float64).
        usual_norms, usual_errors: see `judge`; errors of the reference at a precision.
    """

    weights: Weights
    batch: Batch
    quantities: Callable[[str], dict[str, Tensor]]
    usual_norms: Callable[[], Mapping[str, float]]
    usual_errors: Callable[[str], Mapping[str, float]]


@dataclass
class _Call:
    """Results of one call, and copies of them made at once."""

    results: dict[str, Tensor]
    copies: dict[str, Tensor]


class RefusedError(Exception):
    """A check failed; the message says what was found, in words for the record."""


class Audit:
    """Checks of the timed calls of one group.

    Args:
        gate: of the group; lends its truth, limits and seeds.
        weights: those that the timed calls start from, fp32.
        batch: the one that is timed, on the CPU.
    """

    def __init__(self, gate: Gate, weights: Weights, batch: Batch) -> None:
        self._gate = gate
        # A copy: where nothing needs converting, the variants are timed on the very tensors given here.
        self._batch = batch.copy()
        asked = gate.askable(self._batch, weights)
        # Weights that were learnt may have gradients far from the gate's, which are those of random ones.
        usual_at = weights if gate.workload.checkpoint else None
        self._timed = AuditProblem(
            weights,
            asked,
            functools.cache(functools.partial(gate.shared, "timed", weights, asked)),
            functools.cache(functools.partial(gate.usual_norms, usual_at)),
            functools.cache(functools.partial(gate.usual_errors, weights=usual_at)),
        )

    def find(self, executable: Executable, prepared: Batch, seed: int, *, warm: bool) -> str:
        """Reason why the timed call is refused, in words; nothing when it is honest.

        Afterwards the batch is as it was, and the weights are those that timing starts from.

        Args:
            executable: what is timed.
            prepared: the batch that it is timed on.
            seed: of the gate's weights and batch that are put in place of the timed ones.
            warm: whether it is warm, so that its calls can be timed.
        """
        try:
            with _collector_off():
                self._work(executable, prepared, seed)
                if executable.mode != "training":
                    self._address(executable, prepared, seed)
                    if warm:
                        _refuse_unless_slow(seen.compare(executable, prepared, self._timed.batch, seed))
        except RefusedError as refusal:
            reason = str(refusal)
        else:
            reason = ""
        finally:
            prepared.overwrite(executable.prepare(self._batch))
            executable.restart(self._timed.weights)
        changed = restore_timekeepers()
        return f"replaced {', '.join(changed)}, which measures time" if changed else reason

    def _work(self, executable: Executable, prepared: Batch, seed: int) -> None:
        """Run two problems in turn in the same memory: each result must be right, complete, and stay unchanged."""
        other = AuditProblem(
            self._gate.weights(seed),
            self._gate.batch(seed),
            functools.partial(self._gate.quantities, seed),
            self._gate.usual_norms,
            self._gate.usual_errors,
        )
        before: _Call | None = None
        for problem in (self._timed, other):
            executable.restart(problem.weights)
            prepared.overwrite(executable.prepare(problem.batch))
            call = self._watched(executable, prepared, problem)
            self._right(executable, prepared, problem, call, before)
            if before and not executable.variant.reuses_outputs:
                for name, value in before.results.items():
                    if not torch.equal(value, before.copies[name]):
                        msg = f"{name} of a call was overwritten by the next call, and no `reuses_outputs` says so"
                        raise RefusedError(msg)
            before = call

    def _watched(self, executable: Executable, prepared: Batch, problem: AuditProblem) -> _Call:
        """Call once, and check that the call changed nothing but its own results."""
        inputs = {name: value.clone() for name, value in prepared.tensors().items()}
        weights = {name: value.detach().clone() for name, value in executable.model.named_parameters()}
        if executable.mode == "training":
            call = self._step(executable, prepared, problem)
        else:
            call = call_once(executable, prepared)
        theirs = {_memory(value): name for name, value in prepared.tensors().items()}
        theirs |= {_memory(value): name for name, value in executable.model.named_parameters()}
        for name, value in call.results.items():
            if _memory(value) in theirs:
                msg = f"{name} shares memory with {theirs[_memory(value)]}, which it was computed from"
                raise RefusedError(msg)
        for name, value in prepared.tensors().items():
            if not torch.equal(value, inputs[name]):
                msg = f"a call changed its input {name}"
                raise RefusedError(msg)
        for name, value in executable.model.named_parameters():
            if executable.mode != "training" and not torch.equal(value, weights[name]):
                msg = f"a call in {executable.mode} changed the weights: {name}"
                raise RefusedError(msg)
        return call

    def _step(self, executable: Executable, prepared: Batch, problem: AuditProblem) -> _Call:
        """One training step from known weights; the weights must have moved as Adam's first step moves them."""
        for _ in range(STEP_ATTEMPTS):
            scale = executable.loss_scale
            call = call_once(executable, prepared)
            if executable.loss_scale >= scale:
                break
            # The step overflowed in fp16 and was left out, as it must be.
            executable.restart(problem.weights)
        for name, value in executable.model.named_parameters():
            before = problem.weights[name].to(value.device, torch.float64)
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            call.copies[GRADIENT + name] = gradient.detach().clone()
            step = first_step(gradient)
            missed = float(torch.linalg.vector_norm(value.detach().double() - before - step))
            rounding = 2 * ROUNDOFF["fp32"] * float(torch.linalg.vector_norm(before))
            allowed = STEP_SHARE * float(torch.linalg.vector_norm(step)) + rounding
            # An overflow that no scale mends is for the gradients' check to report.
            if bool(gradient.isfinite().all()) and not missed <= allowed:
                msg = f"a training step did not move {name} as Adam does: off by {missed:.2e}, at most {allowed:.2e}"
                raise RefusedError(msg)
        return call

    def _right(
        self, executable: Executable, prepared: Batch, problem: AuditProblem, call: _Call, before: _Call | None
    ) -> None:
        """Compare the results at return with truth; look at wrong ones again later, in case they were late."""
        precision = executable.variant.precision
        truth = {} if executable.mode == "decode" else problem.quantities("truth")
        expected = functools.partial(problem.quantities, precision)

        def refused(copies: dict[str, Tensor]) -> str:
            found = dict(copies)
            if executable.mode == "decode":
                verdict = self._gate.judge_decoded(found, expected(), precision, problem.weights, problem.batch)
                return "" if verdict.passed else verdict.describe()
            found = executable.completed(found, prepared)
            true = {name: truth[name] for name in found}
            usual_errors = functools.partial(problem.usual_errors, precision)
            verdict = self._gate.judge(found, true, expected, precision, problem.usual_norms, usual_errors)
            return "" if verdict.passed else verdict.describe()

        wrong = refused(call.copies)
        if not wrong:
            return
        time.sleep(LATE_S)
        clock.synchronize(executable.device)
        late = {name: value.detach().clone() for name, value in call.results.items()}
        if not refused(call.copies | late):
            what = "the results were not complete when the call returned"
        elif before and all(torch.equal(before.copies[name], late[name]) for name in late):
            what = "new weights and new content in the same memory gave the results of the call before"
        elif executable.mode != "training" and _ignores_weights(executable, prepared, late):
            what = "the weights were changed and the results stayed the same"
        else:
            what = "the timed call, on the timed batch's memory, is wrong"
        msg = f"{what}: {wrong}"
        raise RefusedError(msg)

    def _address(self, executable: Executable, prepared: Batch, seed: int) -> None:
        """Check that new content in the timed memory gives the same result as elsewhere; weights are unchanged."""
        executable.restart(self._timed.weights)
        prepared.overwrite(executable.prepare(self._timed.batch))
        call_once(executable, prepared)
        prepared.overwrite(executable.prepare(self._timed.batch.varied(torch.Generator().manual_seed(seed))))
        here = call_once(executable, prepared).copies
        there = call_once(executable, prepared.copy()).copies
        limit = 2 * TOLERANCES[executable.variant.precision].floor
        error = max(relative_error(here[name], there[name].double()) for name in here)
        if not error <= limit:
            msg = (
                "the result depends on where the input lies: new content in the same memory and in other memory gave "
                f"outputs that differ by {error:.2e}, at most {limit:.2e}"
            )
            raise RefusedError(msg)


def call_once(executable: Executable, prepared: Batch) -> _Call:
    """The timed call, in the timed call's context; its results are copied before anything waits for anything.

    Raises:
        RefusedError: when a result is not a plain tensor.
    """
    clock.synchronize(executable.device)
    with executable.context():
        result: Any = executable.call(prepared)
        named: dict[str, Tensor] = executable.named(result)
        for name, value in named.items():
            if type(value) is not torch.Tensor:
                msg = f"{name} is a {type(value).__name__}, not a plain tensor: it may be computed only when it is read"
                raise RefusedError(msg)
        return _Call(named, {name: value.detach().clone() for name, value in named.items()})


def _ignores_weights(executable: Executable, prepared: Batch, results: dict[str, Tensor]) -> bool:
    executable.restart({name: value / 2 for name, value in executable.weights().items()})
    again = call_once(executable, prepared).copies
    return all(torch.equal(again[name], value) for name, value in results.items())


def first_step(gradient: Tensor) -> Tensor:
    """Adam's first step for a gradient, in float64 (Kingma and Ba 2015, with both means corrected for their start)."""
    wide = gradient.detach().double()
    return -LEARNING_RATE * wide / (wide.abs() + ADAM_EPSILON)


def _refuse_unless_slow(found: seen.Seen) -> None:
    if not found.passed:
        msg = (
            f"faster on inputs it has seen before: a new input takes {found.ratio:.1f} times as long, "
            f"at least {found.least:.1f} times where {seen.LIMIT:g} is the limit"
        )
        raise RefusedError(msg)


def _memory(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


@contextlib.contextmanager
def _collector_off() -> Iterator[None]:
    """Switch the garbage collector off, as in a timed block, so that a variant cannot recognise a check by it."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
