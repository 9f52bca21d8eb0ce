"""CTC decoding: against all alignments written out, alone and in batches, greedy beside the search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from seq2seq.data.tokens import PAD
from seq2seq.decoding import ctc as ctc_decode
from seq2seq.decoding.ctc import best_path, prefix_beam_search
from seq2seq.models.ctc import ctc_loss

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from test_models_ctc import collapsed, likelihoods

#: More prefixes than there are in any problem drawn here.
WIDE = 200


@dataclass(frozen=True)
class Outputs:
    """Scores of a batch, (batch, steps, labels) float64, and their valid steps."""

    batch: int
    steps: int
    labels: int
    blank: int
    lengths: tuple[int, ...]
    seed: int

    @property
    def scores(self) -> Tensor:
        """Random, some labels much likelier than others."""
        generator = torch.Generator().manual_seed(self.seed)
        return 2 * torch.randn(self.batch, self.steps, self.labels, generator=generator).double()

    @property
    def valid(self) -> Tensor:
        """The lengths as a tensor."""
        return torch.tensor(self.lengths)


@st.composite
def outputs(draw: st.DrawFn) -> Outputs:
    """Of few labels and steps, so that all alignments can be written out."""
    batch, steps, labels = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(2, 4))
    lengths = draw(st.tuples(*[st.integers(1, steps)] * batch))
    return Outputs(batch, steps, labels, draw(st.integers(0, labels - 1)), lengths, draw(SEEDS))


@settings(max_examples=60)
@given(problem=outputs())
def test_a_wide_search_finds_what_all_alignments_say(problem):
    """With room for all prefixes: the likeliest labels, with the sum over all their alignments."""
    found = prefix_beam_search(problem.scores, problem.valid, beam=WIDE, blank=problem.blank)
    for row, steps in enumerate(problem.lengths):
        exact = likelihoods(problem.scores[row, :steps], problem.blank)
        likeliest = max(exact, key=exact.__getitem__)
        assert tuple(found.lists(end=None)[row]) == likeliest
        assert float(found.scores[row]) == pytest.approx(math.log(exact[likeliest]))


@settings(max_examples=60)
@given(problem=outputs(), beam=st.integers(1, 6))
def test_a_search_never_claims_more_than_there_is(problem, beam):
    """With any beam the score is at most the labels' probability, and the labels are at most the likeliest ones'."""
    found = prefix_beam_search(problem.scores, problem.valid, beam=beam, blank=problem.blank)
    for row, steps in enumerate(problem.lengths):
        exact = likelihoods(problem.scores[row, :steps], problem.blank)
        assert float(found.scores[row]) <= math.log(exact[tuple(found.lists(end=None)[row])]) + 1e-9


@given(problem=outputs(), beam=st.integers(1, 6))
def test_a_batch_is_decoded_as_its_sequences_are_alone(problem, beam):
    """Labels and scores of a sequence do not depend on the others, nor on padding, which need not be a number."""
    spoilt = problem.scores
    for row, steps in enumerate(problem.lengths):
        spoilt[row, steps:] = math.nan
    searches = (
        lambda *arguments: prefix_beam_search(*arguments, beam=beam, blank=problem.blank),
        lambda *arguments: best_path(*arguments, blank=problem.blank),
    )
    for search in searches:
        together = search(spoilt, problem.valid)
        for row, steps in enumerate(problem.lengths):
            alone = search(problem.scores[row : row + 1, :steps])
            assert together.lists(end=None)[row] == alone.lists(end=None)[0]
            assert float(together.scores[row]) == pytest.approx(float(alone.scores[0]))
            assert (together.tokens[row, int(together.lengths[row]) :] == PAD).all()


@given(problem=outputs(), beam=st.integers(1, 6))
def test_the_number_of_the_padding_does_not_matter(problem, beam):
    """A number past a prefix's end is no label, whichever label has it."""
    found = []
    for number in (PAD, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ctc_decode, "PAD", number)
            found.append(prefix_beam_search(problem.scores, problem.valid, beam=beam, blank=problem.blank))
    one, other = found
    assert one.lists(end=None) == other.lists(end=None)
    assert torch.allclose(one.scores, other.scores)


@given(problem=outputs())
def test_the_best_path_is_the_likeliest_alignment(problem):
    """Label by label the likeliest, then without repeats and blanks; its score is that alignment's."""
    found = best_path(problem.scores, problem.valid, blank=problem.blank)
    for row, steps in enumerate(problem.lengths):
        logarithms = problem.scores[row, :steps].log_softmax(-1)
        path = tuple(logarithms.argmax(-1).tolist())
        assert tuple(found.lists(end=None)[row]) == collapsed(path, problem.blank)
        assert float(found.scores[row]) == pytest.approx(float(logarithms.max(-1).values.sum()))


@given(problem=outputs())
def test_a_wide_search_is_at_least_as_good_as_the_best_path(problem):
    """The labels of the likeliest alignment are never likelier than what the search finds."""
    found = prefix_beam_search(problem.scores, problem.valid, beam=WIDE, blank=problem.blank)
    greedy = best_path(problem.scores, problem.valid, blank=problem.blank)
    assert (found.scores >= greedy.scores - 1e-9).all()


@given(problem=outputs(), beam=st.integers(1, 4))
def test_where_the_model_is_sure_all_agree(problem, beam):
    """If one label has nearly all probability at each step, every beam finds the best path."""
    sure = 100 * torch.nn.functional.one_hot(problem.scores.argmax(-1), problem.labels).double()
    greedy = best_path(sure, problem.valid, blank=problem.blank)
    found = prefix_beam_search(sure, problem.valid, beam=beam, blank=problem.blank)
    assert found.lists(end=None) == greedy.lists(end=None)


def test_many_alignments_outweigh_the_likeliest():
    """Twice 0.6 blank: two blanks are the likeliest alignment (0.36), but one label has 0.64; a beam of 1 loses it."""
    scores = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log()
    assert best_path(scores).lists(end=None) == [[]]
    assert prefix_beam_search(scores, beam=1).lists(end=None) == [[]]
    found = prefix_beam_search(scores, beam=2)
    assert found.lists(end=None) == [[1]]
    assert math.exp(float(found.scores[0])) == pytest.approx(0.64)


def test_a_prefix_that_comes_back_is_one_prefix():
    """Kept prefixes are all different however long the search, so that none takes a place or a share twice."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4, 40, 5, generator=generator)
    for beam in (3, 8):
        found = prefix_beam_search(scores, beam=beam)
        for row in range(4):
            labels = torch.tensor([found.lists(end=None)[row]])
            exact = -float(ctc_loss(scores[row : row + 1].double(), labels)) * labels.size(1)
            assert float(found.scores[row]) <= exact + 1e-9
    wider = prefix_beam_search(scores, beam=64).scores
    assert (wider >= prefix_beam_search(scores, beam=3).scores - 1e-9).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prefix_beam_search(torch.zeros(1, 2, 3), beam=0), "beam is 0, expected at least 1 prefix"),
        (lambda: best_path(torch.zeros(1, 2, 3), blank=3), "blank is 3; expected"),
        (lambda: best_path(torch.zeros(2, 3)), r"outputs have shape \(2, 3\)"),
    ],
)
def test_what_cannot_be_decoded_is_refused(call, message):
    """With what was given and what was expected."""
    with pytest.raises(ValueError, match=message):
        call()
