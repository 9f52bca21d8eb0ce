"""The artefact of a recommendation is proven in a fresh process, and a wrong or slow one is refused."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from run_folders import ENVIRONMENT, make_run

from bench.__main__ import main
from bench.analysis.intervals import Interval
from bench.plan import own_model
from bench.plan.cases import Case
from bench.recommend import apply
from bench.recommend.apply import Proof, ProofError, Recipe, prove
from bench.worker.artefact_recipe import NoRecipeError, text
from kernels.cpu import build, decoder
from seq2seq.execution.variants import VARIANTS
from seq2seq.models.attention import AttentionConfig

CASE = Case("seed", "onednn", "inference", "cpu", 1)
#: A run that knows what its variants need, which nothing has to be asked for.
KNOWN = ENVIRONMENT | {"needs": {"onednn": []}}
#: What a proof says where it is about the time.
TIMING = "the time of the variant it was made from|could not be measured"
APPLICABLE = {"reference", "onednn", "cpu-fused", "compile", "amp-bf16", "onnxruntime", "openvino", "torchscript"}


@pytest.fixture
def brief(warm, monkeypatch):  # noqa: ARG001
    """Less time for proofs."""
    monkeypatch.setattr(apply, "BUDGETS_S", (1.0, 4.0))


@pytest.fixture(scope="module")
def source():
    """The artefact of plain nn.LSTM."""
    return text("seed", "onednn", "inference", "cpu")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_a_recipe_or_a_reason(variant):
    """The text is Python; where there is none, one line says why."""
    try:
        found = text("seed", variant, "inference", VARIANTS[variant].devices[0])
    except NoRecipeError as error:
        found = str(error)
    else:
        compile(found, "artefact.py", "exec")
    assert ("def apply" in found) or "\n" not in found
    assert variant not in APPLICABLE or "def apply" in found
    assert variant not in {"loop", "lstmcell", "tf32", "cudnn-fair"} or "def apply" not in found


def test_a_recipe_names_what_the_variant_is_made_of():
    """The file says how the variant is had, in calls that a reader can copy."""
    assert 'replace_lstm(model, implementation="cpu-fused", weight_storage="int8")' in text(
        "seed", "cpu-fused-int8", "inference", "cpu"
    )
    assert "torch.compile(model.run)" in text("seed", "compile", "training", "cpu")
    assert 'torch.autocast("cpu", torch.bfloat16)' in text("seed", "amp-bf16", "inference", "cpu")
    assert "OnnxRuntime(model, {})" in text("seed", "onnxruntime", "inference", "cpu")


@pytest.mark.skipif(build.missing() is not None, reason="there is no C++ compiler")
def test_an_artefact_runs_a_fed_decoder_as_the_variant_does():
    """In one native call; without it the file would be slower than what it was made from."""
    model = AttentionConfig(3, 4, 2, feeds="context").build(torch.nn.LSTM).float().eval()
    made = {}
    exec(text("speech-las-scaled", "cpu-fused", "inference", "cpu"), made)  # noqa: S102 - what a user would run
    with torch.inference_mode(), mock.patch.object(decoder, "run", wraps=decoder.run) as ran:
        made["apply"](model)(torch.randn(2, 5, 3), torch.randn(2, 4, 3))
    assert ran.call_count == 1


@pytest.mark.slow
def test_an_artefact_is_loaded_gated_and_timed_in_a_fresh_process(source, brief, tmp_path):  # noqa: ARG001
    """Plain nn.LSTM as a file is right, and as fast as the variant that it is; on a busy machine not always at once."""
    for attempts_left in (2, 1, 0):
        try:
            proof = prove(Recipe(source), CASE, tmp_path / "best.py")
        except ProofError as error:
            if not attempts_left or not re.search(TIMING, str(error)):
                raise
        else:
            break
    assert 0 < proof.error < proof.limit
    assert proof.excess.low < 1.03
    assert "loaded in a fresh process: error" in proof.text()


@pytest.mark.slow
def test_a_wrong_artefact_is_refused(source, brief, tmp_path):  # noqa: ARG001
    """A planted error of a percent is found by the gate."""
    wrong = source.replace("    return run\n", "    return lambda *x: tuple(1.01 * value for value in run(*x))\n", 1)
    assert wrong != source
    with pytest.raises(ProofError, match="its results are wrong"):
        prove(Recipe(wrong), CASE, tmp_path / "best.py")


@pytest.mark.slow
@pytest.mark.usefixtures("brief")
def test_a_slow_artefact_is_refused(source, monkeypatch, tmp_path):
    """A planted wait of five milliseconds a call is found by the rounds, both times that it is measured."""
    monkeypatch.setattr(apply, "BUDGETS_S", (0.5, 1.0))
    slow = source.replace(
        "    return run\n", "    import time\n    return lambda *x: (time.sleep(5e-3), run(*x))[1]\n", 1
    )
    assert slow != source
    with pytest.raises(ProofError, match=TIMING):
        prove(Recipe(slow), CASE, tmp_path / "best.py")


def test_what_a_short_measurement_finds_slower_is_measured_longer(monkeypatch):
    """A busy minute refuses nothing; what stays slower is refused."""
    asked, slower = [], apply.SlowerError("it takes 1.07x the time")
    proof = apply.Proof(error=0.0, limit=1.0, speedup=None, excess=Interval(1.0, 0.99, 1.01))
    findings = iter([slower, proof, slower, slower])

    def judged(*_args, **_options):
        found = next(findings)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(apply, "_measured", lambda *args: (asked.append(args[-1]), None))
    monkeypatch.setattr(apply, "judged", judged)
    assert apply._first_proof(None, [], None, "onednn", baseline=True) is proof
    with pytest.raises(ProofError, match=r"1\.07x"):
        apply._first_proof(None, [], None, "onednn", baseline=True)
    assert asked == [*apply.BUDGETS_S] * 2


def test_an_artefact_that_does_not_load_is_refused(source, tmp_path):
    """What the file raises is the reason."""
    with pytest.raises(ProofError, match="running it failed: ZeroDivisionError"):
        prove(Recipe(source.replace("def apply", "1 / 0\n\n\ndef apply", 1)), CASE, tmp_path / "best.py")
    assert not list(tmp_path.iterdir())


def test_apply_refuses_before_it_works(tmp_path, capsys):
    """An existing file, another ending, more than one group, and a variant that did not run: one line, exit code 2."""
    folder = make_run(tmp_path / "run", KNOWN, workloads=("seed", "other"), figured=True)
    there = tmp_path / "there.py"
    there.write_text("mine\n")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "link.py").symlink_to(there)
    one = ["recommend", str(folder), "--workload", "seed"]
    for words, said in (
        ([*one, "--apply", str(there)], "nothing is overwritten"),
        ([*one, "--apply", str(tmp_path / "link.py")], "there.py: exists, and nothing is overwritten"),
        ([*one, "--apply", str(tmp_path / "folder.py"), "--overwrite"], "is a folder"),
        ([*one, "--apply", str(tmp_path / "out.txt")], "does not end in .py"),
        ([*one, "--apply", str(tmp_path / "out.py"), "--variant", "onedn"], "has no `ok` result in"),
        ([*one, "--variant", "onednn"], "add --apply OUT.py"),
        ([*one, "--overwrite"], "add --apply OUT.py"),
        ([*one, "--apply", str(tmp_path / "no" / "out.py")], "there is no folder"),
        ([*one, "--apply", str(tmp_path / "openvino.py")], "would hide the module openvino"),
        (["recommend", str(folder), "--apply", str(tmp_path / "out.py")], "has 2 groups"),
    ):
        assert main(words) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        if "has 2 groups" in said:
            assert not printed.out
    assert there.read_text() == "mine\n"
    assert not (tmp_path / "out.py").exists()


def test_overwriting_loses_nothing(tmp_path, capsys, monkeypatch):
    """What is there gives way to a proven file alone, which takes its mode and its place behind a link."""
    folder = make_run(tmp_path / "run", KNOWN, workloads=("seed",), figured=True)
    there, link = tmp_path / "there.py", tmp_path / "link.py"
    there.write_text("mine\n")
    there.chmod(0o755)
    link.symlink_to(there)
    words = ["recommend", str(folder), "--variant", "onednn", "--apply", str(link), "--overwrite"]
    fine = Proof(1e-7, 1e-5, None, Interval(1.0, 1.0, 1.0))

    def refused(*_: object, **__: object) -> Proof:
        msg = "planted"
        raise ProofError(msg)

    monkeypatch.setattr(apply, "recipe", lambda *_: Recipe(f"# {apply.PROOF}\n"))
    monkeypatch.setattr(apply, "prove", refused)
    assert main(words) == 1
    assert "planted; nothing is written" in capsys.readouterr().err
    assert there.read_text() == "mine\n"
    monkeypatch.setattr(apply, "prove", lambda *_, **__: fine)
    assert main(words) == 0
    assert link.is_symlink()
    assert "loaded in a fresh process" in there.read_text()
    assert there.stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.py", "run", "there.py"]


def test_what_the_artefact_is_made_from_is_never_replaced(tmp_path):
    """The user's own file would be lost, and with it what the artefact loads."""
    model, trace = tmp_path / "lm.py", tmp_path / "served.jsonl"
    found = dict.fromkeys(("inputs", "loss", "metric"), "") | {"model": f"{model}:build", "trace": str(trace)}
    theirs = own_model.files(found | {"variants": {"fast": f"{tmp_path / 'fast.py'}:make"}})
    for name in ("lm.py", "fast.py"):
        assert "the artefact needs it" in apply.refusal(tmp_path / name, overwrite=True, theirs=theirs)
    assert apply.refusal(tmp_path / "best.py", overwrite=True, theirs=theirs) is None


@pytest.mark.slow
def test_apply_writes_what_it_proved(tmp_path, capsys, brief):  # noqa: ARG001
    """The file that is written has the proof in it, and what has no recipe leaves nothing behind."""
    folder = make_run(tmp_path / "run", KNOWN, figured=True)
    out = tmp_path / "best.py"
    code = main(["recommend", str(folder), "--apply", str(out)])
    if code == 5:
        pytest.skip("other processes kept the machine too busy to time the artefact")
    assert code == 0
    assert "loaded in a fresh process" in out.read_text()
    assert main(["recommend", str(folder), "--variant", "loop", "--apply", str(tmp_path / "loop.py")]) == 1
    assert "not a way to ship a model; nothing is written" in capsys.readouterr().err
    assert not (tmp_path / "loop.py").exists()
