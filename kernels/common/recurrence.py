"""One layer's recurrence as plain data: what every LSTM kernel reads and writes, and a reference loop.

The products over all steps (input projection before, weight gradients after) are not in here: they are GEMMs of torch.
What remains must be computed step by step, forward and backward, for one direction or both at once.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Everything that decides which kernel can serve and which is fastest; hashable, without tensors.

    Attributes:
        device: `cpu` or `cuda`.
        dtype: of the gates, the hidden state and the recurrent weights; the cell state is always float32.
        batch, steps, hidden_size: B, T, H.
        directions: 1, or 2 for a bidirectional layer.
        saves: whether the forward pass keeps what the backward pass needs.
        masked: whether sequences differ in length.
        tf32: whether float32 products may round their factors to TF32.
        capability: compute capability as 90 for 9.0; 0 on a CPU.
        multiprocessors: programs of one block each that certainly run at the same time; 0 on a CPU.
        gpu: name of the GPU as torch reports it, by which its table is found; empty on a CPU.
        resets: whether rows of the batch begin anew in the middle of the steps.
        autocast: whether the tensors are float32, in a plain eager call under autocast to `dtype`.
        storage: how a module wants its weights kept on a CPU: a key of `kernels.cpu.packing.STORAGE`.
    """

    device: str
    dtype: torch.dtype
    batch: int
    steps: int
    hidden_size: int
    directions: int = 1
    saves: bool = False
    masked: bool = False
    tf32: bool = False
    capability: int = 0
    multiprocessors: int = 0
    gpu: str = ""
    resets: bool = False
    autocast: bool = False
    storage: str = "fp32"


@dataclass(frozen=True)
class Forward:
    """Tensors of a forward recurrence, as views with time first; T steps, batch B, D directions, hidden size H.

    The last dimension is contiguous everywhere; other strides are whatever the caller has (batch first, expanded).
    Direction 1 walks backward in time. Past a sequence's length the state is held, `output` is zero, and what stands in
    `gates_input` is not read. A kernel writes every element of every output.

    Attributes:
        gates_input: (T, B, D, 4H), `x @ weight_ih.T + bias_ih + bias_hh`, gates in the order i, f, g, o.
        weight_hh: (D, 4H, H), contiguous.
        h0: (D, B, H) contiguous, dtype of the gates; zeros when None.
        c0: (D, B, H) contiguous, float32 (float64 for float64 gates); zeros when None.
        lengths: (B,) int32 on the same device, each from 0 to T; all T when None.
        output: (T, B, D, H), written: h of every step.
        h_n: (D, B, H) contiguous, written: h after each sequence's last step.
        c_n: (D, B, H) contiguous, as c0, written.
        gates: (T, B, D, 4H), written with i, f, g, o after their sigmoid or tanh; None when not kept. Past a length:
            anything finite.
        cells: (T, B, D, H), as c0, written with c after every step (held past a length); None when not kept.
        tf32: whether float32 products may use TF32.
        resets: (D, T, B) bool, contiguous: true where h and c of a row are zero before the step, in the order in which
            the direction walks (`resets_of`), and no gradient passes; not looked at past a length. None: nowhere.
    """

    gates_input: Tensor
    weight_hh: Tensor
    h0: Tensor | None
    c0: Tensor | None
    lengths: Tensor | None
    output: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor | None
    cells: Tensor | None
    tf32: bool
    resets: Tensor | None = None

    @functools.cached_property
    def problem(self) -> Problem:
        """Facts that kernels are chosen by."""
        gates, masked, resets = self.gates_input, self.lengths is not None, self.resets is not None
        steps, batch, directions, four_hidden = gates.shape
        saves = self.gates is not None
        return problem_on(
            gates.device, gates.dtype, batch, steps, four_hidden // 4, directions, saves, masked, self.tf32, resets
        )


@dataclass(frozen=True)
class Backward:
    """Tensors of a backward recurrence; views as in `Forward`.

    Attributes:
        weight_hh, c0, lengths, tf32, resets: as in `Forward`.
        gates, cells: as the forward pass left them.
        grad_output: (T, B, D, H), gradient of the output, dtype of the gates; not looked at past a length.
        grad_h_n: (D, B, H) contiguous, dtype of the gates; zeros when None.
        grad_c_n: (D, B, H) contiguous, as c0; zeros when None.
        grad_gates: (T, B, D, 4H), written: gradient of `gates_input`, zero past a length.
        grad_h0: (D, B, H) contiguous, written, dtype of the gates.
        grad_c0: (D, B, H) contiguous, written, as c0.
    """

    weight_hh: Tensor
    c0: Tensor | None
    lengths: Tensor | None
    gates: Tensor
    cells: Tensor
    grad_output: Tensor
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    grad_gates: Tensor
    grad_h0: Tensor
    grad_c0: Tensor
    tf32: bool
    resets: Tensor | None = None

    @functools.cached_property
    def problem(self) -> Problem:
        """Facts that kernels are chosen by."""
        gates, masked, resets = self.gates, self.lengths is not None, self.resets is not None
        steps, batch, directions, four_hidden = gates.shape
        return problem_on(
            gates.device, gates.dtype, batch, steps, four_hidden // 4, directions, True, masked, self.tf32, resets
        )


class LayerOptions(NamedTuple):
    """Options that all layers of a call share: the chosen kernel, and its arguments besides tensors.

    Attributes:
        hidden, directions: H, and 1 or 2.
        batch_first: order of the first two dimensions of input and output.
        implementation: a name of `kernels.dispatch` but `vendor`.
        dtype: in which products are made: the input's, or autocast's.
        tf32: whether the recurrence may round float32 factors to TF32.
        storage: how the CPU kernel keeps weights: a key of `kernels.cpu.packing.KEPT`.
    """

    hidden: int
    directions: int
    batch_first: bool
    implementation: str
    dtype: torch.dtype
    tf32: bool
    storage: str = "fp32"


def placed(device: torch.device) -> torch.device:
    """The device with its number: `cuda` alone is the current one, which changes."""
    number: int | None = device.index
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and number is None else device


@functools.lru_cache(maxsize=4096)
def problem_on(  # noqa: PLR0913, PLR0917 - the fields of a problem
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    steps: int,
    hidden_size: int,
    directions: int,
    saves: bool,
    masked: bool,
    tf32: bool,
    resets: bool = False,
    autocast: bool = False,
    storage: str = "fp32",
) -> Problem:
    """The problem on a device, with what is to be known of that; kept, since it is asked for several times a call."""
    problem = Problem(
        device.type, dtype, batch, steps, hidden_size, directions, saves, masked, tf32,
        resets=resets, autocast=autocast, storage=storage,
    )  # fmt: skip
    return on_device(problem, device)


def on_device(problem: Problem, device: torch.device) -> Problem:
    """The problem with what is to be known of the device."""
    if device.type != "cuda":
        return problem
    capability, multiprocessors, gpu = gpu_facts(torch.cuda.current_device() if device.index is None else device.index)
    return dataclasses.replace(problem, capability=capability, multiprocessors=multiprocessors, gpu=gpu)


@functools.cache
def gpu_facts(index: int) -> tuple[int, int, str]:
    """Capability, multiprocessors and name of a GPU; asking torch takes longer than the rest of a choice."""
    properties = torch.cuda.get_device_properties(index)
    name = torch.cuda.get_device_name(index)
    return 10 * properties.major + properties.minor, properties.multi_processor_count, name


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of the cell state for gates of a type: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


#: Message of the error for gradients of gradients.
NO_DOUBLE_BACKWARD = (
    "kernels.LSTM has no double backward (gradients of gradients); use torch.nn.LSTM with "
    "torch.backends.cudnn.flags(enabled=False) for that"
)


def resets_of(resets: Tensor, lengths: Tensor | None, directions: int) -> Tensor:
    """Steps before which each direction's state becomes zero, where a mask says which steps begin a new sequence.

    A direction that walks backward leaves a sequence at its first step, so its state becomes zero one step earlier:
    both directions compute what they would for each sequence alone.

    Args:
        resets: (T, B) bool: true where a step is the first of a new sequence.
        lengths: (B,), or None for all steps.
        directions: 1 or 2.

    Returns:
        (D, T, B) bool, contiguous.
    """
    if directions == 1:
        return resets.unsqueeze(0).contiguous()
    inside = resets
    if lengths is not None:
        inside = resets & (torch.arange(resets.size(0), device=resets.device)[:, None] < lengths)
    return torch.stack([resets, torch.cat([inside[1:], torch.zeros_like(resets[:1])])])


def loop_forward(args: Forward) -> None:
    """The recurrence in torch operations, step by step: slow, any device, any type, and what kernels are compared with.

    Products and states are computed in `state_dtype`; h is rounded to the gates' type at every step, as kernels do.
    """
    steps, batch, directions, _ = args.gates_input.shape
    dtype, wide = args.gates_input.dtype, state_dtype(args.gates_input.dtype)
    hidden = args.weight_hh.size(2)
    for direction in range(directions):
        weight = args.weight_hh[direction].to(wide).t()
        h = args.h_n.new_zeros(batch, hidden) if args.h0 is None else args.h0[direction]
        c = args.c_n.new_zeros(batch, hidden) if args.c0 is None else args.c0[direction]
        for step in range(steps - 1, -1, -1) if direction else range(steps):
            h_before, c_before = h, c
            if args.resets is not None:
                reset = args.resets[direction, step][:, None]
                h_before, c_before = torch.where(reset, 0.0, h), torch.where(reset, 0.0, c)
            gates = args.gates_input[step, :, direction].to(wide) + h_before.to(wide) @ weight
            i, f, g, o = gates.chunk(4, dim=1)
            i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
            c_new = f * c_before + i * g
            h_new = (o * c_new.tanh()).to(dtype)
            kept, out = torch.cat([i, f, g, o], dim=1), h_new
            if args.lengths is not None:
                inside = (step < args.lengths)[:, None]
                h_new, c_new = torch.where(inside, h_new, h), torch.where(inside, c_new, c)
                out = torch.where(inside, h_new, 0.0)
                kept = torch.where(inside, kept, 0.0)
            h, c = h_new, c_new
            args.output[step, :, direction] = out
            if args.gates is not None and args.cells is not None:
                args.gates[step, :, direction] = kept.to(dtype)
                args.cells[step, :, direction] = c
        args.h_n[direction], args.c_n[direction] = h, c


def loop_backward(args: Backward) -> None:
    """The gradients of `loop_forward`, in torch operations, step by step."""
    steps, batch, directions, _ = args.gates.shape
    dtype, wide = args.gates.dtype, state_dtype(args.gates.dtype)
    hidden = args.weight_hh.size(2)
    for direction in range(directions):
        weight = args.weight_hh[direction].to(wide)
        zeros = torch.zeros(batch, hidden, dtype=wide, device=args.gates.device)
        dh = zeros if args.grad_h_n is None else args.grad_h_n[direction].to(wide)
        dc = zeros if args.grad_c_n is None else args.grad_c_n[direction]
        first = zeros if args.c0 is None else args.c0[direction]
        order = list(range(steps - 1, -1, -1) if direction else range(steps))
        for position in range(steps - 1, -1, -1):
            step = order[position]
            i, f, g, o = args.gates[step, :, direction].to(wide).chunk(4, dim=1)
            tanh_c = args.cells[step, :, direction].tanh()
            before = args.cells[order[position - 1], :, direction] if position else first
            inside = None if args.lengths is None else (step < args.lengths)[:, None]
            reset = None if args.resets is None else args.resets[direction, step][:, None]
            if reset is not None:
                before = torch.where(reset, 0.0, before)
            from_output = args.grad_output[step, :, direction].to(wide)
            total = dh + (from_output if inside is None else torch.where(inside, from_output, 0.0))
            dc_here = dc + total * o * (1 - tanh_c * tanh_c)
            grad = torch.cat(
                [
                    dc_here * g * i * (1 - i),
                    dc_here * before * f * (1 - f),
                    dc_here * i * (1 - g * g),
                    total * tanh_c * o * (1 - o),
                ],
                dim=1,
            )
            if inside is not None:
                grad = torch.where(inside, grad, 0.0)
            rounded = grad.to(dtype)
            args.grad_gates[step, :, direction] = rounded
            dh_before, dc_before = rounded.to(wide) @ weight, dc_here * f
            if reset is not None:
                dh_before, dc_before = torch.where(reset, 0.0, dh_before), torch.where(reset, 0.0, dc_before)
            if inside is not None:
                dh_before, dc_before = torch.where(inside, dh_before, dh), torch.where(inside, dc_before, dc)
            dh, dc = dh_before, dc_before
        args.grad_h0[direction], args.grad_c0[direction] = dh.to(dtype), dc
