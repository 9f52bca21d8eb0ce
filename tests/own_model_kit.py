"""Own models for tests: a spec from files or from code, its workloads, and verdicts of the gate on them."""

from __future__ import annotations

import functools
import textwrap
from pathlib import Path

from bench.gate.own_model import gate_for
from seq2seq.execution.executable import execute
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model.catalogue import workload_of
from seq2seq.own_model.model import OwnModel
from seq2seq.own_model.source import Spec
from seq2seq.own_model.workload import own_weights

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
FOREIGN = ROOT / "tests" / "own_models"

#: A model that every check lets through; tests replace a part of it.
PLAIN = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 8, batch_first=True)
        self.head = nn.Linear(8, 3)
    def forward(self, x, state=None):
        y, state = self.lstm(x, state)
        return self.head(y), state

def build():
    return Model()

def example_inputs():
    return torch.randn(2, 7, 5)

def loss(output, inputs):
    return output[0].square().mean()
"""


def written(folder: Path, code: str, name: str = "mine") -> str:
    """Write code to a file of a folder; returns its path."""
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(code), encoding="utf-8")
    return str(path)


def own(path: Path | str, **fields) -> OwnModel:
    """The own model of a file: `build` and `example_inputs` in it, and what the fields say."""
    return OwnModel(Spec(f"{path}:build", **{"folder": str(Path(path).parent), **fields}))


@functools.cache
def foreign(name: str, mode: str = "inference"):
    """The workload of a model of `own_models`, with its loss where it is to be trained."""
    path = FOREIGN / f"{name}.py"
    has_loss = mode == "training" and "\ndef loss" in path.read_text(encoding="utf-8")
    return workload(path, loss=f"{path}:loss" if has_loss else "")


def workload(path: Path | str, name: str = "", **fields):
    """The workload of a file's own model, of the set of a name."""
    found = own(path, **fields)
    return workload_of(found, next(n for n in found.names if n.endswith(name)))


def verdict(problem, variant: str, mode: str = "inference", seed: int = 3):
    """The gate's verdict on a variant of an own model."""
    gate = gate_for(problem, mode, "cpu")
    return gate.check(execute(problem, VARIANTS[variant], mode, "cpu", own_weights(problem)), seed)


#: The worked examples in sizes of a test: code of a file that stands for each.
SMALL = {
    "word_language_model": """
        def build():
            return full.build(50, 16)

        def example_inputs():
            return full.example_inputs(50, 16, steps=5, batch=3)
        """,
    "tagger": """
        def build():
            return full.build(full.WORDS, 8, 16)

        def example_inputs(seed=0, batch=3, steps=6):
            return full.example_inputs(batch, steps, seed)
        """,
    "forecaster": """
        import dataclasses
        full.WORKLOAD = dataclasses.replace(full.WORKLOAD, batch=4, source_steps=12, target_steps=5)
        build, example_inputs = full.build, full.example_inputs
        """,
}


def example(folder: Path, name: str) -> str:
    """Write a small twin of a worked example, its loss and metric among it; returns its path."""
    head = f"""
        import sys
        sys.path.insert(0, {str(EXAMPLES)!r})
        import {name} as full
        loss, metric = full.loss, getattr(full, "perplexity", getattr(full, "accuracy", None))
        """
    code = textwrap.dedent(head) + textwrap.dedent(SMALL[name])
    return written(folder, code, f"small_{name}")
