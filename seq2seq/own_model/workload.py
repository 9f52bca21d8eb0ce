"""An own model as a workload: one set of inputs, with what the checks found of a call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seq2seq.execution.variant import Variant
from seq2seq.models.base import Stack
from seq2seq.models.family_defaults import FamilyDefaults
from seq2seq.models.weights import Weights
from seq2seq.own_model import lstms
from seq2seq.own_model.inputs import Given, InputSet
from seq2seq.own_model.model import OwnModel
from seq2seq.own_model.runtimes import why_not
from seq2seq.own_model.saved import unfit_program
from seq2seq.workloads.checkpoint import starting_weights

FAMILY = "own"
#: Fields of `OwnWorkload` that the checks found.
_FOUND = (
    "batch", "source_steps", "valid_steps", "has_lengths", "held", "aliased", "stays", "narrow", "untrained", "notes",
)  # fmt: skip
#: Least and largest factor of a weight that the gate draws, and what is added in root mean squares of the weight.
_FACTOR, _ADDED = 0.5, 0.25


@dataclass(frozen=True)
class OwnConfig(FamilyDefaults):
    """Sizes of an own model, as far as harness and requirements ask for them."""

    stacks: tuple[Stack, ...]
    parameters: int

    family: str = FAMILY
    decodes: bool = False
    #: Something runs between the LSTMs, for torch.compile to compile when it skips them.
    bridged: bool = True

    @property
    def hidden_size(self) -> int:
        """Of its first LSTM; 0 for a saved program, which has no modules."""
        return self.stacks[0].hidden_size if self.stacks else 0

    @property
    def num_layers(self) -> int:
        """Of its first LSTM; 0 for a saved program."""
        return self.stacks[0].num_layers if self.stacks else 0


@dataclass(frozen=True)
class OwnWorkload:
    """One set of inputs of the user's model; what `seq2seq.workloads.workload.Workload` is for the suite's own.

    Attributes:
        name: of the workload.
        own: the model and its functions.
        inputs: the set.
        config: sizes of its LSTMs.
        batch, source_steps: sequences and longest steps that its first LSTM reads in a call.
        valid_steps: steps that the busiest LSTM reads, padding left out.
        has_lengths: whether an LSTM reads packed sequences.
        held: inputs whose content is never changed.
        stays: inputs that stay on the CPU, whatever the device.
        aliased: outputs that share memory with inputs or weights, which no call computes.
        narrow: why the truth is in float32, in words; empty where it is in float64.
        untrained: why it cannot be trained, in words; empty where it can.
        notes: what was changed of the model in training, in words.
    """

    name: str
    own: OwnModel
    inputs: InputSet
    config: OwnConfig
    batch: int
    source_steps: int
    valid_steps: int
    has_lengths: bool
    held: frozenset[str]
    aliased: frozenset[str]
    stays: frozenset[str] = frozenset()
    narrow: str = ""
    untrained: str = ""
    notes: str = ""

    target_steps: None = None
    decoded_steps: None = None
    beam: int = 1
    checkpoint: str = ""
    data: str = "your own inputs"

    def found(self) -> dict[str, Any]:
        """Findings of the checks as plain values, so that the worker of a cold start need not call the model first."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {name: plain[name] for name in _FOUND}
        sets = {name: sorted(value) for name, value in kept.items() if isinstance(value, frozenset)}
        return kept | sets | {"config": dataclasses.asdict(self.config)}

    @classmethod
    def known(cls, name: str, own: OwnModel, inputs: InputSet, found: dict[str, Any]) -> OwnWorkload:
        """The workload of what `found` gave in another process."""
        config = found["config"]
        stacks = tuple(Stack(**stack) for stack in config["stacks"])
        sets = {key: frozenset(value) for key, value in found.items() if isinstance(value, list)}
        return cls(name, own, inputs, **(found | sets | {"config": OwnConfig(**(config | {"stacks": stacks}))}))

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"your model {self.own.spec.model}"

    @property
    def source(self) -> str:
        """Origin of the sizes."""
        return f"{self.own.spec.model}, inputs {self.own.spec.trace or self.own.inputs_name}"

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes in which it can be measured."""
        return ("inference",) if self.untrained else ("inference", "training")

    def facts(self) -> dict[str, Any]:
        """Facts of its rows in records.csv."""
        return {
            "model": FAMILY,
            "data": self.data,
            "source": self.source,
            "batch": self.batch,
            "source_steps": self.source_steps,
            "target_steps": None,
            "valid_steps": self.valid_steps,
            "hidden_size": self.config.hidden_size or None,
            "num_layers": self.config.num_layers or None,
            "parameters": self.config.parameters,
            "input_set": self.inputs.name or None,
            "weight": self.inputs.weight,
            "unavailable": None,
        }

    def make_batch(self, seed: int) -> Given:
        """The inputs of a seed, in memory of their own: the user's for seed 0, or where the function takes the seed."""
        return batch_of(self.inputs, seed, self.held, self.stays)

    def refuses(self, variant: Variant, mode: str) -> str | None:
        """Reason why a variant is not a way to execute this model, or None."""
        if mode == "training" and self.untrained:
            return self.untrained
        if (mode == "training" and variant.runtime) or variant.make is not None:
            return None
        # TorchScript is asked once: it compiles for no inputs, and fails otherwise where it failed before.
        key = ("" if variant.compiler == "torchscript" else self.name, variant.name)
        if key not in self.own.refused:
            self.own.refused[key] = _unfit(self, variant)
        return self.own.refused[key]


def batch_of(
    inputs: InputSet, seed: int, fixed: frozenset[str] = frozenset(), stays: frozenset[str] = frozenset()
) -> Given:
    """The inputs of a set and a seed, on the CPU."""
    value = inputs.make(seed if inputs.seeded else 0, "cpu")
    found = Given(value, fixed, stays).copy()
    return found if inputs.seeded or seed == 0 else found.varied(torch.Generator().manual_seed(seed))


@starting_weights.register(OwnWorkload)
def own_weights(workload: OwnWorkload, seed: int = 0) -> Weights:
    """The weights that the user's function built, copied."""
    del seed
    state = workload.own.model.state_dict()
    return {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}


def random_weights(workload: OwnWorkload, seed: int) -> Weights:
    """Weights for the gate: the user's, each value times 0.5 to 1.5 and moved by up to a quarter of their usual size.

    Zeros become small numbers, so that what leaves a bias of zeros out does not pass. What shares memory still does;
    buffers are as they were.
    """
    generator = torch.Generator().manual_seed(seed)
    found = own_weights(workload)
    parameters = dict(workload.own.model.named_parameters(remove_duplicate=False))
    drawn: dict[int, Tensor] = {}
    for name, value in found.items():
        parameter = parameters.get(name)
        if parameter is None or not value.is_floating_point() or not value.numel():
            continue
        if id(parameter) not in drawn:
            usual = float(value.square().mean().sqrt()) or 0.1
            factor = 1 + _FACTOR * (2 * torch.rand(value.shape, generator=generator) - 1)
            drawn[id(parameter)] = value * factor + usual * _ADDED * (
                2 * torch.rand(value.shape, generator=generator) - 1
            )
        found[name] = drawn[id(parameter)]
    return found


def _unfit(workload: OwnWorkload, variant: Variant) -> str | None:
    """Reason why a variant's LSTMs cannot stand in this model, or its runtime does not take it, or None."""
    if workload.own.form is not None and (reason := unfit_program(workload.own.form, variant)):
        return reason
    if variant.compiler == "torchscript" or variant.runtime is not None:
        return why_not(workload.own.fresh().eval(), workload.make_batch(0), variant)
    if variant.lstm == "nn":
        return None
    _, kept = lstms.replaced(workload.own.fresh(), variant)
    of_model = {stack.name for stack in workload.config.stacks}
    left = {name: reason for name, reason in kept.items() if name in of_model}
    if len(left) < len(of_model):
        return None
    name, reason = next(iter(left.items()))
    return f"no LSTM of the model can be replaced: {name} {reason}"
