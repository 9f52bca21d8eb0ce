"""A fed decoder in one native call: as the model's own loop in float64, on every build; and who is not served."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
from cpu_builds import TARGETS
from planted_decoder_defects import DEFECTS as WAY_BACK
from planted_kernels import DEFECT, planted_sources
from torch import Tensor

from kernels.cpu import build, decoder, packing, shortlist
from kernels.lstm import LSTM
from kernels.tools import sanitize
from seq2seq.execution.fused_decoder import FusedDecoder
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.attention import AttentionConfig, AttentionSeq2Seq
from seq2seq.models.attention_layer import Attention

pytest.importorskip("hypothesis")
from fed_decoders import (
    CLOSE,
    LUONG,
    by_own_loop,
    decoded,
    decoder_built_for,
    fed_configs,
    model_of,
    problem,
    truth,
    worst,
)
from hypothesis import given
from hypothesis import strategies as st
from strategies import SEEDS

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(build.missing() is not None, reason="there is no C++ compiler"),
]


@pytest.mark.parametrize("target", TARGETS)
@given(
    config=fed_configs(), batch=st.integers(1, 14), steps=st.integers(1, 5), threads=st.integers(1, 3),
    differ=st.booleans(), seed=SEEDS,
)  # fmt: skip
def test_all_steps_are_those_of_float64(target, config, batch, steps, threads, differ, seed):
    """Of every kind of attention and feeding, in memory that was NaN before; and one native call ran all steps."""
    model, given_ = model_of(config, seed), problem(config, batch, steps, seed, differ=differ)
    # Where torch is deterministic, memory that it does not initialise is NaN.
    torch.use_deterministic_algorithms(True)
    try:
        watched = mock.patch.object(decoder, "run", wraps=decoder.run)
        with decoder_built_for(target, threads), torch.inference_mode(), watched as ran:
            found = decoded(model, given_)
    finally:
        torch.use_deterministic_algorithms(False)
    assert ran.call_count == 1
    assert worst(found, truth(model, given_)) < CLOSE


#: Each loses one thing of the call: what the comparison must see.
DEFECTS = {
    "mask": lambda kept: kept | {"memory": kept["memory"].__class__(**(vars(kept["memory"]) | {"mask": None}))},
    "lengths": lambda kept: kept | {"lengths": None},
    "scale": lambda kept: kept | {"memory": kept["memory"].__class__(**(vars(kept["memory"]) | {"scale": 1.0}))},
    "bias": lambda kept: kept | {"combine": (kept["combine"][0], None)},
    "bias of the query": lambda kept: (
        kept
        | {"memory": kept["memory"].__class__(**(vars(kept["memory"]) | {"query": (kept["memory"].query[0], None)}))}
    ),
    "bias of the LSTM": lambda kept: kept | {"layers": [own[:2] for own in kept["layers"]]},
    "what is fed": lambda kept: (
        kept | {"state": kept["state"].__class__(**(vars(kept["state"]) | {"fed": kept["state"].fed + 0.1}))}
    ),
}


@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_the_comparison_sees_what_is_lost(defect):
    """Without a defect it passes; each defect is far beyond what it allows."""
    model, given_ = model_of(LUONG), problem(LUONG, 6, 5, 1, differ=True)
    torch.nn.init.uniform_(model.attention.query.bias, -0.5, 0.5)
    names = ("x", "state", "layers", "memory", "combine", "lengths", "dropped")
    run = decoder.run

    def spoilt(*arguments, **options):
        kept = dict(zip(names, arguments, strict=True))
        return run(**(DEFECTS[defect](kept) if defect else kept), **options)

    with mock.patch.object(decoder, "run", spoilt), torch.inference_mode():
        error = worst(decoded(model, given_), truth(model, given_))
    assert error < CLOSE if defect is None else error > 30 * CLOSE


def test_steps_one_by_one_and_changed_weights():
    """A step at a time gives what all at once gives; weights changed in place take effect."""
    model, (source, target, *_) = model_of(LUONG), problem(LUONG, 3, 4, 2, differ=False)
    for _ in range(2):
        with torch.inference_mode():
            whole, state = model.decode(target, model.encode(source), None)
            after, outputs = model.encode(source), []
            for step in target.unbind(1):
                output, after = model.step(step, after)
                outputs.append(output)
        torch.testing.assert_close(torch.stack(outputs, 1), whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after["fed"], state["fed"], rtol=1e-5, atol=1e-5)
        given_ = (source, target, None, None)
        with torch.no_grad():
            assert worst(decoded(model, given_), truth(model, given_)) < CLOSE
            for parameter in model.parameters():
                parameter.mul_(1.3)


def _added(*_: object) -> None:
    """A hook, which sees that a module is called."""


def _shrunk(layer: torch.nn.Module, _: object) -> None:
    """A hook that makes a weight anew."""
    layer.weight.data.mul_(0.99)


#: What is done to a model or its inputs (source, target, lengths of both) so that the native call must not serve them.
UNSERVED = {
    "autocast": None,
    "weights in int8": lambda model, *_: setattr(model.decoder.lstm, "weight_storage", "int8"),
    "another kernel": lambda model, *_: setattr(model.decoder.lstm, "implementation", "loop"),
    "a hook of the decoder": lambda model, *_: model.decoder.register_forward_hook(_added),
    "a hook of the LSTM": lambda model, *_: model.decoder.lstm.register_forward_pre_hook(_added),
    "a hook of the attention": lambda model, *_: model.attention.register_forward_hook(_added),
    "a hook of the query": lambda model, *_: model.attention.query.register_forward_hook(_added),
    # As pruning and the older weight normalisation make the weight anew.
    "a weight that a hook makes": lambda model, *_: model.combine.register_forward_pre_hook(_shrunk),
    "a forward of its own": lambda model, *_: setattr(model.combine, "__class__", Doubled),
    "scores of a class of its own": lambda model, *_: setattr(model.attention, "__class__", Sharper),
    "scores of its own": lambda model, *_: setattr(model.attention, "scores", lambda _, keys: keys.sum(-1)[:, None]),
    "a look of its own": lambda model, *_: setattr(model, "_look", lambda _, state: state["memory"][0, :, :1]),
    "a combination of its own": lambda model, *_: setattr(model, "_combined", lambda found, _: -found),
    "a model of its own": lambda model, *_: setattr(model, "__class__", Negative),
    "a target of bool": lambda _, source, target, *ends: (source, target > 0, *ends),
    "a length of 0": lambda _, source, target, read, ends: (source, target, read, ends * 0),
}  # fmt: skip


class Sharper(Attention):
    """Attention whose scores are others."""

    def scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Further apart."""
        return 3 * super().scores(queries, keys)


class Negative(AttentionSeq2Seq):
    """A model that combines in a way of its own."""

    def _combined(self, found: Tensor, context: Tensor) -> Tensor:
        return -super()._combined(found, context)


class Doubled(torch.nn.Linear):
    """A layer that does more than what it is derived from, as adapters do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as in the base class
        """Twice what it gives."""
        return 2 * super().forward(input)


@pytest.mark.parametrize("why", UNSERVED)
def test_who_is_not_served_runs_by_the_models_own_loop(why):
    """The results are those of the model without it."""
    given_ = problem(LUONG, 3, 4, 2, differ=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if why == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        found = []
        for run in (decoded, by_own_loop):
            model = model_of(LUONG)
            if why == "autocast":
                # By its name the kernel refuses autocast on a processor without products of bf16.
                for module in model.modules():
                    if isinstance(module, LSTM):
                        module.implementation = "auto"
            changed = UNSERVED[why](model, *given_) if UNSERVED[why] else None
            with mock.patch.object(decoder, "run", side_effect=AssertionError("it ran")):
                found.append(run(model, changed if isinstance(changed, tuple) else given_))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_hook_of_all_modules_sees_their_calls():
    """It is no module's own."""
    model, seen = model_of(LUONG), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.inference_mode():
            decoded(model, problem(LUONG, 3, 4, 2, differ=False))
    finally:
        hook.remove()
    assert seen.count(model.attention) == 4


@pytest.mark.parametrize("missing", ["a vector that scores", "all of the memory", "a row of the memory"])
def test_where_there_is_nothing_to_weigh_it_is_as_in_torch(missing):
    """A scaled vector of zeros and a row that is all padding give NaN, a memory without steps zeros."""
    model, (source, target, *_) = model_of(LUONG), problem(LUONG, 3, 4, 2, differ=False)
    with torch.no_grad():
        state = model.encode(source, torch.tensor([5, 2, 3]))
        if missing == "a vector that scores":
            model.attention.vector.zero_()
        elif missing == "a row of the memory":
            state["mask"][0, 1] = False
        else:
            state |= {name: state[name][:, :, :0] for name in ("memory", "keys", "mask")}
        found = model.decode(target, state)[0]
        fused = vars(model).pop("_step_by_step")
        torch.testing.assert_close(found, model.decode(target, state)[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    rows = {"a vector that scores": 3, "all of the memory": 0, "a row of the memory": 1}
    assert found.isnan().any(-1).all(-1).sum() == rows[missing]
    assert isinstance(fused, FusedDecoder)


def test_the_evidence_is_of_what_ran_last():
    """After a native call, and after the model's own loop again; what the LSTM prepared for that is still there."""
    model, given_ = model_of(LUONG), problem(LUONG, 3, 4, 2, differ=False)
    lstm = model.decoder.lstm
    with torch.inference_mode():
        by_own_loop(model, given_)
        kept = vars(lstm)["_kept"]
        decoded(model, given_)
        assert "with its attention" in lstm.choices[0].reason
        assert vars(lstm)["_kept"] is kept
        by_own_loop(model, given_)
        assert "with its attention" not in lstm.choices[0].reason


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301 - its own
def test_a_copy_runs_by_its_own_weights(copied):
    """In one native call, as the original."""
    model, given_ = model_of(LUONG), problem(LUONG, 3, 4, 2, differ=True)
    other = copied(model)
    with torch.no_grad(), mock.patch.object(decoder, "run", wraps=decoder.run) as ran:
        for parameter in model.parameters():
            parameter.zero_()
        assert worst(decoded(other, given_), truth(other, given_)) < CLOSE
    assert ran.call_count == 1


@pytest.mark.parametrize("name", [name for name, variant in VARIANTS.items() if variant.decoder == "fused"])
def test_what_compiles_the_kernel_compiles_the_decoder(name):
    """So that no first call waits for a compiler that the record of a cold start leaves out."""
    head = shortlist.hindrance() if VARIANTS[name].head == "shortlist" else None
    with mock.patch.object(decoder, "library", return_value="no such decoder"):
        assert VARIANTS[name].builds("decode") == (head or "no such decoder")


@pytest.mark.parametrize("changed", [{"implementation": "loop"}, torch.nn.LSTM])
def test_models_with_another_lstm_run_by_it(changed):
    """An implementation that was asked for by name runs."""
    make = functools.partial(LSTM, **changed) if isinstance(changed, dict) else changed
    model = LUONG.build(make).float().eval()
    FusedDecoder.into(model)
    with torch.inference_mode(), mock.patch.object(decoder, "run", side_effect=AssertionError("it ran")):
        decoded(model, problem(LUONG, 3, 4, 2, differ=False))


def test_models_without_a_fed_decoder_stay_as_they_are():
    """There is nothing to run in one call: their LSTM already does."""
    config = AttentionConfig(3, 4, 2, attention="general")
    model = config.build(functools.partial(LSTM, implementation="cpu-fused"))
    FusedDecoder.into(model)
    assert "_step_by_step" not in vars(model)


def test_a_loop_of_the_models_own_stays():
    """Somebody put it there to run."""
    model = LUONG.build(functools.partial(LSTM, implementation="cpu-fused"))
    model._step_by_step = own = lambda x, *_: x
    FusedDecoder.into(model)
    assert vars(model)["_step_by_step"] is own


def test_what_does_not_fit_is_refused_before_memory_is_read():
    """A bias of another size would be read past its end; what is decoded to x of another type, written past its end."""
    model, given_ = model_of(LUONG), problem(LUONG, 3, 4, 2, differ=False)
    run, narrow = decoder.run, lambda x, *others, **options: run(x > 0, *others, **options)
    with torch.inference_mode():
        with mock.patch.object(decoder, "run", narrow), pytest.raises(RuntimeError, match=r"of torch.bool on cpu"):
            decoded(model, given_)
        model.combine.bias = torch.nn.Parameter(torch.zeros(19, dtype=torch.float32))
        with pytest.raises(RuntimeError, match=r"has shape \(19,\), expected \(20,\)"):
            decoded(model, given_)
    packing.forget()


#: How threads share out the rows, and how they do not.
_SHARED = "part = thread; part < parts.size(); part += members"
_NOT_SHARED = "part = PLANTED ? 0 : thread; part < parts.size(); part += PLANTED ? 1 : members"


@pytest.mark.slow
def test_threads_share_nothing_that_they_write(tmp_path, monkeypatch):
    """The sanitizers find nothing, and a race where each thread runs all rows: they have no barrier to lose.

    Their program compares too: a wrong gradient is not what float64 has.
    """
    defects = {"not shared": (_SHARED, _NOT_SHARED), "gradient": WAY_BACK["h below"][:2]}
    source = planted_sources(defects, tmp_path, decoder.SOURCE)
    for name in (*(sanitize.CHECKS.keys() - {sanitize.RACES}), sanitize.RACES):
        program = sanitize.build(name, tmp_path / "check", source, sanitize.DECODER)
        passed, said = sanitize.run(program)
        assert passed, said
    for number, word in enumerate(("data race", "a slope of")):
        monkeypatch.setenv(DEFECT, str(number))
        passed, said = sanitize.run(program)
        assert not passed
        assert word in said
