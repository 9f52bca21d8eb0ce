"""The parent's part of an own model: what the command line says of it, handed to workers; none of it runs here."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.errors import UsageError

#: Environment variable of workers with what the command line says, as JSON; see `seq2seq.own_model.source`.
VARIABLE = "SEQ2SEQ_BENCH_OWN_MODEL"
#: The suite that measures it, unless another is named.
SUITE = "own-model"
#: Options that say something of it.
OPTIONS = ("model", "inputs", "loss", "metric", "add_variant")
_TRACE = ".jsonl"
#: From this many LSTMs in a row on that are alike, one line describes them.
_ALIKE = 3
#: Section of environment.json with the shares of the LSTMs.
SHARES = "lstm_share"
#: What to know of a saved file, by its form.
_FORMS = {
    "a pickled module": "loading it ran the code that it names",
    "an ONNX model": "onnxruntime and openvino are compared with each other, since torch does not run it",
}


def reference(text: str) -> str:
    """A reference as workers know it, who run elsewhere: a file's path in full, a module's name as it is."""
    place, function = _parts(text)
    if not place:
        msg = f"{text!r} names no file; expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"
        raise argparse.ArgumentTypeError(msg)
    if place.endswith(":"):
        msg = f"{text!r} names no function after the colon; expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"
        raise argparse.ArgumentTypeError(msg)
    is_file = "/" in place or Path(place).suffix in {
        ".py",
        _TRACE,
        ".pt",
        ".pth",
        ".pt2",
        ".onnx",
        ".ort",
        ".torchscript",
    }
    # A saved model may have any other name.
    is_file = is_file or Path(place).is_file()
    return f"{Path(place).resolve() if is_file else place}{':' if function else ''}{function}"


def _parts(text: str) -> tuple[str, str]:
    """File or module of a reference, and its function; empty where it names none."""
    place, colon, function = text.rpartition(":")
    return (place, function) if colon and function.isidentifier() else (text, "")


def named_reference(text: str) -> str:
    """`NAME=FILE.py:FUNCTION`; the name is the function's where none is given."""
    name, equals, place = text.partition("=")
    # A path may hold an = too, but a name holds no /.
    if not equals or "/" in name or "." in name:
        name, place = text.rpartition(":")[2], text
    found = reference(place)
    if ":" not in found or not all(c.isalnum() or c in "-_." for c in name):
        msg = f"{text!r} is not NAME=FILE.py:FUNCTION, with a name of letters, digits, - and _"
        raise argparse.ArgumentTypeError(msg)
    return f"{name}={found}"


def variable(arguments: Mapping[str, Any]) -> str:
    """The value of `VARIABLE` for options; empty where they name no model.

    Raises:
        UsageError: for options that need a model, without one.
    """
    model = arguments.get("model")
    if not model:
        if given := next((name for name in OPTIONS if arguments.get(name)), None):
            msg = f"--{given.replace('_', '-')} is about a model of your own: name it with --model FILE.py:FUNCTION"
            raise UsageError(msg)
        return ""
    traces = [text for text in arguments.get("inputs") or [] if Path(text).suffix == _TRACE]
    functions = [text for text in arguments.get("inputs") or [] if text not in traces]
    if len(traces) > 1 or len(functions) > 1:
        msg = "--inputs takes one function and one trace at most; several sets are what the function returns"
        raise UsageError(msg)
    if traces and not Path(traces[0]).is_file():
        msg = f"--inputs {traces[0]} does not exist; expected a trace of JSON lines, or FILE.py:FUNCTION"
        raise UsageError(msg)
    variants: dict[str, str] = {}
    for text in arguments.get("add_variant") or []:
        name, _, place = text.partition("=")
        if name in variants:
            msg = f"--add-variant {name} is given twice; give one of them another name: NAME=FILE.py:FUNCTION"
            raise UsageError(msg)
        variants[name] = place
    return json.dumps(
        {
            "model": model,
            "inputs": functions[0] if functions else "",
            "trace": traces[0] if traces else "",
            "loss": arguments.get("loss") or "",
            "metric": arguments.get("metric") or "",
            "variants": variants,
            "folder": arguments.get("model_folder") or str(Path.cwd()),
        }
    )


def stored(facts: Mapping[str, Any]) -> str:
    """The value of `VARIABLE` that a run gave its workers; empty without an own model.

    Args:
        facts: environment.json of the run.
    """
    found: Any = facts
    for name in ("threads", "workers", VARIABLE):
        found = found.get(name, "") if isinstance(found, Mapping) else ""
    return str(found)


def given(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of a run that describe the user's own model; None without one.

    Args:
        facts: environment.json of the run.
    """
    found = stored(facts)
    return dict(json.loads(found)) if found else None


def folder(facts: Mapping[str, Any]) -> str:
    """The folder in which a run was begun, where its model's modules are looked for; empty without a model.

    Args:
        facts: environment.json of the run.
    """
    found = given(facts)
    return str(found["folder"]) if found else ""


def files(found: Mapping[str, Any]) -> list[str]:
    """Files that an own model was given with, each once."""
    references = (
        *(found[name] for name in ("model", "inputs", "trace", "loss", "metric")),
        *found["variants"].values(),
    )
    paths = [_parts(text)[0] for text in references if text and Path(_parts(text)[0]).is_absolute()]
    return list(dict.fromkeys(paths))


def missing(found: Mapping[str, Any]) -> list[str]:
    """Files that an own model was given with and that are gone."""
    return [path for path in files(found) if not Path(path).is_file()]


def words(facts: Mapping[str, Any]) -> list[str]:
    """The options that name a run's own model and its inputs; none without a model.

    Args:
        facts: environment.json of the run.
    """
    return _named(given(facts) or {}, (("--model", "model"), ("--inputs", "inputs"), ("--inputs", "trace")))


def run_words(value: str, variant: str) -> list[str]:
    """The options of `bench run` that describe an own model, for one of its variants; none without a model.

    Args:
        value: of `VARIABLE`.
        variant: of those that the user added, the one to name: all that are named are measured.
    """
    found = json.loads(value) if value else {}
    options = [("--model", "model"), ("--inputs", "inputs"), ("--inputs", "trace"), ("--loss", "loss")]
    added = [f"{name}={place}" for name, place in found.get("variants", {}).items() if name == variant]
    return _named(found, [*options, ("--metric", "metric")]) + [w for text in added for w in ("--add-variant", text)]


def _named(found: Mapping[str, Any], options: Iterable[tuple[str, str]]) -> list[str]:
    return [word for option, key in options if found.get(key) for word in (option, found[key])]


def lines(found: Mapping[str, Any]) -> list[str]:
    """Describe the model for the terminal: its LSTMs, their share of a call, and what was held or changed."""
    said = [f"model {found['model']}: {found['parameters']:,} parameters"]
    if form := found.get("saved"):
        said.append(f"  {form}: {_FORMS.get(form, 'operators and no torch.nn.LSTM, so no LSTM is replaced')}")
    for entry in found["sets"]:
        if entry["input_set"]:
            said.append(f"inputs {entry['input_set']}, {entry['weight']:.0%} of calls")
        said += [f"  {text}" for text in _lstms([lstm for lstm in entry["lstms"] if lstm["calls"]])]
        for mode, share in entry["lstm_share"].items():
            said.append(f"  {mode}: {share_text(share)}")
        said += [f"  {text}" for text in _remarks(entry["checked"])]
    if lost := found.get("unregistered"):
        said.append(f"  no part of the model, so neither replaced nor trained: {', '.join(lost)}; use nn.ModuleList")
    if found["cells"]:
        said.append(f"  nn.LSTMCell is left as it is: {', '.join(found['cells'])}")
    return said


def shares(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Share of a call's time that the LSTMs take, by workload and mode, for environment.json."""
    return {entry["workload"]: {m: round(s, 4) for m, s in entry["lstm_share"].items()} for entry in found["sets"]}


def share_of(facts: Mapping[str, Any], workload: str, mode: str) -> float | None:
    """The share of a group's LSTMs, as a run recorded it; None where it did not.

    Args:
        facts: environment.json of the run.
        workload: of the group.
        mode: of the group.
    """
    section = facts.get(SHARES)
    found = section.get(workload) if isinstance(section, Mapping) else None
    share = found.get(mode) if isinstance(found, Mapping) else None
    return float(share) if isinstance(share, int | float) else None


def share_text(share: float) -> str:
    """Say a share of the LSTMs and the bound that follows from it by Amdahl's law."""
    most = 1 / (1 - share) if share < 1 else float("inf")
    bound = f"faster LSTMs alone make it at most {most:.1f}x" if most < 100 else "they decide its time"  # noqa: PLR2004
    return f"your LSTMs take {share:.0%} of a call: {bound}"


def _lstms(found: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each LSTM; neighbours that are alike share one if they are many."""
    said = []
    for what, alike in itertools.groupby(((lstm["name"], _lstm(lstm)) for lstm in found), key=lambda pair: pair[1]):
        names = [name for name, _ in alike]
        if len(names) >= _ALIKE:
            names = [f"{names[0]} to {names[-1]}, {len(names)} of them"]
        said += [f"{name}: {what}" for name in names]
    return said


def _lstm(lstm: Mapping[str, Any]) -> str:
    """Sizes and use of an LSTM, in words."""
    hidden = "size not known" if lstm["hidden_size"] is None else lstm["hidden_size"]
    sizes = f"{lstm['num_layers']} x {hidden}{' each way' if lstm['bidirectional'] else ''}"
    if lstm["batch"] is None:
        return f"{lstm['kind']} {sizes}, in {lstm['input_size']}{'; packed' if lstm['packed'] else ''}"
    calls = "" if lstm["calls"] == 1 else f", {lstm['calls']} calls"
    packed = "packed, longest" if lstm["packed"] else "steps"
    read = f"batch {lstm['batch']}, {packed} {lstm['steps']}{calls}"
    return f"{lstm['kind']} {sizes}, in {lstm['input_size']}; {read}"


def _remarks(found: Mapping[str, Any]) -> list[str]:
    said = []
    if found["narrow"]:
        said.append(f"truth is in float32, limits are wider: it does not run in float64 ({found['narrow']})")
    if found["untrained"]:
        said.append(f"training is left out: {found['untrained']}")
    if found["notes"]:
        said.append(found["notes"])
    if found["aliased"]:
        said.append(f"not compared, for they are inputs or weights themselves: {', '.join(found['aliased'])}")
    return said
