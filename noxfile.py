"""Sessions that work on a fresh machine: `nox -s bench`, `nox -s tests` and the checks."""

from __future__ import annotations

import os
import shutil

import nox

nox.options.sessions = ["lint", "types", "tests"]
# uv would fetch another build of torch than pip.
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

PROJECT = nox.project.load_toml("pyproject.toml")

# Tests and runs start many Python processes. Where bytecode is not kept, each compiles all of torch that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def install(session: nox.Session, *groups: str) -> None:
    """Install what kernels and suite depend on, and the given groups; the project itself runs from the checkout."""
    session.install(*PROJECT["project"]["dependencies"], *nox.project.dependency_groups(PROJECT, "suite", *groups))


def install_peers(session: nox.Session) -> None:
    """Install what to compare with, each for itself: a package without a wheel for this Python is left out.

    Its variants and workloads are then listed as unavailable, and `bench serve` names what it lacks. Nothing is built
    from source, which would take an hour and a compiler.
    """
    for requirement in nox.project.dependency_groups(PROJECT, "peers", "serve"):
        session.install("--only-binary=:all:", requirement, success_codes=(0, 1))


@nox.session
def bench(session: nox.Session) -> None:
    """Measure: `nox -s bench`, or `nox -s bench -- --suite smoke` and any other option of `python -m bench run`."""
    install(session)
    install_peers(session)
    session.run("python", "-m", "bench", "run", *session.posargs)


@nox.session
def microbench(session: nox.Session) -> None:
    """Time variants and kernels with pytest-benchmark: `nox -s microbench -- -k onednn --benchmark-autosave`."""
    install(session)
    install_peers(session)
    session.run("python", "-m", "pytest", "bench/microbench", "--benchmark-only", *session.posargs)


@nox.session
def selftest(session: nox.Session) -> None:
    """Hold the suite against itself: `nox -s selftest`, or `nox -s selftest -- null --pairs 100`."""
    install(session)
    session.run("python", "-m", "bench", "selftest", *session.posargs)


@nox.session
def train(session: nox.Session) -> None:
    """Train a model on a task: `nox -s train -- forecasting`, or any other option of `python -m seq2seq train`."""
    install(session, "tasks")
    session.run("python", "-m", "seq2seq", "train", *session.posargs)


@nox.session
def report(session: nox.Session) -> None:
    """Write plots and page of a run folder again: `nox -s report -- DIR`."""
    install(session)
    session.run("python", "-m", "bench", "report", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on all cores; arguments go to pytest, as in `nox -s tests -- -k parity` or `-- -n0 -s`."""
    install(session, "tests", "tasks", "pretrained")
    install_peers(session)
    # One thread: many tiny problems, and several processes of their own.
    environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    session.run("python", "-m", "pytest", *workers(session.posargs), *session.posargs, env=environment)


@nox.session
def cluster(session: nox.Session) -> None:
    """Test sweeps on a Ray cluster of two nodes on this machine; Ray is 79 MB to download, so `tests` does without."""
    install(session, "tests", "cluster")
    session.run("python", "-m", "pytest", "tests/test_sweep.py", "tests/test_sweep_ray.py", *session.posargs)


def workers(arguments: list[str]) -> list[str]:
    """Options that share the test files out among the cores, unless the user says how or wants to see inside."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    alone = ("-n", "--numprocesses", "--dist", "--pdb", "--trace", "-s", "--capture=no")
    # A GPU is one, and its tests measure and fill it.
    if cores == 1 or shutil.which("nvidia-smi") or any(word.startswith(alone) for word in arguments):
        return []
    # Whole files, whose tests share what takes long to make, in the order of tests/conftest.py. Each worker takes some
    # 600 MB, and past eight the longest file decides. A worker that dies is not started again: pytest-xdist would hand
    # its finished files to another, which waits for more to come for ever.
    return ["-n", str(min(cores, 8)), "--dist", "loadfile", "--no-loadscope-reorder", "--max-worker-restart", "0"]


@nox.session
def docs(session: nox.Session) -> None:
    """Make a site of the pages in build/docs/site, which opens without a server; its search box needs one."""
    session.install(*nox.project.dependency_groups(PROJECT, "docs"))
    session.run("python", "docs/site/gather.py", "build/docs")
    session.run("zensical", "build", "--clean", "--strict", "--config-file", "build/docs/zensical.toml")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*nox.project.dependency_groups(PROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly."""
    install(session, "types")
    session.run("mypy")
