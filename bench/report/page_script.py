"""Content that the page carries so that it works without a network: Plotly's script and the figures.

Only the script is taken from Plotly's package.
"""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Mapping
from typing import Any

from plotly.offline import get_plotlyjs


@functools.cache
def script() -> str:
    """Plotly's JavaScript, packed: 5 MB, which take a quarter of a second."""
    return packed(str(get_plotlyjs()))


def packed(text: str) -> str:
    """A text compressed, in letters that may stand inside any element, whatever it holds."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode("ascii")


def as_json(figures: Mapping[str, dict[str, Any]]) -> str:
    """All figures by their ids as one JSON text."""
    return json.dumps(figures, allow_nan=False, separators=(",", ":"))
