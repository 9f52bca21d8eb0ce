"""The sequences of an own model's inputs are taken apart as the model reads them, or it is refused in one line."""

from __future__ import annotations

import pytest
import torch
from own_model_kit import PLAIN, foreign, workload, written

from bench.gate import batched
from bench.gate.own_rows import rows_of
from seq2seq.execution.executable import execute
from seq2seq.execution.variants import VARIANTS
from seq2seq.own_model.errors import OwnModelError
from seq2seq.own_model.workload import own_weights


def problem(tmp_path, forward: str, inputs: str):
    """The workload of a small model with another forward and other inputs."""
    code = PLAIN.replace("        y, state = self.lstm(x, state)\n        return self.head(y), state\n", forward)
    code = code.replace("    return torch.randn(2, 7, 5)\n", f"    return {inputs}\n")
    return workload(written(tmp_path, code))


PADDED = """\
        packed = nn.utils.rnn.pack_padded_sequence(x, state, batch_first=True, enforce_sorted=False)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])
"""
PLAIN_FORWARD = "        y, state = self.lstm(x, state)\n        return self.head(y), state\n"


@pytest.mark.parametrize(
    ("forward", "inputs", "found"),
    [
        (PLAIN_FORWARD, "torch.randn(2, 7, 5)", {"inputs": 0}),
        # As many steps and features as sequences: only the model can tell.
        (PLAIN_FORWARD, "torch.randn(5, 5, 5)", {"inputs": 0}),
        ("        return self.lstm(x.transpose(0, 1))[0]\n", "torch.randn(5, 5, 5)", {"inputs": 1}),
        (
            PLAIN_FORWARD,
            "(torch.randn(2, 7, 5), (torch.randn(1, 2, 8), torch.randn(1, 2, 8)))",
            {"inputs[0]": 0, "inputs[1][0]": 1, "inputs[1][1]": 1},
        ),
        (PADDED, "(torch.randn(3, 7, 5), torch.tensor([4, 6, 2]))", {"inputs[0]": 0, "inputs[1]": 0}),
        # A table that all sequences share, with a dimension of the batch's size.
        ("        return self.lstm(x + state)[0]\n", "(torch.randn(7, 7, 5), torch.randn(1, 7, 5))", {"inputs[0]": 0}),
    ],
)
def test_the_model_says_along_which_dimension_its_sequences_lie(tmp_path, forward, inputs, found):
    """Sizes alone do not: one sequence alone must give its part of the results of all."""
    assert dict(rows_of(problem(tmp_path, forward, inputs)).inputs) == found


@pytest.mark.parametrize(
    ("forward", "inputs", "told"),
    [
        (PLAIN_FORWARD, "torch.randn(1, 7, 5)", "give inputs of a batch of two sequences or more"),
        (
            "        return self.lstm(x)[0].mean()\n",
            "torch.randn(3, 7, 5)",
            "output (shape ()) is not made of the results",
        ),
        (
            "        return self.lstm(x - x.mean(0))[0]\n",
            "torch.randn(3, 7, 5)",
            "output (shape (3, 7, 8)) is not made",
        ),
        (
            PADDED.replace(", enforce_sorted=False", ""),
            "(torch.randn(3, 7, 5), torch.tensor([6, 4, 2]))",
            "enforce_sorted",
        ),
        (
            PLAIN_FORWARD.replace("self.head(y), state", "y.data"),
            "nn.utils.rnn.pack_sequence([torch.randn(4, 5), torch.randn(2, 5)])",
            "inputs is a PackedSequence",
        ),
        ("        return self.lstm(x.view(3, 2, 5))[0]\n", "torch.randn(6, 5)", "no input has a dimension of 3"),
    ],
)
def test_what_cannot_be_taken_apart_is_one_line(tmp_path, forward, inputs, told):
    """It names what depends on all sequences, or what to give instead."""
    with pytest.raises(OwnModelError) as raised:
        rows_of(problem(tmp_path, forward, inputs))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["infersent", "crnn"])
def test_models_of_others_can_be_served(name):
    """A query in a batch gets what it gets alone, in our own LSTM too."""
    served = foreign(name)
    library = batched.library_of(served, 8)
    assert len(library.lengths) >= 8
    executable = execute(served, VARIANTS["onednn"], "inference", "cpu", own_weights(served))

    def run(batch):
        return executable.named(executable.call(executable.prepare(batch)))

    with executable.context():
        assert batched.check(run, library, 4, 1e-5, 1).passed


def test_the_queries_are_those_of_the_inputs_function(tmp_path):
    """Each is one of its sequences; gathered again in their order they are its inputs."""
    served = problem(tmp_path, PLAIN_FORWARD, "(torch.randn(3, 7, 5), (torch.randn(1, 3, 8), torch.randn(1, 3, 8)))")
    library = batched.library_of(served, 7)
    assert library.lengths == ((7,),) * 9
    for seed in range(3):
        expected = served.make_batch(seed).tensors()
        found = library.gather(range(3 * seed, 3 * seed + 3)).tensors()
        assert found.keys() == expected.keys()
        for path, value in expected.items():
            torch.testing.assert_close(found[path], value, rtol=0, atol=0)


def test_a_planted_leak_between_queries_is_found(tmp_path):
    """A variant that adds what the other sequences of the batch are to each result fails the gate of batches."""
    served = problem(tmp_path, PLAIN_FORWARD, "torch.randn(3, 7, 5)")
    library = batched.library_of(served, 8)

    def leaking(batch):
        with torch.inference_mode():
            output, _ = served.own.model(*batch.args)
        return {"output[0]": output + 1e-2 * output.mean(0, keepdim=True)}

    found = batched.check(leaking, library, 4, 1e-5, 1)
    assert not found.passed
