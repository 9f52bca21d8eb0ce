"""The gate of decoding by step: a query must generate the same tokens in a row that it joins as alone.

If two tokens are almost equally likely, rounding decides between them, and everything after differs. So, as in
`bench.gate.decoding`, tokens are not compared with tokens: one call on the whole sequence of the query alone is fed the
tokens that its row chose. Each of them must be the likeliest in that call too, unless errors within the gate's limits
explain the choice. The scores must equal those of the call, and a query must end at its end token or last step.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gate.batched import Batched, QueryLibrary, stepped
from bench.gate.decoding import CHOICE
from bench.gate.tolerance import relative_error
from seq2seq.data.tokens import END
from seq2seq.decoding.rows import DecodingRows
from seq2seq.decoding.search import first_token
from seq2seq.layers.likelihoods import widened

#: Runs a batch with a given target and returns its outputs (batch, steps, vocabulary).
Forced = Callable[[Any], Tensor]


@torch.no_grad()
def check_decoded(
    rows: DecodingRows, forced: Forced, config: Any, library: QueryLibrary, limits: tuple[float, float], seed: int
) -> Batched:
    """Let queries decode in rows that they join and leave at random steps, and compare each with the same query alone.

    Args:
        rows: of the variant, all free.
        forced: the variant on a whole batch.
        config: of its model.
        library: what can be asked.
        limits: that each side may err by, of outputs and of scores.
        seed: of the queries.

    Returns:
        The one of its checks that is nearest to its limit, or beyond.
    """
    samples, found = stepped(rows, library, seed)
    claimed, alone = [], []
    checks = [Batched(0.0, 2 * CHOICE * limits[0], "nothing differs")]
    for query, sample in enumerate(samples):
        tokens, most = found[query]["tokens"], library.lengths[sample][-1]
        where = f"tokens of query {query + 1}, step by step, {library.lengths[sample][0]} steps"
        if not _ends_right(tokens[0].tolist(), most, config.target_vocabulary):
            checks.append(Batched(math.inf, checks[0].limit, f"end of the {where}"))
            continue
        fed = torch.cat([torch.full_like(tokens[:, :1], first_token(config)), tokens[:, :-1]], 1).cpu()
        batch = library.gather([sample])
        lengths = None if batch.target_lengths is None else torch.tensor([fed.size(1)])
        outputs = widened(forced(dataclasses.replace(batch, target=fed, target_lengths=lengths)))[0].double()
        own = outputs.log_softmax(-1)
        chosen = own.gather(1, tokens.T)
        regret = float((own.amax(1, keepdim=True) - chosen).max()) / float(outputs.square().mean().sqrt())
        checks.append(Batched(regret, checks[0].limit, where))
        claimed.append(found[query]["scores"])
        alone.append(chosen.sum(0))
    if claimed:
        error = relative_error(torch.cat(claimed), torch.cat(alone))
        checks.append(Batched(error, 2 * limits[1], "scores of all queries, step by step"))
    # NaN is beyond every limit.
    return max(checks, key=lambda each: math.inf if math.isnan(each.error) else each.error / each.limit)


def _ends_right(tokens: list[int], most: int, vocabulary: int) -> bool:
    """Return whether tokens end at their first end token, or at the last step if they have none."""
    if not tokens or not all(0 <= token < vocabulary for token in tokens) or END in tokens[:-1]:
        return False
    return len(tokens) == most or (len(tokens) < most and tokens[-1] == END)
