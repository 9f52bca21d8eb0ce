"""One rank in this process: its part of the loss, and gradients that are held against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from bench.worker import ranks
from bench.worker.ranks import RankedCase
from seq2seq.models.weights import initial_weights
from seq2seq.workloads.registry import find_workload

FIXED, TOKENS = "seed@batch=4,length=3", "translation-small-scaled@batch=4,length=6,hidden=16"
ALONE = ranks.RankSetting(1, "weak", 25.0)
SEED = RankedCase(find_workload(FIXED), "reference")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("name", [FIXED, TOKENS])
def test_the_ranks_losses_make_the_loss_of_the_joint_batch(group, monkeypatch, name, pieces):
    """The mean over ranks, each micro-batch weighed by its valid steps, is the mean over the whole batch."""
    workload = find_workload(name)
    replica = ranks.Replica(ALONE, RankedCase(workload, "reference"), initial_weights(workload.config, 1), group)
    replica.setting = ranks.RankSetting(2, "strong", 25.0, pieces)
    joint = workload.make_batch(3)

    def loss(batch):
        with torch.no_grad():
            outputs = replica.executable.model(batch.source, batch.target, batch.source_lengths, batch.target_lengths)
            return replica.executable.model.loss(outputs, batch.expected, batch.decoded_lengths)

    shares, rows = [], 0
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        for batch, factor in replica.parts(joint):
            shares.append(factor * loss(batch))
            rows += batch.size
    assert rows == joint.size
    torch.testing.assert_close(sum(shares) / 2, loss(joint))


def test_gradients_over_ranks_pass_the_gate(group):
    """Those of one rank are those of one process; its first collective comes before the end of the step."""
    workload = find_workload(FIXED)
    verdict = ranks.check(ALONE, RankedCase(workload, "reference"), group, 5)
    assert verdict["passed"], verdict["reason"]
    replica = ranks.Replica(ALONE, RankedCase(workload, "reference"), initial_weights(workload.config, 1), group)
    compute_s, total_s = replica.step(replica.parts(workload.make_batch(0)))
    assert 0 < compute_s < total_s


@pytest.mark.parametrize("name", [FIXED, TOKENS])
def test_accumulated_gradients_pass_the_gate_and_are_exchanged_once(group, monkeypatch, name):
    """Those of two micro-batches are those of the whole; one that is left out is refused."""
    trained, setting = RankedCase(find_workload(name), "reference"), dataclasses.replace(ALONE, accumulate=2)
    exchanged = []
    hook = ranks.allreduce_hook
    monkeypatch.setattr(ranks, "allreduce_hook", lambda state, bucket: exchanged.append(bucket) or hook(state, bucket))
    verdict = ranks.check(setting, trained, group, 5)
    assert verdict["passed"], verdict["reason"]
    assert len(exchanged) == 1
    parts = ranks.Replica.parts
    monkeypatch.setattr(ranks.Replica, "parts", lambda self, joint: parts(self, joint)[1:])
    assert not ranks.check(setting, trained, group, 5)["passed"]


def test_a_training_goes_on_from_its_checkpoint(group, tmp_path):
    """To the weights that it would have had without."""
    found = ranks.check_resumed(ALONE, SEED, group, tmp_path / "checkpoint")
    assert found["resume_error"] <= found["resume_limit"]
    assert found["checkpoint_bytes"] > 0
    assert found["save_s"] > 0
    assert found["resume_s"] > 0


@pytest.mark.parametrize("lost", ["optimizer", "model"])
def test_a_checkpoint_that_lacks_something_is_found_out(group, tmp_path, monkeypatch, lost):
    """The optimizer's moments, or the weights of the last step."""
    load = torch.load

    def without(path, **options):
        kept = load(path, **options)
        if lost == "optimizer":
            kept["optimizer"]["state"] = {}
        else:
            kept["model"] = {name: value * (1 + 1e-5) for name, value in kept["model"].items()}
        return kept

    monkeypatch.setattr(torch, "load", without)
    found = ranks.check_resumed(ALONE, SEED, group, tmp_path / "checkpoint")
    assert found["resume_error"] > found["resume_limit"]


@pytest.mark.parametrize("factor", [1.001, 0.5])
def test_planted_wrong_gradients_are_refused(group, monkeypatch, factor):
    """A rank that weighs its loss wrongly, as a mean over ranks of different lengths would."""
    parts = ranks.Replica.parts
    monkeypatch.setattr(ranks.Replica, "parts", lambda self, joint: [(parts(self, joint)[0][0], factor)])
    verdict = ranks.check(ALONE, SEED, group, 5)
    assert not verdict["passed"]
    assert "grad " in verdict["reason"]


@pytest.mark.parametrize(
    ("trained", "setting", "told"),
    [
        (SEED, ranks.RankSetting(2, "strong", 25.0, 3), "4 sequences of a step (strong) do not fill 6 micro-batches"),
        (SEED, ranks.RankSetting(2, "weak", 25.0, 5), "take a larger batch, as seed@batch=5"),
        (dataclasses.replace(SEED, variant="amp-bf16"), ALONE, "eagerly in fp32"),
        (dataclasses.replace(SEED, device="cuda"), ALONE, "1 ranks of this machine take a GPU each, and torch sees 0"),
    ],
)
def test_what_cannot_be_trained_over_ranks_is_refused(monkeypatch, trained, setting, told):
    """With what would do."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert told in ranks.refusal(trained, [setting])
    assert ranks.refusal(SEED, [ALONE]) is None
