"""Fine-tuning and others' models: what is frozen stays, theirs answer as ours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from seq2seq.data.tokens import BEGIN
from seq2seq.decoding.search import beam_search, greedy
from seq2seq.models.base import IGNORE_TOKEN, select
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.huggingface import PretrainedSeq2Seq
from seq2seq.models.huggingface_files import load_config, load_weights
from seq2seq.models.layer_groups import PretrainedError, freeze

ROOT = Path(__file__).parent.parent
LSTM = Seq2SeqConfig(3, 4, 5, num_layers=2, source_vocabulary=7, target_vocabulary=5)

#: What a user of this checkout does; run in a process of its own, with nothing of ours imported before.
FROM_THE_ROOT = """
import sys, transformers
from transformers.utils import is_kernels_available
import kernels
assert not is_kernels_available(), "our kernels are taken for those of the hub"
assert kernels.__file__.startswith(sys.argv[1])
from seq2seq.models.huggingface_files import load_config, load_weights
model = load_config(sys.argv[2]).build()
model.load_state_dict(load_weights(sys.argv[2]))
import torch
print(model.run(torch.tensor([[3, 4, 1]]))[0].shape[2])
"""


def model_of(config, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return config.build(nn.LSTM)


def test_what_is_frozen_does_not_train():
    """After a step, frozen parameters are what they were, and all others are not."""
    model = model_of(LSTM)
    frozen = freeze(model, ["encoder.*", "embed_source.*"])
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], 0.1)
    model(torch.randint(7, (6, 9)), torch.arange(5).repeat(6, 2)).square().sum().backward()
    optimizer.step()
    assert {name.split(".")[0] for name in frozen} == {"encoder", "embed_source"}
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) is (name in frozen)


def test_freezing_again_thaws_the_rest():
    model = model_of(LSTM)
    freeze(model, ["encoder.*"])
    freeze(model, ["fc.*"])
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["fc.weight", "fc.bias"]


def test_a_pattern_that_fits_nothing_or_everything_is_refused():
    with pytest.raises(PretrainedError, match=r"no parameter's name fits 'enc'; names begin with embed_source, embed"):
        freeze(model_of(LSTM), ["fc.*", "enc"])
    with pytest.raises(PretrainedError, match="nothing to train"):
        freeze(model_of(LSTM), ["*"])


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PretrainedError, match="pip install transformers"):
        load_weights("user/model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny Marian and a tiny T5, made and saved on the spot."""
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": 8, "d_model": 8}
    shared |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    marian = transformers.MarianConfig(
        **shared,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        max_position_embeddings=16,
        forced_eos_token_id=None,
    )
    t5 = transformers.T5Config(**shared, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for config, kind in ((marian, transformers.MarianMTModel), (t5, transformers.T5ForConditionalGeneration)):
            found[config.model_type] = tmp_path_factory.mktemp(config.model_type)
            kind(config).save_pretrained(found[config.model_type])
    return found


@pytest.fixture(params=["marian", "t5"])
def loaded(request, folders) -> PretrainedSeq2Seq:
    model = load_config(folders[request.param]).build()
    model.load_state_dict(load_weights(folders[request.param]))
    return model.eval()


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    source, target = (torch.randint(2, 8, (3, steps), generator=generator) for steps in (6, 5))
    target[:, 0] = 0
    return source, target, torch.tensor([6, 2, 4]), torch.tensor([3, 5, 1])


def test_sizes_and_special_tokens_are_those_of_the_model(loaded):
    config = loaded.config
    assert (config.hidden_size, config.output_size, config.num_layers) == (8, 8, 2)
    assert (config.pad, config.begin, config.end) == (0, 0, 1)


def test_outputs_are_those_of_the_library(loaded):
    """Its own forward pass on one sequence without padding."""
    model = loaded
    source, target, *lengths = problem()
    outputs, hidden, cell = model.run(source, target, *lengths)
    assert hidden.shape == cell.shape == (1, 3, 8)
    for place, (ours, theirs) in enumerate(zip(*lengths, strict=True)):
        alone = model.model(
            input_ids=source[place : place + 1, :ours], decoder_input_ids=target[place : place + 1, :theirs]
        )
        torch.testing.assert_close(outputs[place, :theirs], alone.logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cell[0, place], alone.encoder_last_hidden_state[0, -1], rtol=1e-4, atol=1e-5)


def test_padding_never_counts(loaded):
    model = loaded
    source, target, *lengths = problem()
    expected = model.run(source, target, *lengths)
    for value, valid in zip((source, target), lengths, strict=True):
        value[torch.arange(value.size(1)) >= valid[:, None]] = 10**6
    for one, other in zip(expected, model.run(source, target, *lengths), strict=True):
        assert torch.equal(one, other)


def test_steps_give_what_run_gives(loaded):
    """Step by step with the library's cache, the state reordered on the way and left as it was."""
    model = loaded
    source, target, *lengths = problem()
    expected = model.run(source, target, *lengths)[0]
    order = torch.tensor([2, 0, 1])
    state = select(model.encode(source, lengths[0]), order)
    for place in range(target.size(1)):
        kept = {name: value.clone() for name, value in state.items()}
        outputs, after = model.step(target[order, place], state)
        assert all(torch.equal(value, kept[name]) for name, value in state.items())
        valid = place < lengths[1][order]
        torch.testing.assert_close(outputs[valid], expected[order, place][valid], rtol=1e-4, atol=1e-5)
        assert all(value.size(1) == 3 for value in after.values())
        state = after
    assert state["self0"].size(3) == target.size(1)


def test_steps_generate_what_the_library_generates(loaded):
    """Greedy decoding by steps gives the tokens of its own `generate`."""
    model = loaded
    source = problem()[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = model.model.generate(source, max_new_tokens=6, num_beams=1, do_sample=False)
        state, token, ours = model.encode(source), torch.full((3,), model.config.begin), []
        ended = torch.zeros(3, dtype=torch.bool)
        for _ in range(theirs.size(1)):
            ours.append(torch.where(ended, model.config.pad, token))
            ended = ended | (token == model.config.end) & (len(ours) > 1)
            outputs, state = model.step(token, state)
            if model.config.architecture == "marian":
                # Marian's generation never gives padding.
                outputs[:, model.config.pad] = -math.inf
            token = outputs.argmax(-1)
    assert torch.equal(torch.stack(ours, 1), theirs)


@pytest.mark.parametrize("beam", [0, 1, 3])
def test_decoding_begins_with_the_model_s_own_token(loaded, beam):
    """Not with ours: one step, greedy (0) or a beam, gives what the model's first step says after it."""
    model = loaded
    source = problem()[0]
    assert model.config.begin != BEGIN
    if beam:
        found = beam_search(model, source, beam=beam, end=None, max_steps=1)
    else:
        found = greedy(model, source, end=None, max_steps=1)
    with torch.no_grad():
        scores = model.step(torch.full((3,), model.config.begin), model.encode(source))[0].log_softmax(-1)
    assert torch.allclose(found.scores, scores.amax(-1).double())
    assert torch.equal(found.tokens[:, 0], scores.argmax(-1))


def test_it_fine_tunes(loaded):
    """With the encoder frozen, the loss falls and the encoder stays."""
    model = loaded
    source, target, *lengths = problem()
    expected = torch.randint(8, target.shape, generator=torch.Generator().manual_seed(0))
    expected[torch.arange(target.size(1)) >= lengths[1][:, None]] = IGNORE_TOKEN
    frozen = freeze(model, ["*encoder.*"])
    kept = [value.clone() for name, value in model.named_parameters() if name in frozen]
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], 0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(model.run(source, target, *lengths)[0], expected, lengths[1])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    now = [value for name, value in model.named_parameters() if name in frozen]
    assert all(torch.equal(one, other) for one, other in zip(kept, now, strict=True))


def test_inputs_that_are_no_tokens_are_refused(loaded):
    with pytest.raises(TypeError, match="expected int64 tokens"):
        loaded.run(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="between 1 and the 2 steps"):
        loaded.run(torch.zeros(1, 2, dtype=torch.int64), None, torch.tensor([3]))


def test_what_it_cannot_load_says_why(tmp_path, folders):
    del folders
    with pytest.raises(PretrainedError, match="transformers does not load it") as caught:
        load_weights(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_our_kernels_do_not_break_transformers(folders):
    """From the root of the checkout, where `kernels` is ours: the library imports, probes for its own, and loads."""
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FROM_THE_ROOT, str(ROOT), str(folders["t5"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8\n"
