"""The gate of the mode `decode`: what was generated is compared with truth along its own path.

Free running is discontinuous: if two tokens are almost equally likely, rounding decides, and everything after differs.
So tokens are not compared with truth's tokens. Truth, the loop in float64, is fed with what the variant chose, and then

- `outputs`: along the target, the same for all, every step's outputs keep within the usual limits;
- `scores`: the log-probabilities that the variant claims are those that truth gives the same tokens;
- `choices`: no choice is worse than truth's own by more than errors of that size explain: the first best hypothesis of
  a step against truth's first best continuation of the same hypotheses, the second against the second, and so on. Where
  truth's margin is larger than the limit, the tokens are therefore equal;
- `values`, where values are generated: each follows from those before it within the usual limits.

CHOICE: factor by which an output's error may exceed the root mean square error that the limit of `outputs` allows: 5,
for the largest of a million normal errors, times 2, since two outputs are compared. A hypothesis of a beam sums a
step's errors, which grow with the root of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bench.gate.tolerance import Check, Verdict, limit_for, relative_error
from seq2seq.data.batch import Batch
from seq2seq.decoding.search import first_token
from seq2seq.execution.executable import Executable
from seq2seq.execution.variants import VARIANTS
from seq2seq.layers.likelihoods import central
from seq2seq.models.base import Config, select
from seq2seq.models.weights import Weights

CHOICE = 10.0
#: Precisions whose largest outputs are exact: what is likeliest in a step is chosen as in fp32, and judged so. A beam
#: also compares hypotheses by the normalisers of their softmax, which are not exact.
CHOOSES_EXACTLY = frozenset({"int8-head"})


class Truth:
    """The loop in float64 on one problem.

    Args:
        config: sizes of the model.
        device: where it runs.
        weights: fp32.
        batch: on the CPU.
        beam: hypotheses of a sequence.
    """

    def __init__(self, config: Config, device: str, weights: Weights, batch: Batch, beam: int) -> None:
        self._executable = Executable(VARIANTS["loop"], config, "decode", device, weights)
        self._model, self._beam, self._config = self._executable.model.double(), beam, config
        self._batch = batch.to(device, torch.float64)

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """The error of everything in `found` that can be judged, by name; infinite for what makes no sense."""
        with self._executable.context():
            errors = {}
            if "outputs" in found:
                errors["outputs"] = relative_error(found["outputs"], self._outputs())
            if "values" in found:
                errors["values"] = relative_error(found["values"], self._values(found["values"]))
            if "tokens" in found:
                errors |= self._tokens(found)
            return errors

    def _outputs(self) -> Tensor:
        """Outputs along the target, by teacher forcing and not step by step."""
        batch = self._batch
        return self._model.run(batch.source, batch.target, batch.source_lengths)[0].repeat_interleave(self._beam, 0)

    def _values(self, values: Tensor) -> Tensor:
        """Outputs that follow from the found tokens, step by step: (batch, steps, output_size)."""
        batch, size = self._batch, self._config.output_size
        assert batch.target is not None  # noqa: S101 - such a workload is refused before
        target = batch.target.clone()
        if values.shape != (*target.shape[:2], size):
            return target.new_empty(0)
        target[:, 1:, :size] = values[:, :-1].to(target)
        outputs = self._model.run(batch.source, target, batch.source_lengths)[0]
        return central(self._config.likelihood, outputs)

    def _tokens(self, found: Mapping[str, Tensor]) -> dict[str, float]:
        """Errors of scores and choices, by going the way that was gone."""
        wrong = {"scores": math.inf, "choices": math.inf}
        batch, beam = self._batch, self._beam
        assert batch.target is not None  # noqa: S101 - such a workload is refused before
        sequences, steps = batch.target.shape[:2]
        tokens, vocabulary = found["tokens"], self._config.output_size
        first = torch.arange(sequences, device=tokens.device)
        traced = first.expand(steps, -1), tokens.T
        parents, chosen = traced if beam == 1 else (found["parents"], found["chosen"])
        if tokens.shape != (sequences, steps) or not parents.shape == chosen.shape == (steps, sequences * beam):
            return wrong
        if int(chosen.min()) < 0 or int(chosen.max()) >= vocabulary:
            return wrong
        state = self._model.encode(batch.source, batch.source_lengths)
        value, history = torch.full_like(first, first_token(self._config)), tokens.new_zeros(sequences, steps)
        scores, regret = torch.zeros(sequences, dtype=torch.float64, device=tokens.device), 0.0
        for step in range(steps):
            outputs, state = self._model.step(value, state)
            come, value = parents[step], chosen[step]
            every = scores[:, None] + outputs.log_softmax(-1)
            if not self._apart(come, value, outputs.size(0) // sequences):
                return wrong
            scores = every[come, value]
            best = every.reshape(sequences, -1).topk(beam).values
            missed = float((best - scores.view(sequences, beam).sort(descending=True).values).max())
            rounded = float(outputs.square().mean().sqrt()) * math.sqrt(step + 1 if beam > 1 else 1)
            regret = max(regret, missed / rounded)
            state, history = select(state, come), history[come]
            history[:, step] = value
        same = (history.view(sequences, beam, steps) == tokens[:, None]).all(-1)
        if not bool(same.any(1).all()):
            return wrong
        grid = scores.view(sequences, beam)
        own = grid.masked_fill(~same, -math.inf).amax(1)
        regret = max(regret, float((grid.amax(1) - own).max()) / rounded)
        return {"scores": relative_error(found["scores"], own), "choices": regret}

    def _apart(self, parents: Tensor, chosen: Tensor, rows: int) -> bool:
        """Return whether hypotheses continue their own sequence's, `rows` rows each, and no two are the same."""
        own = torch.arange(parents.size(0), device=parents.device) // self._beam
        if not torch.equal(parents.div(rows, rounding_mode="floor"), own):
            return False
        pairs = parents * self._config.output_size + chosen
        return int(pairs.unique().numel()) == parents.size(0)


def judge(errors: Mapping[str, float], yardsticks: Mapping[str, float], precision: str, beam: int = 1) -> Verdict:
    """Hold a variant's errors against what the reference's at the same precision allow.

    Args:
        errors: from `Truth.errors`; a timed call has no `outputs`, and what else is missing is refused.
        yardsticks: the reference's, all of them.
        precision: key of `TOLERANCES`.
        beam: hypotheses of a sequence.
    """
    checks = []
    for name in yardsticks:
        if name == "outputs" and name not in errors:
            continue
        limit = limit_for(yardsticks["outputs" if name == "choices" else name], precision)
        if name == "choices" and beam == 1 and precision in CHOOSES_EXACTLY:
            limit = limit_for(0.0, "fp32")
        checks.append(Check(name, errors.get(name, math.inf), CHOICE * limit if name == "choices" else limit))
    return Verdict(tuple(checks))
