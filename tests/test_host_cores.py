"""The cores that a process may use: a container's quota counts, wherever in its hierarchy it stands."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.__main__ import usable_cores as bench_s
from kernels.host import cores
from kernels.host.cores import cpu_quota, usable_cores


def version_1(folder: Path, path: str, root: str = "/") -> Path:
    """A process in a group of version 1, whose hierarchy is mounted under a folder; returns its folder in /proc."""
    return process(folder, f"4:cpu,cpuacct:{path}\n1:name=systemd:/elsewhere\n0::/elsewhere\n", "cgroup", root)


def version_2(folder: Path, path: str, root: str = "/") -> Path:
    """A process in a group of version 2, likewise."""
    return process(folder, f"0::{path}\n", "cgroup2", root)


def process(folder: Path, groups: str, kind: str, root: str) -> Path:
    """The files of a process that say where its groups are."""
    mounted = str(folder / "sys fs").replace(" ", r"\040")
    options = "rw,cpu,cpuacct" if kind == "cgroup" else "rw"
    found = folder / "proc"
    found.mkdir()
    (found / "cgroup").write_text(groups)
    (found / "mountinfo").write_text(
        "22 1 0:20 / /proc rw - proc proc rw\n"
        "30 1 0:21 / /no/such/place rw shared:9 - cgroup cgroup rw,memory\n"
        f"31 1 0:22 {root} {mounted} rw,nosuid shared:10 master:4 - {kind} cgroup {options}\n"
    )
    return found


def limit(folder: Path, quota: str, path: str = ".", *, version: int) -> None:
    """Give a group a limit of so many microseconds in 100,000."""
    group = folder / "sys fs" / path
    group.mkdir(parents=True, exist_ok=True)
    if version == 1:
        (group / "cpu.cfs_quota_us").write_text(quota + "\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (group / "cpu.max").write_text(f"{quota} 100000\n")


VERSIONS = pytest.mark.parametrize(("version", "made", "none"), [(1, version_1, "-1"), (2, version_2, "max")])


@VERSIONS
def test_a_quota_is_told_in_cpus(version, made, none, tmp_path):
    """A group's own, in either version; a group without a limit has none."""
    found = made(tmp_path, "/a/b")
    limit(tmp_path, none, "a/b", version=version)
    assert cpu_quota(found) is None
    limit(tmp_path, "150000", "a/b", version=version)
    assert cpu_quota(found) == 1.5


@VERSIONS
def test_the_strictest_group_above_counts(version, made, none, tmp_path):
    """A pod's limit holds for its containers, whatever they say."""
    found = made(tmp_path, "/pod/container/task")
    limit(tmp_path, none, "pod/container/task", version=version)
    limit(tmp_path, "400000", "pod/container", version=version)
    limit(tmp_path, "50000", "pod", version=version)
    assert cpu_quota(found) == 0.5
    assert usable_cores(found) == 1


@VERSIONS
@pytest.mark.parametrize(
    ("path", "root"), [("/docker/abc", "/docker/abc"), ("/../../abc", "/"), ("/host/abc", "/docker/abc"), ("/", "/..")]
)
def test_a_container_s_own_view_is_understood(version, made, none, path, root, tmp_path):
    """Its group is the top of what it sees, however /proc calls it."""
    del none
    found = made(tmp_path, path, root)
    limit(tmp_path, "200000", version=version)
    assert cpu_quota(found) == 2


@VERSIONS
@pytest.mark.parametrize("content", ["", "max", "a b", "-1 100000", "1 0"])
def test_a_file_that_says_nothing_is_no_limit(version, made, none, content, tmp_path):
    """Nor is one that is missing."""
    del none
    found = made(tmp_path, "/a")
    assert cpu_quota(found) is None
    limit(tmp_path, "1", "a", version=version)
    (tmp_path / "sys fs" / "a" / ("cpu.max" if version == 2 else "cpu.cfs_quota_us")).write_text(content)
    assert cpu_quota(found) is None


def test_a_system_without_groups_has_no_limit(tmp_path):
    """No /proc, no quota: the affinity alone counts."""
    assert cpu_quota(tmp_path / "none") is None
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


@given(quota=st.floats(0.01, 500), affinity=st.integers(1, 256))
def test_the_quota_is_rounded_up_and_cannot_add_cores(quota, affinity):
    """At least one core, at most those of the affinity, and no CPU of the quota left idle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
        patch.setattr(cores, "cpu_quota", lambda _: quota)
        found = usable_cores()
    assert 1 <= found <= affinity
    assert found == affinity or found - 1 < quota <= found == math.ceil(quota)


def test_a_run_takes_these_cores():
    """The command line's default is this very function."""
    assert bench_s is usable_cores


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", os.R_OK), reason="no groups of version 1")
def test_a_real_group_s_quota_is_obeyed():
    """A process in a group that is limited to half a CPU takes one core."""
    import subprocess
    import sys

    group = Path("/sys/fs/cgroup/cpu") / f"seq2seq-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("50000")
    except OSError:
        pytest.skip("this process may make no group")
    code = "import sys; from kernels.host.cores import cpu_quota, usable_cores; print(cpu_quota(), usable_cores())"
    shell = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{code}'"
    try:
        done = subprocess.run(
            ["/bin/sh", "-c", shell], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        )
        assert done.stdout.split() == ["0.5", "1"]
    finally:
        group.rmdir()
