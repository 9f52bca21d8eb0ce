"""Rooms and arrows: who may import whom, read from the imports of every file, those inside functions included."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Rooms of each package from the one that uses no other to the one that may use all. A room uses those above it, and
#: none beside it on its line; a name that is no folder is a file of the package itself, and "" are all its other files.
ORDER = {
    "kernels": """
        host common
        cpu gpu
        ""
        tools
        __main__
    """,
    "seq2seq": """
        data layers
        models
        decoding runtimes workloads
        execution tasks
        own_model training deployment
        cli
        __main__
    """,
    "bench": """
        errors units
        machine
        plan
        records
        timing console
        analysis gate
        run
        worker recommend
        report
        selftest microbench ab terminal serve ranks sweep
        arguments
        commands
        __main__
    """,
}
LINES = {
    package: [[name.strip('"') for name in line.split()] for line in text.strip().splitlines()]
    for package, text in ORDER.items()
}
LEVELS = {
    (package, name): level for package, lines in LINES.items() for level, line in enumerate(lines) for name in line
}
#: Rooms of bench/ that run in a worker; in the others nothing imports torch or what imports it.
HEAVY = {"timing", "gate", "worker", "microbench"}
#: What a package may use of the others; of the kernels everyone may use what a command line needs.
LIGHT = "kernels.host"
#: Names that two classes have. Those of `bench.timing.rounds` are what a worker is asked for and what it looks back on.
SHARED_CLASS_NAMES = {"Plan", "Round"}
MOST_FILES, MOST_LINES = 20, 400


def sources(root: Path = ROOT) -> dict[str, str]:
    """Text of every Python file of the three packages, by its module's name."""
    found = {}
    for package in ORDER:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text(encoding="utf-8")
    return found


SOURCES = sources()
PACKAGES = {
    ".".join(path.parent.relative_to(ROOT).parts) for package in ORDER for path in (ROOT / package).rglob("__init__.py")
}


@functools.cache
def parsed(text: str) -> ast.Module:
    """A file's tree."""
    return ast.parse(text)


def called(function: ast.expr) -> str:
    """The last word of what is called."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


@functools.cache
def imported(module: str, text: str) -> frozenset[str]:
    """Modules that a file names in an import, wherever it stands, and in `import_module`."""
    package = module if module in PACKAGES else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node.func) == "import_module":
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return frozenset(found)


def arrows(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Modules of ours that each module uses. A package that is imported for a module in it is not used itself."""
    found = {}
    for module, text in texts.items():
        names = imported(module, text) & texts.keys() - {module}
        found[module] = {name for name in names if not any(other.startswith(f"{name}.") for other in names)}
    return found


def room(module: str) -> tuple[str, str]:
    """Package and room of a module."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    return (package, name) if (package, name) in LEVELS else (package, "")


def circle(graph: Mapping[object, set[object]]) -> list[object]:
    """A circle of a graph; empty without one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def faults(texts: Mapping[str, str]) -> list[str]:
    """What is wrong with the arrows, a line each."""
    found = arrows(texts)
    between: dict[object, set[object]] = {}
    lines = []
    for module, used in found.items():
        for other in used:
            here, there = room(module), room(other)
            if here == there:
                continue
            between.setdefault(here, set()).add(there)
            if here[0] == there[0]:
                allowed = LEVELS[here] > LEVELS[there]
            else:
                allowed = list(ORDER).index(here[0]) > list(ORDER).index(there[0])
            if not allowed:
                lines.append(f"{module} uses {other}")
    for what, graph in (("files", found), ("rooms", between)):
        if around := circle(graph):
            lines.append(f"a circle of {what}: {' -> '.join(map(str, around))}")
    return lines


def heavy(texts: Mapping[str, str]) -> list[str]:
    """Modules of bench/ that import torch, or what may, where the parent may import them."""
    lines = []
    for module, text in texts.items():
        package, name = room(module)
        if package != "bench" or name in HEAVY:
            continue
        names = {used for used in imported(module, text) if used.split(".")[0] in {"torch", "seq2seq", "kernels"}}
        lines += [f"{module} imports {used}" for used in names if not used.startswith(LIGHT)]
    return lines


def test_arrows_run_one_way():
    """No file uses one of a room to its right, beside it, or one that uses it."""
    assert faults(SOURCES) == []


def test_the_parent_imports_no_torch():
    """Torch would take cores and memory from workers, and seconds of every command."""
    assert heavy(SOURCES) == []


@pytest.mark.parametrize(
    ("module", "planted", "told"),
    [
        ("bench.plan.cases", "from bench.run.runner import Runner", "bench.plan.cases uses bench.run.runner"),
        (
            "bench.units",
            "def late():\n    from bench.report import page",
            "bench.units uses bench.report.page",
        ),
        (
            "seq2seq.data.batch",
            "if TYPE_CHECKING:\n    from seq2seq.models.base import Config",
            "seq2seq.data.batch uses seq2seq.models.base",
        ),
        ("kernels.common.recurrence", "from .. import dispatch", "kernels.common.recurrence uses kernels.dispatch"),
        ("kernels.reference", "import seq2seq.data.batch", "kernels.reference uses seq2seq.data.batch"),
        (
            "seq2seq.decoding.result",
            'importlib.import_module("seq2seq.runtimes.int8")',
            "seq2seq.decoding.result uses seq2seq.runtimes.int8",
        ),
        ("bench.gate.tolerance", "from bench.gate.parity import Gate", "a circle of files"),
        ("kernels.cpu.build", "from ..gpu.cell import launches", "kernels.cpu.build uses kernels.gpu.cell"),
    ],
)
def test_a_planted_arrow_is_found(module, planted, told):
    """Lazy imports, imports for types, relative ones and names in strings count."""
    texts = {**SOURCES, module: f"{SOURCES[module]}\n{planted}\n"}
    assert any(line.startswith(told) for line in faults(texts))


def test_a_planted_circle_of_rooms_is_found():
    """Two rooms that use each other by different files are a circle, though no file is in one."""
    texts = {**SOURCES, "kernels.cpu.build": f"{SOURCES['kernels.cpu.build']}\nfrom ..replace import replace_lstm\n"}
    assert any(line.startswith("a circle of rooms") for line in faults(texts))


def test_a_planted_import_of_torch_is_found():
    texts = {**SOURCES, "bench.run.group": f"{SOURCES['bench.run.group']}\ndef late():\n    import torch\n"}
    assert heavy(texts) == ["bench.run.group imports torch"]


def test_every_folder_is_a_room():
    """Each folder with Python files has its place in the order, and each room of the order is there."""
    folders = {tuple(name.split(".")[:2]) for name in PACKAGES if "." in name}
    listed = {(package, name) for package, name in LEVELS if (ROOT / package / name).is_dir() and name}
    assert folders == listed
    assert all(f"{package}.{name}".strip(".") in SOURCES for package, name in LEVELS)


@pytest.mark.parametrize("package", sorted(PACKAGES - {"kernels", "seq2seq", "bench"}))
def test_a_room_says_what_it_is_for(package):
    """Its first lines say what lives there and what it may use; it hands on nothing of its files."""
    tree = parsed(SOURCES[package])
    assert [type(node) for node in tree.body] == [ast.Expr]
    text = ast.get_docstring(tree)
    assert text is not None
    assert len(text.split()) > 8


def guesses(source: str) -> list[str]:
    """Properties of a model's config that a source looks up by name, with an answer of its own where it has none."""
    return re.findall(r"getattr\(\s*(?:\w+\.)*_?config, \"\w+\"", source)


def test_every_family_answers_for_itself():
    """What a config does not say is in `seq2seq.models.family_defaults`, never where it is asked."""
    found = {name: guesses(text) for name, text in SOURCES.items() if name.startswith(("seq2seq", "bench"))}
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_a_guess_about_a_family_would_be_noticed():
    """The test above sees what it looks for."""
    assert guesses('x = getattr(model.config, "kinked", False)') == ['getattr(model.config, "kinked"']


def test_rooms_and_files_are_small():
    """A room has at most 20 files beside its `__init__`, and a file 400 lines: beyond, it is two concerns."""
    crowded = {
        str(folder.relative_to(ROOT)): count
        for package in PACKAGES
        for folder in [ROOT / package.replace(".", "/")]
        if (count := len([path for path in folder.glob("*.py") if path.name != "__init__.py"])) > MOST_FILES
    }
    assert crowded == {}
    files = [
        path for package in ORDER for path in (ROOT / package).rglob("*.*") if path.suffix in {".py", ".cpp", ".h"}
    ]
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


def test_a_class_name_is_used_once():
    """A name that a reader meets means one class, wherever it is."""
    places: dict[str, list[str]] = {}
    for module, text in SOURCES.items():
        for node in parsed(text).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    shared = {name: modules for name, modules in places.items() if len(modules) > 1 and name not in SHARED_CLASS_NAMES}
    assert shared == {}


def test_what_starts_often_loads_no_torch():
    """Importing each in turn, with all that it imports, leaves torch alone."""
    modules = ("kernels", "bench.analysis.compare", "bench.report.page", "bench.__main__")
    code = (
        "import importlib, sys\n"
        f"for module in {modules}:\n"
        "    importlib.import_module(module)\n"
        "    print(module, sorted({'torch', 'triton'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{module} []" for module in modules]
