"""One rank in this process: its part of the loss, and gradients that are held against float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bench.worker import ranks
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

FIXED, TOKENS = "seed@batch=4,length=3", "translation-small-scaled@batch=4,length=6,hidden=16"
ALONE = ranks.RankSetting(1, "weak", 25.0)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [FIXED, TOKENS])
def test_the_ranks_losses_make_the_loss_of_the_joint_batch(group, monkeypatch, name):
    """The mean over ranks, each weighed by its valid steps, is the mean over the whole batch."""
    workload = find_workload(name)
    replica = ranks.Replica(ALONE, workload, "reference", initial_weights(workload.config, 1), group)
    replica.setting = ranks.RankSetting(2, "strong", 25.0)
    joint = workload.make_batch(3)

    def loss(batch):
        with torch.no_grad():
            outputs = replica.executable.model(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
            return replica.executable.model.loss(outputs, batch.expected, batch.decoded_lengths)

    shares, rows = [], 0
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        batch, factor = replica.part(joint)
        shares.append(factor * loss(batch))
        rows += batch.size
    assert rows == joint.size
    torch.testing.assert_close(sum(shares) / 2, loss(joint))


def test_gradients_over_ranks_pass_the_gate(group):
    """Those of one rank are those of one process; its first collective comes before the end of the step."""
    workload = find_workload(FIXED)
    verdict = ranks.check(ALONE, workload, "reference", group, 5)
    assert verdict["passed"], verdict["reason"]
    replica = ranks.Replica(ALONE, workload, "reference", initial_weights(workload.config, 1), group)
    compute_s, total_s = replica.step(*replica.part(workload.make_batch(0)))
    assert 0 < compute_s < total_s


@pytest.mark.parametrize("factor", [1.001, 0.5])
def test_planted_wrong_gradients_are_refused(group, monkeypatch, factor):
    """A rank that weighs its loss wrongly, as a mean over ranks of different lengths would."""
    part = ranks.Replica.part
    monkeypatch.setattr(ranks.Replica, "part", lambda self, joint: (part(self, joint)[0], factor))
    verdict = ranks.check(ALONE, find_workload(FIXED), "reference", group, 5)
    assert not verdict["passed"]
    assert "grad " in verdict["reason"]
