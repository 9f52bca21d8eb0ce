"""The seed's example: as written it does not run, mended it does, and ours prints what the mended one prints."""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

#: The code of the seed, word for word.
SEED = """\
import torch
import torch.nn as nn
import torch.optim as optim
# Define sequence parameters
seq_length = 10
batch_size = 16
input_size = 5
output_size = 1
# Generate random input and output sequences
X = torch.randn((batch_size, seq_length, input_size))
y = torch.randn((batch_size, seq_length, output_size))
class Seq2Seq(nn.Module):
    def __init__(self, input_dim, hidden_dim, output_dim):
        super(Seq2Seq, self).__init__()
        self.encoder = nn.LSTM(input_dim, hidden_dim, batch_first=True)
        self.decoder = nn.LSTM(hidden_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(hidden_dim, output_dim)
    def forward(self, x):
        _, (hidden, cell) = self.encoder(x)
        outputs, _ = self.decoder(x, (hidden, cell))
        outputs = self.fc(outputs)
        return outputs
# Initialize the model, optimizer, and loss function
model = Seq2Seq(input_dim=input_size, hidden_dim=16, output_dim=output_size)
optimizer = optim.Adam(model.parameters(), lr=0.01)
loss_fn = nn.MSELoss()
# Training loop
for epoch in range(50):
    optimizer.zero_grad()
    output = model(X)
    loss = loss_fn(output, y)
    loss.backward()
    optimizer.step()
    if (epoch + 1) % 10 == 0:
        print(f"Epoch [{epoch+1}/50], Loss: {loss.item():.4f}")
"""
MENDED = SEED.replace("self.decoder = nn.LSTM(hidden_dim,", "self.decoder = nn.LSTM(input_dim,")
ROOT = Path(__file__).parents[1]
LINE = re.compile(r"Epoch \[(\d+)/50\], Loss: (\d+\.\d{4})")


def run_text(text: str, folder: Path) -> None:
    """Run a program's text from the random state of seed 0."""
    path = folder / "example.py"
    path.write_text(text)
    torch.manual_seed(0)
    runpy.run_path(str(path))


def losses(output: str) -> list[float]:
    """The losses printed, after a look at the lines: epochs 10 to 50 and nothing else."""
    matches = [LINE.fullmatch(line) for line in output.splitlines()]
    assert all(matches), output
    assert [int(match[1]) for match in matches] == [10, 20, 30, 40, 50]
    return [float(match[2]) for match in matches]


def test_seed_as_written_raises(tmp_path):
    """The seed's decoder is built for hidden_dim features but is fed input_dim, so its own example raises."""
    with pytest.raises(RuntimeError, match="Expected 16, got 5"):
        run_text(SEED, tmp_path)


def test_our_example_prints_what_the_mended_seed_prints(tmp_path, capsys, monkeypatch):
    """With the decoder built for what it is fed, the seed's program and ours print the same from the same seed."""
    run_text(MENDED, tmp_path)
    mended = losses(capsys.readouterr().out)
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["seq2seq"])
    # Another test may have imported it, of which runpy would warn.
    monkeypatch.delitem(sys.modules, "seq2seq.__main__", raising=False)
    with pytest.raises(SystemExit) as ending:
        runpy.run_module("seq2seq", run_name="__main__")
    assert ending.value.code == 0
    # The last of the four digits printed may round the other way.
    assert losses(capsys.readouterr().out) == pytest.approx(mended, abs=2e-4)


def test_our_example_runs_from_the_command_line():
    """`python -m seq2seq` ends well with five lines in the seed's format, and the loss falls from each to the next."""
    done = subprocess.run(
        [sys.executable, "-m", "seq2seq"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = losses(done.stdout)
    assert all(later < earlier for earlier, later in itertools.pairwise(found)), found
