"""The LSTM operators of a saved program: what one call asks of them, and their share of its time, by torch's profiler.

A program has no modules to watch, so the operator `aten::lstm` is looked for while the program runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile

from seq2seq.own_model.lstms import CallLook
from seq2seq.runtimes.export import unprinted

OPERATOR = "aten::lstm"
#: Calls from which a share is taken: the median of the fastest few, which nothing disturbed.
_CALLS, _CALM = 10, 3
#: Dimensions of a batch of sequences.
_BATCHED = 3
#: Places of an operator's arguments from the end, the same for padded and packed input.
_LAYERS, _BIDIRECTIONAL = 1, 4


def found_operators(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Describe the LSTM operators of a call as `Use.facts` describes modules; what is not known is None."""
    return [_facts(place, event) for place, event in enumerate(_lstms(_events(call)), 1)]


def operator_look(call: Callable[[], object]) -> CallLook:
    """Return the time of a call, without the profiler, and the share of it that its LSTM operators take."""
    call()
    start = time.perf_counter()
    call()
    call_s = time.perf_counter() - start
    found: list[tuple[float, float]] = []
    for _ in range(_CALLS):
        events = _events(call)
        whole = sum(event.cpu_time_total for event in events if event.cpu_parent is None)
        found.append((whole, sum(event.cpu_time_total for event in _lstms(events))))
    calm = sorted(found)[:_CALM]
    share = statistics.median(part / whole for whole, part in calm)
    return CallLook(call_s, share or None)


def _events(call: Callable[[], object]) -> list[Any]:
    # Its C++ prints when it starts and ends.
    with unprinted(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        call()
    return list(found.events())


def _lstms(events: list[Any]) -> list[Any]:
    return [event for event in events if event.name == OPERATOR]


def _facts(place: int, event: Any) -> dict[str, Any]:
    shape, known = list(event.input_shapes[0]), [value for value in event.concrete_inputs if value is not None]
    packed = len(shape) < _BATCHED and len(event.input_shapes[1]) == 1
    # Padded: has_biases, num_layers, dropout, train, bidirectional, batch_first; packed the same without the last.
    layers, bidirectional = known[_LAYERS], known[_BIDIRECTIONAL]
    batch_first = not packed and bool(known[-1])
    sizes = shape[:2][::-1] if batch_first else shape[:2]
    hidden = next((s[2][1] for s in _shapes(event) if len(s) > 2 and len(s[2]) == 2), None)  # noqa: PLR2004
    return {
        "name": f"operator {place}",
        "kind": OPERATOR,
        "input_size": shape[-1],
        "hidden_size": hidden,
        "num_layers": int(layers),
        "bidirectional": bool(bidirectional),
        "proj_size": 0,
        "calls": 1,
        "batch": None if packed else sizes[1],
        "steps": None if packed else sizes[0],
        "packed": packed,
        "from_zeros": None,
    }


def _shapes(event: Any) -> Iterator[list[list[int]]]:
    """Shapes of the layers of oneDNN inside an operator: input, weights of the input, weights of the state."""
    for child in event.cpu_children:
        if child.name == "aten::mkldnn_rnn_layer":
            yield child.input_shapes
        yield from _shapes(child)
