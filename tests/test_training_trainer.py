"""Training: a run is a function of its settings, wherever it is interrupted, and stops where it should."""

from __future__ import annotations

import csv
import dataclasses
import math

import pytest
import torch
from tiny_tasks import Reverse, Sines

from kernels.common.cudnn_precision import lstm_precision
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.transformer import TransformerConfig
from seq2seq.models.weights import initial_weights
from seq2seq.tasks.registry import TASKS, restore
from seq2seq.training.folder import CURVE, TrainFolder, TrainingError
from seq2seq.training.settings import TrainSettings, rate_factor
from seq2seq.training.task_workload import task_workload
from seq2seq.training.trainer import Trainer, variant_of, why_not

FAST = TrainSettings(batch=5, learning_rate=1e-2, epochs=3, variant="reference")


def trainer(task, settings=FAST, folder=None, **options):
    """A trainer of a task on its one model."""
    return Trainer(task, task.model_config("lstm", "small"), settings, folder, **options)


def result(run):
    """All that a run ends with: weights, the optimizer's moments, the best weights, the progress without seconds."""
    weights = {f"weights {name}": value.clone() for name, value in run.executable.model.state_dict().items()}
    moments = {
        f"{name} {number}": value
        for number, state in run.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    best = {f"best {name}": value for name, value in run.best.items()}
    return weights | moments | best, dataclasses.replace(run.progress, training_s=0.0)


def assert_equal(first, second):
    """Two runs ended with the same bits."""
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name


def interrupted(task, settings, path, step):
    """A run that is told to stop at a step, begun again by another trainer from what is in the folder."""
    folder = TrainFolder.create(path)
    first = trainer(task, settings, folder)

    def stop(progress, _):
        first.stopping = first.stopping or progress.step >= step

    first.run(stop)
    torch.manual_seed(12345)
    torch.rand(7)
    second = trainer(task, settings, folder)
    second.resume(folder.load())
    assert second.progress.step == step
    second.run()
    return second


def curve(path):
    """The curve without its seconds."""
    with (path / "curve.csv").open(encoding="utf-8") as file:
        return [{name: cell for name, cell in row.items() if name != "training_s"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(("variant", "lstm", "other"), [("", "onednn", "reference"), ("loop", "loop", "loop")])
def test_what_trains_where_no_variant_is_named(variant, lstm, other):
    """Torch's own way: oneDNN's LSTM, and the reference for a model without LSTMs."""
    settings = dataclasses.replace(FAST, variant=variant)
    assert variant_of(Sines().model_config("lstm", "small"), settings) == lstm
    transformer = TransformerConfig(8, 1, 2, 2, source_features=1)
    assert variant_of(transformer, settings) == other
    if not variant:
        assert why_not(Sines(), transformer, settings) is None


@pytest.mark.parametrize("step", [3, 5, 14])
def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, step):
    """Five batches an epoch: in the middle of one, at its end, at its first; dropout draws on."""
    task = Reverse(dropout=0.4)
    whole = trainer(task, FAST, TrainFolder.create(tmp_path / "whole"))
    whole.run()
    again = interrupted(task, FAST, tmp_path / "again", step)
    assert_equal(result(whole), result(again))
    assert curve(tmp_path / "whole") == curve(tmp_path / "again")


def test_an_interrupted_run_that_validates_between_epochs_ends_as_one_that_was_not(tmp_path):
    """Validation every 4 steps of 5 an epoch, a rate that changes, values with a likelihood."""
    settings = dataclasses.replace(FAST, evaluate_every=4, schedule="cosine", warmup=3, weight_decay=0.1)
    task = Sines(likelihood="student")
    whole = trainer(task, settings)
    whole.run()
    assert_equal(result(whole), result(interrupted(task, settings, tmp_path / "again", 6)))


def test_dropout_would_tell_a_lost_generator(tmp_path):
    """The test above can fail: from another random state the same checkpoint ends elsewhere."""
    task = Reverse(dropout=0.4)
    whole = trainer(task)
    whole.run()
    folder = TrainFolder.create(tmp_path / "run")
    first = trainer(task, FAST, folder)
    first.stopping = True
    first.run()
    state = folder.load()
    state["random"] = torch.Generator().manual_seed(99).get_state()
    second = trainer(task, FAST, folder)
    second.resume(state)
    second.run()
    assert any(not torch.equal(value, result(second)[0][name]) for name, value in result(whole)[0].items())


def test_equal_seeds_give_equal_runs_and_others_do_not():
    """Weights, order and dropout come from the seed alone, whatever was drawn before."""
    runs = []
    for seed in (3, 3, 4):
        torch.rand(5)
        run = trainer(Reverse(dropout=0.3), dataclasses.replace(FAST, seed=seed, epochs=2))
        run.run()
        runs.append(result(run))
    assert_equal(runs[0], runs[1])
    assert any(not torch.equal(value, runs[2][0][name]) for name, value in runs[0][0].items())


def test_a_run_that_is_resumed_at_its_end_does_nothing(tmp_path):
    """Finished work is not done again, and the curve stays as it is."""
    folder = TrainFolder.create(tmp_path / "run")
    first = trainer(Sines(), FAST, folder)
    first.run()
    before = curve(folder.path)
    second = trainer(Sines(), FAST, folder)
    second.resume(folder.load())
    second.run()
    assert_equal(result(first), result(second))
    assert curve(folder.path) == before


def test_a_run_learns_and_keeps_its_best_weights():
    """The loss falls, tokens come out right, and the best weights are those of the lowest validation loss."""
    losses = []
    settings = dataclasses.replace(FAST, epochs=30, learning_rate=3e-2)
    run = trainer(Reverse(), settings)
    run.run(lambda _, loss: losses.append(loss) if loss is not None else None)
    assert min(losses) < losses[0] / 2
    assert run.progress.best_loss == min(losses)
    assert run.evaluate()["accuracy"] > 0.5


def test_validation_is_the_mean_over_steps_whatever_the_batches():
    """Batches of one and of eight give the same validation loss, with sequences of different lengths."""
    found = []
    for batch in (1, 8):
        run = trainer(Reverse(), dataclasses.replace(FAST, batch=batch))
        found.append(run._validation_loss())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_validation_leaves_the_generators_alone():
    """Training draws the same numbers with and without a validation in between."""
    run = trainer(Sines())
    before = torch.get_rng_state()
    run._evaluate()
    run.evaluate()
    assert torch.equal(torch.get_rng_state(), before)


def test_quality_is_judged_without_tf32(monkeypatch):
    """It says fp32, and cuDNN's LSTM takes TF32 by default."""
    run, seen, before = trainer(Sines()), [], lstm_precision()
    monkeypatch.setattr(run.task, "evaluate", lambda *_: seen.append(lstm_precision()) or {})
    monkeypatch.setattr(run._judge, "forward", lambda *_: seen.append(lstm_precision()) or 1 / 0)
    run.evaluate()
    with pytest.raises(ZeroDivisionError):
        run._validation_loss()
    assert seen == ["ieee", "ieee"]
    assert lstm_precision() == before


def test_a_machine_with_fewer_gpus_resumes(monkeypatch, tmp_path):
    """The checkpoint has a generator for each GPU of the machine before."""
    folder = TrainFolder.create(tmp_path / "run")
    trainer(Sines(), folder=folder).save()
    run, taken = trainer(Sines()), []
    run.settings = dataclasses.replace(run.settings, device="cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", taken.extend)
    run.resume(folder.load() | {"random_cuda": ["first", "second"]})
    assert taken == ["first"]


def test_patience_ends_a_run():
    """A loss that cannot fall ends the run after so many validations."""
    run = trainer(Sines(), dataclasses.replace(FAST, learning_rate=1e-30, patience=2, epochs=50))
    assert run.run().ended == "no lower validation loss in 2 validations"
    assert run.progress.epoch == 3


@pytest.mark.parametrize(("limits", "step"), [({"steps": 7}, 7), ({"epochs": 2}, 10), ({"steps": 12, "epochs": 2}, 10)])
def test_the_first_limit_ends_a_run(limits, step):
    """Steps or epochs, whichever comes first; 5 batches an epoch."""
    run = trainer(Sines(), dataclasses.replace(FAST, **({"epochs": None} | limits)))
    assert run.run().step == step
    assert str(step) in run.progress.ended or "2 epochs" in run.progress.ended


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_by_name(tmp_path, bad):
    """The line says step and epoch, and the checkpoint before it is sound."""

    class Broken(Sines):
        def batches(self, split, batch, seed, epoch):
            for number, found in enumerate(super().batches(split, batch, seed, epoch)):
                broken = split == "train" and (epoch, number) == (1, 2)
                yield dataclasses.replace(found, expected=found.expected + bad) if broken else found

    folder = TrainFolder.create(tmp_path / "run")
    run = trainer(Broken(), FAST, folder)
    with pytest.raises(TrainingError, match=r"training loss is (nan|inf) at step 8 \(epoch 2\)"):
        run.run()
    state = folder.load()
    assert state["progress"]["step"] == 5
    assert all(value.isfinite().all() for value in state["weights"].values())


def test_gradients_are_clipped(tmp_path):
    """The norm in the curve is the one before, and Adam sees at most the limit."""
    folder = TrainFolder.create(tmp_path / "run")
    run = trainer(Sines(scale=100.0), dataclasses.replace(FAST, clip=0.5, steps=1), folder)
    run.run()
    norm = math.sqrt(sum(float(value.grad.square().sum()) for value in run.executable.model.parameters()))
    assert norm == pytest.approx(0.5, rel=1e-4)
    assert float(curve(folder.path)[0]["gradient_norm"]) > 1


def test_what_is_frozen_stays_and_rates_differ():
    """A frozen part keeps its bits; a rate near 0 moves a part by next to nothing."""
    settings = dataclasses.replace(FAST, freeze=("encoder.*",), rates={"decoder.*": 1e-6})
    run = trainer(Sines(), settings)
    before = run.executable.weights()
    run.run()
    moved = {name: float((value - before[name]).abs().max()) for name, value in run.executable.weights().items()}
    assert all(distance == 0 for name, distance in moved.items() if name.startswith("encoder"))
    assert all(0 < distance < 1e-5 for name, distance in moved.items() if name.startswith("decoder"))
    assert all(distance > 1e-3 for name, distance in moved.items() if name.startswith("fc"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"freeze": ("nothing.*",)}, "no parameter's name fits 'nothing"),
        ({"freeze": ("*",)}, "leave nothing to train"),
        ({"variant": "openvino"}, "openvino cannot train here: "),
        ({"variant": "cudnn"}, "cudnn cannot train here: exists on cuda only"),
    ],
)
def test_what_cannot_train_says_why(settings, words):
    """One line, before anything is trained."""
    with pytest.raises(TrainingError, match=words):
        trainer(Sines(), dataclasses.replace(FAST, **settings))


@pytest.mark.parametrize(
    "bad", [{"batch": 0}, {"learning_rate": math.nan}, {"schedule": "steps"}, {"epochs": None}, {"patience": -1}]
)
def test_settings_out_of_range_are_refused(bad):
    """The message names the setting."""
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(FAST, **bad)


def test_a_task_without_data_is_refused():
    """No endless loop over nothing."""
    with pytest.raises(TrainingError, match="no training batch"):
        trainer(Sines(train=0))


def test_fp16_trains_with_a_scale_that_resumes(tmp_path):
    """Loss scaling is part of the checkpoint."""
    variant = dataclasses.replace(VARIANTS["reference"], name="half", precision="fp16", autocast=True)
    VARIANTS["half"] = variant
    try:
        settings = dataclasses.replace(FAST, variant="half")
        whole = trainer(Sines(), settings)
        whole.run()
        again = interrupted(Sines(), settings, tmp_path / "again", 7)
    finally:
        del VARIANTS["half"]
    assert whole.executable.scaler.is_enabled()
    assert again.executable.scaler.state_dict() == whole.executable.scaler.state_dict()
    assert_equal(result(whole), result(again))


def test_variants_train_the_same_curve(tmp_path):
    """The loop and torch's own LSTM start from the same weights on the same data, so their losses agree."""
    found = []
    for variant in ("reference", "loop", "onednn"):
        run = trainer(Sines(), dataclasses.replace(FAST, variant=variant), TrainFolder.create(tmp_path / variant))
        run.run()
        found.append([float(row["loss"] or row["validation_loss"]) for row in curve(tmp_path / variant)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_a_run_starts_from_given_weights():
    """Fine-tuning: the first loss is that of the weights given."""
    task = Sines()
    weights = initial_weights(task.model_config("lstm", "small"), 5)
    run = trainer(task, dataclasses.replace(FAST, learning_rate=1e-30, epochs=1), weights=weights)
    run.run()
    for name, value in run.executable.weights().items():
        assert torch.equal(value, weights[name])


def test_the_rate_rises_falls_and_ends_at_nothing():
    """Warm-up to the whole rate, cosine down to 0 at the limit."""
    settings = dataclasses.replace(FAST, schedule="cosine", warmup=4, steps=40, epochs=None)
    factors = [rate_factor(settings, step, 40) for step in range(41)]
    assert factors[:4] == sorted(factors[:4])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[0] == pytest.approx(0.25)
    assert factors[40] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("limits", "total"),
    [
        ({"epochs": 1, "steps": None}, 5),
        ({"epochs": 3, "steps": None}, 15),
        ({"epochs": 3, "steps": 7}, 7),
        ({"epochs": 1, "steps": 7}, 5),
        ({"epochs": None, "steps": 7}, 7),
    ],
)
def test_a_cosine_falls_with_every_step_to_the_limit_that_ends_the_run(tmp_path, limits, total):
    """Five batches an epoch; half a cosine over all steps, whichever limit there is, and no stair at an epoch's end."""
    settings = dataclasses.replace(FAST, schedule="cosine", patience=0, **limits)
    trainer(Reverse(), settings, TrainFolder.create(tmp_path / "run")).run()
    rates = [float(row["learning_rate"]) for row in TrainFolder(tmp_path / "run").curve() if row["loss"]]
    expected = [settings.learning_rate * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_a_folder_is_not_overwritten(tmp_path):
    """Neither another run nor anything else that is there."""
    folder = TrainFolder.create(tmp_path / "run")
    folder.write_run({"settings": {}})
    with pytest.raises(TrainingError, match="holds a training run, and nothing is overwritten"):
        TrainFolder.create(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it")
    with pytest.raises(TrainingError, match="is not empty"):
        TrainFolder.create(tmp_path / "other")


def test_a_torn_checkpoint_is_named(tmp_path):
    """No traceback, and no silent start from the beginning."""
    folder = TrainFolder.create(tmp_path / "run")
    trainer(Sines(), dataclasses.replace(FAST, steps=1), folder).run()
    path = folder.path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(TrainingError, match=r"checkpoint.pt cannot be read"):
        folder.load()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    """The line says so."""
    folder = TrainFolder.create(tmp_path / "run")
    trainer(Sines(), dataclasses.replace(FAST, steps=1), folder).run()
    with pytest.raises(TrainingError, match="does not fit this model"):
        trainer(Reverse()).resume(folder.load())


def test_a_torn_curve_is_mended(tmp_path):
    """A row that a killed run left half written is dropped, and what comes after the checkpoint is trained again."""
    folder = TrainFolder.create(tmp_path / "run")
    trainer(Sines(), dataclasses.replace(FAST, epochs=1), folder).run()
    whole = curve(folder.path)
    with folder.curve_path.open("a", encoding="utf-8") as file:
        file.write("6,2,0.01,0.5,0.1,,\n7,2,0.0")
    folder.cut(5, 5)
    assert curve(folder.path) == whole
    assert list(whole[0]) == [name for name in CURVE if name != "training_s"]


def test_a_task_is_a_workload_of_its_batches():
    """Variants are asked about the lengths that there are, and the gate draws what is trained on."""
    task = Reverse()
    workload = task_workload(task, task.model_config("lstm", "small"), 5)
    assert workload.has_lengths
    assert (workload.batch, workload.source_steps, workload.target_steps) == (5, 5, 5)
    assert not torch.equal(workload.make_batch(0).source, workload.make_batch(1).source)
    assert torch.equal(workload.make_batch(1).source, workload.make_batch(1).source)
    assert not task_workload(Sines(), Sines().model_config("lstm", "small"), 5).has_lengths


def test_tasks_are_registered_by_name():
    """The registry asks a module only when it is called."""
    assert set(TASKS) == {"forecasting", "translation", "summarization", "speech"}
    with pytest.raises(KeyError):
        restore("cooking", {})
