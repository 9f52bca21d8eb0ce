"""Fine-tuning and others' models: what is frozen stays, rates fall from layer to layer, theirs answer as ours."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from seq2seq.data.tokens import BEGIN
from seq2seq.decoding.search import beam_search, greedy
from seq2seq.models.base import IGNORE_TOKEN, select
from seq2seq.models.encoder_decoder import Seq2SeqConfig
from seq2seq.models.huggingface import PretrainedSeq2Seq
from seq2seq.models.huggingface_files import load_transformers
from seq2seq.models.layer_groups import PretrainedError, freeze, layer_groups, parameter_groups
from seq2seq.models.transformer import TransformerConfig

ROOT = Path(__file__).parent.parent
LSTM = Seq2SeqConfig(3, 4, 5, num_layers=2, source_vocabulary=7, target_vocabulary=5)
WORDS = ["<pad>", "</s>", "<unk>", "the", "cat", "sat", "on", "mat"]

#: What a user of this checkout does; run in a process of its own, with nothing of ours imported before.
FROM_THE_ROOT = """
import sys, transformers
from transformers.utils import is_kernels_available
import kernels
assert not is_kernels_available(), "our kernels are taken for those of the hub"
assert kernels.__file__.startswith(sys.argv[1])
from seq2seq.models.huggingface_files import load_transformers
model, tokenizer = load_transformers(sys.argv[2])
import torch
print(model.run(torch.tensor([[3, 4, 1]]))[0].shape[2], tokenizer("the cat")["input_ids"])
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
    optimizer = torch.optim.Adam(parameter_groups(model, 0.1))
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


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (LSTM, ["embed_source", "embed_target", "encoder", "encoder", "decoder", "decoder", "fc"]),
        (
            TransformerConfig(4, 1, 2, 2),
            [*["read_source", "read_target"], *["encoder"] * 2, "encoder_norm", *["decoder"] * 2, "decoder_norm", "fc"],
        ),
    ],
)
def test_layers_are_in_the_order_of_the_model(config, layers):
    """Every parameter once; both layers of an LSTM and every layer of a list are layers of their own."""
    model = model_of(config)
    groups = layer_groups(model)
    assert [names[0].split(".")[0] for names in groups] == layers
    assert sorted(name for names in groups for name in names) == sorted(name for name, _ in model.named_parameters())


def test_rates_fall_by_the_factor_from_the_top():
    groups = parameter_groups(model_of(LSTM), 0.5)
    assert groups[-1]["names"] == ["fc.weight", "fc.bias"]
    assert groups[-1]["lr"] == 0.5
    for lower, upper in pairwise(groups):
        assert upper["lr"] / lower["lr"] == pytest.approx(2.6)


def test_a_frozen_layer_keeps_its_place():
    """The layer below a frozen one gets the rate that it had before."""
    model = model_of(LSTM)
    before = parameter_groups(model, 1.0)
    freeze(model, ["fc.*"])
    after = parameter_groups(model, 1.0)
    assert [group["lr"] for group in after] == [group["lr"] for group in before[:-1]]


def test_layers_may_be_named():
    groups = parameter_groups(model_of(LSTM), 1.0, factor=10, layers=[["e*"], ["decoder.*"], ["fc.*"]])
    assert [group["lr"] for group in groups] == [0.01, 0.1, 1.0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rate": 0}, "rate above 0"),
        ({"rate": math.nan}, "rate above 0"),
        ({"rate": 1, "factor": 0.5}, "at least 1"),
        ({"rate": 1, "layers": [["encoder.*"]]}, "is in 0 layers"),
        ({"rate": 1, "layers": [["*"], ["fc.*"]]}, "fc.weight is in 2 layers"),
    ],
)
def test_rates_and_layers_that_make_no_sense_are_refused(options, words):
    with pytest.raises(PretrainedError, match=words):
        parameter_groups(model_of(LSTM), **options)


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(PretrainedError, match="pip install transformers"):
        load_transformers("user/model")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tiny Marian and a tiny T5 with their tokenizer, made and saved on the spot."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    shared = {"vocab_size": len(WORDS), "d_model": 8}
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
            wrapped.save_pretrained(found[config.model_type])
    return found


@pytest.fixture(params=["marian", "t5"])
def loaded(request, folders) -> tuple[PretrainedSeq2Seq, object]:
    return load_transformers(folders[request.param])


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    source, target = (torch.randint(2, 8, (3, steps), generator=generator) for steps in (6, 5))
    target[:, 0] = 0
    return source, target, torch.tensor([6, 2, 4]), torch.tensor([3, 5, 1])


def test_sizes_and_tokens_are_those_of_the_model(loaded):
    model, tokenizer = loaded
    config = model.config
    assert (config.hidden_size, config.output_size, config.num_layers) == (8, 8, 2)
    assert (config.pad, config.begin, config.end) == (0, 0, 1)
    assert tokenizer("the cat sat")["input_ids"] == [3, 4, 5]
    assert not model.training


def test_outputs_are_those_of_the_library(loaded):
    """Its own forward pass on one sequence without padding."""
    model, _ = loaded
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
    model, _ = loaded
    source, target, *lengths = problem()
    expected = model.run(source, target, *lengths)
    for value, valid in zip((source, target), lengths, strict=True):
        value[torch.arange(value.size(1)) >= valid[:, None]] = 10**6
    for one, other in zip(expected, model.run(source, target, *lengths), strict=True):
        assert torch.equal(one, other)


def test_steps_give_what_run_gives(loaded):
    """Step by step with the library's cache, the state reordered on the way and left as it was."""
    model, _ = loaded
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
    model, _ = loaded
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
    model, _ = loaded
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
    """With the encoder frozen and rates by layer, the loss falls and the encoder stays."""
    model, _ = loaded
    source, target, *lengths = problem()
    expected = torch.randint(8, target.shape, generator=torch.Generator().manual_seed(0))
    expected[torch.arange(target.size(1)) >= lengths[1][:, None]] = IGNORE_TOKEN
    frozen = freeze(model, ["*encoder.*"])
    kept = [value.clone() for name, value in model.named_parameters() if name in frozen]
    optimizer = torch.optim.Adam(parameter_groups(model, 0.02, factor=1.2))
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
        loaded[0].run(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="between 1 and the 2 steps"):
        loaded[0].run(torch.zeros(1, 2, dtype=torch.int64), None, torch.tensor([3]))


def test_what_it_cannot_load_says_why(tmp_path, folders):
    del folders
    with pytest.raises(PretrainedError, match="transformers does not load it") as caught:
        load_transformers(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_our_kernels_do_not_break_transformers(folders):
    """From the root of the checkout, where `kernels` is ours: the library imports, probes for its own, and loads."""
    environment = os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", FROM_THE_ROOT, str(ROOT), str(folders["t5"])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(maxsplit=1) == ["8", "[3, 4]\n"]
