"""Rows that sequences join and leave between steps: a batch that never waits for its longest sequence.

Each row holds one query. It goes through the LSTMs of a model one after the other (`Model.streams`), a step at a time,
and the next query takes its row when it is done. Where a query joins, its row of the state is reset. The decoder reads
a given target in `StepRows`, and its own output in `DecodingRows`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.lstm import LSTM
from seq2seq.data.batch import Batch
from seq2seq.data.tokens import END
from seq2seq.decoding.search import first_token
from seq2seq.layers.likelihoods import widened
from seq2seq.models.base import Model, StreamedLSTM

State = tuple[Tensor, Tensor]


@dataclass
class RowHolder:
    """A query in a row: its name, its sample in the batch, where it is, and the most steps of each LSTM.

    `ended` is set where it is done before them.
    """

    query: int
    sample: int
    steps: tuple[int, ...]
    stage: int = 0
    step: int = 0
    ended: bool = False


@dataclass(frozen=True)
class Finished:
    """A query that has left its row, with its results: those of `Model.run` or `greedy` for this query alone."""

    query: int
    results: Mapping[str, Tensor]


class StepRows:
    """A model with a fixed number of rows. Use it without gradients, inside the settings of its variant.

    Results of a query are `outputs` (1, steps, head_size), `hidden` and `cell`.

    Args:
        model: in eval mode; `Model.streams` must not be empty.
        batch: the sequences that queries ask about, on the model's device and in its type.
        lengths: of each sequence its steps, one number for each tensor that the model reads (source, target).
        count: rows.

    Attributes:
        computed: row steps computed so far; `valid` of them were of a query.
    """

    def __init__(self, model: Model, batch: Batch, lengths: tuple[tuple[int, ...], ...], count: int) -> None:
        self.streams = model.streams()
        if not self.streams:
            msg = f"{type(model).__name__} cannot be driven step by step"
            raise ValueError(msg)
        self.batch, self.lengths = batch, lengths
        self.computed = self.valid = 0
        self._rows: list[RowHolder | None] = [None] * count
        self._states = [_zeros(stream, count, batch.source.device) for stream in self.streams]
        head = self._run(
            len(self.streams) - 1, torch.zeros(count, dtype=torch.int64), torch.ones(count, dtype=torch.bool)
        )
        self._make_room(head, max(self._steps(sample)[-1] for sample in range(len(lengths))))

    @property
    def free(self) -> int:
        """Rows that no query holds."""
        return self._rows.count(None)

    @property
    def active(self) -> int:
        """Rows that a query holds."""
        return len(self._rows) - self.free

    def join(self, query: int, sample: int) -> None:
        """Give a query a free row; its first step is in the next `advance`.

        Args:
            query: its name, which `advance` gives back.
            sample: its sequence.

        Raises:
            ValueError: where no row is free.
        """
        if not self.free:
            msg = f"no row is free: {len(self._rows)} queries are here, one must leave before another joins"
            raise ValueError(msg)
        self._rows[self._rows.index(None)] = RowHolder(query, sample, self._steps(sample))

    def advance(self) -> list[Finished]:
        """Take one step of every query; returns those that are done, whose rows are free again."""
        finished = []
        # Backwards, so that what enters an LSTM waits for the next step.
        for stage in reversed(range(len(self.streams))):
            here = [(row, holder) for row, holder in enumerate(self._rows) if holder and holder.stage == stage]
            if not here:
                continue
            self._step(stage, here)
            self.computed += len(self._rows)
            self.valid += len(here)
            done = [(row, holder) for row, holder in here if holder.ended or holder.step == holder.steps[stage]]
            if stage + 1 < len(self.streams):
                self._enter(stage + 1, done)
            else:
                finished += [self._leave(row, holder) for row, holder in done]
        return finished

    def _steps(self, sample: int) -> tuple[int, ...]:
        """Steps of a sample in each LSTM."""
        own = self.lengths[sample]
        return tuple(own[0] if stream.reads == "source" else own[-1] for stream in self.streams)

    def _step(self, stage: int, here: list[tuple[int, RowHolder]]) -> None:
        """One step of an LSTM; rows without a query in it compute values that are not read."""
        samples, steps = torch.zeros(2, len(self._rows), dtype=torch.int64)
        resets = torch.zeros(len(self._rows), dtype=torch.bool)
        for row, holder in here:
            samples[row], steps[row] = holder.sample, holder.step
            resets[row] = holder.step == 0 and stage == 0
            holder.step += 1
        outputs = self._run(stage, samples, resets, steps)
        if self.streams[stage].head is not None:
            rows = torch.tensor([row for row, _ in here], device=outputs.device)
            self._keep(outputs[rows], rows, steps.to(outputs.device)[rows], [holder for _, holder in here])

    def _make_room(self, head: Tensor, longest: int) -> None:
        """Make room for results of at most this many steps, of the type of a step's outputs (rows, head_size)."""
        self._outputs = head.new_zeros(head.size(0), longest, head.size(1))

    def _keep(self, outputs: Tensor, rows: Tensor, steps: Tensor, holders: list[RowHolder]) -> None:
        """Keep the outputs (some rows, head_size) of a step, by its row and its number in the sequence."""
        del holders
        self._outputs[rows, steps] = outputs

    def _read(self, stage: int, samples: Tensor, steps: Tensor) -> Tensor:
        """Input of an LSTM in a step of all rows."""
        reads = self.streams[stage].reads
        value = self.batch.source if reads == "source" or self.batch.target is None else self.batch.target
        return value[samples.to(value.device), steps.to(value.device)]

    def _run(self, stage: int, samples: Tensor, resets: Tensor, steps: Tensor | None = None) -> Tensor:
        """Outputs (rows, features) of one step of all rows, whose state is updated in place."""
        stream = self.streams[stage]
        x = stream.embed(self._read(stage, samples, torch.zeros_like(samples) if steps is None else steps))
        outputs = _stepped(stream.lstm, x, self._states[stage], resets.to(x.device))
        return outputs if stream.head is None else stream.head(outputs)

    def _enter(self, stage: int, queries: list[tuple[int, RowHolder]]) -> None:
        """Hand the final state of an LSTM to the next one."""
        if not queries:
            return
        rows = torch.tensor([row for row, _ in queries], device=self.batch.source.device)
        start: Callable[..., State] | None = self.streams[stage].start
        given: State = tuple(value[:, rows] for value in self._states[stage - 1])  # type: ignore[assignment]
        for value, first in zip(self._states[stage], given if start is None else start(*given), strict=True):
            value[:, rows] = first.to(value.dtype)
        for _, holder in queries:
            holder.stage, holder.step = stage, 0

    def _leave(self, row: int, holder: RowHolder) -> Finished:
        """Free a row."""
        self._rows[row] = None
        return Finished(holder.query, self._results(row, holder.step))

    def _results(self, row: int, steps: int) -> dict[str, Tensor]:
        """Copies of a row's state after a number of steps of its last LSTM: the next query writes where it lies."""
        hidden, cell = (value[:, row : row + 1].clone() for value in self._states[-1])
        return {"outputs": self._outputs[row : row + 1, :steps].clone(), "hidden": hidden, "cell": cell}


class DecodingRows(StepRows):
    """Rows in which each query decodes greedily: its decoder reads the token that it chose in the step before.

    A query is done after its end token, or after as many tokens as its sample's target has steps. Its results are
    `tokens` (1, steps), the end token among them, and `scores` (1,), its log-probability in float64: those of `greedy`.

    Args:
        model: as for `StepRows`; with tokens as targets.
        batch: as for `StepRows`; of the targets only the number of steps counts.
        lengths: as for `StepRows`.
        count: rows.

    Raises:
        ValueError: also for a model whose decoder reads no tokens.
    """

    def __init__(self, model: Model, batch: Batch, lengths: tuple[tuple[int, ...], ...], count: int) -> None:
        if not model.config.target_vocabulary:
            msg = f"{type(model).__name__} of these sizes reads no tokens as target, so no end token ends a query"
            raise ValueError(msg)
        self._first = first_token(model.config)
        self._fed = torch.full((count,), self._first, device=batch.source.device)
        super().__init__(model, batch, lengths, count)

    def _make_room(self, head: Tensor, longest: int) -> None:
        self._tokens = self._fed.new_zeros(head.size(0), longest)
        self._scores = head.new_zeros(head.size(0), dtype=torch.float64)

    def _read(self, stage: int, samples: Tensor, steps: Tensor) -> Tensor:
        last = stage == len(self.streams) - 1
        return self._fed if last else super()._read(stage, samples, steps)

    def _keep(self, outputs: Tensor, rows: Tensor, steps: Tensor, holders: list[RowHolder]) -> None:
        wide = widened(outputs)
        likeliest, tokens = wide.max(-1)
        self._tokens[rows, steps] = self._fed[rows] = tokens
        self._scores[rows] += likeliest - wide.logsumexp(-1)
        for holder, token in zip(holders, tokens.tolist(), strict=True):
            holder.ended = token == END

    def _enter(self, stage: int, queries: list[tuple[int, RowHolder]]) -> None:
        super()._enter(stage, queries)
        rows = torch.tensor([row for row, _ in queries], dtype=torch.int64, device=self._fed.device)
        self._fed[rows], self._scores[rows] = self._first, 0.0

    def _results(self, row: int, steps: int) -> dict[str, Tensor]:
        return {"tokens": self._tokens[row : row + 1, :steps].clone(), "scores": self._scores[row : row + 1].clone()}


def _zeros(stream: StreamedLSTM, count: int, device: torch.device) -> State:
    lstm = stream.lstm
    shape, dtype = (lstm.num_layers, count, lstm.hidden_size), next(lstm.parameters()).dtype
    return torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)


def _stepped(lstm: Any, x: Tensor, state: State, resets: Tensor) -> Tensor:
    """One step, state in place: by the LSTM's own `step`, or as a sequence of one step."""
    if isinstance(lstm, LSTM):
        return lstm.step(x, state, resets)
    for value in state:
        value.masked_fill_(resets[:, None], 0.0)
    outputs, after = lstm(x.unsqueeze(1), state)
    for value, new in zip(state, after, strict=True):
        value.copy_(new)
    found: Tensor = outputs.squeeze(1)
    return found
