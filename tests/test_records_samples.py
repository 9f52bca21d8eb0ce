"""Raw samples read back are the rounds that were written, and a record's figures follow from them."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import make_run

from bench.analysis.figures import figures
from bench.errors import UsageError
from bench.machine.core_distance import FAR_WORDS
from bench.machine.interference import Interference
from bench.plan.cases import REFERENCE, Case
from bench.records.block import Block
from bench.records.folder import RunFolder
from bench.records.raw_csv import ROUNDS
from bench.records.reader import read_records
from bench.records.rounds import Round, Samples
from bench.records.samples import read_samples

KEY = ("seed", "inference", "cpu", 1)


def written(path, samples: Samples, variants: tuple[str, ...]):
    """The path of samples.csv.gz, written as the runner writes it."""
    folder = RunFolder(path)
    for variant in variants:
        for process, rounds in enumerate(samples.processes):
            folder.append_samples(samples.rows(Case("seed", variant, "inference", "cpu", 1), process, rounds))
    return path / "samples.csv.gz"


def test_rounds_come_back_as_they_were_written(tmp_path):
    """Values, disturbance, and the order in which blocks ran, single calls and queued ones alike."""
    processes = [
        [
            Round(0, {"b": Block((0.25, 0.5)), "a": Block((1.0,), 4, 2.0, 1.0)}),
            Round(1, {"a": Block((), 4, 3.0, 2.5), "b": Block((0.125,))}, beside=Interference(why="disturbed")),
        ],
        [Round(0, {"a": Block((0.75,))})],
    ]
    found = read_samples(written(tmp_path, Samples(processes), ("a", "b")))
    assert list(found) == [KEY]
    assert found[KEY].processes == processes
    assert [list(r.blocks) for r in found[KEY].processes[0]] == [["b", "a"], ["a", "b"]]


def test_groups_stay_apart(tmp_path):
    """Rounds of one workload never meet those of another."""
    found = read_samples(make_run(tmp_path / "run", workloads=("seed", "seed@batch=2")) / "samples.csv.gz")
    assert [key[0] for key in found] == ["seed", "seed@batch=2"]
    assert all(len(samples.processes) == 3 for samples in found.values())


@pytest.mark.parametrize("queued", [False, True])
def test_a_record_s_figures_follow_from_its_raw_samples(queued, tmp_path):
    """Every statistic of a record is computed again from samples.csv.gz, to the nine digits that are kept."""
    folder = make_run(
        tmp_path / "run", noise=0.05, process_noise=0.02, disturbed_share=0.3, queued=queued, figured=True
    )
    samples = read_samples(folder / "samples.csv.gz")[KEY]
    for record in read_records(folder):
        case = Case(record.workload, record.variant, record.mode, record.device, record.threads)
        facts = {"batch": record.batch, "valid_steps": record.valid_steps}
        again = figures(case, samples, REFERENCE, 0.05, facts)
        assert len(again) >= 12
        for name, value in again.items():
            assert getattr(record, name) == pytest.approx(value, rel=1e-7), name


def test_times_are_the_medians_of_kept_rounds(tmp_path):
    """One array per process; a round without the variant has no part in it."""
    rounds = [Round(n, {"a": Block((1.0, 2.0 + n, 9.0))} if n else {"b": Block((5.0,))}) for n in range(8)]
    (times,) = Samples([rounds]).times("a")
    assert np.array_equal(times, 2.0 + np.arange(1, 8))
    assert Samples([rounds]).times("c") == []
    assert not list(tmp_path.iterdir())


def test_a_case_that_was_measured_twice_is_refused(tmp_path):
    """Rounds of two measurements never took turns, so they must not be paired."""
    samples = Samples([[Round(n, {"a": Block((1.0,)), "b": Block((2.0,))}) for n in range(3)]])
    written(tmp_path, samples, ("a", "b"))
    with pytest.raises(UsageError, match=r"line 8: .* a has round 0 of process 0 twice"):
        read_samples(written(tmp_path, samples, ("a",)))


BAD = {
    "not gzip": gzip.decompress,
    "a byte is wrong": lambda raw: raw[:200] + bytes([raw[200] ^ 255]) + raw[201:],
    "other columns": lambda raw: gzip.compress(gzip.decompress(raw).replace(b"wall_s", b"wall_ms", 1)),
    "a time of 0": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,inference,cpu,1,9,0,0,call,1,0,,0\n"),
    "no time": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,inference,cpu,1,9,0,0,call,1,nan,,0\n"),
    "a word": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,inference,cpu,one,9,0,0,call,1,1,,0\n"),
    "another kind": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,inference,cpu,1,9,0,0,step,1,1,,0\n"),
    "another flag": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,inference,cpu,1,9,0,0,call,1,1,,2\n"),
    "no flag": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,inference,cpu,1,9,0,0,call,1,1,,\n"),
    "half a line": lambda raw: gzip.compress(gzip.decompress(raw) + b"seed,a,infer\n"),
    "no text": lambda raw: gzip.compress(gzip.decompress(raw) + b"\xff\xfe\n"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_broken_file_is_one_line_that_names_it(problem, tmp_path):
    """Nothing is guessed and no line is left out."""
    path = make_run(tmp_path / "run") / "samples.csv.gz"
    path.write_bytes(BAD[problem](path.read_bytes()))
    with pytest.raises(UsageError) as error:
        read_samples(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 400), zeros=st.booleans())
def test_an_append_that_a_kill_tore_leaves_what_was_there(cut, zeros, tmp_path_factory):
    """Wherever the last append ends, the rows of the appends before are read, and no others."""
    path = tmp_path_factory.mktemp("torn")
    rounds = [Round(n, {"a": Block((1.0 + n,)), "b": Block((2.0,))}) for n in range(30)]
    before = read_samples(written(path, Samples([rounds]), ("a",)))
    whole = (path / "samples.csv.gz").read_bytes()
    written(path, Samples([rounds]), ("b",))
    torn = (path / "samples.csv.gz").read_bytes()[len(whole) : -1][:cut]
    # Some systems lengthen a file before they fill it.
    (path / "samples.csv.gz").write_bytes(whole + (bytes(len(torn)) if zeros else torn))
    assert read_samples(path / "samples.csv.gz") == before


def test_without_the_file_there_is_no_group(tmp_path):
    """Nothing was sampled."""
    assert read_samples(tmp_path / "samples.csv.gz") == {}


FAR = f"{FAR_WORDS} 550 ns, 175 at best in this run"


def test_what_disturbed_a_round_comes_back(tmp_path):
    """Intervals depend on it: cores that were far apart in all rounds widen none, whoever computes them."""
    case = Case("seed", "a", "inference", "cpu", 1)
    rounds = [Round(n, {"a": Block((1.0 + n / 100,))}, beside=Interference(why=FAR)) for n in range(9)]
    rounds[4] = dataclasses.replace(rounds[4], beside=Interference(why=f"{FAR}; others took 0.2 cores"))
    samples = Samples([rounds, rounds])
    for number, process in enumerate(samples.processes):
        RunFolder(tmp_path).append_rows(ROUNDS, [found.row(case.group, number) for found in process])
    found = read_samples(written(tmp_path, samples, ("a",)))[KEY]
    assert [[r.beside.why for r in process] for process in found.processes] == [[r.beside.why for r in rounds]] * 2
    assert found.stretch("a") == samples.stretch("a") == pytest.approx((9 / 8) ** 0.5)


def test_a_round_that_is_none_is_refused(tmp_path):
    """The file with the reasons is checked as well."""
    path = written(tmp_path, Samples([[Round(0, {"a": Block((1.0,))})]]), ("a",))
    ROUNDS.append(tmp_path, [["seed/inference/cpu/1t", "first", *[""] * 13]])
    with pytest.raises(UsageError, match="not a round of a process: first"):
        read_samples(path)
