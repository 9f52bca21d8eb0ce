"""Work of `kernels.tools.tune` in a child process: time all candidates of one shape and phase, and torch's own LSTM."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import dispatch, padded_vendor
from ..common.cudnn_precision import cudnn_precision, wanted_precision
from ..common.recurrence import Problem, loop_forward
from ..dispatch import MODULES
from ..lstm import LSTM
from ..measurements import MeasuredShape, Timing, dtype_name
from .interleave import Call, Clock, EventClock, WallClock, interleave, quartiles
from .problems import DEVICE, GRADIENTS, OUTPUTS, Sizes, configured
from .process_pool import at

#: Names of a job's parts: a candidate by its number, the products over all steps, and `kernels.LSTM` as it is called.
OURS, AROUND, MODULE = "ours", "around", "module"
#: End of the reason of a candidate that was right and then failed while it was timed.
WHILE_TIMED = "(while it was timed)"


@dataclass(frozen=True)
class Candidate:
    """A configuration that was right, and its worst error over what is allowed."""

    implementation: str
    config: Any
    error: float


@dataclass(frozen=True)
class Job:
    """One shape in one phase (`inference`, `forward` or `backward`).

    Attributes:
        candidates: that were right.
        wrong: those that were not, each with its reason.
        left_out: parts besides the candidates that hung or broke before and are not tried again.
    """

    sizes: Sizes
    tf32: bool
    phase: str
    candidates: tuple[Candidate, ...]
    wrong: tuple[str, ...] = ()
    rounds: int = 15
    seed: int = 0
    left_out: tuple[str, ...] = ()

    def without(self, part: str, reason: str) -> Job | None:
        """Return the job without what failed in it; None where that is not a part that it can do without.

        Args:
            part: as the work named it (`process_pool.at`).
            reason: what became of it.
        """
        kind, _, number = part.partition(" ")
        if kind == OURS:
            gone = self.candidates[int(number)]
            wrong = f"{gone.implementation} {gone.config}: {reason} {WHILE_TIMED}"
            kept = tuple(one for one in self.candidates if one is not gone)
            return dataclasses.replace(self, candidates=kept, wrong=(*self.wrong, wrong))
        if not part or part == AROUND or part in self.left_out:
            return None
        return dataclasses.replace(self, wrong=(*self.wrong, f"{part}: {reason}"), left_out=(*self.left_out, part))


def measure(job: Job, clock: Clock | None = None) -> MeasuredShape:
    """Time a job where kernels run, by CUDA events or, in Triton's interpreter, the host's clock; or by a given clock.

    Raises:
        RuntimeError: when a candidate left an output unwritten.
    """
    products, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
    products.fp32_precision = "tf32" if job.tf32 else "ieee"
    try:
        with cudnn_precision(wanted_precision(job.sizes.dtype, tf32=job.tf32)):
            return _measured(job, clock or (EventClock() if DEVICE == "cuda" else WallClock()))
    finally:
        products.fp32_precision = before


def _measured(job: Job, clock: Clock) -> MeasuredShape:
    """The entry of a job, with precisions set."""
    sizes = job.sizes
    calls = {f"{OURS} {number}": call for number, call in enumerate(_ours(job))}
    at(AROUND)
    calls[AROUND] = _around(sizes, job.phase)
    at("")
    padded = -(-sizes.batch // 8) * 8
    vendors = {"vendor": (sizes.dtype, sizes.batch, "vendor")}
    if padded_vendor.changes(sizes.hidden, sizes.hidden, sizes.batch, directions=sizes.directions):
        vendors["vendor padded"] = (sizes.dtype, sizes.batch, dispatch.PADDED)
    if (sizes.dtype, sizes.batch) != (torch.float16, padded):
        vendors["vendor float16"] = (torch.float16, padded, "vendor")
    for name, (dtype, batch, implementation) in vendors.items():
        if name in job.left_out:
            continue
        at(name)
        try:
            calls[name] = _tried(_module(sizes, dtype, batch, job.phase, implementation))
        except RuntimeError as error:  # It does not support every shape and type; ours are timed anyway.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            text = f"torch's own LSTM in {str(dtype).removeprefix('torch.')}: {reason}"
            job = dataclasses.replace(job, wrong=(*job.wrong, text))
    at("")
    return _with_modules(job, evaluate(job, calls, clock), clock)


def _with_modules(job: Job, entry: MeasuredShape, clock: Clock) -> MeasuredShape:
    """The entry with the time of `kernels.LSTM` as a user calls it, for the best of each kernel.

    With few steps, the host's work around the kernel (module, memory, autograd) dominates, and torch's figures include
    it.
    """
    calls, kernels = {}, dict(entry.kernels)
    with configured(functools.partial(_best, {name: timing.config for name, timing in kernels.items()})):
        for name in kernels:
            if f"{MODULE} {name}" in job.left_out:
                continue
            at(f"{MODULE} {name}")
            try:
                calls[name] = _tried(_module(job.sizes, job.sizes.dtype, job.sizes.batch, job.phase, name))
            except (RuntimeError, ValueError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                entry = dataclasses.replace(entry, wrong=(*entry.wrong, f"kernels.LSTM({name!r}) as called: {reason}"))
        told = functools.partial(_at, prefix=f"{MODULE} ")
        times = interleave(calls, clock, rounds=job.rounds, seed=job.seed, told=told)
    at("")
    for name, values in times.items():
        if len(values) == job.rounds:
            low, middle, high = quartiles(values)
            kernels[name] = dataclasses.replace(kernels[name], module_s=middle, module_low_s=low, module_high_s=high)
    return dataclasses.replace(entry, kernels=kernels)


def _best(best: Mapping[str, Mapping[str, Any]], problem: Problem, implementation: str, backward: bool) -> Any:
    """The configuration that was best for an implementation; None where it does not serve a problem."""
    configs = importlib.import_module(MODULES[implementation]).configs(problem, backward=backward)
    return next((config for config in configs if dataclasses.asdict(config) == best.get(implementation)), None)


def _at(name: str, prefix: str) -> None:
    at(f"{prefix}{name}")


def _tried(call: Call) -> Call:
    """The call, after it has run once."""
    if call.prepare is not None:
        call.prepare()
    call.run()
    return call


def evaluate(job: Job, calls: dict[str, Call], clock: Clock) -> MeasuredShape:
    """Time calls, the candidates' named `ours 0` and so on in their order, and keep the best of each kernel."""
    times = interleave(calls, clock, rounds=job.rounds, seed=job.seed, told=at)
    at("")
    kernels: dict[str, Timing] = {}
    medians_s: dict[str, float] = {}
    for number, candidate in enumerate(job.candidates):
        values = times[f"{OURS} {number}"]
        low, middle, high = quartiles(values)
        medians_s[f"{candidate.implementation} {candidate.config}"] = middle
        best = kernels.get(candidate.implementation)
        # One that was dropped after the trial has lost, whatever its few rounds say.
        if len(values) == job.rounds and (best is None or middle < best.time_s):
            config = dataclasses.asdict(candidate.config)
            kernels[candidate.implementation] = Timing(config, middle, low, high, len(values), candidate.error)
    sizes = job.sizes
    vendor = quartiles(times["vendor"])[1] if "vendor" in times else None
    float16 = quartiles(times["vendor float16"])[1] if "vendor float16" in times else None
    if (sizes.dtype, sizes.batch % 8) == (torch.float16, 0):
        float16 = vendor
    return MeasuredShape(
        phase=job.phase,
        dtype=dtype_name(sizes.problem(tf32=job.tf32)),
        batch=sizes.batch,
        steps=sizes.steps,
        hidden_size=sizes.hidden,
        directions=sizes.directions,
        kernels=kernels,
        around_s=quartiles(times[AROUND])[1],
        vendor_s=vendor,
        vendor_float16_s=float16,
        wrong=job.wrong,
        vendor_padded_s=quartiles(times["vendor padded"])[1] if "vendor padded" in times else None,
        medians_s=medians_s,
    )


def _ours(job: Job) -> list[Call]:
    """Each candidate on the same tensors, after it has shown that it writes all outputs at this very size."""
    args: Any = job.sizes.forward(save=job.phase != "inference", tf32=job.tf32)
    names = OUTPUTS[:3] if job.phase == "inference" else OUTPUTS
    if job.phase == "backward":
        loop_forward(args)
        args, names = job.sizes.backward(args), GRADIENTS
    found = []
    for number, candidate in enumerate(job.candidates):
        at(f"{OURS} {number}")
        module = importlib.import_module(MODULES[candidate.implementation])
        function = module.backward if job.phase == "backward" else module.forward
        for name in names:
            getattr(args, name).fill_(float("nan"))
        function(args, candidate.config)
        for name in names:
            if not getattr(args, name).isfinite().all():
                msg = f"{candidate.implementation} {candidate.config} left {name} unwritten or not finite"
                raise RuntimeError(msg)
        found.append(Call(_bound(function, args, candidate.config), group=candidate.implementation))
    return found


def _bound(function: Callable[..., None], args: Any, config: Any) -> Callable[[], None]:
    return lambda: function(args, config)


def _around(sizes: Sizes, phase: str) -> Call:
    """The products over all steps that go with our kernels, as `kernels.ops` has them; the input as wide as h."""
    rows, hidden, directions = sizes.steps * sizes.batch, sizes.hidden, sizes.directions

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=sizes.dtype)

    x, weight, bias = random(rows, hidden), random(directions * 4 * hidden, hidden), random(directions * 4 * hidden)
    if phase != "backward":
        return Call(lambda: functional.linear(x, weight, bias), group="around")
    grad, h = random(rows, directions * 4 * hidden), random(rows, hidden)

    def products() -> list[Tensor]:
        parts = grad.chunk(directions, dim=1)
        recurrent = [part[sizes.batch :].t() @ h[: rows - sizes.batch] for part in parts]
        return [grad @ weight, grad.t() @ x, grad.sum(0), *recurrent]

    return Call(products, group="around")


def _module(sizes: Sizes, dtype: torch.dtype, batch: int, phase: str, implementation: str) -> Call:
    """A module as a user calls it: one layer, time first, input as wide as h; nn.LSTM for `vendor`."""
    made: Callable[..., nn.RNNBase] = nn.LSTM
    if implementation != "vendor":
        made = functools.partial(LSTM, implementation=implementation)
    lstm = made(sizes.hidden, sizes.hidden, bidirectional=sizes.directions > 1).to(DEVICE, dtype)
    if implementation in dispatch.VENDORS and sizes.directions == 1:
        # torch itself lays out no bfloat16 weights, and would copy them at every call.
        padded_vendor.flatten(lstm)
    x = torch.randn(sizes.steps, batch, sizes.hidden, device=DEVICE, dtype=dtype)
    group = f"module {implementation} {dtype}"
    if phase == "inference":
        lstm.eval()

        def infer() -> object:
            with torch.inference_mode():
                return lstm(x)

        return Call(infer, group=group)
    x.requires_grad_()
    if phase == "forward":
        return Call(lambda: lstm(x), group=group)
    outputs: list[Tensor] = []
    wanted = [x, *lstm.parameters()]
    grad = torch.randn_like(lstm(x)[0])

    def prepare() -> None:
        outputs[:] = [lstm(x)[0]]

    return Call(lambda: torch.autograd.grad(outputs[0], wanted, grad), prepare, group)
