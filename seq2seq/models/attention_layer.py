"""Attention: from each query to a weighted mean of a memory (Luong et al. 2015; Bahdanau et al. 2015).

One module for every model that looks at its source, and the counts of its work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from seq2seq.models.base import Extent

ATTENTIONS = ("dot", "general", "bahdanau")


class Attention(nn.Module):
    """Weighted means of a memory, with a weight for each of its steps by how well that suits a query.

    The score of query q and step m of the memory is, by kind:

    - `dot`: q . m (Luong et al. 2015), which needs both of one size;
    - `general`: q . W m (the same);
    - `bahdanau`: v . tanh(W q + U m) (Bahdanau et al. 2015).

    Scaled, the first two are multiplied by a learned number; `bahdanau` becomes g v / |v| . tanh(W q + U m + b), weight
    normalisation as in Salimans and Kingma 2016. tensorflow/nmt calls them `scaled_luong` and `normed_bahdanau`.

    Args:
        kind: one of `ATTENTIONS`.
        query_size: features of a query.
        memory_size: features of a step of the memory.
        size: features that `bahdanau` compares them in.
        scaled: see above.
    """

    __constants__ = ("additive", "projected")

    def __init__(self, kind: str, query_size: int, memory_size: int, size: int, *, scaled: bool = False) -> None:
        super().__init__()
        self.additive = kind == "bahdanau"
        self.projected = kind != "dot"
        keys = size if self.additive else query_size
        self.key = nn.Linear(memory_size, keys, bias=False) if self.projected else nn.Identity()
        self.query = nn.Linear(query_size, size, bias=scaled) if self.additive else nn.Identity()
        # In one dimension: these are not matrices that a runtime would quantise.
        bound = 1 / math.sqrt(size)
        self.vector = nn.Parameter(torch.empty(size).uniform_(-bound, bound)) if self.additive else None
        self.scale = nn.Parameter(torch.full((1,), bound if self.additive else 1.0)) if scaled else None
        if isinstance(self.query, nn.Linear) and scaled:
            nn.init.zeros_(self.query.bias)

    def forward(self, queries: Tensor, memory: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """Context of each query: (batch, queries, memory_size).

        Args:
            queries: (batch, queries, query_size).
            memory: (batch, steps, memory_size), finite in its padding too.
            keys: `self.key(memory)`, which serves all queries.
            mask: (batch, steps) bool, false for padding; all count when absent.
        """
        scores = self.scores(queries, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask.unsqueeze(1), -math.inf)
        return torch.bmm(torch.softmax(scores, -1).to(memory.dtype), memory)

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Score of each step for each query: (batch, queries, steps)."""
        scale: Tensor | None = self.scale
        if self.additive:
            vector: Tensor | None = self.vector
            assert vector is not None  # noqa: S101 - for the types
            if scale is not None:
                vector = vector * (scale / torch.linalg.vector_norm(vector))
            compared = torch.tanh(self.query(queries).unsqueeze(2) + keys.unsqueeze(1))
            return functional.linear(compared, vector.unsqueeze(0)).squeeze(-1)
        found = torch.bmm(queries, keys.transpose(1, 2))
        return found if scale is None else found * scale


def attention_parameters(kind: str, query_size: int, memory_size: int, size: int, *, scaled: bool) -> int:
    """Values of an `Attention`'s weights."""
    if kind == "bahdanau":
        return size * (query_size + memory_size + 1) + (size + 1 if scaled else 0)
    return (query_size * memory_size if kind == "general" else 0) + scaled


def attention_products(kind: str, query_size: int, memory_size: int, size: int, extent: Extent) -> int:
    """FLOPs of the forward products of an `Attention` that each target step asks once.

    Keys are counted as the equations have them: projected from the memory, once a source step.
    """
    keys, compared = {"dot": (0, query_size), "general": (query_size, query_size), "bahdanau": (size, size)}[kind]
    asked = query_size * size * extent.target_steps if kind == "bahdanau" else 0
    return 2 * (memory_size * keys * extent.source_steps + asked + (compared + memory_size) * extent.crossed)
