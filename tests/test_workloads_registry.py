"""Every workload is runnable and says where it comes from; overrides change what they name and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kernels.reference import LoopLSTM
from seq2seq.models.base import IGNORE_TOKEN
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.workloads.registry import WORKLOADS, find_workload
from seq2seq.workloads.workload import AXES, UnknownWorkloadError

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

EACH = pytest.mark.parametrize("name", WORKLOADS)


def changed(name: str) -> dict[str, object]:
    """The fields in which a workload differs from the one it overrides, those of its config among them."""

    def flat(workload: object) -> dict[str, object]:
        return vars(workload) | {f"config.{key}": value for key, value in vars(workload.config).items()}

    before = flat(WORKLOADS[name.partition("@")[0]])
    return {k: v for k, v in flat(find_workload(name)).items() if v != before[k] and k not in {"name", "config"}}


def test_registry_is_keyed_by_name():
    """A workload is found under its own name."""
    assert all(name == workload.name for name, workload in WORKLOADS.items())
    assert all(find_workload(name) == workload for name, workload in WORKLOADS.items())


@EACH
def test_says_where_it_comes_from(name):
    """Each workload says in words what it is, who uses its sizes, and whether its data is real."""
    workload = WORKLOADS[name]
    assert len(workload.summary.split()) > 3
    assert len(workload.source.split()) > 3
    kind, _, what = workload.data.partition(": ")
    assert kind == ("real" if workload.temperatures else "synthetic")
    assert what


@EACH
def test_results_can_be_compared(name):
    """Dropout is off: its random stream differs between implementations."""
    assert WORKLOADS[name].config.dropout == 0


@EACH
def test_every_token_can_be_predicted(name):
    """If the decoder reads tokens, the head has one output for each token of that vocabulary."""
    config = WORKLOADS[name].config
    assert config.target_vocabulary in {0, config.output_size}


@EACH
@pytest.mark.parametrize("lstm", [nn.LSTM, LoopLSTM])
def test_model_accepts_its_batch(name, lstm):
    """The model takes the workload's batch, and its outputs can be compared with what the batch expects.

    Output by output, or by CTC all of them with the labels.
    """
    workload = find_workload(f"{name}@batch=2,length=5,hidden=8")
    model, batch = workload.config.build(lstm), workload.make_batch(0)
    outputs, *_ = model.run(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    compared = batch.expected if workload.label_steps is None else batch.source
    assert outputs.shape == (*compared.shape[:2], workload.config.head_size)
    loss = model.loss(outputs, batch.expected, batch.decoded_lengths)
    loss.backward()
    assert torch.isfinite(loss)


@EACH
def test_batch_has_the_sizes_given(name):
    """At full size the batch has the workload's own batch, steps and lengths, and tokens that the model knows."""
    workload = WORKLOADS[name]
    batch = workload.make_batch(0)
    assert batch.source.shape[:2] == (workload.batch, workload.source_steps)
    assert (batch.target is None) == (workload.target_steps is None)
    if batch.target is not None:
        assert batch.target.shape[:2] == (workload.batch, workload.target_steps)
    assert (batch.source_lengths is not None or batch.target_lengths is not None) == workload.has_lengths
    for lengths, steps in ((batch.source_lengths, batch.source), (batch.target_lengths, batch.target)):
        if lengths is not None:
            assert 1 <= int(lengths.min()) < int(lengths.max()) <= steps.size(1)
    if workload.config.target_vocabulary:
        real = batch.expected[batch.expected != IGNORE_TOKEN]
        assert 0 <= int(real.min()) <= int(real.max()) < workload.config.output_size


@given(batch=st.integers(1, 9), length=st.integers(1, 60), seed=SEEDS)
def test_labels_fit_into_their_steps(batch, length, seed):
    """At any size, a sequence of the CTC workload has labels, none is the blank, and all fit even if all are alike."""
    workload = find_workload(f"speech-ctc-scaled@batch={batch},length={length}")
    found = workload.make_batch(seed)
    counts = (found.expected != IGNORE_TOKEN).sum(1)
    assert counts.min() >= 1
    assert (2 * counts - 1 <= found.source_lengths).all()
    labels = found.expected[found.expected != IGNORE_TOKEN]
    assert (labels != workload.config.blank).all()
    assert 0 <= labels.min() <= labels.max() < workload.config.output_size


@EACH
def test_batches_follow_their_seed(name):
    """Equal seeds give equal batches, others give others."""
    workload = find_workload(f"{name}@batch=4,length=6")
    first, again, other = workload.make_batch(0), workload.make_batch(0), workload.make_batch(1)
    assert torch.equal(first.source, again.source)
    assert torch.equal(first.expected, again.expected)
    assert not torch.equal(first.source, other.source)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("seed@batch=3", {"batch": 3}),
        ("seed@hidden=3", {"config.hidden_size": 3}),
        ("seed@layers=3", {"config.num_layers": 3}),
        ("seed@length=3", {"source_steps": 3}),
        ("forecast-deepar@length=84", {"source_steps": 84, "target_steps": 12}),
        ("forecast-deepar@length=1", {"source_steps": 1, "target_steps": 1}),
        ("scaling@length=100", {"source_steps": 100, "target_steps": 100}),
        ("speech-las@layers=5", {"config.num_layers": 5}),
        ("speech-ctc@length=400", {"source_steps": 400, "label_steps": 75}),
        ("seed@batch=3,hidden=4", {"batch": 3, "config.hidden_size": 4}),
        (
            "scaling@layers=2,length=7,hidden=9,batch=5",
            {"batch": 5, "config.hidden_size": 9, "source_steps": 7, "target_steps": 7, "config.num_layers": 2},
        ),
        ("seed@batch=16", {}),
        (
            "deepbench@hidden=512,batch=32,length=50",
            {"batch": 32, "source_steps": 50, "config.hidden_size": 512},
        ),
    ],
)
def test_overrides_change_what_they_name(name, expected):
    """An override changes its own sizes and no other field; several combine; the target keeps its proportion."""
    assert changed(name) == expected


def test_a_layer_of_deepbench_has_as_many_features_as_units():
    """At any hidden size, as in its table; the outputs are the LSTM's own."""
    workload = find_workload("deepbench@hidden=96,batch=2,length=3")
    assert workload.config == SingleConfig(96)
    assert (workload.config.input_size, workload.config.output_size) == (96, 96)
    batch = workload.make_batch(0)
    assert batch.source.shape == batch.expected.shape == (2, 3, 96)
    assert workload.decoded_steps is None


def test_name_keeps_its_overrides():
    """A workload with overrides is called by them, so its records are told apart from the plain one's."""
    assert find_workload("seed@batch=3,hidden=4").name == "seed@batch=3,hidden=4"


def test_order_of_overrides_does_not_matter():
    """Overrides give the same sizes in any order."""
    one, other = find_workload("speech-las@length=8,layers=2"), find_workload("speech-las@layers=2,length=8")
    assert dataclasses.replace(one, name="") == dataclasses.replace(other, name="")


@pytest.mark.parametrize(
    "override",
    [
        "steps=3",
        "batch",
        "batch=",
        "batch=0",
        "batch=-1",
        "batch=1.5",
        "batch=x",
        "=3",
        "batch = 3",
        "batch=3;hidden=4",
    ],
)
def test_unknown_overrides_are_refused(override):
    """A bad override is refused with the axes there are, alone or after a good one."""
    for name in (f"seed@{override}", f"seed@length=3,{override}"):
        with pytest.raises(UnknownWorkloadError) as raised:
            find_workload(name)
        assert repr(override) in str(raised.value)
        assert all(axis in str(raised.value) for axis in AXES)


@pytest.mark.parametrize("name", ["translation-gnmt@layers=1", "speech-rnnt-encoder@hidden=5"])
def test_an_override_that_its_model_does_not_take_is_refused(name):
    """A size out of the model's range is refused as an override, with the model's own reason."""
    with pytest.raises(UnknownWorkloadError, match=r"override .* expected (at least 2|a multiple of the 2)"):
        find_workload(name)


@EACH
def test_axes_work_everywhere(name):
    """Every workload takes every axis."""
    workload = find_workload(f"{name}@batch=3,hidden=8,layers=2,length=10")
    assert (workload.batch, workload.config.hidden_size, workload.config.num_layers) == (3, 8, 2)
    assert workload.source_steps == 10
    workload.config.build(nn.LSTM)


@pytest.mark.parametrize("name", ["", "sed", "Seed", "@batch=3", "seed batch=3"])
def test_unknown_names_are_refused(name):
    """An unknown name is refused with the names there are."""
    with pytest.raises(UnknownWorkloadError, match="no workload is called") as raised:
        find_workload(name)
    assert all(known in str(raised.value) for known in WORKLOADS)


@pytest.mark.parametrize("name", ["seed@", "seed@batch=2,,length=3", "seed@batch=2,batch=3", "seed@batch=0"])
def test_an_override_left_empty_or_given_twice_is_refused(name):
    """A slip in an override is an error, never a workload of other sizes than meant."""
    with pytest.raises(UnknownWorkloadError, match="override"):
        find_workload(name)
