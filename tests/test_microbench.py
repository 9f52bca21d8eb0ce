"""The pytest-benchmark surface and the second instrument: gated, told what ran, and never in a run's way."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from report_pages import page_text
from torch import nn

import kernels
from bench.console import Console
from bench.gate.parity import TOLERANCES
from bench.gate.planted_defects import GateOrder
from bench.microbench import test_kernels, test_variants
from bench.plan.cases import PASSES, Case, Group, Selection, Suite, load_suite
from bench.records.folder import RunFolder
from bench.records.schema import Record, Status
from bench.run import second_instrument
from bench.run.planning import Described, Plan
from bench.run.runner import Runner
from bench.run.second_instrument import FILE, Findings
from bench.run.worker_process import Settings
from kernels.dispatch import IMPLEMENTATIONS
from kernels.lstm import LSTM
from seq2seq.execution.variant import DTYPES
from seq2seq.execution.variants import VARIANTS

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "tests" / "plugins" / "broken_variants.py"
TIMED = ("reference", "loop")
REFUSED = {
    "wrong": "(gate before the timing)",
    "wrong-when-warm": "(gate after the timing)",
    "raises": "planted: the kernel does not take this",
}
#: A variant that is right in a worker and wrong under pytest, which no gate of the run itself can see.
TWO_FACED = """
import sys
from bench.gate.planted_defects import GateOrder
from kernels.reference import LoopLSTM
from seq2seq.execution.variant import LSTMS, Variant
from seq2seq.execution.variants import VARIANTS
LSTMS["two-faced"] = GateOrder if "pytest" in sys.modules else LoopLSTM
VARIANTS["two-faced"] = Variant("two-faced", "planted", lstm="two-faced")
"""
SUITE = """
name = "planted"
summary = "a variant that only the second instrument refuses"
budget_s = 0.5
interval = 0.9
processes = 1
second_instrument = true
[[select]]
workloads = ["seed"]
variants = ["two-faced"]
modes = ["inference"]
"""


def surface(folder: Path, variants: list[str], *options: str) -> subprocess.CompletedProcess[str]:
    """Run the surface for real, on the seed in inference, storing below `folder`."""
    names = [f"bench/microbench/test_variants.py::test_variant[seed-inference-{variant}]" for variant in variants]
    # The plugin of hypothesis alone imports for a second.
    without = ("-p", "no:hypothesispytest", "-p", "no:cacheprovider")
    # Long enough, on a slow machine too, for what becomes wrong after some calls.
    fixed = ("--benchmark-only", "--benchmark-max-time=0.25", f"--benchmark-storage={folder}", "-rsf")
    line = [sys.executable, "-m", "pytest", *names, *fixed, *without, "--bench-threads=1", *options]
    environment = second_instrument.variables(Settings(1, plugins=(PLUGIN,)), folder)
    environment.pop("PYTEST_DISABLE_PLUGIN_AUTOLOAD")
    return subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300, env=environment)


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Right, wrong and unavailable variants timed together: how pytest ended, its JSON, its storage."""
    folder = tmp_path_factory.mktemp("surface")
    json_file = folder / "out.json"
    done = surface(folder, [*TIMED, *REFUSED, "nowhere"], f"--benchmark-json={json_file}", "--benchmark-autosave")
    return done, json.loads(json_file.read_text(encoding="utf-8")), folder


@pytest.mark.slow
def test_a_right_variant_has_its_figure_with_evidence_and_parity(timed):
    """Evidence, the error with its limit, precision, threads and torch stand beside each figure."""
    found = {entry["extra_info"]["variant"]: entry for entry in timed[1]["benchmarks"]}
    assert set(found) == set(TIMED)
    for entry in found.values():
        facts = entry["extra_info"]
        assert entry["group"] == "seed/inference/cpu/1t"
        assert entry["stats"]["median"] > 0
        assert 0 < facts["parity_error"] <= facts["parity_limit"]
        assert (facts["threads"], facts["precision"], facts["ran_precision"]) == (1, "fp32", "fp32")
        assert facts["torch"]
    assert found["reference"]["extra_info"]["evidence"] == "LSTM ran in ATen"
    assert found["loop"]["extra_info"]["evidence"] == "the time loop ran in Python"


@pytest.mark.slow
def test_what_the_gate_refuses_has_no_figure(timed):
    """Neither in the JSON nor in the table nor in what autosave keeps, also when it was timed before it failed."""
    done, data, folder = timed
    assert done.returncode == 1
    (saved,) = folder.glob("*/*.json")
    kept = {entry["name"] for entry in json.loads(saved.read_text(encoding="utf-8"))["benchmarks"]}
    assert kept == {entry["name"] for entry in data["benchmarks"]} == {named(variant) for variant in TIMED}
    rows = re.findall(r"^test_variant\[seed-inference-(\S+)\] ", done.stdout, re.MULTILINE)
    assert set(rows) == set(TIMED)
    assert {entry["variant"]: entry["reason"] for entry in data["refused"]}.keys() == REFUSED.keys()
    for entry in data["refused"]:
        assert REFUSED[entry["variant"]] in entry["reason"]
        assert "\n" not in entry["reason"]


def named(variant: str) -> str:
    """A case's name as pytest-benchmark has it."""
    return f"test_variant[seed-inference-{variant}]"


@pytest.mark.slow
def test_an_unavailable_variant_is_skipped_with_its_own_reason(timed):
    """The variant says why it cannot run here."""
    skipped = [line for line in timed[0].stdout.splitlines() if line.startswith("SKIPPED")]
    assert len(skipped) == 1
    assert skipped[0].endswith(": planted: it needs a machine that nobody has")


@pytest.mark.slow
@pytest.mark.parametrize(("factor", "code"), [(1000.0, 0), (0.001, 1)])
def test_compare_fail_ends_with_1_for_a_regression_alone(timed, tmp_path, factor, code):
    """Against a saved run made a thousand times slower it passes, against one a thousand times faster it fails."""
    (saved,) = timed[2].glob("*/*.json")
    data = json.loads(saved.read_text(encoding="utf-8"))
    for entry in data["benchmarks"]:
        entry["stats"]["median"] *= factor
    copy = tmp_path / saved.relative_to(timed[2])
    copy.parent.mkdir()
    copy.write_text(json.dumps(data), encoding="utf-8")
    done = surface(tmp_path, ["reference"], "--benchmark-compare", "--benchmark-compare-fail=median:50%")
    assert done.returncode == code, done.stdout + done.stderr
    assert ("has regressed" in done.stdout + done.stderr) is bool(code)


@pytest.mark.slow
def test_a_run_says_what_its_second_instrument_refused(warm_workers, tmp_path):
    """The refusal is a line for the user and a row of the page; the run's own figures and exit code stay."""
    (tmp_path / "planted.toml").write_text(SUITE, encoding="utf-8")
    (tmp_path / "two_faced.py").write_text(TWO_FACED, encoding="utf-8")
    options = ["--suite", str(tmp_path / "planted.toml"), "--plugin", str(tmp_path / "two_faced.py")]
    done = warm_workers.run("run", *options, "--threads", "1", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times 2 of them again" in done.stdout
    assert re.search(r"no figure for seed-inference-two-faced: .*\(gate before the timing\)", done.stdout)
    assert "pytest-benchmark timed 1 of 2 cases" in done.stdout
    records = pd.read_csv(tmp_path / "run" / "records.csv")
    assert set(records["status"]) == {"ok"}
    found = second_instrument.read(tmp_path / "run")
    assert [key[-1] for key in found.figures] == ["reference"]
    assert [key[-1] for key in found.refused] == ["two-faced"]
    # Two clocks on the same call: the machine may be busy, but not by a factor of twenty.
    reference = records.set_index("variant").loc["reference"]
    call_s = reference["batch"] / reference["throughput_seq_per_s"]
    assert 0.05 < next(iter(found.figures.values())).median_s / call_s < 20
    assert "no figure there: " in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


# --- what is listed -------------------------------------------------------------------------------------------------


def listed(generate: Callable[[Any], None]) -> list[Any]:
    """The cases that a module lists on a CPU: values, marks and name of each."""
    found: list[Any] = []
    config = SimpleNamespace(getoption=lambda *_: ["cpu"])
    generate(SimpleNamespace(config=config, parametrize=lambda _, cases: found.extend(cases)))
    return found


def test_every_variant_is_listed_for_every_workload_and_mode():
    """No variant is left out, those that cannot run here included; names are unique."""
    cases = listed(test_variants.pytest_generate_tests)
    expected = {(w, m, v, "cpu") for w in test_variants.WORKLOADS for m in PASSES for v in VARIANTS}
    assert {values for values, _, _ in cases} == expected
    assert len({name for _, _, name in cases}) == len(cases) == len(expected)


def test_the_quick_part_is_what_a_run_takes():
    """The marker `quick` and `takes` choose the same cases."""
    quick, taken = set(), set()
    for (workload, mode, variant, device), marks, name in listed(test_variants.pytest_generate_tests):
        whole = Case(test_variants.WORKLOADS[workload], variant, mode, device, 1)
        if marks:
            quick.add(name)
        if second_instrument.takes(whole, compiles=VARIANTS[variant].compiles_long):
            taken.add(name)
    assert quick == taken
    assert quick >= {f"seed-training-{variant}" for variant in ("reference", "onednn", "compile", "torchscript")}


def test_every_lstm_of_the_kernels_package_is_timed():
    """A kernel that is added joins the surface, or this says that its line is missing."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(kernels.__path__, "kernels.")]
    found = {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, nn.RNNBase) and kind.__module__ == module.__name__
    }
    assert found
    assert found <= {getattr(kernel.build, "func", kernel.build) for kernel in test_kernels.KERNELS}


def test_every_implementation_of_kernels_lstm_is_timed():
    """Each kernel by its name, and the choice among them; torch's own is there as `vendor`."""
    ours = [k for k in test_kernels.KERNELS if getattr(k.build, "func", None) is LSTM]
    assert {k.build.keywords["implementation"] for k in ours} == {*IMPLEMENTATIONS} - {"auto", "vendor"}
    assert all(k.name.startswith(f"own-{k.build.keywords['implementation']}") for k in ours)


def test_a_size_that_a_kernel_refuses_is_skipped_with_its_words(monkeypatch):
    """Triton's kernels say on a CPU that they need a GPU; what is not ours refuses nothing."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {
        kernel.name: test_kernels.KernelProblem(
            dataclasses.replace(kernel, precision="fp32"), SMALLEST, False, "cpu"
        ).refusal()
        for kernel in test_kernels.KERNELS
    }
    refused = {name for name, reason in found.items() if reason}
    assert refused == {"own-triton", "own-cell-fp16", "own-sequence-fp16", "own-persistent-fp16"}
    assert all("needs an NVIDIA GPU" in found[name] for name in refused)


# --- the kernels' gate ----------------------------------------------------------------------------------------------

SMALLEST = test_kernels.Size(3, 4, 5, 7)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "kernel", [k for k in test_kernels.KERNELS if "cpu" in k.devices], ids=lambda kernel: kernel.name
)
def test_every_kernel_passes_its_gate(kernel, backward):
    """At an odd size, forward and backward."""
    verdict = test_kernels.KernelProblem(kernel, SMALLEST, backward, "cpu").check(5)
    assert verdict.passed, verdict.describe()
    assert any(check.name.startswith("grad ") for check in verdict.checks) is backward


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_kernel_is_gated_at_its_precision(precision, backward):
    """Weights, inputs and the yardstick are of its type, and its limits are that type's: in fp32 they would refuse."""
    (own,) = (kernel for kernel in test_kernels.KERNELS if kernel.name == "own-loop")
    low = test_kernels.KernelProblem(dataclasses.replace(own, precision=precision), SMALLEST, backward, "cpu")
    assert {value.dtype for value in low.module.parameters()} == {DTYPES[precision]}
    verdict = low.check(5)
    assert verdict.passed, verdict.describe()
    assert verdict.worst.error > TOLERANCES["fp32"].cap


class LostGradient(nn.LSTM):
    """Right forwards, but the input gets no gradient of its own: it is doubled."""

    def forward(self, x: Any, hx: Any = None) -> Any:
        """Run it with an input whose gradient is doubled."""
        return super().forward(2 * x - x.detach(), hx)


@pytest.mark.parametrize(
    ("build", "backward", "named_quantity"),
    [(GateOrder, False, "outputs"), (lambda i, h: LostGradient(i, h, batch_first=True), True, "grad input")],
)
def test_a_wrong_kernel_is_refused(build, backward, named_quantity):
    """A defect forwards, and one that only gradients show."""
    verdict = test_kernels.KernelProblem(test_kernels.Kernel("planted", build), SMALLEST, backward, "cpu").check(5)
    assert not verdict.passed
    assert named_quantity in verdict.describe()


# --- the parent's part ----------------------------------------------------------------------------------------------


def case(variant: str = "reference", mode: str = "inference", workload: str = "seed") -> Case:
    """A case on one CPU thread."""
    return Case(workload, variant, mode, "cpu", 1)


def plan(*described: Described, second: bool = True) -> Plan:
    """A plan of one group."""
    suite = Suite("mine", "", (Selection(("seed",)),), second_instrument=second)
    return Plan(suite, ((Group("g", tuple(d.case for d in described)), described),), {}, {})


DESCRIBED = (
    Described(case(), {}, None),
    Described(case("cudnn"), {}, "exists on cuda only"),
    Described(case("compile-loop"), {}, None, compiles=True),
    Described(case("reference#again"), {}, None),
    Described(case("loop", "training"), {}, None),
    Described(case(workload="scaling"), {}, None),
)


def test_a_plan_takes_what_is_quick_and_can_run():
    """Unavailable, long compiling, labelled and other workloads' cases are not timed a second time."""
    chosen = plan(*DESCRIBED)
    assert [(c.variant, c.mode) for c in chosen.second_cases] == [("reference", "inference"), ("loop", "training")]
    without = plan(*DESCRIBED, second=False)
    assert without.second_cases == ()
    extra = second_instrument.expected_s(2)
    assert extra > 0
    assert chosen.expected_s() == pytest.approx(without.expected_s() + extra)


def test_quick_has_a_second_instrument_and_smoke_has_none():
    """Only the suite that `nox -s bench` runs pays for it."""
    assert load_suite("quick").second_instrument
    assert not load_suite("smoke").second_instrument


def test_only_what_ended_ok_is_timed_a_second_time(tmp_path, monkeypatch, capsys):
    """A variant that crashed or was refused would only do so again; with none left nothing starts."""
    asked: list[list[Case]] = []
    monkeypatch.setattr(second_instrument, "run", lambda cases, *_: asked.append(cases) or ["a line for the user"])
    ends = Runner(plan(*DESCRIBED), RunFolder(tmp_path), Settings(1), Console())
    ends.folder.append(DESCRIBED[0].record(status=Status.CRASHED), DESCRIBED[4].record(status=Status.OK))
    ends._second_instrument(tmp_path)
    assert asked == [[DESCRIBED[4].case]]
    assert "a line for the user" in capsys.readouterr().out
    none_ok = Runner(plan(*DESCRIBED), RunFolder(tmp_path / "other"), Settings(1), Console())
    none_ok.folder.path.mkdir()
    none_ok.folder.append(DESCRIBED[0].record(status=Status.CRASHED))
    none_ok._second_instrument(tmp_path)
    assert len(asked) == 1


def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, limit_s: float = 60.0) -> list[str]:
    """Return what the user is told when the child is this Python code."""
    monkeypatch.setattr(second_instrument, "command", lambda *_: [sys.executable, "-c", code])
    return second_instrument.run([case()], tmp_path, Settings(1), tmp_path, limit_s)


def test_a_child_that_dies_costs_its_figures_alone(tmp_path, monkeypatch):
    """Its exit code is told in one line, and what it said is in the log."""
    (line,) = lines(tmp_path, monkeypatch, "print('planted'); raise SystemExit(3)")
    assert line == (
        "second instrument: pytest-benchmark timed 0 of 1 cases; pytest ended with exit code 3, "
        "and workers.log has what it said"
    )
    assert "planted" in (tmp_path / "workers.log").read_text(encoding="utf-8")


def test_a_child_that_hangs_is_ended(tmp_path, monkeypatch):
    """After the limit, with one line."""
    (line,) = lines(tmp_path, monkeypatch, "import time; time.sleep(60)", limit_s=0.5)
    assert line == "second instrument: left out, since it did not end within 0.5 s"


def test_figures_that_are_there_are_kept(tmp_path, monkeypatch):
    """Nothing is started that would write over them."""
    (tmp_path / FILE).write_text('{"benchmarks": []}', encoding="utf-8")
    (line,) = lines(tmp_path, monkeypatch, "raise SystemExit(1)")
    assert line == f"second instrument: {tmp_path / FILE} is there already and is kept"
    assert not (tmp_path / "workers.log").exists()


def test_an_empty_file_of_an_interrupted_one_is_measured_again(tmp_path, monkeypatch):
    """pytest-benchmark opens its file before it times anything; what was interrupted is no result."""
    (tmp_path / FILE).touch()
    (*_, line) = lines(tmp_path, monkeypatch, "print('started')")
    assert "is there already" not in line
    assert "started" in (tmp_path / "workers.log").read_text(encoding="utf-8")


def test_without_pytest_benchmark_the_line_says_what_to_install(tmp_path, monkeypatch):
    """An absent library costs the feature alone, and nothing is started."""
    monkeypatch.setattr(second_instrument.importlib.util, "find_spec", lambda name: None if "_" in name else name)
    (line,) = lines(tmp_path, monkeypatch, "raise SystemExit(1)")
    assert line.endswith("pip install pytest-benchmark")
    assert not (tmp_path / "workers.log").exists()


# --- the report -----------------------------------------------------------------------------------------------------


class Cells(HTMLParser):
    """The rows of a page's second instrument."""

    def __init__(self, html: str) -> None:
        """Parse the section of `html`."""
        super().__init__()
        self.rows: list[list[str]] = []
        start = html.index('<section id="second-instrument">')
        self.feed(html[start : html.index("</section>", start)])

    def handle_starttag(self, tag: str, _attrs: object) -> None:
        """Open a row or a cell."""
        if tag == "tr":
            self.rows.append([])
        elif tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        """Fill the cell."""
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def folder_with(path: Path, text: str | None) -> Path:
    """A run folder of three cases, and the second instrument's file with this text."""
    records = [
        Record("seed", "lstm", name, "inference", "cpu", "fp32", 1, Status.OK, "", latency_p50_s=0.004, speedup=1.0)
        for name in ("reference", "loop", "onednn")
    ]
    (path / "records.jsonl").write_text("".join(json.dumps(record.as_dict()) + "\n" for record in records))
    if text is not None:
        (path / FILE).write_text(text, encoding="utf-8")
    return path


def entry(variant: str, **more: Any) -> dict[str, Any]:
    """Key of a case in the file."""
    return {"workload": "seed", "mode": "inference", "variant": variant, "device": "cpu", "threads": 1, **more}


def test_the_report_has_both_figures(tmp_path):
    """Our p50, its median, quotient and rounds, of the cases that both have; what it refused has its reason."""
    data = {
        "benchmarks": [
            {"extra_info": entry("reference"), "stats": {"median": 0.005, "rounds": 321}},
            {"extra_info": entry("nobody-else-has-it"), "stats": {"median": 0.005, "rounds": 321}},
            {"extra_info": entry("loop", threads=2), "stats": {"median": 0.005, "rounds": 321}},
        ],
        "refused": [entry("onednn", reason="outputs <b>off</b>")],
    }
    page = page_text(folder_with(tmp_path, json.dumps(data)))
    head, *rows = Cells(page).rows
    assert head[2:] == ["our p50", "its median", "its median / our p50", "its speedup", "its rounds"]
    assert sorted(row[1:] for row in rows) == [
        ["onednn", "no figure there: outputs <b>off</b>"],
        ["reference", "4.00 ms", "5.00 ms", "1.25x", "1.00x", "321"],
    ]


BROKEN = {
    "no JSON": "{",
    "not an object": "[]",
    "without benchmarks": "{}",
    "entry without stats": json.dumps({"benchmarks": [{"extra_info": entry("loop")}]}),
    "entry of something else": json.dumps({"benchmarks": [{"extra_info": {}, "stats": {"median": 1, "rounds": 1}}]}),
    "no median": json.dumps({"benchmarks": [{"extra_info": entry("loop"), "stats": {"median": 0, "rounds": 1}}]}),
    "refusal without reason": json.dumps({"benchmarks": [], "refused": [entry("loop")]}),
}  # fmt: skip


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_file_is_one_line(tmp_path, problem):
    """No figure is taken from it, and the line names it."""
    (tmp_path / FILE).write_text(BROKEN[problem], encoding="utf-8")
    found = second_instrument.read(tmp_path)
    assert (found.figures, found.refused) == ({}, {})
    assert found.problem.startswith(f"{FILE} cannot be read (")
    assert "\n" not in found.problem


def test_the_page_says_that_the_file_is_broken(tmp_path):
    """One line in place of the table."""
    page = page_text(folder_with(tmp_path, "{"))
    assert f"{FILE} cannot be read" in page
    assert Cells(page).rows == []


def test_without_the_file_there_is_no_section(tmp_path):
    """A run without a second instrument says nothing about it."""
    assert second_instrument.read(tmp_path) == Findings()
    assert "second-instrument" not in page_text(folder_with(tmp_path, None))
