"""The seed's example, on the mended model: it trains on random data and prints the loss."""

from __future__ import annotations

import torch
from torch import nn, optim

from seq2seq.models.encoder_decoder import Seq2Seq, Seq2SeqConfig

BATCH, STEPS, INPUT_SIZE, OUTPUT_SIZE, HIDDEN_SIZE = 16, 10, 5, 1, 16
EPOCHS, REPORT_EVERY, LEARNING_RATE = 50, 10, 0.01


def run() -> None:
    """Train for 50 epochs of Adam on one random batch, printing the loss each 10."""
    x = torch.randn((BATCH, STEPS, INPUT_SIZE))
    y = torch.randn((BATCH, STEPS, OUTPUT_SIZE))
    model = Seq2Seq(Seq2SeqConfig(INPUT_SIZE, HIDDEN_SIZE, OUTPUT_SIZE))
    optimizer = optim.Adam(model.parameters(), lr=LEARNING_RATE)
    loss_function = nn.MSELoss()
    for epoch in range(1, EPOCHS + 1):
        optimizer.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        optimizer.step()
        if epoch % REPORT_EVERY == 0:
            print(f"Epoch [{epoch}/{EPOCHS}], Loss: {loss.item():.4f}")
