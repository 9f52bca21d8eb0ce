"""A model of texts that was exported translates without this project, as `translate` does."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch
from alone import ALONE

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
from seq2seq.cli.main import main
from seq2seq.models.checkpoint import save_pretrained
from seq2seq.tasks.text_models import TextSizes

LINES = "3 red ferries\n  grüne   Fähren <end>\n日本\n" + "x" * 40 + "\n"


@pytest.mark.parametrize("task", ["translation", "summarization"])
@pytest.mark.parametrize("model", ["lstm", "attention", "gnmt", "transformer"])
def test_texts_are_those_of_translate(tmp_path, capsys, monkeypatch, task, model):
    """Line by line, with the vocabulary beside the file, cut where the training cut; special names are words."""
    (tmp_path / "pairs.tsv").write_text("".join(f"{n} red ferries\t{n} rote Fähren\n" for n in range(20)))
    module = importlib.import_module(f"seq2seq.tasks.{task}")
    monkeypatch.setitem(module.SIZES, "small", TextSizes(8, 8, 1, 0.0))
    loaded = module.load(tmp_path / "pairs.tsv", max_source=9, max_target=7)
    torch.manual_seed(0)
    found = loaded.model_config(model, "small").build(torch.nn.LSTM).eval()
    # Untrained it says one token for ever; so it says others.
    for parameter in found.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.9)
    save_pretrained(found, tmp_path / "run", {"name": task, "state": loaded.state()})
    out = tmp_path / "model.onnx"
    assert main(["export", str(tmp_path / "run"), "--format", "onnx", "--out", str(out)]) == 0
    facts = json.loads((tmp_path / "model.onnx.json").read_text())
    assert facts["special_tokens"] == {"padding": 0, "unknown": 1, "begin": 2, "end": 3}
    assert facts["inputs"]["source"]["below"] == loaded.subwords.size
    (tmp_path / "lines").write_text(LINES)
    capsys.readouterr()
    assert main(["translate", str(tmp_path / "run"), "--data", str(tmp_path / "lines"), "--beam", "1"]) == 0
    expected = capsys.readouterr().out
    assert len(set(expected.splitlines())) > 1
    done = subprocess.run(
        [sys.executable, "-c", ALONE, f"{out}.py"],
        input=LINES.encode(), capture_output=True, check=False, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == expected
