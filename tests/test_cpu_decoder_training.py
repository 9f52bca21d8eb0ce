"""The decoder's native calls with gradients, called directly: as plain torch in float64, with dropout of layers."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from cpu_builds import TARGETS
from planted_kernels import NOTHING
from torch import Tensor

from kernels.cpu import build, decoder, decoder_training
from kernels.cpu.decoder import FedState, Memory
from seq2seq.execution import fused_decoder

pytest.importorskip("hypothesis")
from fed_decoders import (
    CLOSE_BACK,
    KINDS,
    Found,
    decoder_built_for,
    model_of,
    planted_decoder,
    problem,
    uninitialised_is_nan,
    worst,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="there is no C++ compiler")
Arguments = tuple[Tensor, FedState, list[tuple[Tensor, ...]], Memory, tuple[Tensor, Tensor | None]]


def by_torch(  # noqa: PLR0913 - as `decoder.run`
    x: Tensor,
    state: FedState,
    layers: list[tuple[Tensor, ...]],
    memory: Memory,
    combine: tuple[Tensor, Tensor | None],
    lengths: Tensor,
    dropped: Tensor | None,
    *,
    feeds_context: bool,
) -> tuple[Tensor, FedState]:
    """The equations, a step at a time; what is past a length is zero, and the state is held there."""
    hidden, cell, fed = list(state.hidden.unbind(0)), list(state.cell.unbind(0)), state.fed
    decoded = []
    for t, step in enumerate(x.unbind(1)):
        below, runs = torch.cat([step, fed], 1), (t < lengths)[:, None]
        for number, (weight_ih, weight_hh, *biases) in enumerate(layers):
            gates = below @ weight_ih.T + hidden[number] @ weight_hh.T + sum(biases)
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * cell[number] + i.sigmoid() * g.tanh()
            below = o.sigmoid() * c.tanh()
            cell[number], hidden[number] = torch.where(runs, c, cell[number]), torch.where(runs, below, hidden[number])
            if dropped is not None and number + 1 < len(layers):
                below = below * dropped[number, :, t]
        query = below
        if memory.query is not None:
            query = query @ memory.query[0].T + (0 if memory.query[1] is None else memory.query[1])
        if memory.vector is None:
            scores = (query[:, None] * memory.keys).sum(-1)
        else:
            scores = torch.tanh(query[:, None] + memory.keys) @ memory.vector
        scores = scores * memory.scale
        if memory.mask is not None:
            scores = scores.masked_fill(~memory.mask, -math.inf)
        context = (scores.softmax(1)[..., None] * memory.values).sum(1)
        joint = torch.cat([context, below], 1) @ combine[0].T
        found = torch.tanh(joint if combine[1] is None else joint + combine[1])
        fed = torch.where(runs, context if feeds_context else found, fed)
        decoded.append(torch.where(runs, found, 0.0))
    return torch.stack(decoded, 1), FedState(torch.stack(hidden), torch.stack(cell), fed)


@dataclasses.dataclass(frozen=True)
class ProblemSizes:
    """Sizes and kind of a problem; without `asks` queries are h itself, and `keys` is the hidden size."""

    batch: int
    steps: int
    inputs: int
    hidden: int
    size: int
    keys: int
    layers: int
    memory_steps: int
    asks: bool
    additive: bool
    context: bool
    biased: bool
    seed: int


@st.composite
def all_sizes(draw: st.DrawFn) -> ProblemSizes:
    """Sizes around those of vectors, and every kind: what scores need not go with how queries are made."""
    sizes = st.sampled_from([1, 2, 15, 16, 17, 33])
    inputs, hidden, size, keys = (draw(sizes) for _ in range(4))
    asks, additive, context, biased = (draw(st.booleans()) for _ in range(4))
    return ProblemSizes(
        draw(st.integers(1, 9)), draw(st.integers(1, 4)), inputs, hidden, size, keys if asks else hidden,
        draw(st.integers(1, 3)), draw(st.integers(1, 9)), asks, additive, context, biased, draw(SEEDS),
    )  # fmt: skip


def made(sizes: ProblemSizes) -> tuple[Found, Found]:
    """What needs gradients by name, and what has none; in float64."""
    batch, steps, inputs, hidden, size, keys, layers, memory_steps, asks, additive, context, biased, seed = (
        dataclasses.astuple(sizes)
    )  # fmt: skip
    fed = size if context else hidden
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / (1 + shape[-1]) ** 0.5

    given_ = {
        "x": some(batch, steps, inputs), "hidden": some(layers, batch, hidden), "cell": some(layers, batch, hidden),
        "fed": some(batch, fed), "values": some(batch, memory_steps, size), "keys": some(batch, memory_steps, keys),
        "combine": some(hidden, size + hidden),
    }  # fmt: skip
    given_ |= {"combine_bias": some(hidden)} if biased else {}
    given_ |= {"vector": some(keys)} if additive else {}
    if asks:
        given_ |= {"query": some(keys, hidden)} | ({"query_bias": some(keys)} if biased else {})
    for layer in range(layers):
        features = hidden if layer else inputs + fed
        given_ |= {f"ih {layer}": some(4 * hidden, features), f"hh {layer}": some(4 * hidden, hidden)}
        given_ |= {f"bias {layer} {n}": some(4 * hidden) for n in range(2)} if biased else {}
    drops = (torch.rand(layers - 1, batch, steps, hidden, generator=generator) < 0.7) / 0.7
    mask = torch.rand(batch, memory_steps, generator=generator) < 0.6
    mask[:, 0] = True
    others = {"lengths": torch.randint(1, steps + 1, (batch,), generator=generator), "mask": mask, "dropped": drops}
    return given_, others


def arguments(given_: Found) -> Arguments:
    """The first arguments of `decoder_training.run`."""
    layers = [
        tuple(v for n, v in given_.items() if n in {f"ih {k}", f"hh {k}"} or n.startswith(f"bias {k} "))
        for k in range(given_["hidden"].size(0))
    ]
    query = (given_["query"], given_.get("query_bias")) if "query" in given_ else None
    return (
        given_["x"], FedState(given_["hidden"], given_["cell"], given_["fed"]), layers,
        Memory(given_["values"], given_["keys"], None, query, given_.get("vector"), 0.7),
        (given_["combine"], given_.get("combine_bias")),
    )  # fmt: skip


def results(run: Any, given_: Found, others: Found, *, feeds_context: bool) -> Found:
    """What is decoded, the state after it, and all gradients of a sum of them."""
    leaves = {name: value.clone().requires_grad_() for name, value in given_.items()}
    x, state, layers, memory, combine = arguments(leaves)
    memory = dataclasses.replace(memory, mask=others["mask"])
    dropped = others["dropped"].to(x.dtype)
    decoded, after = run(x, state, layers, memory, combine, others["lengths"], dropped, feeds_context=feeds_context)
    found = {"decoded": decoded, "h_n": after.hidden, "c_n": after.cell, "fed_n": after.fed}
    loss = sum((value * torch.linspace(-1, 1, value.numel()).view(value.shape)).sum() for value in found.values())
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {n: v.detach() for n, v in found.items()} | dict(zip(leaves, grads, strict=True))


def error_of(sizes: ProblemSizes) -> float:
    """Largest error of results and gradients; what is decoded without gradients must be the same."""
    given_, others = made(sizes)
    truth = results(by_torch, given_, others, feeds_context=sizes.context)
    others |= {"lengths": others["lengths"].to(torch.int32)}
    narrow = {name: value.float() for name, value in given_.items()}
    with uninitialised_is_nan():
        found = results(decoder_training.run, narrow, others, feeds_context=sizes.context)
        x, state, layers, memory, combine = arguments(narrow)
        memory = dataclasses.replace(memory, mask=others["mask"])
        lengths, dropped = others["lengths"], others["dropped"].float()
        alone = decoder.run(x, state, layers, memory, combine, lengths, dropped, feeds_context=sizes.context)
    assert torch.equal(alone[0], found["decoded"])
    return worst(found, truth)


@pytest.mark.parametrize("target", TARGETS)
@given(sizes=all_sizes(), threads=st.integers(1, 3))
def test_with_dropout_all_gradients_are_those_of_float64(target, sizes, threads):
    """Of one to three layers, by the same factors."""
    with decoder_built_for(target, threads):
        assert error_of(sizes) < CLOSE_BACK


#: More steps and rows than products over them take together; columns of weights and of the memory in several blocks.
MANY_STEPS = ProblemSizes(3, 150, 5, 33, 70, 65, 2, 300, True, False, False, True, 1)


@pytest.mark.parametrize("additive", [False, True])
def test_gradients_of_many_steps_are_those_of_float64(additive):
    """The products over them go by a part of the steps and of the columns."""
    with decoder_built_for(build.NATIVE, 2):
        assert error_of(dataclasses.replace(MANY_STEPS, additive=additive)) < CLOSE_BACK


#: Each loses what is dropped in one place: what stands there, and what it becomes.
DEFECTS = {
    "forward": ("dropped_of(a, layer, row(r), t)[unit];", "(PLANTED ? 1.0f : dropped_of(a, layer, row(r), t)[unit]);"),
    "of a step": ("drops = layer && a->dropped;", "drops = layer && a->dropped && !PLANTED;"),
    "of another layer": ("dropped_of(a, layer - 1, row(r), t)", "dropped_of(a, PLANTED ? 0 : layer - 1, row(r), t)"),
    "of the weights": ("record.below(layer, 0)", "(PLANTED ? record.h(layer - 1, 1) : record.below(layer, 0))"),
}  # fmt: skip
#: Each loses a part of what products over many steps go by.
PARTS_LOST = {
    "earlier steps": ("count, width, start, out", "count, width, start && !PLANTED, out"),
    "later columns": ("pack_columns(rights, depth, column,", "pack_columns(rights, depth, PLANTED ? 0 : column,"),
}  # fmt: skip


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The decoder with all of these, of which none is chosen yet."""
    return planted_decoder(DEFECTS | PARTS_LOST, tmp_path_factory.mktemp("planted"))


def choose(name: str, changed: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the decoder run with a defect, or with none."""
    monkeypatch.setattr(decoder, "library", lambda: changed)
    ctypes.c_int.in_dll(changed, "planted_defect").value = [*DEFECTS, *PARTS_LOST, NOTHING].index(name)


@pytest.mark.parametrize("name", [NOTHING, *DEFECTS])
def test_a_lost_dropout_is_seen(name, changed, monkeypatch):
    """Without a defect the comparison passes; each defect is far beyond what it allows."""
    choose(name, changed, monkeypatch)
    error = error_of(ProblemSizes(5, 4, 7, 17, 9, 11, 3, 6, True, True, False, True, 3))
    assert error < CLOSE_BACK if name == NOTHING else error > 30 * CLOSE_BACK


@pytest.mark.parametrize("name", PARTS_LOST)
def test_a_lost_part_of_many_steps_is_seen(name, changed, monkeypatch):
    """Few steps do not have such parts."""
    choose(name, changed, monkeypatch)
    assert error_of(MANY_STEPS) > 30 * CLOSE_BACK


def test_what_does_not_fit_is_refused():
    """Native code would read past its end."""
    model, (source, target, *_) = model_of(KINDS["general"]).train(), problem(KINDS["general"], 3, 4, 1, differ=False)
    wrong = mock.patch.object(fused_decoder, "_dropped", return_value=torch.ones(1, 3, 3, 33, dtype=torch.float32))
    with wrong, pytest.raises(RuntimeError, match=r"has shape \(1, 3, 3, 33\), expected \(1, 3, 4, 33\)"):
        model.run(source, target)


def test_dropout_is_drawn_for_every_value_of_a_training_step():
    """Each is dropped by the probability that was asked for, anew in each call, and never in evaluation."""
    model, (source, target, *_) = model_of(KINDS["general"]).train(), problem(KINDS["general"], 40, 30, 1, differ=False)
    model.decoder.lstm.dropout, seen = 0.3, []

    def watched(*given_, **options):
        seen.append(given_[6])
        return run(*given_, **options)

    run = decoder_training.run
    with mock.patch.object(decoder_training, "run", watched):
        model.run(source, target)
        model.run(source, target)
        model.eval().run(source, target)
    first, second, third = seen
    assert first.shape == (1, 40, 30, 33)
    assert third is None
    assert first.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs(float((first == 0).float().mean()) - 0.3) < 0.02
    assert not torch.equal(first, second)
