"""Environment of a run: facts are there and plain values, and what the system does not report is called missing."""

from __future__ import annotations

import json
import os
import re
import subprocess

import psutil
import pytest

from bench.analysis import comparability as comparable
from bench.machine import environment


@pytest.fixture(scope="module")
def described():
    """Facts of this machine, through JSON as into the file."""
    facts = environment.describe({"torch": "2.x", "onednn": True}, {"OMP_NUM_THREADS": "2"})
    return json.loads(json.dumps(facts))


def test_the_machine_is_told(described):
    """Processor, cores, memory and caches, in the sizes that the system gives."""
    machine = described["machine"]
    assert machine["processor"]
    assert machine["cores_logical"] == psutil.cpu_count()
    assert machine["memory_bytes"] == psutil.virtual_memory().total
    assert isinstance(machine["caches"], dict)
    for name, size in machine["caches"].items():
        assert re.fullmatch(r"L\d \w+", name)
        assert re.fullmatch(r"\d+[KM]", size)
    assert {"system", "architecture", "governor", "gpu", "cores_physical"} <= set(machine)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no affinity")
def test_the_cores_this_process_may_use_are_told(described):
    """A run pinned to some cores says to which."""
    assert set(described["machine"]["affinity"]) == os.sched_getaffinity(0)


def test_versions_are_told(described):
    """Every package that can change a number, those that are missing too, and what torch said of itself."""
    software = described["software"]
    assert set(environment.PACKAGES) <= set(software)
    assert re.match(r"\d+\.\d+", software["numpy"])
    assert software["torch"] == "2.x"
    assert software["onednn"] is True


def test_a_missing_package_is_told(monkeypatch):
    """Not installed is an answer."""
    monkeypatch.setattr(environment, "PACKAGES", ("no-such-package",))
    assert environment.software()["no-such-package"] == "not installed"


def test_thread_settings_are_told(monkeypatch):
    """Those of the workers, and those that the user's shell brought along, no others."""
    for name in [name for name in os.environ if name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_PLACES", "cores")
    monkeypatch.setenv("KMP_AFFINITY", "compact")
    monkeypatch.setenv("UNRELATED", "1")
    threads = environment.describe({}, {"OMP_NUM_THREADS": "2"})["threads"]
    assert threads == {
        "workers": {"OMP_NUM_THREADS": "2"},
        "inherited": {"KMP_AFFINITY": "compact", "OMP_PLACES": "cores"},
    }


def test_the_commit_is_told_and_whether_the_tree_was_changed(tmp_path, monkeypatch):
    """A clean checkout is clean, one new file makes it dirty."""
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b")
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except OSError:
        pytest.skip("git is not installed")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "m"], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    clean = environment.git()
    assert re.fullmatch(r"[0-9a-f]{40}", clean["commit"])
    assert (clean["dirty"], clean["changed_files"]) == (False, 0)
    (tmp_path / "new").touch()
    assert environment.git() == clean | {"dirty": True, "changed_files": 1}


def test_a_tree_without_git_is_told(tmp_path, monkeypatch):
    """A downloaded archive is no checkout, and a machine without git cannot tell."""
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.git() == {"commit": "not a git checkout"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.git() == {"commit": "not a git checkout"}


def test_without_a_gpu_there_is_none(tmp_path, monkeypatch):
    """A machine without NVIDIA's tool has no GPU to tell of."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.machine()["gpu"] == "none"


def test_the_load_is_told():
    """Averages over 1, 5 and 15 minutes, the share in use now, and the memory left."""
    load = environment.load()
    assert len(load["load_1_5_15_min"]) == 3
    assert 0 <= load["cpu_percent"] <= 100
    assert 0 < load["memory_available_bytes"] <= psutil.virtual_memory().total


def test_what_a_system_does_not_tell_is_left_out_or_said(monkeypatch, tmp_path):
    """Without /sys there are no caches and no governor, and nothing fails."""
    monkeypatch.setattr(environment, "_CPU", tmp_path)
    machine = environment.machine()
    assert machine["caches"] == {}
    assert machine["governor"] == "unknown on this system"


def test_a_machine_without_a_frequency_can_be_described(monkeypatch):
    """Virtual machines often tell none, and psutil then raises or gives nothing."""
    monkeypatch.setattr(environment.psutil, "cpu_freq", lambda: None)
    assert "frequency_mhz" not in environment.machine()


#: What libraries that look at a machine raise where it has no such thing, or hides it.
ERRORS = [
    OSError(2, "No such file"),
    NotImplementedError("no file"),
    RuntimeError("no service"),
    KeyError("MemTotal"),
    ValueError("invalid literal"),
    Exception("only X86 and ARM"),
]
#: Each function that is asked, and what of the description hangs on it.
ASKED = [
    (environment.psutil, "cpu_count", {"cores_physical", "cores_logical"}),
    (environment.psutil, "virtual_memory", {"memory_bytes"}),
    (environment.psutil, "cpu_freq", {"frequency_mhz"}),
    (environment.psutil, "Process", {"affinity"}),
    (environment.platform, "platform", {"system"}),
    (environment.platform, "machine", {"architecture"}),
    (environment.platform, "processor", set()),
    (environment, "cpu_quota", {"cpu_quota"}),
    (environment, "_caches", {"caches"}),
    (environment, "_cpu_info", {"vector_flags"}),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize(("owner", "name", "facts"), ASKED, ids=[name for _, name, _ in ASKED])
def test_a_fact_that_cannot_be_had_is_left_out(monkeypatch, owner, name, facts, error):
    """Whatever raises costs its own facts alone, and the rest is as before."""

    def broken(*_, **__):
        raise error

    # The real one starts processes.
    monkeypatch.setattr(environment, "_cpu_info", lambda: {"brand_raw": "Some CPU", "flags": ["avx2"]})
    monkeypatch.setattr(environment, "_gpu", lambda: "none")
    before = environment.machine()
    monkeypatch.setattr(owner, name, broken)
    after = environment.machine()
    assert not facts & set(after)
    assert set(before) - facts == set(after)
    assert after["processor"]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_load_that_cannot_be_had_is_left_out(monkeypatch, error):
    """Without /proc a run starts all the same."""

    def broken(*_, **__):
        raise error

    for name in ("getloadavg", "cpu_percent", "virtual_memory"):
        monkeypatch.setattr(environment.psutil, name, broken)
    assert environment.load() == {}


def test_a_quota_is_told(monkeypatch):
    """A container's limit is a fact of the machine, and that there is none is another; `compare` tells them apart."""
    monkeypatch.setattr(environment, "cpu_quota", lambda: 1.5)
    limited = environment.machine()
    assert limited["cpu_quota"] == 1.5
    monkeypatch.setattr(environment, "cpu_quota", lambda: None)
    free = environment.machine()
    assert free["cpu_quota"] == "none"
    found = comparable.differences({"machine": free}, {"machine": limited})
    assert "CPU quota none against 1.5" in map(str, found)


def test_broken_metadata_is_told(monkeypatch, tmp_path):
    """A package whose metadata has no version keeps no run from starting."""
    (tmp_path / "broken_package-1.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(environment, "PACKAGES", ("broken-package",))
    assert environment.software()["broken-package"] == "unknown to its metadata"
