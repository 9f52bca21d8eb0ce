"""Write an LSTM stack as C to a folder: its weights, the kernel's sources, a C header and examples.

`make` there builds a library that needs neither Python nor torch. `python -m kernels export-c` is its command.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...host.output import run_command
from ...host.usage import PACKAGE, part_of
from ..packing import STORAGE

HERE = Path(__file__).parent
MAGIC = b"S2SLSTM1"
#: How the library can keep weights: `split` needs tiles, which it has not.
PRECISIONS = tuple(name for name in STORAGE if name != "split")
#: Files that a folder gets besides the weights; the headers go to its folder `kernel`.
FILES = ("seq2seq_lstm.h", "seq2seq_lstm.cpp", "example.c", "example.py", "Makefile")
HEADERS = (
    "byte_tiles", "byte_walk", "forward", "integers", "interleaved", "matrices", "overlapped", "pair_walk",
    "paired_bytes", "paired_walk", "pairs", "processor", "products", "rows", "status", "strip_walk", "strips", "summed",
    "team", "tile_walk", "tiles", "vectors", "walk", "weights",
)  # fmt: skip
_PARAMETER = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)(_reverse)?$")


class ServeExportError(ValueError):
    """Weights that cannot be exported; the message says why and what to do."""


def export_c(
    state: Mapping[str, Tensor], folder: Path, *, prefix: str = "", head: str | None = None, precision: str = "fp32"
) -> None:
    """Write an LSTM stack as C to a folder that does not exist yet or is empty.

    Args:
        state: a state_dict with the names of torch.nn.LSTM after `prefix`.
        folder: where to write.
        prefix: what names of the LSTM begin with, such as `encoder.`.
        head: name of a linear layer whose `weight` (outputs, H) and `bias` follow the last layer; None for none.
        precision: one of `PRECISIONS`: how the library keeps the weights.

    Raises:
        ServeExportError: for names, shapes, kinds of LSTM or precisions that the library does not have, and a folder
            that has files.
    """
    if precision not in PRECISIONS:
        msg = f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}"
        raise ServeExportError(msg)
    layers = _layers(state, prefix)
    input_size, hidden = layers[0][0].size(1), layers[0][1].size(1)
    linear = [] if head is None else _head(state, head, hidden)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        msg = f"{folder} exists and is not an empty folder; name another"
        raise ServeExportError(msg)
    outputs = linear[0].size(0) if linear else 0
    values = [value for own in layers for value in own] + linear
    if any(value.is_meta for value in values):
        msg = "the weights have no values (they are on the device meta); load them first"
        raise ServeExportError(msg)
    (folder / "kernel").mkdir(parents=True, exist_ok=True)
    with (folder / "weights.bin").open("wb") as file:
        file.write(MAGIC + struct.pack("<5q", len(layers), input_size, hidden, STORAGE[precision][0], outputs))
        for value in values:
            file.write(value.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
    for name in FILES:
        shutil.copyfile(HERE / name, folder / name)
    for name in HEADERS:
        shutil.copyfile(HERE.parent / f"{name}.h", folder / "kernel" / f"{name}.h")


def _layers(state: Mapping[str, Tensor], prefix: str) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """weight_ih (4H, input), weight_hh (4H, H), bias_ih and bias_hh (4H,) of each layer."""
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    found = [match for name in own if (match := _PARAMETER.match(name))]
    if not found:
        begin = sorted({name[: match.start()] for name in state if (match := _PARAMETER.search(name))})
        known = f"; LSTMs there have the prefixes {', '.join(map(repr, begin))}" if begin else ""
        msg = f"no LSTM with the prefix {prefix!r}{known}"
        raise ServeExportError(msg)
    if any(match[4] for match in found):
        msg = "a bidirectional LSTM needs the later steps, which a stream does not have yet; export one direction"
        raise ServeExportError(msg)
    if any(name.startswith("weight_hr_l") for name in own):
        msg = "an LSTM with projections (proj_size) cannot be exported: the kernel has none"
        raise ServeExportError(msg)
    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for layer in range(1 + max(int(match[3]) for match in found)):
        weights = [own.get(f"weight_{kind}_l{layer}") for kind in ("ih", "hh")]
        if weights[0] is None or weights[1] is None:
            msg = f"layer {layer} of the LSTM {prefix!r} has no weight_ih or weight_hh"
            raise ServeExportError(msg)
        rows, hidden = weights[1].shape
        zeros = torch.zeros(rows, dtype=torch.float32, device="cpu")
        biases = [own.get(f"bias_{kind}_l{layer}", zeros) for kind in ("ih", "hh")]
        first = weights[0].size(1) if layer == 0 else layers[0][1].size(1)
        shapes = [tuple(value.shape) for value in (weights[0], weights[1], *biases)]
        if shapes != [(4 * hidden, first), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]:
            msg = f"layer {layer} of the LSTM {prefix!r} has shapes {shapes}, which do not fit each other"
            raise ServeExportError(msg)
        layers.append((weights[0], weights[1], biases[0], biases[1]))
    return layers


def _head(state: Mapping[str, Tensor], head: str, hidden: int) -> list[Tensor]:
    weight = state.get(f"{head}.weight")
    fitting = [
        name.removesuffix(".weight")
        for name, value in state.items()
        if name.endswith(".weight") and getattr(value, "shape", ())[1:] == (hidden,)
    ]
    if weight is None or head not in fitting:
        shape = "is not there" if weight is None else f"is {tuple(weight.shape)}"
        msg = f"{head}.weight {shape}, expected (outputs, {hidden}) for the last layer's {hidden} hidden units"
        msg += f"; layers with such weights: {', '.join(fitting)}" if fitting else "; no layer has such weights"
        raise ServeExportError(msg)
    bias = state.get(f"{head}.bias", torch.zeros(weight.size(0), dtype=torch.float32, device="cpu"))
    return [weight, bias]


if __name__ == "__main__":
    run_command(part_of(f"{PACKAGE} export-c"))
