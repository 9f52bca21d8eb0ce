"""Interface of every model family: its sizes, its state while decoding, and its methods.

Harness, decoding, training and export go by this alone, so that a further family is one file and no branch elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from seq2seq.data.batch import Batch
from seq2seq.layers.likelihoods import head_loss
from seq2seq.layers.padding import valid_mask
from seq2seq.models.family_defaults import FamilyDefaults

#: Target value that the loss leaves out: the places past the end of a token sequence.
IGNORE_TOKEN = -100

#: State from which decoding continues, by name. In every tensor the second dimension is the batch, whatever the family,
#: so that beams are reordered and finished ones dropped without knowing what is in it.
State = dict[str, Tensor]


@dataclass(frozen=True)
class StreamedLSTM:
    """An LSTM that a sequence goes through a step at a time, with what stands around it.

    Attributes:
        lstm: of one direction, batch first.
        reads: `source` or `target`.
        embed: what it reads as its input: tokens (batch,) or values (batch, features) to (batch, input_size).
        head: its outputs (batch, hidden_size) as those of the model; None where none are.
        start: the state that it starts from, given the final h and c of the LSTM before it; None for that state itself.
    """

    lstm: nn.RNNBase
    reads: str
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor] | None = None
    start: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Stack:
    """The sizes of one LSTM of a model: what its work is counted by, and what kernels are asked about.

    Attributes:
        name: of the module.
        input_size, hidden_size, num_layers: as those of `torch.nn.LSTM`.
        directions: 1, or 2 when it reads both ways.
        decodes: whether it reads the target; otherwise the source.
        embedded: whether it reads what was computed, as embedded tokens are, so that gradients go on into its input.
        from_zeros: whether its initial state is zeros; None means that it is where it reads the source.
        stepwise: whether it is called for each step, since its input depends on what came of the step before.
        every: steps of the sequence that are stacked into one step of its input.
    """

    name: str
    input_size: int
    hidden_size: int
    num_layers: int
    directions: int = 1
    decodes: bool = False
    embedded: bool = False
    from_zeros: bool | None = None
    stepwise: bool = False
    every: int = 1

    @property
    def starts_from_zeros(self) -> bool:
        """Return whether the first step's recurrent product is with zeros, and so not needed."""
        return not self.decodes if self.from_zeros is None else self.from_zeros


@dataclass(frozen=True)
class Extent:
    """Extent of a batch that decides the work.

    Attributes:
        sequences: in the batch.
        source_steps, target_steps: time steps without padding that encoder and decoder read, all sequences together.
        source_rows, target_rows: distinct tokens among them, which is how many rows of an embedding are needed; 0
            for real-valued ones.
        own_target: whether the decoder reads something else than the source.
        crossed: sum over sequences of source steps x target steps, which attention to the source looks at.
        source_squares, target_squares: sums over sequences of squared steps, which attention to oneself looks at.
        labels: tokens that the outputs are compared with; None for real values.
    """

    sequences: int
    source_steps: int
    target_steps: int
    source_rows: int = 0
    target_rows: int = 0
    own_target: bool = True
    crossed: int = 0
    source_squares: int = 0
    target_squares: int = 0
    labels: int | None = None

    @classmethod
    def of(cls, batch: Batch) -> Extent:
        """Of a batch on the CPU."""
        decoded = batch.source if batch.target is None else batch.target
        source = _steps(batch.source, batch.source_lengths)
        target = _steps(decoded, batch.decoded_lengths)
        return cls(
            batch.size,
            int(source.sum()),
            int(target.sum()),
            _rows(batch.source, batch.source_lengths),
            _rows(decoded, batch.decoded_lengths),
            batch.target is not None,
            int((source * target).sum()),
            int(source.square().sum()),
            int(target.square().sum()),
            None if batch.expected.is_floating_point() else int((batch.expected != IGNORE_TOKEN).sum()),
        )


class Config(FamilyDefaults, Protocol):
    """Sizes of a model: a frozen dataclass that inherits from `FamilyDefaults`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def family(self) -> str:
        """Name of such models in a record."""

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """LSTMs of the model in the order in which they run; empty for a model without any."""

    @property
    def decodes(self) -> bool:
        """Return whether it has a decoder; otherwise its outputs are those of its encoder."""

    @property
    def bridged(self) -> bool:
        """Return whether anything runs between LSTMs, for torch.compile to compile when it skips them."""

    @property
    def hidden_size(self) -> int:
        """Hidden size of the encoder."""

    @property
    def num_layers(self) -> int:
        """Layers of the encoder."""

    @property
    def input_size(self) -> int:
        """Features of a source step; for tokens the size of their embedding."""

    @property
    def output_size(self) -> int:
        """Features of an output step as it is compared with what was expected; for tokens the vocabulary."""

    def state_values(self, extent: Extent) -> int:
        """Values that `run` gives back besides the outputs."""

    def build(self, lstm: Callable[..., nn.RNNBase]) -> Model:
        """The model of these sizes; `lstm` makes its LSTMs and has the parameters of `torch.nn.LSTM`."""


class Seq2SeqResult(NamedTuple):
    """Result of a pass: outputs (batch, target steps, head_size), and the final state in two tensors.

    For LSTMs they are the decoder's h and c, each (decoder layers, batch, decoder hidden size).
    """

    outputs: Tensor
    hidden: Tensor
    cell: Tensor


class Model(nn.Module):
    """A sequence-to-sequence model; batch first, lengths (batch,) int64 on the CPU.

    Attributes:
        config: its sizes.
    """

    if TYPE_CHECKING:  # TorchScript would take it for a tensor
        config: Any

    def forward(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> Tensor:
        """Outputs of `run`: (batch, target steps, head_size)."""
        return self.run(source, target, source_lengths, target_lengths)[0]

    def run(
        self,
        source: Tensor,
        target: Tensor | None = None,
        source_lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode the source, decode with teacher forcing; the fields of `Seq2SeqResult`.

        Args:
            source: (batch, source steps, input_size) floats, or (batch, source steps) int64 tokens.
            target: what the decoder reads, (batch, target steps, target_size) floats or (batch, target steps) tokens;
                the source again when absent.
            source_lengths: (batch,) int64 on the CPU, each from 1 to the source steps; all steps when absent.
            target_lengths: the same for the target; `source_lengths` when the target is absent too.

        Raises:
            TypeError, ValueError: for inputs or lengths of the wrong dtype or shape, and for what a family cannot take.
        """
        raise NotImplementedError

    def encode(self, source: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """The state that decoding starts from.

        Args:
            source: as for `run`.
            lengths: valid steps of each source; all when absent.
        """
        raise NotImplementedError

    def step(self, value: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Decode one step: outputs (batch, head_size), and the state after it. `state` itself is left as it was.

        Args:
            value: what the decoder reads, (batch,) int64 tokens or (batch, target_size) floats.
            state: from `encode` or from the step before.
        """
        raise NotImplementedError

    @torch.jit.unused
    def streams(self) -> tuple[StreamedLSTM, ...]:
        """The LSTMs that a sequence goes through one after the other, the first from zeros, to compute what `run` does.

        Empty where that is no chain of LSTMs of one direction, which is what a model cannot be driven by steps without.
        """
        return ()

    @torch.jit.unused
    def loss(self, outputs: Tensor, expected: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mean loss per valid step: `head_loss` where outputs are a distribution's parameters, else `loss_of`.

        Over as many as there are expected tokens, or valid steps of real values: what means of batches are weighed by.
        """
        if self.config.likelihood:
            return head_loss(self.config.likelihood, outputs, expected, lengths)
        return loss_of(outputs, expected, lengths)


def select(state: State, index: Tensor) -> State:
    """The state of the sequences of an index (chosen,) int64, in its order; one may be chosen several times."""
    return {name: value.index_select(1, index) for name, value in state.items()}


def loss_of(outputs: Tensor, expected: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Mean loss per valid step, in float32 or wider whatever the outputs are.

    Args:
        outputs: (batch, steps, output_size).
        expected: (batch, steps) int64 tokens with `IGNORE_TOKEN` past the end, for cross entropy; or
            (batch, steps, output_size) floats, for mean squared error.
        lengths: (batch,) valid steps of each sequence; all when absent. Not needed for tokens.
    """
    if outputs.dtype in {torch.float16, torch.bfloat16}:
        outputs = outputs.float()
    if not expected.is_floating_point():
        return functional.cross_entropy(outputs.flatten(0, 1), expected.flatten(), ignore_index=IGNORE_TOKEN)
    if lengths is None:
        return functional.mse_loss(outputs, expected.to(outputs.dtype))
    valid = valid_mask(outputs, lengths)
    # Selected, not multiplied: values in the padding need not be finite.
    difference = torch.where(valid[..., None], outputs - expected.to(outputs.dtype), 0.0)
    return difference.square().mean(-1).sum() / valid.sum()


# The checks below are compiled by TorchScript too, which knows no `msg` variables in `raise`.
def check_steps(name: str, value: Tensor, features: int, tokens: bool) -> None:
    """Raise TypeError or ValueError for steps of the wrong type or shape."""
    if tokens:
        if value.dim() != 2:  # noqa: PLR2004
            raise ValueError(f"{name} has {value.dim()} dimensions, expected (batch, steps) tokens")
        if value.dtype != torch.int64:
            raise TypeError(f"{name} has dtype {value.dtype}, expected int64 tokens")
    else:
        if value.dim() != 3:  # noqa: PLR2004
            raise ValueError(f"{name} has {value.dim()} dimensions, expected (batch, steps, {features})")
        if value.size(2) != features:
            raise ValueError(f"{name} has {value.size(2)} features, expected {features}")
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}, expected a floating-point type")
    if value.size(0) == 0 or value.size(1) == 0:
        raise ValueError(f"{name} is empty, expected at least one sequence of at least one step")


def check_lengths(name: str, lengths: Tensor | None, value: Tensor) -> None:
    """Raise TypeError or ValueError for lengths that do not fit the steps they are of."""
    if lengths is None:
        return
    if lengths.dim() != 1 or lengths.size(0) != value.size(0):
        raise ValueError(f"{name} must have one length per sequence, (batch,) = ({value.size(0)},)")
    if lengths.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {lengths.dtype}, expected int64")
    if lengths.device.type != "cpu":
        raise ValueError(f"{name} must be on the CPU, where packing reads them")
    # Reading values would break the graph of torch.compile; there the caller's lengths are trusted.
    if torch.compiler.is_compiling():
        return
    if int(lengths.min()) < 1 or int(lengths.max()) > value.size(1):
        raise ValueError(f"{name} must lie between 1 and the {value.size(1)} steps given")


def checked_target(
    source: Tensor,
    target: Tensor | None,
    source_lengths: Tensor | None,
    target_lengths: Tensor | None,
    sizes: tuple[int, int],
    tokens: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None]:
    """Target and its lengths, those of the source when absent, once all arguments of `run` are checked.

    `sizes` are the features of a source step and of a target step, `tokens` says whether each is tokens instead.

    Raises:
        TypeError, ValueError: for arguments that do not fit a model or each other.
    """
    if target is None:
        target = source
        if target_lengths is None:
            target_lengths = source_lengths
    check_steps("source", source, sizes[0], tokens[0])
    check_steps("target", target, sizes[1], tokens[1])
    if source.size(0) != target.size(0):
        raise ValueError(f"source has batch {source.size(0)} but target has {target.size(0)}; give both the same")
    check_lengths("source_lengths", source_lengths, source)
    check_lengths("target_lengths", target_lengths, target)
    return target, target_lengths


def make_lstm(lstm: Callable[..., nn.RNNBase], stack: Stack, dropout: float = 0.0) -> nn.RNNBase:
    """The LSTM of a stack, batch first; `lstm` has the parameters of `torch.nn.LSTM`."""
    options: dict[str, Any] = {"batch_first": True, "bidirectional": stack.directions > 1}
    # Dropout acts between layers; torch warns when it is asked for where there is only one.
    dropped = dropout if stack.num_layers > 1 else 0.0
    return lstm(stack.input_size, stack.hidden_size, stack.num_layers, dropout=dropped, **options)


def embedding(vocabulary: int, size: int) -> nn.Module:
    """An embedding of tokens; nothing for real values."""
    return nn.Embedding(vocabulary, size) if vocabulary else nn.Identity()


def _steps(value: Tensor, lengths: Tensor | None) -> Tensor:
    """Valid steps of each sequence."""
    return torch.full((value.size(0),), value.size(1)) if lengths is None else lengths


def _rows(value: Tensor, lengths: Tensor | None) -> int:
    """Distinct tokens inside the lengths; 0 for real values."""
    if value.is_floating_point():
        return 0
    tokens = value if lengths is None else value[valid_mask(value, lengths)]
    return int(tokens.unique().numel())
