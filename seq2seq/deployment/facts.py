"""Facts that are needed to use an exported model without this project: inputs, outputs, scaling, vocabulary.

They are written beside the file as JSON, and into an ONNX file as metadata: a key for each fact, its value as JSON.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seq2seq.data.series import Frequency
from seq2seq.data.tokens import BEGIN, END, PAD, UNKNOWN
from seq2seq.layers.likelihoods import LEAST_FREEDOM, LEAST_SCALE, QUANTILES
from seq2seq.models.base import Config

VERSION = 1
#: What the last dimension of the outputs is, by likelihood; softplus(x) is log(1 + exp(x)).
PARAMETERS = {
    "point": {"value": "outputs[0]"},
    "gaussian": {"location": "outputs[0]", "scale": "softplus(outputs[1]) + least_scale"},
    "student": {
        "freedom": "softplus(outputs[0]) + least_freedom",
        "location": "outputs[1]",
        "scale": "softplus(outputs[2]) + least_scale",
    },
    "quantile": {f"quantile {level}": f"outputs[{place}], after sorting" for place, level in enumerate(QUANTILES)},
}
#: Where a timestamp is within a cycle, from 0 to 1.
SHARES = {
    "day": "seconds since midnight / 86400",
    "week": "(days since Monday + share of the day) / 7",
    "year": "(days since January 1 + share of the day) / days of that year",
}


def describe(config: Config, task_state: Mapping[str, Any] | None, form: str, *, lengths: bool) -> dict[str, Any]:
    """Return facts about an exported model, as JSON takes them.

    Args:
        config: sizes of the model.
        task_state: as `checkpoint.Checkpoint` has it; None for a model without a task.
        form: the format that it is exported in.
        lengths: whether lengths are inputs.
    """
    facts: dict[str, Any] = {
        "facts_version": VERSION,
        "format": form,
        "family": config.family,
        "inputs": _inputs(config, lengths=lengths),
        "outputs": {
            "outputs": {"type": "float32", "shape": ["batch", "steps", config.head_size]},
            "hidden": "the decoder's final state, h of an LSTM",
            "cell": "the decoder's final state, c of an LSTM",
        },
    }
    kept = dict((task_state or {}).get("state") or {})
    name = (task_state or {}).get("name")
    if name == "forecasting":
        return facts | {"task": name} | _of_forecasts(kept, config.likelihood)
    if "tokenizer" in kept:
        kept["tokenizer"] = json.loads(kept["tokenizer"])
    if name is not None:
        tokens = {"padding": PAD, "unknown": UNKNOWN, "begin": BEGIN, "end": END}
        facts |= {"task": name, "special_tokens": tokens} | {key: kept[key] for key in kept if key != "task"}
    return facts


def add_metadata(path: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to the metadata of an ONNX file; values are JSON, since metadata are texts."""
    onnx = importlib.import_module("onnx")
    found = onnx.load(io.BytesIO(path.read_bytes()))
    onnx.helper.set_model_props(found, {name: json.dumps(value) for name, value in facts.items()})
    path.write_bytes(found.SerializeToString())


def _inputs(config: Config, *, lengths: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    sides = {"source": (config.source_vocabulary, config.input_size)}
    if config.decodes:
        sides["target"] = (config.target_vocabulary, config.target_size)
    for side, (vocabulary, features) in sides.items():
        steps = ["batch", f"{side} steps"]
        found[side] = (
            {"type": "int64", "shape": steps, "below": vocabulary}
            if vocabulary
            else {"type": "float32", "shape": [*steps, features]}
        )
    if lengths:
        found |= {f"{side}_lengths": {"type": "int64", "shape": ["batch"]} for side in sides}
    return found


def _of_forecasts(state: Mapping[str, Any], likelihood: str) -> dict[str, Any]:
    lag = state["lag"]
    value = f"x[t] - x[t - {lag}]" if lag else "x[t]"
    frequency = Frequency(**state["frequency"])
    circles = [f"{wave}(2 pi share of the {cycle})" for cycle in state["cycles"] for wave in ("sin", "cos")]
    return {
        "frequency": {"name": str(frequency), **state["frequency"]},
        "history": state["history"],
        "horizon": state["horizon"],
        "season": state["season"],
        "difference": lag,
        "features": [f"({value} - mean) / deviation", *circles],
        "cycles": state["cycles"],
        "shares": {cycle: SHARES[cycle] for cycle in state["cycles"]},
        "scales": state["scales"],
        "scaling": "mean and deviation of each series of the training; for another one take those of its own first 80% "
        "of differences. A deviation of 0 says that nothing varied: divide by 1, and multiply by 0.",
        "decoding": "source is the history. Each step of target has the first feature of the step before, the last of "
        "the history to begin with and from then on the model's own, and the other features of the step itself. Values "
        "are outputs * deviation + mean" + (f", added to the value {lag} steps before." if lag else "."),
        "likelihood": {
            "name": likelihood or "point",
            "outputs": PARAMETERS[likelihood or "point"],
            "least_scale": LEAST_SCALE,
            "least_freedom": LEAST_FREEDOM,
            "quantiles": list(QUANTILES),
        },
    }
