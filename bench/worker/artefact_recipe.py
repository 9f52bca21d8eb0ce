"""The source text of an artefact: code that runs a model in the way of a variant, made from the variant's fields.

Runs in a process of its own, since variants need torch: `python -m bench.worker.artefact_recipe WORKLOAD VARIANT MODE
DEVICE` prints the text and what its process needs as JSON, or exits with 1 and the reason why there is no such file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from textwrap import indent

from bench.worker.gating import WEIGHTS_SEED
from kernels.host.output import run_command
from seq2seq.execution.fused_decoder import FusedDecoder
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.runtimes.registry import RUNTIMES
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import UnknownWorkloadError

EXIT_CANNOT = 1
#: Placeholder that the parent replaces by the proof.
PROOF = "(not proven)"


class NoRecipeError(ValueError):
    """A variant that is not a way to ship a model."""


def refusal(variant: Variant, mode: str) -> str | None:
    """Reason why a variant cannot be written as a file of its own, or None."""
    if mode == "decode":
        return "decoding is a loop over steps around the model, and an artefact replaces only whole passes"
    if variant.lstm not in {"nn", "kernels"}:
        return f"{variant.name} runs an LSTM written for comparison, which is not a way to ship a model"
    if variant.captures_step or variant.reuses_outputs:
        return f"{variant.name} returns memory that its next call overwrites, which a caller must know of"
    if variant.torch_tf32 or variant.precision == "tf32":
        return f"{variant.name} is nn.LSTM with settings of torch for the whole process: set TF32 there, nothing else"
    return None


def body(variant: Variant, device: str, mode: str) -> tuple[list[str], list[str]]:
    """Imports and statements that make `run` of `model`, a model of the suite's.

    Args:
        variant: in its precision here.
        device: `cpu` or `cuda`.
        mode: `inference` or `training`.

    Raises:
        NoRecipeError: with the reason why there is none.
    """
    imports, lines = replacing(variant, mode, "replaced.kept or not replaced.swapped")
    if variant.decoder == "fused" and mode == "inference":
        imports.append(f"from {FusedDecoder.__module__} import {FusedDecoder.__name__}")
        lines.append(f"{FusedDecoder.__name__}.into(model)  # a model whose decoder is not fed stays as it is")
    if variant.runtime is not None:
        imports.append(f"from {RUNTIMES[variant.runtime].__module__} import {RUNTIMES[variant.runtime].__name__}")
        made = RUNTIMES[variant.runtime].__name__
        return imports, [*lines, f"return {made}(model, {json.dumps(dict(variant.runtime_options))})"]
    if variant.compiler == "dynamo":
        lines.append(f"run = torch.compile(model.run{compile_options(variant)})")
    elif variant.compiler == "torchscript":
        lines.append("run = torch.jit.script(model).run")
    else:
        lines.append("run = model.run")
    return imports, [*lines, *_called(variant, device, mode)]


def replacing(variant: Variant, mode: str, wrong: str) -> tuple[list[str], list[str]]:
    """Imports and statements that give `model` the variant's LSTMs and precision, and set Dynamo up.

    Args:
        variant: in its precision here.
        mode: `inference` or `training`.
        wrong: condition on `replaced` under which the statements raise.

    Raises:
        NoRecipeError: with the reason why there is none.
    """
    if reason := refusal(variant, mode):
        raise NoRecipeError(reason)
    imports, lines = ["import torch"], []
    if variant.lstm == "kernels":
        options = ", ".join(f"{name}={json.dumps(value)}" for name, value in variant.lstm_options.items())
        imports += [
            "try:",
            "    from kernels import replace_lstm  # in a checkout",
            "except ImportError:",
            "    from seq2seq_kernels import replace_lstm  # installed",
        ]
        lines += [
            f"replaced = replace_lstm(model, {options})",
            f"if {wrong}:",
            "    raise RuntimeError(str(replaced))",
            "model = replaced.model",
        ]
    if variant.stores_low(mode):
        lines += [f"model.to({variant.dtype})"]
    if variant.compiler == "dynamo" and variant.allow_rnn:
        imports.append("import torch._dynamo")
        lines += ["# Without it Dynamo leaves nn.LSTM as it is.", "torch._dynamo.config.allow_rnn = True"]
    return imports, lines


def compile_options(variant: Variant) -> str:
    """More arguments of torch.compile, each after a comma."""
    return "".join(f", {name}={value!r}" for name, value in variant.compile_options.items())


def contexts(variant: Variant, device: str, mode: str) -> list[str]:
    """Context managers that must be active during a call."""
    found = []
    if not variant.vendor_lstm and variant.lstm == "nn":
        library = "cudnn" if device == "cuda" else "mkldnn"
        found.append(f"torch.backends.{library}.flags(enabled=False)")
    if variant.autocast or (variant.dtype.itemsize < 4 and mode == "training"):  # noqa: PLR2004
        found.append(f"torch.autocast({json.dumps(device)}, {variant.dtype})")
    return found


def environment_lines(variant: Variant) -> list[str]:
    """Statements that refuse a process without the variant's environment variables; none where it has none."""
    if not variant.environment:
        return []
    return [
        "# Libraries read these when they are loaded, so the process must be started with them.",
        f"ENVIRONMENT = {json.dumps(dict(variant.environment))}",
        "if missing := [f'{name}={value}' for name, value in ENVIRONMENT.items() if os.environ.get(name) != value]:",
        "    raise RuntimeError(f\"start the process with {' '.join(missing)}\")",
        "",
        "",
    ]


def _called(variant: Variant, device: str, mode: str) -> list[str]:
    """Statements that wrap each call in those context managers."""
    around, low = contexts(variant, device, mode), variant.stores_low(mode)
    if not around and not low:
        return ["return run"]
    dtype = variant.dtype
    cast = f"*[x.to({dtype}) if x is not None and x.is_floating_point() else x for x in inputs]" if low else "*inputs"
    inside = [f"return run({cast})"]
    if around:
        inside = [f"with {', '.join(around)}:", f"    {inside[0]}"]
    return ["", "def call(*inputs):", *(f"    {line}" for line in inside), "", "return call"]


def text(workload: str, variant: str, mode: str, device: str) -> str:
    """The artefact's source.

    Args:
        workload: name of the suite's own or of a checkpoint.
        variant: name in `VARIANTS`.
        mode: `inference` or `training`.
        device: `cpu` or `cuda`.

    Raises:
        NoRecipeError: see `body`.
    """
    found = VARIANTS[variant].here()
    imports, lines = body(found, device, mode)
    imports = [*(["import os", ""] if found.environment else []), imports[0], "from torch import nn", "", *imports[1:]]
    imports.append(f"from {starting_weights.__module__} import starting_weights")
    imports.append(f"from {find_workload.__module__} import find_workload")
    statements = indent("\n".join(lines), "    ")
    constants = f"WORKLOAD, MODE, DEVICE = {json.dumps(workload)}, {json.dumps(mode)}, {json.dumps(device)}"
    train = "model.train()" if mode == "training" else "model.eval()"
    head = f"{workload}, {mode} on {device}: `{variant}`, {found.summary}."
    quoted = head.replace("\\", "\\\\").replace('"""', "'''")
    return f'''"""{quoted}

`apply(model)` returns what runs a model this way: a function of `source, target, source_lengths, target_lengths`.
`load()` builds the measured model, with the weights it was measured with, and applies it. Needs this project on the
path (PYTHONPATH=CHECKOUT). Run as a program it makes one call.
{PROOF}
"""

{chr(10).join(imports)}

{chr(10).join(environment_lines(found))}{constants}


def apply(model):
    """Return a function that runs `model` this way; where LSTMs are replaced, they are so in `model` itself."""
{statements}


def load():
    """Return the measured model, run this way."""
    workload = find_workload(WORKLOAD)
    model = workload.config.build(nn.LSTM)
    model.load_state_dict(starting_weights(workload, {WEIGHTS_SEED}))
    model.to(DEVICE)
    {train}
    return apply(model)


if __name__ == "__main__":
    run, batch = load(), find_workload(WORKLOAD).make_batch(0).to(DEVICE, None)
    with torch.set_grad_enabled(MODE == "training"):
        outputs = run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)[0]
    print("outputs", *outputs.shape)
'''


def main() -> int:
    """Print a recipe."""
    workload, variant, mode, device = sys.argv[1:]
    return printed(variant, lambda: text(workload, variant, mode, device))


def printed(variant: str, make: Callable[[], str]) -> int:
    """Print a recipe and the needs of its process as one line of JSON, or why there is none; return the exit code."""
    if variant not in VARIANTS:
        print(f"{variant} is a variant of a plugin, of which there is no recipe", file=sys.stderr)
        return EXIT_CANNOT
    try:
        found = make()
    except (NoRecipeError, UnknownWorkloadError) as error:
        print(error, file=sys.stderr)
        return EXIT_CANNOT
    made = VARIANTS[variant]
    # The user's code may have printed something before.
    print(f"\n{json.dumps({'source': found, 'alone': made.alone, 'environment': dict(made.environment)})}")
    return 0


if __name__ == "__main__":
    run_command(main)
