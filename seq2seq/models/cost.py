"""The least work of a call: FLOPs that cannot be left out, and bytes that must be moved at least once.

Own arithmetic, since `torch.utils.flop_counter` counts 0 for nn.LSTM. Both are lower bounds, so that nothing that
computes the model can need less: what an implementation does beyond them (padding, casts, activations kept for
backward, weights read again each step) is its own affair, and shows as a smaller share of the machine's ceiling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seq2seq.models.base import Config, Extent

#: Operations per hidden unit and valid step besides the matrix products, an activation counted as one. Forward: five
#: activations, c = f c + i g (3), h = o tanh(c) (1). The biases are the sums' first terms, so they cost nothing.
FORWARD_POINTWISE = 9
#: Backward: through o (4), c (5), i, f and g (4 each), to the c before (1), and a term of four bias gradients (4).
BACKWARD_POINTWISE = 26
#: Per value of the output: subtract, exponential or square, sum; backward one product.
LOSS_FORWARD, LOSS_BACKWARD = 3, 1
#: Adam, per parameter: first moment 3, second 4, root with correction and epsilon 3, update 3.
ADAM = 13
#: Adam, per parameter: weight and two moments read and written, the gradient written, each once.
ADAM_TRANSFERS = 7
TOKEN_BYTES = 8
#: Gradients, moments and the weights of a training step are float32 in all variants.
FULL_BYTES = 4


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves random values out: on the device `meta` nothing holds them, and asking for them loads torch's compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = kwargs or {}
        if function in {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}:
            return args[0] if args else given["tensor"]
        return function(*args, **given)


def built_parameters(config: Config) -> int:
    """Number of the parameters that a model is built with, though none of them is made."""
    with torch.device("meta"), _NoRandomNumbers():
        return sum(parameter.numel() for parameter in config.build(nn.LSTM).parameters())


@dataclass(frozen=True)
class Cost:
    """Least work of one call.

    Attributes:
        flops: floating-point operations, a multiplication and an addition counted as two.
        least_bytes: bytes read or written, each once.

    Counted as no implementation leaves it out: in a first step from zeros, what the forget gate is made of.
    """

    flops: int
    least_bytes: int


def cost(
    config: Config,
    extent: Extent,
    mode: str,
    *,
    stored_bytes: int = FULL_BYTES,
    computed_bytes: int = FULL_BYTES,
) -> Cost:
    """Least FLOPs and bytes of one call.

    Args:
        config: sizes of the model.
        extent: of the batch.
        mode: `inference`, `training` (forward, loss, backward, Adam), or `decode`, for which the extent is that of
            `decoding`; what decoding gives back is left out, being a few tokens.
        stored_bytes: size of a stored weight and of a real-valued input, bytes.
        computed_bytes: size of a value that the model gives back, bytes.

    Raises:
        ValueError: for an unknown mode.
    """
    if mode == "inference":
        moved = _weights_read(config, extent) * stored_bytes + _results(config, extent) * computed_bytes
        return Cost(
            forward_products(config, extent) + _forward_pointwise(config, extent),
            moved + _inputs(config, extent, stored_bytes),
        )
    if mode == "training":
        logits = extent.target_steps * config.head_size
        flops = (
            forward_products(config, extent)
            + backward_products(config, extent)
            + _forward_pointwise(config, extent)
            + BACKWARD_POINTWISE * _units(config, extent)
            + (LOSS_FORWARD + LOSS_BACKWARD) * logits
            + ADAM * parameters(config)
        )
        values = extent.target_steps * config.output_size
        expected = values * FULL_BYTES if extent.labels is None else extent.labels * TOKEN_BYTES
        moved = ADAM_TRANSFERS * FULL_BYTES * parameters(config) + expected
        return Cost(flops, moved + _inputs(config, extent, FULL_BYTES))
    if mode == "decode":
        moved = _weights_read(config, extent) * stored_bytes
        return Cost(
            forward_products(config, extent) + _forward_pointwise(config, extent),
            moved + _inputs(config, dataclasses.replace(extent, own_target=False), stored_bytes),
        )
    msg = f"mode is {mode!r}, expected inference, training or decode"
    raise ValueError(msg)


def decoding(extent: Extent, steps: int, beam: int) -> Extent:
    """The extent of decoding a batch for a number of steps: all that hypotheses read, padding of targets included.

    The first step is the same for all hypotheses of a sequence. Which tokens come out is not known, but one does.

    Args:
        extent: of the batch with teacher forcing.
        steps: that every sequence is decoded for.
        beam: hypotheses of a sequence.
    """
    hypotheses = 1 + beam * (steps - 1)
    return dataclasses.replace(
        extent,
        target_steps=extent.sequences * hypotheses,
        target_rows=min(extent.target_rows, 1),
        crossed=extent.source_steps * hypotheses,
        target_squares=extent.sequences * (1 + beam * (steps**2 - 1)),
    )


@dataclass(frozen=True)
class _Direction:
    """One direction of one LSTM layer.

    Attributes:
        features, hidden: sizes of its input and state.
        steps: valid steps it reads.
        recurrent_steps: those that start from a state that need not be zero. The encoder's first need no product.
        input_gradient: whether the backward pass continues into its input.
    """

    features: int
    hidden: int
    steps: int
    recurrent_steps: int
    input_gradient: bool


def _directions(config: Config, extent: Extent) -> Iterator[_Direction]:
    """Every direction of every layer, encoder first."""
    for stack in config.stacks:
        hidden = stack.hidden_size
        # Stacked, sequences that do not fill their last step need one more each, which is not known here.
        steps = -(-(extent.target_steps if stack.decodes else extent.source_steps) // stack.every)
        recurrent_steps = max(0, steps - extent.sequences) if stack.starts_from_zeros else steps
        for layer in range(stack.num_layers):
            features = hidden * stack.directions if layer else stack.input_size
            for _ in range(stack.directions):
                yield _Direction(features, hidden, steps, recurrent_steps, layer > 0 or stack.embedded)


def valid_steps(config: Config, extent: Extent) -> int:
    """Time steps without padding that the model reads, source and target together."""
    return extent.source_steps + (extent.target_steps if config.decodes else 0)


def forward_products(config: Config, extent: Extent) -> int:
    """FLOPs of the forward pass's matrix products."""
    lstm = sum(
        8 * d.hidden * (d.features * d.steps + d.hidden * d.recurrent_steps) for d in _directions(config, extent)
    )
    return lstm + config.dense_products(extent, backward=False)


def backward_products(config: Config, extent: Extent) -> int:
    """FLOPs of the backward pass's matrix products: for weights, states, and the inputs that need a gradient."""
    lstm = sum(
        8 * d.hidden * (d.features * d.steps * (1 + d.input_gradient) + 2 * d.hidden * d.recurrent_steps)
        for d in _directions(config, extent)
    )
    return lstm + config.dense_products(extent, backward=True)


def layer_products(
    extent: Extent, layers: tuple[int, int], hidden: int, inner: int, feedforward: tuple[int, int]
) -> int:
    """Forward FLOPs of a Transformer's layers as they are written, without what padding and the causal mask spare.

    Products folded into others are not looked for: that would pay only where one side of an attention is much shorter
    than a head has features.

    Args:
        extent: of the batch.
        layers: of encoder and decoder.
        hidden: size of a step.
        inner: features of all heads of an attention together.
        feedforward: FLOPs of a feed-forward part at each step, in encoder and decoder.
    """
    source, target = extent.source_steps, extent.target_steps
    # Scores and sums, 2 products a pair of steps; a causal step looks at those before it and at itself.
    pair, square = 4 * inner, 2 * hidden * inner
    before = (extent.target_squares + target) // 2
    encoder = source * (4 * square + feedforward[0]) + extent.source_squares * pair
    decoder = target * (6 * square + feedforward[1]) + source * 2 * square + (before + extent.crossed) * pair
    return layers[0] * encoder + layers[1] * decoder


def parameters(config: Config) -> int:
    """Values of all weights, embeddings included."""
    return _embedded(config, config.source_vocabulary, config.target_vocabulary) + _dense_parameters(config)


def _dense_parameters(config: Config) -> int:
    """Values of all weights but the embeddings: those that every call reads."""
    sizes = _directions(config, Extent(1, 1, 1))
    return sum(4 * d.hidden * (d.features + d.hidden + 2) for d in sizes) + config.dense_parameters


def _forward_pointwise(config: Config, extent: Extent) -> int:
    return FORWARD_POINTWISE * _units(config, extent)


def _units(config: Config, extent: Extent) -> int:
    """Hidden units times valid steps of all LSTM layers and directions."""
    return sum(d.hidden * d.steps for d in _directions(config, extent))


def _weights_read(config: Config, extent: Extent) -> int:
    """Weights that a forward pass needs: all but the embeddings' rows of tokens that do not occur.

    Recurrent weights of an LSTM whose sequences have one step each, from zeros, are multiplied with nothing else.
    """
    unread = sum(4 * d.hidden**2 for d in _directions(config, extent) if not d.recurrent_steps)
    return _dense_parameters(config) - unread + _embedded(config, extent.source_rows, extent.target_rows)


def _embedded(config: Config, source_rows: int, target_rows: int) -> int:
    """Values of a number of rows of the embeddings, besides what counts as dense."""
    shared = config.shared_embedding
    if shared == "head":
        return 0
    source, target = source_rows * config.input_size, target_rows * config.target_size
    # Of one matrix for both sides the same rows may serve both.
    return max(source, target) if shared else source + target


def _results(config: Config, extent: Extent) -> int:
    """Values that inference gives back: valid outputs and the final state."""
    return extent.target_steps * config.head_size + config.state_values(extent)


def _inputs(config: Config, extent: Extent, value_bytes: int) -> int:
    """Bytes of what is read; a decoder that reads the source again finds it in a cache."""
    source = TOKEN_BYTES if config.source_vocabulary else config.input_size * value_bytes
    target = TOKEN_BYTES if config.target_vocabulary else config.target_size * value_bytes
    return extent.source_steps * source + (extent.target_steps * target if extent.own_target else 0)
