"""A checkpoint of every family is a workload whose batches its model can read and learn from."""

from __future__ import annotations

import pytest
from torch import nn

from bench.gate.parity import Gate
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import REFERENCE
from seq2seq.models.attention import AttentionConfig
from seq2seq.models.checkpoint import FAMILIES, save_pretrained
from seq2seq.models.ctc import CTCConfig, steps_needed
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.episodes import EpisodesConfig
from seq2seq.models.gnmt import GNMTConfig
from seq2seq.models.huggingface_config import marian
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.models.rnnt_encoder import StackedConfig
from seq2seq.models.transformer import TransformerConfig
from seq2seq.workloads.checkpoint import starting_weights
from seq2seq.workloads.registry import find_workload

#: A model of each family that a checkpoint may be of, tiny.
TINY = {
    "lstm": Seq2SeqConfig(3, 4, 1, num_layers=2, dropout=0.5),
    "lstm-alone": SingleConfig(5),
    "lstm-episodes": EpisodesConfig(5, 3, 2),
    "attention": AttentionConfig(3, 4, 4, source_vocabulary=7, target_vocabulary=4),
    "ctc": CTCConfig(3, 4, 5, blank=2),
    "gnmt": GNMTConfig(3, 16, 4, num_layers=2, source_vocabulary=7, target_vocabulary=4),
    "rnnt-encoder": StackedConfig(3, 4),
    "transformer": TransformerConfig(8, 11, 1, 2, source_vocabulary=7, target_vocabulary=11),
    "pretrained": marian(8, 1, 2, 12, 20),
}


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_every_family_can_be_measured(tmp_path, family, mode):
    """Batches of its workload can be read and learnt: the gate lets the reference through."""
    if family == "pretrained":
        pytest.importorskip("transformers")
    save_pretrained(TINY[family].build(nn.LSTM), tmp_path / "model")
    workload = find_workload(f"checkpoint:{tmp_path / 'model'}@batch=3,length=6")
    weights = starting_weights(workload, 0)
    verdict = Gate(workload, mode, "cpu").check(Executable(REFERENCE, workload.config, mode, "cpu", weights), 1)
    assert verdict.passed, verdict.describe()


def test_a_model_by_ctc_is_told_labels(tmp_path):
    """Never the blank, of numbers that differ and fit into the steps, which differ too; and the record says so."""
    save_pretrained(TINY["ctc"].build(nn.LSTM), tmp_path / "model")
    workload = find_workload(f"checkpoint:{tmp_path / 'model'}")
    batch = workload.make_batch(0)
    assert batch.target is None
    assert not (batch.expected == workload.config.blank).any()
    assert (steps_needed(batch.expected) <= batch.source_lengths).all()
    assert batch.source_lengths.unique().numel() > 3
    assert "labels" in workload.data
