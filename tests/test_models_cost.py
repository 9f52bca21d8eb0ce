"""The least work of a call: the arithmetic against counts that know nothing of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kernels.reference import LoopLSTM
from seq2seq.data.batch import Batch
from seq2seq.models import cost as costs
from seq2seq.models.attention import AttentionConfig
from seq2seq.models.base import IGNORE_TOKEN, Config, Extent
from seq2seq.models.cost import Cost, built_parameters, cost
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.workloads.registry import WORKLOADS, find_workload

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from strategies import Problem, attentive, labelled, problems, singles, stacked

PADDED = {"source_lengths": None, "target_lengths": None}


def counted(problem: Problem) -> tuple[int, int]:
    """FLOPs of the products that torch runs for the loop, forward and backward."""
    model = problem.config.build(LoopLSTM)
    batch = problem.make_batch(torch.float32)
    with FlopCounterMode(display=False) as forward:
        outputs, *_ = model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    loss = model.loss(outputs, batch.expected, batch.decoded_lengths)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def spared(problem: Problem) -> tuple[int, int]:
    """FLOPs that the loop spends though nothing needs them, forward and backward.

    Products with an initial state of zeros; of a decoder that is fed, those with the zeros fed first, and the gradient
    into its real-valued input, to which the loop joins what is fed. Backward a zero state costs the gradient of
    weight_hh alone: the state itself takes none.
    """
    forward = sum(
        8 * stack.hidden_size**2 * problem.batch * stack.num_layers * stack.directions
        for stack in problem.config.stacks
        if stack.starts_from_zeros
    )
    backward = forward
    config = problem.config
    if isinstance(config, AttentionConfig) and config.feeds:
        gates, steps = 8 * config.decoder_size, problem.target_steps or problem.source_steps
        forward += gates * config.fed_size * problem.batch
        # At the first step the input takes a gradient where it is embedded, at the others always.
        backward += gates * config.fed_size * problem.batch
        if config.target_vocabulary:
            backward += gates * config.fed_size * problem.batch
        else:
            backward += gates * config.target_size * problem.batch * (steps - 1)
    return forward, backward


@given(
    problem=problems(with_lengths=False)
    | singles()
    | stacked(with_lengths=False, whole=True)
    | labelled(with_lengths=False)
)
def test_products_are_those_that_the_loop_runs(problem: Problem):
    """Forward and backward, the count is torch's own of the loop's products, less those that nothing needs."""
    extent = Extent.of(problem.make_batch())
    found = costs.forward_products(problem.config, extent), costs.backward_products(problem.config, extent)
    assert found == tuple(ran - least for ran, least in zip(counted(problem), spared(problem), strict=True))


@settings(max_examples=60)
@given(problem=attentive(with_lengths=False))
def test_products_of_attention_are_those_that_the_loop_runs(problem: Problem):
    """The same where the decoder looks at the source: fed or not, from zeros or not, layer by layer."""
    test_products_are_those_that_the_loop_runs.hypothesis.inner_test(problem)


@given(problem=problems(with_lengths=True) | attentive(with_lengths=True) | labelled(with_lengths=True))
def test_padding_is_no_work(problem: Problem):
    """A batch of different lengths needs what its sequences need one by one; with padding counted it would be more."""
    batch = problem.make_batch()
    alone = [Extent.of(sequence(batch, place)) for place in range(problem.batch)]
    whole = Extent.of(batch)
    for count in (costs.forward_products, costs.backward_products):
        assert count(problem.config, whole) == sum(count(problem.config, extent) for extent in alone)
    full = Extent.of(dataclasses.replace(batch, **PADDED))
    grown = full.source_steps + full.target_steps > whole.source_steps + whole.target_steps
    assert (cost(problem.config, full, "training").flops > cost(problem.config, whole, "training").flops) is grown


@given(problem=stacked(with_lengths=True))
def test_stacked_steps_are_a_lower_bound(problem: Problem):
    """Sequences that do not fill their last stacked step need more than is counted, never less."""
    batch = problem.make_batch()
    alone = [Extent.of(sequence(batch, place)) for place in range(problem.batch)]
    for count in (costs.forward_products, costs.backward_products):
        together = sum(count(problem.config, extent) for extent in alone)
        assert 0 < count(problem.config, Extent.of(batch)) <= together


def sequence(batch: Batch, place: int) -> Batch:
    """One sequence of a batch, cut to its own length."""

    def cut(value, lengths):
        return None if value is None else value[place : place + 1, : None if lengths is None else int(lengths[place])]

    return Batch(
        cut(batch.source, batch.source_lengths),
        cut(batch.target, batch.target_lengths),
        None,
        None,
        cut(batch.expected, batch.decoded_lengths),
    )


@given(problem=problems() | singles() | attentive() | stacked() | labelled())
def test_parameters_are_the_model_s(problem: Problem):
    """Every weight is counted once."""
    expected = sum(value.numel() for value in problem.config.build(nn.LSTM).parameters())
    assert costs.parameters(problem.config) == expected


def unread_weights(model: nn.Module, batch: Batch) -> set[str]:
    """Names of recurrent weights that no result depends on, since each sequence has one step, from zeros."""
    found = set()
    with torch.no_grad():
        expected = model.run(batch.source, batch.target)
        for name, weight in model.named_parameters():
            if "weight_hh" in name:
                before = weight.clone()
                weight.add_(1)
                if all(map(torch.equal, expected, model.run(batch.source, batch.target))):
                    found.add(name)
                # Not by a subtraction, which rounds: results of all that follow would differ.
                weight.copy_(before)
    return found


@given(problem=problems(with_lengths=False) | singles() | attentive(with_lengths=False) | labelled(with_lengths=False))
def test_inference_moves_weights_inputs_and_results_once(problem: Problem):
    """Bytes are those of the tensors: weights but for rows that nobody asks for, what goes in, what comes out."""
    model, batch = problem.config.build(nn.LSTM), problem.make_batch(torch.float32)
    with torch.no_grad():
        results = model.run(batch.source, batch.target)
    rows = []
    if problem.config.decodes:
        rows.append((model.embed_source, batch.source))
        rows.append((model.embed_target, batch.source if batch.target is None else batch.target))
    unread = unread_weights(model, batch)
    tensors = [value for name, value in model.named_parameters() if not name.startswith("embed") and name not in unread]
    tensors += [layer.weight[tokens.unique()] for layer, tokens in rows if isinstance(layer, torch.nn.Embedding)]
    tensors += [value for value in (*results, batch.source, batch.target) if value is not None]
    assert cost(problem.config, Extent.of(batch), "inference").least_bytes == sum(tensor.nbytes for tensor in tensors)


@given(problem=problems(with_lengths=False) | singles() | attentive(with_lengths=False) | labelled(with_lengths=False))
def test_training_moves_the_optimizer_s_state_twice(problem: Problem):
    """Adam's state is read and written, the gradients are written, inputs and expected values are read."""
    model, batch = problem.config.build(nn.LSTM), problem.make_batch(torch.float32)
    optimizer = torch.optim.Adam(model.parameters())
    model.loss(model.run(batch.source, batch.target)[0], batch.expected).backward()
    optimizer.step()
    state = [
        value for values in optimizer.state.values() for value in values.values() if value.numel() > 1 or value.dim()
    ]
    moved = 2 * sum(value.nbytes for value in (*state, *model.parameters()))
    moved += sum(value.grad.nbytes for value in model.parameters())
    moved += sum(value.nbytes for value in (batch.source, batch.target) if value is not None)
    # Of tokens, those that are there.
    moved += batch.expected[batch.expected != IGNORE_TOKEN].nbytes
    assert cost(problem.config, Extent.of(batch), "training").least_bytes == moved


def test_valid_steps_count_no_padding():
    """Valid steps are the sum of the lengths, of all steps where there are none; a source is counted once a reader."""
    source, target = torch.zeros(3, 5, 2), torch.zeros(3, 4, 2)
    full = Batch(source, target, None, None, expected=target)
    lengths = {"source_lengths": torch.tensor([5, 1, 2]), "target_lengths": torch.tensor([4, 3, 3])}

    def steps(batch: Batch, config: Config | None = None) -> int:
        return costs.valid_steps(config or Seq2SeqConfig(2, 1, 1), Extent.of(batch))

    assert steps(full) == 15 + 12
    assert steps(dataclasses.replace(full, **lengths)) == 8 + 10
    assert steps(dataclasses.replace(full, target_lengths=lengths["target_lengths"])) == 15 + 10
    assert steps(Batch(source, None, None, None, source)) == 30
    assert steps(Batch(source, None, lengths["source_lengths"], None, source)) == 16
    assert steps(Batch(source, None, None, None, source), SingleConfig(1, 2)) == 15


def test_pointwise_operations_are_counted_a_hidden_unit():
    """By hand: one layer each way of 3 units over 2 sequences of 4 steps, 5 features in and 1 out."""
    config = Seq2SeqConfig(5, 3, 1)
    extent = Extent(sequences=2, source_steps=8, target_steps=8, own_target=False)
    encoder, decoder = 8 * 3 * (5 * 8 + 3 * 6), 8 * 3 * (5 * 8 + 3 * 8)
    head = 2 * 3 * 1 * 8
    assert cost(config, extent, "inference").flops == encoder + decoder + head + 9 * 3 * 16
    backward = 8 * 3 * (5 * 8 + 2 * 3 * 6) + 8 * 3 * (5 * 8 + 2 * 3 * 8) + 2 * head
    weights = 2 * 4 * 3 * (5 + 3 + 2) + 3 + 1
    training = encoder + decoder + head + backward + (9 + 26) * 3 * 16 + 4 * 8 + 13 * weights
    assert cost(config, extent, "training").flops == training


def test_narrower_weights_are_fewer_bytes():
    """Stored and computed precision count each for its own part."""
    workload = find_workload("seed")
    extent = Extent.of(workload.make_batch(0))
    full, half, outputs = (
        cost(workload.config, extent, "inference", stored_bytes=stored, computed_bytes=computed)
        for stored, computed in ((4, 4), (2, 2), (4, 2))
    )
    assert half == Cost(full.flops, full.least_bytes // 2)
    # Outputs 16 x 10 x 1, h and c 16 x 16 each.
    assert full.least_bytes - outputs.least_bytes == 2 * (160 + 512)


def test_recurrent_weights_of_a_single_step_from_zeros_are_not_read():
    """One step of an LSTM with 16 units and features alone: W_ih, two biases, x, and h twice and c."""
    config = find_workload("deepbench@batch=1,hidden=16,length=1").config
    one, two = (
        cost(config, Extent.of(find_workload(f"deepbench@batch=1,hidden=16,length={steps}").make_batch(0)), "inference")
        for steps in (1, 2)
    )
    assert one.least_bytes == 4 * (4 * 16 * (16 + 2) + 16 + 3 * 16)
    assert two.least_bytes == one.least_bytes + 4 * (4 * 16 * 16 + 2 * 16)


def test_an_unknown_mode_is_refused():
    """A mode without a count gives no number that looks like one."""
    with pytest.raises(ValueError, match="expected inference, training or decode"):
        cost(Seq2SeqConfig(1, 1, 1), Extent(1, 1, 1), "generate")


@pytest.mark.parametrize("name", WORKLOADS)
def test_parameters_are_counted_without_any(name):
    """As many as the model that is built has, of every family."""
    config = WORKLOADS[name].config
    with torch.device("meta"):
        built = sum(value.numel() for value in config.build(nn.LSTM).parameters())
    assert built_parameters(config) == built


def test_counting_loads_no_compiler():
    """Random values of what holds none would load torch's compiler, which takes longer than all else of a dry run."""
    code = (
        "import sys; from seq2seq.models.cost import built_parameters; "
        "from seq2seq.workloads.registry import WORKLOADS; "
        "print(built_parameters(WORKLOADS['translation-small'].config), 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.split()[1] == "False"
