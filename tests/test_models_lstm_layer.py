"""An LSTM alone: what torch.nn.LSTM gives, in every way to execute it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kernels.reference import LoopLSTM
from seq2seq.execution.executable import Executable
from seq2seq.execution.split_lstm import SplitLSTM
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.lstm_layer import SingleConfig, SingleLSTM
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

pytest.importorskip("hypothesis")
from hypothesis import given
from strategies import Problem, singles


@pytest.mark.parametrize("lstm", [nn.LSTM, LoopLSTM, SplitLSTM])
@given(problem=singles())
def test_results_are_those_of_the_lstm(lstm, problem: Problem):
    """Outputs, h and c, with the LSTM's own weights and nothing around it."""
    model = SingleLSTM(problem.config, lstm).double()
    source = problem.make_batch().source
    config = problem.config
    plain = nn.LSTM(
        config.input_size, config.hidden_size, config.num_layers, batch_first=True, bidirectional=config.bidirectional
    ).double()
    plain.load_state_dict({name.removeprefix("lstm."): value for name, value in model.state_dict().items()})
    with torch.no_grad():
        outputs, (hidden, cell) = plain(source)
        found = model.run(source)
        assert torch.equal(model(source), found[0])
    for value, expected in zip(found, (outputs, hidden, cell), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("argument", ["target", "source_lengths", "target_lengths"])
def test_what_it_does_not_take_is_refused(argument):
    """A target or lengths would be left out without a word."""
    model = SingleLSTM(SingleConfig(3))
    given_too = {argument: torch.ones(2, 4, 3) if argument == "target" else torch.tensor([4, 4])}
    with pytest.raises(ValueError, match="a single LSTM takes a source and nothing else"):
        model.run(torch.zeros(2, 4, 3), **given_too)


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("name", ["reference", "loop", "compile", "torchscript"])
def test_variants_execute_it(name, mode):
    """Eager, looped, under torch.compile and scripted, the results and gradients are the reference's."""
    workload = find_workload("deepbench@hidden=8,batch=2,length=3")
    weights = initial_weights(workload.config, 0)
    found, expected = (
        (run := Executable(VARIANTS[variant], workload.config, mode, "cpu", weights)).quantities(
            run.prepare(workload.make_batch(0))
        )
        for variant in (name, "reference")
    )
    assert found.keys() == expected.keys()
    assert ("grad lstm.weight_hh_l0" in found) == (mode == "training")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=lambda text, key=key: f"{key}: {text}")
