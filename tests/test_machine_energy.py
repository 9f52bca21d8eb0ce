"""Energy: counters at a planted power give the planted joules; where there is none, a reason and no figure."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from powercap import RANGE_UJ, PlantedPower, zone
from report_pages import page_text
from run_folders import ENVIRONMENT, FACTS, make_run

from bench.analysis.energy import energy_figures
from bench.machine import energy, gpu
from bench.machine.energy import EnergyUnavailableError, Idle, Rapl, counter, idle
from bench.plan.cases import Case
from bench.records.block import Block, Turn
from bench.records.folder import RunFolder
from bench.records.raw_csv import ENERGY, ROUNDS
from bench.records.rounds import Round, Samples
from bench.records.samples import read_samples
from bench.records.schema import Record
from bench.run.seating import Place, Seating
from bench.run.worker_process import Settings, Worker
from bench.terminal import doctor
from bench.timing.seat import Subject, take_turn

CASE = Case("seed", "onednn", "inference", "cpu", 1)
COUNTED = Idle("RAPL package-0", 20.0, 1e-3)


@pytest.mark.parametrize(("packages", "start_uj"), [(1, 0), (2, 5), (1, RANGE_UJ - 1_000_000)])
def test_a_turn_measures_the_planted_joules(tmp_path, packages, start_uj):
    """Those that its timed calls spend on all packages, and none of its other calls; across the counters' end too."""
    planted = PlantedPower(tmp_path, 0.0, start_uj, packages=packages)
    block = take_turn(Subject(lambda: planted.spend(0.2)), 25, "cpu", counter("cpu", tmp_path)).block
    assert block.energy_j == pytest.approx(25 * 0.2 * packages, rel=1e-5)


@given(before=st.integers(0, RANGE_UJ - 1), used=st.integers(0, RANGE_UJ - 1))
def test_a_counter_that_starts_again_loses_nothing(before, used, tmp_path_factory):
    """Wherever it stood."""
    folder = tmp_path_factory.mktemp("cap")
    zone(folder / "intel-rapl:0", "package-0", before)
    after = (before + used) % RANGE_UJ
    assert Rapl(folder).joules((before,), (after,)) == pytest.approx(1e-6 * used, abs=1e-6)


def test_only_packages_are_counted(tmp_path):
    """Parts of a package and the whole board are in no sum, and a package that has two interfaces is counted once."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:2": "psys"}
    names |= {"intel-rapl:0:0": "core", "intel-rapl-mmio:0": "package-0", "intel-rapl:0:1": "dram"}
    for place, (folder, name) in enumerate(names.items(), start=1):
        zone(tmp_path / folder, name, place)
    found = Rapl(tmp_path)
    assert found.name == "RAPL package-0, package-1"
    assert found.read() == (1, 2)


def test_a_machine_without_a_counter_says_so(tmp_path, monkeypatch):
    """No zone, a zone that root alone may read, one that is garbled, and no GPU."""
    with pytest.raises(EnergyUnavailableError, match="no RAPL counter of a package"):
        counter("cpu", tmp_path / "none")
    file = zone(tmp_path / "intel-rapl:0", "package-0", 1)
    file.write_text("")
    with pytest.raises(EnergyUnavailableError, match="cannot be read"):
        counter("cpu", tmp_path)

    def refused(self):
        raise PermissionError(13, "Permission denied", self.path)

    monkeypatch.setattr(energy._Zone, "read", refused)
    with pytest.raises(EnergyUnavailableError, match=r"only by root; let others read: sudo chmod a\+r"):
        counter("cpu", tmp_path)
    assert idle("cpu", tmp_path).reason.startswith(str(file))
    monkeypatch.setattr(gpu, "nvml", lambda: None)
    with pytest.raises(EnergyUnavailableError, match="pip install nvidia-ml-py"):
        counter("cuda")


class Clock:
    """A clock that a test moves, and a counter that moves with it."""

    def __init__(self, file: Path, power_w: float, update_s: float, look_s: float = 1e-3) -> None:
        self.now_s, self._file, self._power_w, self._update_s, self._look_s = 0.0, file, power_w, update_s, look_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds
        # Half an update late, so that no rounding decides whether it has moved.
        shown_s = self._update_s * ((self.now_s + self._update_s / 2) // self._update_s)
        self._file.write_text(f"{round(1e6 * self._power_w * shown_s)}")

    def __call__(self) -> float:
        """Seconds now; looking takes time."""
        self.sleep(self._look_s)
        return self.now_s


def test_idle_power_and_the_counter_s_pace_are_measured(tmp_path):
    """From a second in which nothing is done, and from watching the counter move."""
    clock = Clock(zone(tmp_path / "intel-rapl:0", "package-0", 0), 30.0, 20e-3)
    found = idle("cpu", tmp_path, clock.sleep, clock)
    assert found.power_w == pytest.approx(30, rel=0.03)
    assert found.update_s == pytest.approx(20e-3, rel=0.1)
    assert found.available


def test_a_counter_that_does_not_move_is_none(tmp_path):
    """As some virtual machines show."""
    clock = Clock(zone(tmp_path / "intel-rapl:0", "package-0", 7), 0.0, 20e-3, 20e-3)
    assert "moved 0 times in 2 s" in idle("cpu", tmp_path, clock.sleep, clock).reason


def test_nvml_counts_millijoules(monkeypatch):
    """By the total energy counter; a GPU that has none is told with NVML's own reason."""
    shown = iter([5_000, 5_000, 7_500])
    library = SimpleNamespace(nvmlDeviceGetTotalEnergyConsumption=lambda _: next(shown))
    monkeypatch.setattr(gpu, "nvml", lambda: (library, "handle"))
    found = counter("cuda")
    assert found.joules(found.read(), found.read()) == 2.5

    def refused(_):
        msg = "Not Supported"
        raise RuntimeError(msg)

    library.nvmlDeviceGetTotalEnergyConsumption = refused
    with pytest.raises(EnergyUnavailableError, match="does not count this GPU's energy: Not Supported"):
        counter("cuda")


def counted(powers: list[float], block_s: float = 0.02, calls: int = 4, rounds: int = 6) -> Samples:
    """Seatings in each of which the variant took a power."""
    block = [Block((block_s / calls,) * calls, energy_j=power * block_s) for power in powers]
    return Samples([[Round(n, {"onednn": each, "reference": Block((1e-3,))}) for n in range(rounds)] for each in block])


def test_the_energy_of_a_sequence_is_that_of_its_share_of_a_block():
    """Joules over calls over the batch, the median of seatings with an interval; tokens without padding."""
    found = energy_figures(CASE, counted([90, 100, 110]), COUNTED, FACTS)
    of_call = 100 * 0.02 / 4
    assert found["energy_per_seq_j"] == pytest.approx(of_call / FACTS["batch"])
    assert found["energy_per_token_j"] == pytest.approx(of_call / FACTS["valid_steps"])
    assert found["energy_per_seq_lo_j"] < found["energy_per_seq_j"] < found["energy_per_seq_hi_j"]
    assert (found["power_w"], found["idle_power_w"]) == (pytest.approx(100), 20.0)
    assert found["energy"] == "RAPL package-0"


@pytest.mark.parametrize(
    ("samples", "counter_", "told"),
    [
        (counted([90]), Idle(reason="no RAPL counter"), "unavailable: no RAPL counter"),
        (
            counted([90]),
            Idle("NVML", 60.0, 0.1),
            "moves every 100 ms and a timed block took 20 ms; it takes --block 1",
        ),
        (counted([0.0]), COUNTED, "did not move in a seating's timed blocks"),
        (Samples([[Round(0, {"onednn": Block((1e-3,))})]]), COUNTED, "no timed block has a reading"),
    ],
)
def test_what_the_counter_cannot_tell_is_no_figure(samples, counter_, told):
    """None at all, blocks that are too short for it, or one that stood still: the reason is in the record."""
    found = energy_figures(CASE, samples, counter_, FACTS)
    assert told in found["energy"]
    assert all(value is None for name, value in found.items() if name.endswith("_j") or name == "power_w")
    assert set(found) <= set(Record().as_dict())


def test_the_energy_of_blocks_is_kept_and_read_back(tmp_path):
    """In energy.csv.gz; a run without one reads as before, and rows without a record are taken out by a mend."""
    folder = RunFolder(make_run(tmp_path / "run", speedups={"reference": 1.0, "onednn": 2.0}))
    (before,) = read_samples(folder.path / "samples.csv.gz").values()
    assert all(b.energy_j is None for rounds in before.processes for r in rounds for b in r.blocks.values())
    row = ["seed", "onednn", "inference", "cpu", 1, 1, 3, 3, "0.01", "1.25"]
    folder.append_rows(ROUNDS, [Round(0, {}).row("seed/inference/cpu/1t", 0)])
    folder.append_rows(ENERGY, [row, [*row[:1], "other", *row[2:]]])
    (after,) = read_samples(folder.path / "samples.csv.gz").values()
    assert after.processes[1][3].blocks["onednn"].energy_j == 1.25
    assert after.processes[1][3].blocks["reference"].energy_j is None
    assert [found[1] for found in ENERGY.rows(folder.path)] == ["onednn", "other"]
    folder.mend(lambda _: True)
    assert [found[1] for found in ENERGY.rows(folder.path)] == ["onednn"]


def test_a_seating_writes_the_energy_of_its_blocks(tmp_path):
    """One row a timed block."""
    folder = RunFolder.create(tmp_path / "run", "made")
    folder.append_seatings([CASE], [Record("seed", "lstm", "onednn")], counted([90, 100], rounds=2))
    rows = list(ENERGY.rows(folder.path))
    assert [row[5:] for row in rows] == [
        [str(p), str(r), "4", "0.02", e] for p, e in ((0, "1.8"), (1, "2")) for r in (0, 1)
    ]


def test_a_parent_that_asks_for_no_energy_gets_none():
    """One of an earlier revision does not know the field."""
    turn = Turn(Block((1.0,)), 0.1, 0.0, 1.0, 0.0, 1.0)
    assert "energy_j" not in turn.fields()["block"]
    assert Turn.of(turn.fields()) == turn


def test_the_page_shows_energy_with_idle_power_apart(tmp_path):
    """In a table of its own; there is none where nothing was counted."""
    folder = make_run(tmp_path / "run", ENVIRONMENT, speedups={"reference": 1.0, "onednn": 2.0}, figured=True)
    assert 'id="energy"' not in page_text(folder)
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    known = {"energy_per_seq_j": 0.0123, "energy_per_token_j": 0.00061, "power_w": 87.0, "idle_power_w": 21.5}
    lines = [line | known | {"energy": "RAPL package-0"} for line in lines]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_text(folder)
    shown = page[page.index('id="energy"') :]
    for text in ("12.3 mJ", "610 uJ", "87 W", "21.5 W", "RAPL package-0", "idle power included"):
        assert text in shown


def test_the_doctor_says_whether_energy_can_be_read(tmp_path, monkeypatch):
    """And what to do where it cannot."""
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    assert doctor.energy_counter().state is doctor.FactState.LIMITED
    zone(tmp_path / "intel-rapl:0", "package-0", 1)
    assert doctor.energy_counter().found == "RAPL package-0"


def test_a_seat_reports_the_energy_of_its_turns(tmp_path):
    """From the worker to the parent, where it is asked for."""
    cap, plugin = tmp_path / "cap", tmp_path / "plugin.py"
    plugin.write_text(
        f"from pathlib import Path\nfrom bench.machine import energy\nenergy.POWERCAP = Path({str(cap)!r})\n"
    )
    case = Case("seed@batch=2", "reference", "inference", "cpu", 1)
    with PlantedPower(cap, 50.0):
        settings = Settings(1, plugins=(plugin,))

        def start(found):
            return Worker(found, tmp_path / "log", tmp_path / "cache")

        with Seating(
            [Place((case,))], start, settings, 60.0, lambda _: None, turns={"energy": True, "block_s": 0.3}
        ) as seating:
            seating.sit(1, audit=False)
            blocks = [seating.players["reference"].turn().block for _ in range(5)]
    assert np.median([b.timed_s for b in blocks]) > 0.1
    power_w = np.sum([b.energy_j for b in blocks]) / np.sum([b.timed_s for b in blocks])
    assert power_w == pytest.approx(50.0, rel=0.25)
