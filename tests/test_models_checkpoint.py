"""Checkpoints: what goes in comes out, what is damaged says so in one line, and a killed save leaves a whole one."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from seq2seq.models import checkpoint
from seq2seq.models.checkpoint import CheckpointError, from_pretrained, save_pretrained
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.workloads.registry import WORKLOADS, find_workload

pytest.importorskip("safetensors")
pytest.importorskip("hypothesis")
from hypothesis import given, settings
from strategies import Problem, labelled, problems, singles

CONFIG = Seq2SeqConfig(3, 4, 1, num_layers=2)


def made(config=CONFIG, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(nn.LSTM)


def equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_pretrained(made(), tmp_path / "model", {"mean": 1.5})
    return tmp_path / "model"


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@settings(max_examples=10)
@given(problem=problems() | singles() | labelled())
def test_a_round_trip_gives_equal_outputs(tmp_path_factory, problem: Problem):
    """Family, sizes and every weight come back, bit by bit."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model = made(problem.config, problem.seed).eval()
    save_pretrained(model, folder)
    loaded = from_pretrained(folder)
    batch = problem.make_batch(torch.float32)
    inputs = (batch.source, batch.target, batch.source_lengths, batch.target_lengths)
    assert loaded.config == problem.config
    assert loaded.task_state is None
    assert not loaded.model.training
    assert all(
        torch.equal(one, other) for one, other in zip(model.run(*inputs), loaded.model.run(*inputs), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_comes_back(tmp_path, dtype):
    model = made().to(dtype)
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model").model
    assert next(loaded.parameters()).dtype == dtype
    assert equal(model, loaded)


def test_task_state_comes_back(saved):
    assert from_pretrained(saved).task_state == {"mean": 1.5}


def test_lstms_are_made_by_the_caller_s_class(saved):
    class Own(nn.LSTM):
        pass

    assert isinstance(from_pretrained(saved, Own).model.encoder, Own)


def test_saving_again_replaces_and_leaves_other_files(saved):
    """The old weights go, a file of somebody else stays, nothing temporary is left."""
    (saved / "curve.csv").write_text("1")
    save_pretrained(made(SingleConfig(5), seed=1), saved)
    assert from_pretrained(saved).config == SingleConfig(5)
    assert sorted(path.suffix for path in saved.iterdir()) == [".csv", ".json", ".safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("replaced", [0, 1])
def test_a_save_that_is_cut_off_leaves_the_old_one(saved, monkeypatch, replaced):
    """Killed before the weights are in place, and between them and the config: the old checkpoint is whole."""
    before = from_pretrained(saved).model
    calls = []
    really = Path.replace

    def replace(self, target):
        if len(calls) == replaced:
            raise KeyboardInterrupt
        calls.append(target)
        return really(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(made(seed=1), saved)
    monkeypatch.undo()
    assert equal(before, from_pretrained(saved).model)
    save_pretrained(made(seed=1), saved)
    assert not equal(before, from_pretrained(saved).model)
    assert len(list(saved.iterdir())) == 2


def test_a_first_save_that_is_cut_off_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "rename", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_pretrained(made(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_everything_is_synced_before_it_is_named(saved, monkeypatch):
    """Weights are on the disk before config.json names them."""
    events = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("sync"), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append(to.suffix), replace(self, to))[1])
    save_pretrained(made(seed=1), saved)
    assert events == ["sync", ".safetensors", "sync", "sync", ".json", "sync"]


def test_a_new_checkpoint_may_be_read_as_other_new_files(tmp_path):
    save_pretrained(made(), tmp_path / "model")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["file", "folder", "other config"])
def test_what_is_no_checkpoint_is_not_overwritten(tmp_path, kind):
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
        (path / ("config.json" if kind == "other config" else "thesis.tex")).write_text("{}")
    with pytest.raises(CheckpointError, match="not overwritten"):
        save_pretrained(made(), path)


def test_an_empty_folder_is_taken(tmp_path):
    save_pretrained(made(), tmp_path)
    assert from_pretrained(tmp_path).config == CONFIG


def test_state_that_is_no_json_is_refused(tmp_path):
    for state in ({"a": torch.zeros(1)}, {"a": float("nan")}):
        with pytest.raises(CheckpointError, match="plain JSON"):
            save_pretrained(made(), tmp_path / "model", state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 2}, "version is 2, expected 1"),
        ({"format": "another"}, "not of a checkpoint of this project"),
        ({"family": "gru"}, "family is 'gru', expected one of lstm"),
        ({"sizes": {"input_size": 3}}, "missing"),
        ({"sizes": {"input_size": 0, "hidden_size": 4, "output_size": 1}}, "input_size is 0, expected at least 1"),
        ({"sizes": {"input_size": 3, "hidden_size": 5, "output_size": 1, "num_layers": 2}}, "has shape"),
        ({"sizes": {"input_size": 3, "hidden_size": 4, "output_size": 1, "num_layers": 3}}, "has no encoder.weight"),
        ({"sizes": {"input_size": 3, "hidden_size": 4, "output_size": 1}}, "which config.json's model does not have"),
        ({"weights": "../model-0000000000000000.safetensors"}, "expected model-"),
        ({"weights": "model-0000000000000000.safetensors"}, "is missing"),
        ({"sha256": 3}, "expected a str"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(saved, fields, words):
    edit(saved, **fields)
    with pytest.raises(CheckpointError, match=words) as caught:
        from_pretrained(saved)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:0], lambda data: data[:-1] + b"\xff"])
def test_damaged_weights_are_refused(saved, damage):
    """Cut off, empty, or a byte changed."""
    path = next(saved.glob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        from_pretrained(saved)


def test_a_damaged_config_is_refused(saved):
    (saved / "config.json").write_text('{"format"')
    with pytest.raises(CheckpointError, match="not JSON"):
        from_pretrained(saved)


def test_a_missing_folder_or_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        from_pretrained(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        from_pretrained(tmp_path)


def test_a_hub_name_is_downloaded(saved, monkeypatch):
    """The hub is asked for the checkpoint's files alone, and what it gives is loaded."""
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, *, allow_patterns):
        asked.append((name, allow_patterns))
        return str(saved)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert from_pretrained("user/model").task_state == {"mean": 1.5}
    assert asked == [("user/model", ["config.json", "model-*.safetensors"])]


def test_a_hub_that_does_not_answer_says_so(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    monkeypatch.setattr(hub, "snapshot_download", Mock(side_effect=ConnectionError("no\nnetwork")))
    with pytest.raises(CheckpointError, match="the hub does not give it: ConnectionError: no network"):
        from_pretrained("user/model")


def test_a_hub_name_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        from_pretrained("user/model")


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.endswith("-scaled") or name == "seed"])
def test_every_family_that_is_measured_can_be_saved(tmp_path, name):
    """Each workload's model comes back with its sizes and weights."""
    model = made(find_workload(name).config)
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert equal(model, loaded.model)


def test_every_family_has_a_config():
    assert all(checkpoint._config_class(family).family == family for family in checkpoint.FAMILIES)
    assert {workload.config.family for workload in WORKLOADS.values()} <= checkpoint.FAMILIES.keys()


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(CheckpointError, match="pip install safetensors"):
        save_pretrained(made(), tmp_path / "model")


def test_weights_that_are_no_tensors_are_refused(saved):
    """Right by its digest, and still no file of tensors."""
    content = b"\x08\0\0\0\0\0\0\0no JSON!"
    digest = hashlib.sha256(content).hexdigest()
    (saved / f"model-{digest[:16]}.safetensors").write_bytes(content)
    edit(saved, weights=f"model-{digest[:16]}.safetensors", sha256=digest)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        from_pretrained(saved)
