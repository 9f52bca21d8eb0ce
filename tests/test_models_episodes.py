"""An LSTM over episodes: what it gives for each alone, however it is executed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels import LSTM
from kernels.reference import LoopLSTM
from seq2seq.execution.cell_lstm import CellLSTM
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.episodes import EpisodesConfig, EpisodesLSTM
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def unrolls(draw: st.DrawFn) -> tuple[EpisodesConfig, torch.Tensor]:
    """Sizes and a batch in which episodes begin anywhere, at the first step too."""
    config = EpisodesConfig(draw(st.integers(1, 4)), draw(st.none() | st.integers(1, 3)), draw(st.integers(1, 3)))
    batch, steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    source = torch.randn(batch, steps, config.input_size, generator=generator, dtype=torch.float64)
    flags = draw(st.lists(st.booleans(), min_size=batch * steps, max_size=batch * steps))
    source[:, :, -1] = torch.tensor(flags, dtype=torch.float64).view(batch, steps)
    return config, source


def by_hand(lstm: nn.LSTM, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step by step, with the state of a row set to zero where an episode begins."""
    state, outputs = None, []
    for step in range(source.size(1)):
        if state is not None:
            keep = (source[:, step, -1] < 0.5)[None, :, None]
            state = tuple(value * keep for value in state)
        output, state = lstm(source[:, step : step + 1, :-1], state)
        outputs.append(output)
    return torch.cat(outputs, 1), *state


@pytest.mark.parametrize("lstm", [nn.LSTM, LoopLSTM, CellLSTM, LSTM])
@given(problem=unrolls())
def test_results_and_gradients_are_those_step_by_step(lstm, problem):
    """Of outputs, h and c, by one sequence an episode, and by resets where the LSTM takes them."""
    config, source = problem
    model = EpisodesLSTM(config, lstm).double()
    if lstm is LSTM:
        model.lstm.lstm.implementation = "loop"
    assert model.resets == (lstm is LSTM)
    plain = nn.LSTM(config.input_size - 1, config.hidden_size, config.num_layers, batch_first=True).double()
    plain.load_state_dict(
        {name.removeprefix("lstm.").removeprefix("lstm."): value for name, value in model.state_dict().items()}
    )
    found, expected = [], []
    for results, module, into in ((model.run(source), model, found), (by_hand(plain, source), plain, expected)):
        total = sum((value * (number + 1)).square().sum() for number, value in enumerate(results))
        into += [*results, *torch.autograd.grad(total, list(module.parameters()))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", ["loop", "onednn", "cpu-fused", "lstmcell", "torchscript", "amp-bf16"])
def test_variants_execute_it(name, mode):
    """The results and gradients are the reference's."""
    workload, variant = find_workload("rl-impala@hidden=16,batch=3,length=120"), VARIANTS[name]
    if reason := variant.why_not("cpu", mode, workload):
        pytest.skip(reason)
    weights = initial_weights(workload.config, 0)
    found, expected = (
        (run := Executable(one, workload.config, mode, "cpu", weights)).quantities(run.prepare(workload.make_batch(0)))
        for one in (variant, VARIANTS["reference"])
    )
    assert found.keys() == expected.keys()
    close = {"rtol": 0.05, "atol": 0.02} if variant.precision == "bf16" else {"rtol": 1e-3, "atol": 1e-5}
    for key, value in expected.items():
        error = (found[key].double() - value.double()).norm() / value.double().norm().clamp_min(1e-6)
        assert error < close["rtol"], key


def test_a_batch_says_where_episodes_begin():
    """By zeros and ones, which are the same in every type, about as often as the workload says."""
    source = find_workload("rl-impala").make_batch(0).source
    assert set(source[:, :, -1].unique().tolist()) == {0.0, 1.0}
    assert 1 / 70 < source[:, :, -1].mean() < 1 / 35


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "int8-dynamic"])
def test_exported_programs_are_refused(name):
    """They would run the episodes of the batch that they were exported with."""
    reason = VARIANTS[name].why_not("cpu", "inference", find_workload("rl-impala"))
    assert reason is not None
    assert "episodes" in reason or "needs" in reason


def test_what_it_does_not_take_is_refused():
    """A target would be left out without a word."""
    model = EpisodesLSTM(EpisodesConfig(3))
    with pytest.raises(ValueError, match="takes a source and nothing else"):
        model.run(torch.zeros(2, 4, 4), torch.zeros(2, 4, 3))
