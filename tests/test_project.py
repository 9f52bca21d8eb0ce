"""The project's own papers: what they promise must be there."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from bench.analysis import compare
from bench.gate.parity import FACTOR
from bench.records.schema import Status, dictionary

ROOT = Path(__file__).parent.parent


def test_dictionary_of_columns_is_current():
    """results/columns.md documents exactly the columns that are written."""
    assert dictionary() in (ROOT / "results" / "columns.md").read_text(encoding="utf-8")


def test_file_tree_in_the_pages_is_there():
    """Every path in the file tree of docs/files.md exists."""
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    tree = text.split("```text\n", 1)[1].split("```", 1)[0]
    paths = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("folder", sorted(path.name for path in (ROOT / "results" / "reference").iterdir()))
def test_reference_runs_can_be_read(folder):
    """Reference runs are of the schema that this release reads, raw samples included."""
    run = compare.load(ROOT / "results" / "reference" / folder)
    for record in run.records:
        if record.status is Status.OK:
            assert run.group(record).times(record.variant)


def test_the_changelog_has_no_line_beyond_120_columns():
    """It is read in a terminal; a paragraph is wrapped as code is."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []


def test_both_ends_of_the_torch_range_stay_open():
    """The ranges of torch and Triton keep those that pair up: 2.11 with 3.6, 2.13 with 3.7, 2.14 with 3.8."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    dependencies = " ".join(project["project"]["dependencies"])
    assert "torch>=2.11,<2.15" in dependencies
    assert "triton>=3.6,<3.9" in dependencies


def test_the_suite_stays_with_the_torch_of_its_figures():
    """`nox -s bench` takes the torch that the kept figures were made with, a pair with its Triton."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {"torch<2.14", "triton<3.8; sys_platform == 'linux'"} <= set(project["dependency-groups"]["suite"])
    kept = list(ROOT.glob("results/reference/*/environment.json"))
    assert kept
    assert {json.loads(path.read_text(encoding="utf-8"))["software"]["torch"][:5] for path in kept} == {"2.13."}


def test_what_is_told_to_install_installs_on_a_fresh_python():
    """Every `pip install` that is told to a user names packages of this project's, or the checkout, and no option.

    The pip that comes with Python 3.11 knows no dependency groups. Wheels that are carried to a machine without a
    network are another matter.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["project"]["dependencies"],
        *(name for group in project["dependency-groups"].values() for name in group if isinstance(name, str)),
    ]
    # huggingface_hub comes with transformers, and NVML's package is of use with a GPU alone.
    known = {_normal(re.split("[<>=;]", name)[0]) for name in wanted} | {"nox", "huggingface-hub", "nvidia-ml-py"}
    files = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(path for room in ("bench", "kernels", "seq2seq") for path in ROOT.glob(f"{room}/**/*.*")),
    ]
    texts = [path.read_text(encoding="utf-8") for path in files if path.suffix in {".py", ".md"}]
    told = [match for text in texts for match in re.findall(r"pip install(?! --no-index)((?: [\w.-]*[\w.])*)", text)]
    assert len(told) > 10
    assert [words for words in told if words != " ." and not {_normal(word) for word in words.split()} <= known] == []


def _normal(package: str) -> str:
    """A package's name as the registry compares it."""
    return re.sub("[-_.]+", "-", package).strip().lower()


def test_results_readme_states_the_gate_s_factor():
    """The pages describe the gate as it is, and nothing was left to be filled in."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    assert f"at most {FACTOR:g} times" in text
    assert f"at most {FACTOR:g} times" in pages["how-it-measures.md"]
    assert "@@" not in text + (ROOT / "README.md").read_text(encoding="utf-8") + "".join(pages.values())


def test_kernels_name_type_and_device_of_what_they_allocate():
    """Memory that a kernel writes depends on no default of the caller's: every new tensor names its type and device."""
    made = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "eye", "linspace"}
    # What only tools call, which own their process.
    files = [path for path in (ROOT / "kernels").rglob("*.py") if ROOT / "kernels" / "tools" not in path.parents]
    found, unnamed = 0, []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if ast.unparse(node.func.value) != "torch" or node.func.attr not in made:
                continue
            found += 1
            named = {keyword.arg for keyword in node.keywords}
            # The type of a range follows its limits, integers here.
            wanted = {"device"} if node.func.attr == "arange" else {"device", "dtype"}
            if not wanted <= named:
                unnamed.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert found > 5
    assert unnamed == []
