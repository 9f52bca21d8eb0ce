"""A run folder: what was written survives, reads as tables, and never overwrites what was there."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.records.folder import RunFolder
from bench.records.reader import read_records
from bench.records.schema import COLUMNS, LACKING, SAMPLE_COLUMNS, SCHEMA_VERSION, Record, Status

ROW = ["seed", "loop", "inference", "cpu", 1, 0, 0, 0, "call", 1, "0.25", "", 0]


@pytest.fixture
def folder(tmp_path):
    """A new run folder."""
    return RunFolder.create(tmp_path / "run", "mine")


def line_of(out: Path) -> str:
    """The message with which a folder is refused, checked to be one line that names it and what to do."""
    with pytest.raises(UsageError) as error:
        RunFolder.create(out, "mine")
    message = str(error.value)
    assert str(out) in message
    assert "--out" in message
    assert "\n" not in message
    return message


def test_every_record_can_be_read_when_it_was_appended(folder):
    """After each append the file holds all records so far: a run that ends here has lost nothing."""
    for number in range(3):
        folder.append(Record(workload=f"w{number}"))
        lines = folder.records_path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["workload"] for line in lines] == [f"w{n}" for n in range(number + 1)]
        assert folder.records() == [json.loads(line) for line in lines]


def test_an_appended_record_is_on_the_disk(folder, monkeypatch):
    """The system is told to write through, after the record has left Python: a power cut loses nothing."""
    folder.append(Record(workload="seed"))
    lengths = []
    monkeypatch.setattr("bench.records.durable.os.fsync", lambda _: lengths.append(folder.records_path.stat().st_size))
    folder.append(Record(workload="seed"))
    assert lengths == [folder.records_path.stat().st_size]


def test_an_appended_record_has_its_time(folder):
    """The time is told in UTC, and the record that comes back is the one in the file."""
    (record,) = folder.append(Record(workload="seed"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.recorded_at)
    assert folder.records() == [record.as_dict()]


def test_records_of_another_process_stay(folder):
    """Appending goes to the end of what is there."""
    folder.append(Record(workload="first"))
    RunFolder(folder.path).append(Record(workload="second"))
    assert [r["workload"] for r in folder.records()] == ["first", "second"]


def test_the_table_has_the_schema_s_columns_and_a_row_a_record(folder):
    """Cells that nobody measured are empty; words with commas and line ends stay whole."""
    folder.append(Record(workload="seed", variant="loop", speedup=0.5, interval_wide=False))
    folder.append(Record(workload="seed", variant="bad", status=Status.ERROR, reason='a, "b"\nc'))
    folder.write_table()
    with (folder.path / "records.csv").open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == COLUMNS
    first, second = (dict(zip(header, row, strict=True)) for row in rows)
    assert (first["speedup"], first["latency_p50_s"], first["status"], first["interval_wide"]) == (
        "0.5",
        "",
        "ok",
        "False",
    )
    assert (second["status"], second["reason"]) == ("error", 'a, "b"\nc')


def test_a_table_without_records_has_its_header(folder):
    """A run that was interrupted before its first record is readable too."""
    folder.write_table()
    assert (folder.path / "records.csv").read_text(encoding="utf-8").strip() == ",".join(COLUMNS)


def test_an_error_that_is_no_number_keeps_the_records_plain_json(folder):
    """JSON has no word for infinity, and a shape that is wrong has an infinite error: other readers must read on."""
    folder.append(Record(workload="seed", parity_error=float("inf"), grad_error=float("nan")))

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    json.loads(folder.records_path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_samples_of_several_appends_read_as_one_file(folder):
    """The gzip members are read one after another, with one header, by pandas."""
    pandas = pytest.importorskip("pandas")
    for process in range(3):
        folder.append_samples([*ROW[:5], process, n, *ROW[7:]] for n in range(4))
    frame = pandas.read_csv(folder.path / "samples.csv.gz")
    assert list(frame.columns) == list(SAMPLE_COLUMNS)
    assert list(zip(frame["process"], frame["round"], strict=True)) == [(p, n) for p in range(3) for n in range(4)]
    assert (frame["wall_s"] == 0.25).all()
    assert frame["device_s"].isna().all()


def test_a_json_file_is_replaced_as_a_whole(folder):
    """The second writing leaves nothing of the first, and no other file."""
    folder.write_json("environment.json", {"long": "x" * 1000})
    folder.write_json("environment.json", {"path": Path("a")})
    assert json.loads((folder.path / "environment.json").read_text(encoding="utf-8")) == {"path": "a"}
    assert [path.name for path in folder.path.iterdir()] == ["environment.json"]


def test_an_empty_folder_may_be_used(tmp_path):
    """A folder made beforehand is taken, and nothing is left behind in it by the trial."""
    (tmp_path / "run").mkdir()
    assert RunFolder.create(tmp_path / "run", "mine").path == tmp_path / "run"
    assert not list((tmp_path / "run").iterdir())


def test_folders_above_are_made(tmp_path):
    """A path whose folders do not exist yet is no mistake."""
    assert RunFolder.create(tmp_path / "a" / "b" / "run", "mine").path.is_dir()


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    """No run writes over another."""
    (tmp_path / "records.jsonl").write_text("mine\n")
    assert "not an empty folder" in line_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    assert (tmp_path / "records.jsonl").read_text() == "mine\n"


def test_a_file_in_the_way_is_refused(tmp_path):
    """A file of that name, or one where a folder above should be."""
    (tmp_path / "taken").write_text("mine")
    line_of(tmp_path / "taken")
    line_of(tmp_path / "taken" / "run")
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    """Said before anything was measured."""
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in line_of(tmp_path / "locked")
    assert "cannot be written" in line_of(tmp_path / "locked" / "run")


def test_a_system_that_refuses_to_write_is_told(tmp_path, monkeypatch):
    """A full disk or a read-only one is told in the system's words."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    assert "Read-only file system" in line_of(tmp_path / "run")


def test_a_run_without_a_name_gets_one_of_its_own(tmp_path, monkeypatch):
    """Runs of one second and suite lie side by side under results/runs/, named by time and suite."""
    monkeypatch.chdir(tmp_path)
    found = [RunFolder.create(None, "quick").path for _ in range(3)]
    assert len(set(found)) == 3
    for path in found:
        assert path.parent == Path("results") / "runs"
        assert re.fullmatch(r"\d{8}T\d{6}Z-quick(-\d+)?", path.name)
        assert path.is_dir()


def test_replaced_records_keep_their_place_and_time(tmp_path):
    """A case that was measured further has new figures where it stood; the others are as they were."""
    folder = RunFolder(tmp_path)
    names = ("reference", "loop", "onednn")
    folder.append(*(Record(workload="seed", variant=name, mode="inference", device="cpu", threads=1) for name in names))
    before = folder.records()
    new = Record(workload="seed", variant="loop", mode="inference", device="cpu", threads=1, speedup=2.0)
    folder.replace({new.key: new})
    after = folder.records()
    assert [values["variant"] for values in after] == list(names)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] == before[1] | {"speedup": 2.0}


@pytest.mark.parametrize("version", LACKING)
def test_a_record_of_an_earlier_release_is_replaced_as_this_one_s(folder, version):
    """As when its run is measured further: the folder is read as before, the record that was left alone included."""
    for workload in ("seed", "other"):
        folder.append(Record(workload=workload, mode="inference", variant="loop", device="cpu", threads=1))
    old = [{name: r[name] for name in COLUMNS if name not in LACKING[version]} for r in folder.records()]
    lines = [json.dumps(values | {"schema_version": version}) + "\n" for values in old]
    folder.records_path.write_text("".join(lines), encoding="utf-8")
    first, other = read_records(folder.path)
    assert (first.schema_version, other.schema_version) == (version, version)
    folder.replace({first.key: dataclasses.replace(first, samples=7)})
    again = read_records(folder.path)
    assert [(r.workload, r.samples, r.schema_version) for r in again] == [
        ("seed", 7, SCHEMA_VERSION),
        ("other", None, version),
    ]
    folder.append(other)
    assert read_records(folder.path)[-1].schema_version == SCHEMA_VERSION
