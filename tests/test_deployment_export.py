"""Deployment: what was exported computes what the model computes, and what cannot be says why in one line."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from seq2seq.cli import arguments
from seq2seq.cli.main import main
from seq2seq.deployment import export as deployment
from seq2seq.deployment.export import FORMATS, ExportError, ExportSizes, agree, export, load, make_inputs
from seq2seq.models.attention import AttentionConfig
from seq2seq.models.base import Config, Model
from seq2seq.models.ctc import CTCConfig
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.gnmt import GNMTConfig
from seq2seq.models.lstm_layer import SingleConfig
from seq2seq.models.transformer import TransformerConfig

TOKENS = {"source_vocabulary": 11, "target_vocabulary": 13}
CONFIGS: dict[str, Config] = {
    "lstm": Seq2SeqConfig(3, 4, 2),
    "lstm of tokens": Seq2SeqConfig(3, 4, 13, 2, bidirectional=True, decoder_layers=1, **TOKENS),
    "attention": AttentionConfig(3, 4, 13, 2, bidirectional=True, **TOKENS),
    "gnmt": GNMTConfig(3, 4, 13, num_layers=3, **TOKENS),
    "transformer": TransformerConfig(8, 13, 2, 2, **TOKENS),
    "lstm-alone": SingleConfig(3, 4),
    "ctc": CTCConfig(3, 4, 5, 2),
}
FED = AttentionConfig(3, 4, 13, attention="bahdanau", feeds="attention", **TOKENS)
WITH_LENGTHS = {name: config for name, config in CONFIGS.items() if name != "lstm-alone"} | {
    "both ways": Seq2SeqConfig(3, 4, 2, 2, bidirectional=True),
    "attention to values": AttentionConfig(3, 4, 2),
    "fed": FED,
}
QUICK = ("torchscript", "torchscript-trace", "onnx")
ANY = ("batches", "source steps", "target steps")
LARGER = ExportSizes(5, 9, 3)


def built(config: Config) -> Model:
    """A model in evaluation mode, the same each time."""
    torch.manual_seed(0)
    return config.build(nn.LSTM).eval()


def equal(model: Model, path: Path, form: str, sizes: ExportSizes, *, lengths: bool = False) -> bool:
    """Return whether a file gives a model's results."""
    inputs = make_inputs(model.config, sizes, lengths=lengths)
    with torch.no_grad():
        return agree(load(path, form)(*inputs), model.run(*inputs))


@pytest.mark.parametrize("form", QUICK)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_round_trip_computes_the_same(name, form, tmp_path):
    """Every family; batch, source and target may have other sizes than those of the export."""
    if form == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    model = built(CONFIGS[name])
    served = export(model, tmp_path / "model", form)
    assert served == deployment.Served(ANY if model.config.decodes else ANY[:2], (), ())
    assert equal(model, tmp_path / "model", form, LARGER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lstm", "attention", "transformer", "ctc"])
def test_an_exported_program_computes_the_same(name, tmp_path):
    """Any batch; steps too where no LSTM unrolls them."""
    model = built(CONFIGS[name])
    served = export(model, tmp_path / "model.pt2", "torch-export")
    assert served.any_of == (ANY if name == "transformer" else ANY[:1])
    assert served.wrong == ()
    assert equal(model, tmp_path / "model.pt2", "torch-export", dataclasses.replace(ExportSizes(), batch=5))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_model_computes_the_same(tmp_path):
    """Machine code, for any batch."""
    model = built(CONFIGS["lstm-alone"])
    served = export(model, tmp_path / "model.pt2", "aotinductor", ExportSizes(2, 2))
    assert served.any_of == ANY[:1]
    assert equal(model, tmp_path / "model.pt2", "aotinductor", ExportSizes(5, 2))


@pytest.mark.parametrize("name", ["lstm of tokens", "attention", "ctc"])
@pytest.mark.parametrize("form", ["torchscript", "torchscript-trace"])
def test_lengths_may_be_inputs(name, form, tmp_path):
    """Other lengths than those of the export give the model's results too."""
    model = built(CONFIGS[name])
    assert export(model, tmp_path / "model", form, lengths=True).wrong == ()
    assert equal(model, tmp_path / "model", form, LARGER, lengths=True)


@pytest.mark.parametrize("form", QUICK)
@pytest.mark.parametrize("name", ["attention", "gnmt", "transformer"])
def test_a_model_with_dropout_is_exported_as_it_is_evaluated(name, form, tmp_path):
    """Nothing is dropped, in the file or in what it is compared with, and the model stays in evaluation mode."""
    if form == "onnx":
        pytest.importorskip("onnx")
        pytest.importorskip("onnxruntime")
    model = built(dataclasses.replace(CONFIGS[name], dropout=0.5))
    assert export(model, tmp_path / "model", form).wrong == ()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", WITH_LENGTHS)
def test_lengths_may_be_inputs_of_onnx(name, tmp_path, capfd):
    """Of every family, one layer of real values included; an LSTM node a layer and no word from the exporter."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = built(WITH_LENGTHS[name])
    served = export(model, tmp_path / "model", "onnx", lengths=True)
    sized = ANY if model.config.decodes else ANY[:2]
    assert served == (deployment.Served(ANY[:2], ANY[2:], ()) if name == "fed" else deployment.Served(sized, (), ()))
    sizes = dataclasses.replace(LARGER, target_steps=ExportSizes().target_steps)
    assert equal(model, tmp_path / "model", "onnx", sizes, lengths=True)
    found = [node.op_type for node in onnx.load(tmp_path / "model").graph.node].count("LSTM")
    steps = ExportSizes().target_steps
    wanted = {"fed": 1 + steps, "gnmt": 6, "transformer": 0}
    assert found == wanted.get(name, sum(stack.num_layers for stack in model.config.stacks))
    assert capfd.readouterr() == ("", "")


def test_an_exporter_that_fails_is_one_line(tmp_path, monkeypatch, capfd):
    """The graph that torch prints when its ONNX exporter fails stays away from the terminal."""
    pytest.importorskip("onnx")

    def symbolic(graph, x, *_):
        return graph.op("Reshape", x), x, x

    monkeypatch.setattr("seq2seq.runtimes.onnx_lstm._Node.symbolic", staticmethod(symbolic))
    with pytest.raises(ExportError, match=r"^onnx: the lstm model cannot be exported: .*; use torchscript$"):
        export(built(CONFIGS["lstm"]), tmp_path / "model", "onnx", lengths=True)
    assert capfd.readouterr() == ("", "")
    print("heard again", flush=True)
    assert capfd.readouterr().out == "heard again\n"


def test_a_script_decodes_step_by_step(tmp_path):
    """It keeps encode and step, which decoding needs where this project is not."""
    model = built(CONFIGS["attention"])
    export(model, tmp_path / "model", "torchscript")
    scripted = torch.jit.load(tmp_path / "model")
    source, target, *_ = make_inputs(model.config, LARGER)
    with torch.no_grad():
        outputs, state = [], scripted.encode(source)
        for value in target.unbind(1):
            found, state = scripted.step(value, state)
            outputs.append(found)
        torch.testing.assert_close(torch.stack(outputs, 1), model(source, target), rtol=1e-4, atol=1e-4)


def test_what_a_trace_fixed_is_told(tmp_path):
    """A decoder that is called for each step is unrolled: its file refuses other target steps, and that is said."""
    served = export(built(FED), tmp_path / "model", "torchscript-trace")
    assert (served.any_of, served.refused, served.wrong) == (ANY[:2], ANY[2:], ())
    assert served.words(ExportSizes()) == "any batches and source steps; only target steps of 6"


def test_a_file_that_gives_other_results_for_other_sizes_is_marked(tmp_path, monkeypatch):
    """A format that would answer wrongly without a word: planted, seen, and told in capitals."""

    def planted(path: Path) -> deployment.Loaded:
        run = FORMATS["torchscript"].load(path)
        return lambda *inputs: tuple(value * (1 + (len(inputs[0]) > 2)) for value in run(*inputs))

    monkeypatch.setitem(FORMATS, "planted", dataclasses.replace(FORMATS["torchscript"], load=planted))
    served = export(built(CONFIGS["lstm"]), tmp_path / "model", "planted")
    assert (served.any_of, served.wrong) == (ANY[1:], ANY[:1])
    assert "only batches of 2, WRONG RESULTS for others" in served.words(ExportSizes())


def test_a_file_that_computes_something_else_is_no_export(tmp_path, monkeypatch):
    """It is told, and what was there before stays."""

    def planted(model: Model, inputs: deployment.Inputs, path: Path) -> None:
        other = built(model.config)
        nn.init.constant_(other.fc.bias, 1.0)
        FORMATS["torchscript"].write(other, inputs, path)

    monkeypatch.setitem(FORMATS, "planted", dataclasses.replace(FORMATS["torchscript"], write=planted))
    (tmp_path / "model").write_text("old")
    with pytest.raises(ExportError, match="the file's results are not the model's; use torch-export"):
        export(built(CONFIGS["lstm"]), tmp_path / "model", "planted")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_what_cannot_be_exported_says_why(tmp_path):
    """One line: the format, the model, the cause, and what to do instead; nothing is written."""
    with pytest.raises(ExportError) as error:
        export(built(CONFIGS["lstm"]), tmp_path / "model.pt2", "torch-export", lengths=True)
    assert str(error.value) == (
        "torch-export: the lstm model cannot be exported with lengths: torch.export cannot pack sequences, whose sizes "
        "depend on the lengths' values; use onnx or torchscript, or leave the lengths out"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        ("torchscrip", "model", "format is 'torchscrip', expected one of torchscript, "),
        ("torch-export", "model.pt", "the file is model.pt, expected a name that ends in .pt2"),
    ],
)
def test_bad_arguments_are_told(form, name, said, tmp_path):
    """Before anything is compiled."""
    with pytest.raises(ExportError, match=said):
        export(built(CONFIGS["lstm"]), tmp_path / name, form)


@pytest.mark.parametrize("form", ["torchscript", "torch-export"])
def test_a_file_of_another_format_is_told(form, tmp_path):
    """It is named, with what was expected."""
    (tmp_path / "model.pt2").write_text("no model")
    with pytest.raises(ExportError, match=f"model.pt2 cannot be read as {form} .*; expected a file") as error:
        load(tmp_path / "model.pt2", form)
    assert "\n" not in str(error.value)


def test_the_command_line_knows_the_formats():
    """Its grammar is read without torch, so it has their names itself."""
    assert tuple(arguments.FORMATS) == tuple(deployment.FORMATS)


def test_the_command_exports_a_checkpoint(tmp_path, capsys):
    """It says what the file serves; a missing checkpoint and a format that cannot are one line and 2."""
    pytest.importorskip("safetensors")
    from seq2seq.models.checkpoint import save_pretrained

    model = built(CONFIGS["lstm"])
    save_pretrained(model, tmp_path / "checkpoint")
    out = tmp_path / "model.pt2"
    assert main(["export", str(tmp_path / "checkpoint"), "--out", str(out)]) == 0
    assert "serves any batches and source steps and target steps" in capsys.readouterr().out
    assert equal(model, out, "torchscript", LARGER)
    for words in (["nothing"], [str(tmp_path / "checkpoint"), "--format", "torch-export", "--lengths"]):
        assert main(["export", *words, "--out", str(tmp_path / "other.pt2")]) == 2
        shown = capsys.readouterr()
        assert (shown.out, shown.err.count("\n")) == ("", 1)
        assert shown.err.startswith("error: ")
    assert main(["export", str(tmp_path / "checkpoint"), "--out", str(out)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
