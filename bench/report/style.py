"""Looks of a variant: colour, marker and line, the same in every plot and on the page.

Eighteen colours cannot all be distinguished, with or without full colour vision, so curves also differ in
marker and dash. The colours are mid-tones from the palettes of Okabe and Ito and of Paul Tol, chosen to
stand on a white page and on a dark one.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from kernels.host.output import utf8

#: Known variants. Relatives share a hue: cuDNN is blue, compilers are green, reduced precision is orange.
COLOURS = {
    "reference": "#808080",
    "loop": "#b3a58c",
    "onednn": "#56b4e9",
    "cudnn": "#0072b2",
    "cudnn-fair": "#6a8fd8",
    "compile": "#009e73",
    "compile-loop": "#44aa99",
    "compile-graphs": "#7bbf4b",
    "compile-rnn": "#2e8b3d",
    "amp-bf16": "#e69f00",
    "amp-bf16-native": "#d55e00",
    "amp-fp16": "#c9a227",
    "tf32": "#cc79a7",
    "torchscript": "#aa4499",
    "triton": "#b0325f",
    "cpu-fused": "#7a5cc9",
    "onnxruntime": "#999933",
    "onnxruntime-int8": "#bbbb66",
    "openvino": "#cc6677",
    "openvino-default": "#e08a94",
    "int8-dynamic": "#b8860b",
    "lstmcell": "#8c7a5b",
    "cpu-fused-w8a8": "#4f7f5f",
}
#: For names not above, picked by checksum: Python's own hash changes from process to process.
OTHER_COLOURS = ("#3f8fa8", "#a6761d", "#8c6bb1", "#d6604d", "#4d9221", "#c2589c", "#5a7ea6", "#a89f3c")

#: The same marker and the same dash, as Matplotlib and as Plotly name them.
MARKERS = (
    ("o", "circle"),
    ("s", "square"),
    ("^", "triangle-up"),
    ("D", "diamond"),
    ("v", "triangle-down"),
    ("P", "cross"),
    ("X", "x"),
    ("<", "triangle-left"),
    (">", "triangle-right"),
    ("p", "pentagon"),
    ("h", "hexagon"),
    ("*", "star"),
)
DASHES = (("-", "solid"), ("--", "dash"), ("-.", "dashdot"), (":", "dot"))


@dataclass(frozen=True)
class Look:
    """Style of a variant; `marker` and `dash` hold Matplotlib's name, then Plotly's."""

    colour: str
    marker: tuple[str, str]
    dash: tuple[str, str]


def look(variant: str) -> Look:
    """The look of `variant`, which depends only on its name."""
    names = list(COLOURS)
    if variant in COLOURS:
        place, colour = names.index(variant), COLOURS[variant]
    else:
        place = zlib.crc32(utf8(variant))
        colour = OTHER_COLOURS[place % len(OTHER_COLOURS)]
    return Look(colour, MARKERS[place % len(MARKERS)], DASHES[place % len(DASHES)])
