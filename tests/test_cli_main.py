"""The command line of seq2seq: training into a folder, using what was trained, and one line for what is wrong."""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
import os
import signal

import pandas as pd
import pytest
import torch
from speech_corpora import write_corpus
from tiny_tasks import Reverse, Sines

from seq2seq.cli import plots
from seq2seq.cli.arguments import MODELS, TASKS, parser
from seq2seq.cli.command_input import CommandError
from seq2seq.cli.main import main
from seq2seq.tasks.forecast import Forecast
from seq2seq.tasks.registry import TASKS as LOADERS
from seq2seq.tasks.task import MODELS as TASK_MODELS

WORDS = ("--variant", "reference", "--batch", "5", "--learning-rate", "0.01")


@pytest.fixture
def sines(monkeypatch):
    """`forecasting` is a task that trains in a moment."""

    class Forecasting(Sines):
        name = "forecasting"

    monkeypatch.setitem(LOADERS, "forecasting", lambda _=None: Forecasting())


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """A CSV of 200 days in weekly waves that are not quite the same."""
    path = tmp_path_factory.mktemp("data") / "days.csv"
    days = pd.date_range("2024-01-01", periods=200)
    values = [10 + day.day_of_week + 0.01 * number + 0.1 * (7 * number % 5) for number, day in enumerate(days)]
    pd.DataFrame({"timestamp": days, "value": values}).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def trained(series, tmp_path_factory):
    """A run on it."""
    out = tmp_path_factory.mktemp("runs") / "days"
    words = ["train", "forecasting", "--data", str(series), "--out", str(out), "--steps", "4", *WORDS]
    assert main([*words, "--option", "history=14", "--option", "samples=5"]) == 0
    return out


def refusal(capsys, *words):
    """The one line with which bad input is refused."""
    capsys.readouterr()
    try:
        code = main(list(words))
    except SystemExit as end:  # argparse's own way
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def weights(out):
    """Weights of a run's checkpoint."""
    return torch.load(out / "checkpoint.pt", weights_only=True)["weights"]


def test_a_run_leaves_curve_plot_checkpoint_model_and_scores(trained):
    """All that the folder is said to hold."""
    facts = json.loads((trained / "run.json").read_text())
    assert facts["result"]["ended"] == "the limit of 4 steps"
    assert {"MASE", "MASE seasonal naive"} <= facts["result"]["scores"].keys()
    assert facts["versions"]["torch"] == torch.__version__
    with (trained / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["validation_loss"]] == ["1", "2", "3", "4"]
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / "model" / "config.json").is_file()


def test_predict_gives_the_horizon_with_intervals_and_a_plot(trained, tmp_path, capsys):
    """One row per step of the last week, in order, the truth beside it; the plot is a picture."""
    plot = tmp_path / "plot.png"
    assert main(["predict", str(trained), "--data", str(trained.parent / "x.csv")]) == 2
    capsys.readouterr()
    data = json.loads((trained / "run.json").read_text())["given"]["data"]
    assert main(["predict", str(trained), "--data", data, "--last", "--plot", str(plot), "--samples", "9"]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert len(rows) == 7
    assert rows[-1]["timestamp"].startswith("2024-07-18")
    assert all(float(row["q05"]) <= float(row["q50"]) <= float(row["q95"]) for row in rows)
    assert float(rows[0]["observed"]) == pytest.approx(10 + 4 + 1.93 + 0.1)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_plots_of_a_forecast_tell_dates_once_and_whole(monkeypatch):
    """Above each panel the days from the first to the last value; no tick repeats them, none is drawn over another.

    matplotlib's own label is the year of the last tick, which is past the data when those end with the year.
    """
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    spans = {"h": 96, "D": 60, "W": 120, "MS": 48, "YS": 40}
    for frequency, steps in spans.items():
        stamps = pd.date_range("2010-12-28", periods=steps, freq=frequency)
        history, horizon = torch.zeros(steps - 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
        plots.forecasts([Forecast("$x^$", "$", stamps, history, horizon, horizon[0], horizon[0])])
        axes = drawn[-1].axes[0]
        drawn[-1].draw_without_rendering()
        shown = stamps[-12:]
        assert axes.get_title(loc="right") == f"{shown[0]:%Y-%m-%d} to {shown[-1]:%Y-%m-%d}"
        assert axes.xaxis.get_offset_text().get_text() == ""
        ticks = [label for label in axes.get_xticklabels() if label.get_text()]
        assert len(ticks) > 1
        assert not any("-" in label.get_text() for label in ticks)
        boxes = [label.get_window_extent() for label in ticks]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes)), frequency


@pytest.mark.usefixtures("sines")
@pytest.mark.parametrize(
    ("task", "name"),
    [
        (("forecasting",), "squared error (normalised values)"),
        (("speech", "--option", "count=30", "--option", "longest=6"), "cross entropy (nats per token)"),
        (("speech", "--model", "ctc", "--option", "count=30", "--option", "longest=6"), "CTC loss (nats a label)"),
    ],
)
def test_the_curve_names_its_loss(tmp_path, monkeypatch, task, name):
    """The axis says which loss it is, and in what; a family with a loss of its own has its own name."""
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    assert main(["train", *task, *WORDS, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert drawn[-1].axes[0].get_ylabel() == name


def forecast_of(capsys, *words):
    """The rows that predict prints for the last horizon, without the series' name; nothing is told beside them."""
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--samples", "9"]) == 0
    shown = capsys.readouterr()
    return shown.err, [row.partition(",")[2] for row in shown.out.splitlines()]


@pytest.fixture
def load(tmp_path):
    """A run on a file whose columns have other names than the usual ones, and that file."""
    path = tmp_path / "hourly.csv"
    stamps = pd.date_range("2024-01-01", periods=150, freq="h")
    values = [50 + hour.hour + 3 * ((7 * number) % 11) for number, hour in enumerate(stamps)]
    pd.DataFrame({"when": stamps, "load_mw": values}).to_csv(path, index=False, sep=";")
    words = ["--option", "timestamp=when", "--option", "value=load_mw", "--option", "history=30", "--steps", "2"]
    words += ["--option", "horizon=4", "--option", "samples=2", "--data", str(path), "--out", str(tmp_path / "fc")]
    assert main(["train", "forecasting", *words, *WORDS]) == 0
    return tmp_path / "fc", path


def test_predict_uses_what_the_training_was_given(load, tmp_path, capsys, monkeypatch):
    """Path and columns are the training's, from whatever folder it is asked; options that are given anew hold."""
    run, path = load
    expected = forecast_of(capsys, run)
    assert expected[0] == ""
    assert len(expected[1]) == 5
    assert forecast_of(capsys, run, "--data", path) == expected
    other = tmp_path / "elsewhere" / "hourly.csv"
    other.parent.mkdir()
    other.write_text(path.read_text().replace("load_mw", "mw"))
    assert "no column named 'load_mw'" in refusal(capsys, "predict", str(run), "--data", str(other))
    assert forecast_of(capsys, run, "--data", other, "--option", "value=mw") == expected
    monkeypatch.chdir(other.parent)
    assert forecast_of(capsys, run) == expected
    path.unlink()
    assert f"{path}: the training's file is no longer there" in refusal(capsys, "predict", str(run))


def test_a_file_of_another_name_is_no_other_series_unless_that_is_said(load, tmp_path, capsys):
    """The name of a file decides nothing: which series it is, is said, and the forecast is that of the training's."""
    run, path = load
    expected = forecast_of(capsys, run)[1]
    recent = tmp_path / "recent.csv"
    header, *rows = path.read_text().splitlines(keepends=True)
    recent.write_text("".join([header, *rows[-60:]]))
    words = ("predict", str(run), "--data", str(recent))
    refused = refusal(capsys, *words)
    assert "--series-as hourly" in refused
    assert "--new-series" in refused
    assert forecast_of(capsys, *words[1:], "--series-as", "hourly") == ("", expected)
    told, new = forecast_of(capsys, *words[1:], "--new-series")
    assert "recent: was not in the training, and is scaled by its own first 80%" in told
    assert new != expected
    # Whatever its name is.
    path.write_bytes(recent.read_bytes())
    assert forecast_of(capsys, run, "--data", path, "--new-series")[1] == new
    assert forecast_of(capsys, run)[1] == expected
    assert "expected one of hourly" in refusal(capsys, *words, "--series-as", "daily")
    assert "name one" in refusal(capsys, "predict", str(run), "--new-series")


@pytest.mark.parametrize("name", ["path", "state", "name", "series_as", "new_series"])
def test_an_option_of_predict_is_one_of_the_file(trained, series, capsys, name):
    """Whatever our functions call their own arguments, nothing but what says how to read the data is an option."""
    for words in ((), ("--data", str(series))):
        assert name in refusal(capsys, "predict", str(trained), *words, "--option", f"{name}=x")


def test_a_plot_names_the_column(load, tmp_path, capsys, monkeypatch):
    """Title and axis of a file's only series are its column's name; a unit that is given stands on the axis."""
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    for number, options in enumerate(((), ("--option", "unit=MW"))):
        forecast_of(capsys, load[0], "--plot", tmp_path / f"{number}.png", *options)
    found = [(figure.axes[0].get_title(loc="left"), figure.axes[0].get_ylabel()) for figure in drawn]
    assert found == [("load_mw", "load_mw"), ("load_mw", "MW")]


def test_translate_refuses_what_forecasts(trained, capsys):
    """A model of series translates nothing."""
    assert "see predict" in refusal(capsys, "translate", str(trained))


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A model of pairs of texts that reads four tokens of a source, hardly trained."""
    folder = tmp_path_factory.mktemp("texts")
    pytest.importorskip("tokenizers")
    (folder / "pairs.tsv").write_text("".join(f"{n} red ferries\t{n} rote Fähren\n" for n in range(20)))
    words = ["train", "translation", "--data", str(folder / "pairs.tsv"), "--out", str(folder / "run"), "--steps", "1"]
    assert main([*words, *WORDS, "--option", "max_source=4", "--option", "max_target=4"]) == 0
    return folder / "run"


def test_lines_that_translate_cuts_are_told(translator, tmp_path, capsys):
    """One line beside the output says how many were cut, which first and to how many tokens; none if none was."""
    lines = tmp_path / "lines.txt"
    lines.write_text("red\n" + "7 red ferries and more of them\n" * 2 + "red\n")
    capsys.readouterr()
    assert main(["translate", str(translator), "--data", str(lines), "--beam", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.err == "2 of 4 lines were cut to 4 tokens, the first is line 2\n"
    assert shown.out.count("\n") == 4
    lines.write_text("red\nferries\n")
    assert main(["translate", str(translator), "--data", str(lines), "--beam", "1"]) == 0
    assert capsys.readouterr().err == ""


def test_lines_to_translate_may_be_of_another_encoding(translator, tmp_path, capsys):
    """One that is named, in any spelling; another is refused in one line, as any other option is."""
    lines = tmp_path / "lines.txt"
    lines.write_bytes("rote Fähren … 5 €\n".encode("cp1252"))
    words = ("translate", str(translator), "--data", str(lines), "--beam", "1")
    assert "row 1: byte 0xe4 is not utf-8: save the file as UTF-8, or name its encoding" in refusal(capsys, *words)
    assert "--option encoding=cp1252" in refusal(capsys, *words, "--option", "encoding=latin1")
    assert "'1253b' is not an encoding of texts" in refusal(capsys, *words, "--option", "encoding=1253b")
    assert "no option vocabulary for translate" in refusal(capsys, *words, "--option", "vocabulary=300")
    assert main([*words, "--option", "encoding=1252"]) == 0
    by_name = capsys.readouterr().out
    lines.write_text("rote Fähren … 5 €\n", encoding="utf-16")
    assert main(list(words)) == 0
    assert capsys.readouterr().out == by_name


def test_a_list_of_recordings_may_name_any_file(tmp_path, capsysbinary):
    """Names of files are bytes; those that are no UTF-8 lead to their files all the same."""
    out, corpus = tmp_path / "run", tmp_path / "corpus"
    write_corpus(corpus, 3, seed=0, longest=6)
    assert main(["train", "speech", *WORDS, "--data", str(corpus), "--steps", "1", "--out", str(out)]) == 0
    named = os.fsencode(corpus) + b"/\xe4.wav"
    (corpus / "00000.wav").rename(os.fsdecode(named))
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbf" + named + b"\r\n")
    capsysbinary.readouterr()
    assert main(["translate", str(out), "--beam", "1", "--data", str(tmp_path / "list")]) == 0
    assert capsysbinary.readouterr().out.count(b"\n") == 1


def test_what_predict_changes_in_a_series_is_told(trained, tmp_path, capsys):
    """Filled values, another time zone and another scaling, on standard error; nothing for the training's own file."""
    data = json.loads((trained / "run.json").read_text())["given"]["data"]
    capsys.readouterr()
    assert main(["predict", str(trained), "--data", data, "--samples", "2"]) == 0
    assert capsys.readouterr().err == ""
    other = tmp_path / "other.csv"
    stamps = pd.date_range("2024-01-01T00:00+02:00", periods=60)
    values = [10.0 + day.day_of_week + 0.1 * number**0.5 for number, day in enumerate(stamps)]
    pd.DataFrame({"timestamp": stamps, "value": values}).drop(index=30).to_csv(other, index=False)
    words = ["predict", str(trained), "--data", str(other), "--samples", "2", "--option", "missing=interpolate"]
    assert main([*words, "--new-series"]) == 0
    told = capsys.readouterr().err.splitlines()
    expected = ("1 of 60 values were missing", "in UTC", "was not in the training")
    assert [word in line for word, line in zip(expected, told, strict=True)] == [True] * 3


@pytest.mark.usefixtures("sines")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_is_resumed_to_the_same_end(tmp_path, monkeypatch, capsys, number, code):
    """Ctrl-C and SIGTERM save; --resume goes on, and the weights are those of a run that was left alone."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    words = ["train", "forecasting", *WORDS, "--steps", "12"]
    assert main([*words, "--out", str(whole)]) == 0
    step = importlib.import_module("seq2seq.training.trainer").Trainer._step

    def interrupting(self, batch):
        step(self, batch)
        if self.progress.step == 7:
            os.kill(os.getpid(), number)

    monkeypatch.setattr("seq2seq.training.trainer.Trainer._step", interrupting)
    assert main([*words, "--out", str(again)]) == code
    assert "interrupted at step 7, which is saved; to continue: python -m seq2seq train" in capsys.readouterr().err
    assert main(["train", "forecasting", "--out", str(again), "--resume"]) == 0
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name]), name


@pytest.mark.usefixtures("sines")
def test_resume_may_go_further_but_nowhere_else(tmp_path, capsys):
    """Limits may change, nothing that decides the weights; no other task, no run that is not there."""
    out = tmp_path / "run"
    assert main(["train", "forecasting", *WORDS, "--epochs", "1", "--out", str(out)]) == 0
    resume = ("train", "forecasting", "--out", str(out), "--resume")
    assert "leave out --learning-rate" in refusal(capsys, *resume, "--learning-rate", "0.5")
    assert main([*resume, "--epochs", "2"]) == 0
    assert json.loads((out / "run.json").read_text())["result"]["epoch"] == 2
    assert "no training run" in refusal(capsys, "train", "forecasting", "--out", str(tmp_path / "none"), "--resume")
    assert "name it" in refusal(capsys, "train", "forecasting", "--resume")


@pytest.mark.usefixtures("sines")
def test_nothing_is_overwritten(tmp_path, capsys):
    """A folder with a run is refused, and is as it was."""
    out = tmp_path / "run"
    words = ("train", "forecasting", *WORDS, "--steps", "2", "--out", str(out))
    assert main(list(words)) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "nothing is overwritten" in refusal(capsys, *words)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("sines")
def test_a_run_is_tuned_from_another(tmp_path, capsys):
    """--init starts from its best weights, --freeze keeps a part of them; another model's weights are refused."""
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["train", "forecasting", *WORDS, "--steps", "2"]
    assert main([*words, "--out", str(first)]) == 0
    assert main([*words, "--out", str(second), "--init", str(first), "--freeze", "encoder.*", "--seed", "5"]) == 0
    assert torch.equal(weights(first)["encoder.weight_hh_l0"], weights(second)["encoder.weight_hh_l0"])
    assert not torch.equal(weights(first)["fc.weight"], weights(second)["fc.weight"])
    LOADERS["forecasting"] = lambda _=None: Reverse()
    other = str(tmp_path / "other")
    assert "cannot be tuned" in refusal(capsys, *words, "--out", other, "--init", str(first))
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("sines")
def test_a_loss_that_is_no_number_exits_with_one_line(tmp_path, capsys):
    """Exit code 1, step and advice."""
    out = str(tmp_path / "run")
    assert main(["train", "forecasting", *WORDS[:-2], "--clip", "0", "--learning-rate", "1e30", "--out", out]) == 1
    error = capsys.readouterr().err
    assert "loss is" in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("sines")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--variant", "cuda-magic"), "cuda-magic"),
        (("--variant", "openvino"), "openvino cannot train here"),
        (("--freeze", "nothing"), "no parameter's name fits 'nothing'"),
        (("--learning-rate", "0"), "learning_rate is 0.0"),
        (("--clip", "-1"), "clip is -1.0"),
        (("--seed", "-1"), "'-1' is not a whole number of at least 0"),
        (("--seed", "9" * 19), "19 digits, expected at most 18"),
        (("--init", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, expected):
    """Exit code 2, and no folder is begun."""
    out = tmp_path / "run"
    assert expected in refusal(capsys, "train", "forecasting", "--out", str(out), *words)
    assert not out.exists()


def everything(folder):
    """All files and folders below one, and what is in them."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("name", "said"),
    [("deep/new/" + "x" * 300, "cannot be written"), ("file/run", "cannot be written"), ("full", "is not empty")],
)
@pytest.mark.usefixtures("sines")
def test_a_folder_that_cannot_be_made_leaves_nothing(tmp_path, capsys, name, said):
    """Not even the folders that it would have stood in."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    before = everything(tmp_path)
    assert said in refusal(capsys, "train", "forecasting", *WORDS, "--out", str(tmp_path / name))
    assert everything(tmp_path) == before


@pytest.mark.usefixtures("sines")
@pytest.mark.parametrize("kept", [False, True])
def test_a_training_that_fails_before_its_first_step_leaves_nothing(tmp_path, monkeypatch, capsys, kept):
    """A full disk below run.json, and data that give no batch; a folder that was there stays, empty as it was."""
    batches = Sines.batches
    out = tmp_path / "deep" / "run"
    if kept:
        out.mkdir(parents=True)
    before = everything(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("seq2seq.training.folder.write_whole", full)
        assert main(["train", "forecasting", *WORDS, "--out", str(out)]) == 1
    assert everything(tmp_path) == before
    for name, split in (("training", "train"), ("validation", "validation")):
        monkeypatch.setattr(Sines, "batches", lambda self, *a, none=split: () if a[0] == none else batches(self, *a))
        assert f"has no {name} batch" in refusal(capsys, "train", "forecasting", *WORDS, "--out", str(out))
        assert everything(tmp_path) == before


def test_a_plot_that_fails_takes_the_table_with_it(trained, tmp_path, monkeypatch, capsys):
    """Both files are written or none; nothing is printed of what was refused."""
    words = ["predict", str(trained), "--samples", "2", "--plot", str(tmp_path / "plot.png")]

    def failing(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plots, "_png", failing)
    assert main([*words, "--out", str(tmp_path / "table.csv")]) == 1
    assert main(words) == 1
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_files_of_any_name_are_trained_on_forecast_and_exported(series, tmp_path, monkeypatch):
    """A name that is no UTF-8, for the data, the run and all that is written; the table is UTF-8 all the same."""
    # As the command itself lets its standard output be.
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace"))
    name = os.fsdecode(b"Z\xfcrich")
    data, out, table = (tmp_path / f"{name}{suffix}" for suffix in (".csv", "", " table.csv"))
    try:
        data.write_bytes(series.read_bytes())
    except OSError:
        pytest.skip("this file system takes no such name")
    words = ["train", "forecasting", "--data", str(data), "--out", str(out), "--steps", "2", *WORDS]
    assert main([*words, "--option", "history=14", "--option", "samples=5"]) == 0
    assert main(["train", "forecasting", "--out", str(out), "--resume", "--steps", "3"]) == 0
    plot = tmp_path / f"{name}.png"
    assert main(["predict", str(out), "--samples", "2", "--plot", str(plot), "--out", str(table)]) == 0
    assert pd.read_csv(table, encoding="utf-8")["series"].unique().tolist() == [r"Z\xfcrich"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    json.loads((out / "run.json").read_text(encoding="utf-8"))
    for form in ("torchscript", "torchscript-trace", "onnx"):
        assert main(["export", str(out), "--format", form, "--out", str(tmp_path / f"{name}.{form}")]) == 0


def threads_of(monkeypatch):
    """The numbers of threads that torch is set to from now on; none is really set."""
    seen = []
    monkeypatch.setattr(torch, "set_num_threads", seen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: seen[-1] if seen else 2)
    return seen


@pytest.mark.usefixtures("sines")
def test_a_resumed_run_computes_with_the_threads_that_it_began_with(tmp_path, monkeypatch, capsys):
    """Sums in other parts round otherwise; another number is refused, and run.json stays as it was."""
    seen = threads_of(monkeypatch)
    words = ["train", "forecasting", "--out", str(tmp_path / "run")]
    assert main([*words, *WORDS, "--epochs", "1", "--threads", "1"]) == 0
    assert seen[-1] == 1
    seen.append(2)  # another process, where torch chose otherwise
    assert main([*words, "--resume", "--epochs", "2"]) == 0
    assert seen[-1] == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text())["threads"] == 1
    assert main([*words, "--resume", "--epochs", "3", "--threads", "1"]) == 0
    before = everything(tmp_path)
    assert "leave out --threads" in refusal(capsys, *words, "--resume", "--threads", "2")
    assert everything(tmp_path) == before


@pytest.mark.usefixtures("sines")
def test_a_resumed_run_keeps_settings_whose_defaults_have_changed(tmp_path, monkeypatch, capsys):
    """The settings it began with hold, not those of a later release; that another release continues is said."""
    words = ["train", "forecasting", "--out", str(tmp_path / "run")]
    assert main([*words, "--batch", "5", "--epochs", "1"]) == 0
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    monkeypatch.setattr(Sines, "learning_rate", 0.5, raising=False)
    monkeypatch.setattr(torch, "__version__", "9.0")
    capsys.readouterr()
    assert main([*words, "--resume", "--epochs", "2"]) == 0
    again = json.loads((tmp_path / "run" / "run.json").read_text())
    assert {**again["settings"], "epochs": 1, "variant": ""} == begun["settings"]
    assert again["versions"] == begun["versions"]
    assert [one["torch"] for one in again["resumed_with"]] == ["9.0"]
    assert capsys.readouterr().err.count("may round differently") == 1


@pytest.mark.usefixtures("sines")
def test_a_run_is_not_resumed_from_other_weights(tmp_path, capsys):
    """The model that --init names may have been trained on since."""
    first, second = tmp_path / "first", tmp_path / "second"
    words = ["train", "forecasting", *WORDS, "--epochs", "1"]
    assert main([*words, "--out", str(first)]) == 0
    assert main([*words, "--out", str(second), "--init", str(first)]) == 0
    resume = ("train", "forecasting", "--resume", "--epochs", "2", "--out")
    assert main([*resume, str(second)]) == 0
    assert main([*resume, str(first)]) == 0
    assert "other weights in --init" in refusal(capsys, *resume, str(second))


def test_recordings_that_changed_are_other_data(tmp_path):
    """A folder has a digest as a file has: of sounds and transcripts, whatever else lies there."""
    command = importlib.import_module("seq2seq.cli.train")
    (tmp_path / "a.wav").write_bytes(b"sound")
    (tmp_path / "a.txt").write_text("said")
    before = command._data_digest(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    assert command._data_digest(str(tmp_path)) == before
    (tmp_path / "a.txt").write_text("Said")
    assert command._data_digest(str(tmp_path)) != before
    assert command._data_digest("seattle") == command._data_digest(None) == ""


def test_a_bad_file_is_one_line(tmp_path, capsys):
    """File, row and cause come from the task."""
    path = tmp_path / "bad.csv"
    path.write_text("timestamp,value\n2024-01-01,1\n2024-01-02,oops\n")
    error = refusal(capsys, "train", "forecasting", "--data", str(path), "--out", str(tmp_path / "run"))
    assert f"{path}, row 3" in error
    assert not (tmp_path / "run").exists()


def a_bad_path(kind, folder):
    """A path that no task can read, by what is wrong with it."""
    path = folder / "given"
    if kind == "folder":
        (path / "deeper").mkdir(parents=True)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "latin": b"caf\xe9\tb,1\n"}.get(kind, b"a\tb\n"))
    if kind == "unreadable":
        path.chmod(0)
    return path


@pytest.mark.parametrize("kind", ["folder", "missing", "empty", "latin", "unreadable"])
@pytest.mark.parametrize("task", TASKS)
def test_bad_data_of_every_task_is_one_line(task, kind, tmp_path, capsys):
    """The data given is named, whatever is wrong with it; for speech a folder without sounds, and any file."""
    path = a_bad_path(kind, tmp_path)
    if kind == "unreadable" and os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    error = refusal(capsys, "train", task, "--data", str(path), "--out", str(tmp_path / "run"))
    assert error.startswith(f"error: {path}")
    assert "expected" in error or "save the file as UTF-8" in error
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_none_is_one_line(tmp_path, capsys):
    """Neither a run nor a model."""
    assert str(tmp_path) in refusal(capsys, "predict", str(tmp_path))


def test_help_names_every_option_and_task(capsys):
    """Every command has help, every option a text."""
    for command in ("train", "predict", "translate"):
        with pytest.raises(SystemExit) as ending:
            main([command, "--help"])
        assert ending.value.code == 0
    assert all(task in TASKS for task in LOADERS)
    assert MODELS == TASK_MODELS
    subparsers = next(action for action in parser()._actions if action.dest == "command")
    for command in subparsers.choices.values():
        assert all(action.help for action in command._actions)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("cook",), "invalid choice 'cook'; choose from seed, train, "),
        (("trian",), "invalid choice 'trian'; did you mean 'train'?; see python -m seq2seq --help"),
        (("train", "forcast"), "invalid choice 'forcast'; did you mean 'forecasting'?"),
        (("train", "speech", "--model", "lstn"), "invalid choice 'lstn'; did you mean 'lstm'?"),
        (("train", "speech", "--variant", "cpu-fusd", "--out", "new"), "'cpu-fusd'; did you mean 'cpu-fused'"),
        (("train",), "no TASK is given; choose from forecasting, translation, "),
        (("train", "baking"), "invalid choice 'baking'; choose from forecasting, translation, "),
        (("train", "speech", "--quick"), "--quick"),
        (("train", "speech", "--sedd", "3"), "--sedd 3; did you mean --seed?; see python -m seq2seq train --help"),
        (("train", "speech", "--seed", "1.5"), "'1.5' is not a whole number"),
        (("train", "speech", "--clip", "much"), "'much' is not a number"),
        (("train", "speech", "--epochs", "0"), "'0' is not a whole number of at least 1"),
        (("train", "speech", "--out"), "expected one argument"),
        (("predict", "RUN", "--last", "--start", "3"), "not allowed with argument"),
        (("predict", "RUN", "--plot", "a.pdf"), "does not end in .png"),
        (("export", "RUN"), "required: --out; see python -m seq2seq export --help"),
    ],
)
def test_wrong_usage_is_one_line_that_names_it(capsys, words, expected):
    """No screen of usage before it; --help prints that."""
    assert expected in refusal(capsys, *words)


def test_attention_weights_are_shares_of_the_source():
    """One row a decoder step, summing to 1, for a model with attention; others have none."""
    attention = pytest.importorskip("seq2seq.models.attention")
    config = attention.AttentionConfig(6, 8, 9, source_vocabulary=9, target_vocabulary=9)
    model = config.build(torch.nn.LSTM).eval()
    assert plots.looks(model)
    found = plots.attention_weights(model, torch.tensor([[4, 5, 6]]), torch.tensor([[2, 7]]))
    assert found.shape == (1, 2, 3)
    assert torch.allclose(found.sum(-1), torch.ones(1, 2))
    assert not plots.looks(Sines().model_config("lstm", "small").build(torch.nn.LSTM))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"caf\xe9\n", "standard input, row 1: byte 0xe9 is not utf-8"),
        ("\ufeffone\u2028line\r\ntwo\n".encode(), ["one\u2028line", "two"]),
        ("one\u2028line\rtwo".encode("utf-16"), ["one\u2028line", "two"]),
        (b"", []),
    ],
)
def test_lines_of_standard_input_are_utf8_split_at_line_ends(monkeypatch, data, expected):
    """Bytes that are no UTF-8 are refused in every locale, and each line in gives one line out."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="surrogateescape"))
    commands = importlib.import_module("seq2seq.cli.commands")
    if isinstance(expected, str):
        with pytest.raises(CommandError, match=expected):
            commands._lines(None)
    else:
        assert commands._lines(None) == expected
