"""Heads that forecast more than a value: the pinball loss, quantiles that rise, and samples that keep to them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from bench.gate import kinked_losses as kinks
from bench.gate import parity
from bench.gate.parity import Gate
from bench.gate.planted_defects import DEFECTS
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
from seq2seq.layers.likelihoods import LIKELIHOODS, LOSSES, QUANTILES, central, draw, head_loss, quantiles
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload
from seq2seq.workloads.workload import Workload

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

sizes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))


def problem(seed, batch, steps, values, dtype=torch.float64):
    """Outputs of a quantile head and what is expected."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(batch, steps, len(QUANTILES) * values, dtype=dtype, generator=generator)
    return outputs, torch.randn(batch, steps, values, dtype=dtype, generator=generator)


@given(SEEDS, sizes)
def test_pinball_loss_is_the_naive_one(seed, size):
    """Element by element in Python, padding left out, whatever stands in it."""
    outputs, expected = problem(seed, *size)
    batch, steps, values = size
    lengths = torch.randint(1, steps + 1, (batch,), generator=torch.Generator().manual_seed(seed))
    naive = []
    for row in range(batch):
        for step in range(int(lengths[row])):
            for value in range(values):
                loss = 0.0
                for place, level in enumerate(QUANTILES):
                    error = float(expected[row, step, value] - outputs[row, step, place * values + value])
                    loss += max(level * error, (level - 1) * error)
                naive.append(loss)
    padding = torch.arange(steps) >= lengths[:, None]
    outputs[padding], expected[padding] = torch.nan, torch.inf
    assert float(head_loss("quantile", outputs, expected, lengths)) == pytest.approx(sum(naive) / len(naive))


@given(SEEDS, sizes)
def test_gradient_of_the_pinball_loss(seed, size):
    """It is that of finite differences, away from the kink."""
    outputs, expected = problem(seed, *size)
    expected = kinks.apart(expected, outputs)
    assert torch.autograd.gradcheck(lambda x: head_loss("quantile", x, expected), outputs.requires_grad_())


def test_the_least_pinball_loss_is_at_the_quantiles():
    """A constant that learns exponential values ends at their quantiles."""
    values = torch.distributions.Exponential(1.0).icdf((torch.arange(4000) + 0.5) / 4000)[:, None, None]
    found = nn.Parameter(torch.zeros(len(QUANTILES)))
    optimizer = torch.optim.Adam([found], lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        head_loss("quantile", found.expand(len(values), 1, -1), values).backward()
        optimizer.step()
    torch.testing.assert_close(found.detach(), -torch.log1p(-torch.tensor(QUANTILES)), atol=0.03, rtol=0)


@given(SEEDS, sizes)
def test_quantiles_never_cross(seed, size):
    """Outputs that do are sorted, which never makes the loss larger; the middle one stands for all."""
    outputs, expected = problem(seed, *size)
    found = quantiles(outputs)
    assert bool((found.diff(dim=0) >= 0).all())
    again = torch.cat(list(found), -1)
    assert float(head_loss("quantile", again, expected)) <= float(head_loss("quantile", outputs, expected)) + 1e-12
    assert torch.equal(central("quantile", outputs), found[1])


@pytest.mark.parametrize("outputs", [[-1.0, 0.5, 4.0], [4.0, -1.0, 0.5], [1.0, 1.0, 1.0]])
def test_samples_have_the_quantiles(outputs):
    """Of many samples the learnt quantiles are those of the head, crossed ones sorted; the seed decides them all."""
    head = torch.tensor(outputs).expand(100_000, -1)
    found = draw("quantile", head, torch.Generator().manual_seed(0))
    assert found.shape == (100_000, 1)
    levels = found.quantile(torch.tensor(QUANTILES), 0)[:, 0]
    torch.testing.assert_close(levels, torch.tensor(outputs).sort().values, atol=0.03, rtol=0)
    assert torch.equal(found, draw("quantile", head, torch.Generator().manual_seed(0)))


def test_every_head_has_a_loss_with_a_name():
    """In half precision too, where the loss is float32."""
    assert LIKELIHOODS.keys() == LOSSES.keys()
    for name, count in LIKELIHOODS.items():
        if name:
            assert head_loss(name, torch.zeros(2, 3, count).bfloat16(), torch.ones(2, 3, 1)).dtype == torch.float32


def test_tft_trains_with_the_loss_of_its_source():
    """The workload and its scaled twin have a head of three quantiles of one value."""
    for name in ("forecast-tft", "forecast-tft-scaled"):
        config = find_workload(name).config
        assert (config.likelihood, config.output_size, config.head_size) == ("quantile", 1, 3)
    assert QUANTILES == (0.1, 0.5, 0.9)


TINY = Workload(
    name="tiny quantiles",
    summary="",
    source="",
    data="",
    config=Seq2SeqConfig(4, 8, 1, likelihood="quantile"),
    batch=4,
    source_steps=6,
    target_steps=5,
)


def on_the_kink(monkeypatch):
    """Every problem expects what truth gives, but for a millionth: each output's side is up to rounding."""
    make = Workload.make_batch

    def planted(self, seed):
        batch = make(self, seed)
        model = Executable(VARIANTS["loop"], self.config, "inference", "cpu", parity.random_weights(self.config, seed))
        with model.context():
            outputs = model.forward(batch).outputs
        return dataclasses.replace(batch, expected=outputs[..., 1:2].clone() * (1 + 1e-7))

    monkeypatch.setattr(Workload, "make_batch", planted)


def refused(names, seeds, mode="training"):
    """Variants and seeds that the gate refuses."""
    gate = Gate(TINY, mode, "cpu")
    weights = initial_weights(TINY.config, 1)
    executables = [Executable(VARIANTS[name], TINY.config, mode, "cpu", weights) for name in names]
    return [
        (executable.variant.name, seed) for seed in seeds for executable in executables
        if not gate.check(executable, seed).passed
    ]  # fmt: skip


def test_the_gate_asks_away_from_kinks(monkeypatch):
    """Problems on the kink refuse right variants unless they are moved; moved, they are judged like any others."""
    on_the_kink(monkeypatch)
    assert refused(["onednn", "loop"], range(4)) == []
    monkeypatch.setattr(parity, "moved_away", lambda batch, *_: batch)
    assert refused(["onednn", "loop"], range(4))


def test_right_variants_pass_with_a_pinball_loss():
    """Float32 and mixed precision, on problems of many seeds."""
    assert refused(["onednn", "loop", "amp-bf16-native"], range(20)) == []


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_are_refused_with_a_pinball_loss(name, monkeypatch):
    """Keeping away from kinks hides none of the planted defects."""
    monkeypatch.setitem(LSTMS, name, DEFECTS[name])
    executable = Executable(
        Variant(name, "", lstm=name), TINY.config, "training", "cpu", initial_weights(TINY.config, 1)
    )
    assert not Gate(TINY, "training", "cpu").check(executable, 3).passed


def test_only_what_is_near_is_moved():
    """Nothing stays within the margin of a quantile; what was outside is left as it was, and so is any other loss."""
    outputs, expected = problem(3, 20, 20, 2)
    moved = kinks.apart(expected, outputs)
    values = torch.stack(outputs.chunk(3, -1))
    margin = kinks.MARGIN * outputs.square().mean().sqrt()
    assert float((values - moved).abs().min()) >= float(margin)
    near = ((values - expected).abs() < margin).any(0)
    assert bool(near.any())
    assert torch.equal(moved[~near], expected[~near])
    batch = TINY.make_batch(0)
    for config in (dataclasses.replace(TINY.config, likelihood="gaussian"), find_workload("seed").config):
        assert kinks.moved_away(batch, config, {}, "cpu") is batch
