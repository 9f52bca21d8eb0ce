"""The pages for users: their commands are accepted, their links lead somewhere, and they leave nothing out."""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import importlib
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import commands as bench_commands
from bench.arguments import parser
from bench.plan.cases import Quality, Selection, Suite, Sweep, load_suite, match, suite_names
from kernels.__main__ import TOOLS
from kernels.__main__ import main as kernels_main
from kernels.tools.gpu_day import command as gpu_day
from seq2seq.data import series_file
from seq2seq.data.options import declared
from seq2seq.execution.variants import VARIANTS
from seq2seq.tasks import forecasting, speech, summarization, translation
from seq2seq.workloads.registry import WORKLOADS

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "docs/notebook/*.md", "kernels/*.md", "results/*.md")
    for path in sorted(ROOT.glob(pattern))
}
#: Packages whose command lines are checked.
ROOMS = ("bench", "seq2seq", "kernels")
#: Options of other programs that the pages mention.
OTHERS_OPTIONS = {
    *("--benchmark-autosave", "--benchmark-compare", "--benchmark-compare-fail", "--help", "--group"),
    # Of Slurm and of Ray.
    *("--exclusive", "--node-name"),
}
TASK_OPTIONS = {
    "forecasting": {**declared(forecasting.Choices), **declared(series_file.Columns)},
    "translation": declared(translation.load),
    "summarization": declared(summarization.load),
    "speech": declared(speech.load),
}


class Parsed(Exception):  # noqa: N818 - no error: it ends a program once its command line is parsed
    """Carries what a program made of its command line."""

    def __init__(self, namespace: argparse.Namespace) -> None:
        super().__init__(namespace)
        self.namespace = namespace


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks that are marked with one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands(block: str) -> Iterator[list[str]]:
    """Words of each command of a block, without comments; a pipe or `&&` divides commands."""
    for line in block.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        words = iter([*lexer, ";"])
        for word in words:
            if word in {"<", ">"}:
                next(words)  # the file
            elif set(word) <= set("();|&"):
                yield command
                command = []
            else:
                command.append(word)


def own(words: list[str]) -> bool:
    """Return True for a command that starts a program of this project or nox."""
    return bool(words) and (Path(words[0]).name == "nox" or module_of(words).partition(".")[0] in ROOMS)


def module_of(words: list[str]) -> str:
    """Module that a command runs with `-m`; empty without one."""
    return words[words.index("-m") + 1] if "-m" in words[:-1] else ""


COMMANDS = [
    pytest.param(words, id=f"{page}: {shlex.join(words)}")
    for page, text in PAGES.items()
    for block in blocks(text, "sh")
    for words in commands(block)
    if own(words)
]


def sessions() -> dict[str, list[str]]:
    """Sessions of noxfile.py, each with the words that it runs before the user's: `python -m bench run`."""
    found = {}
    for node in ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and "nox.session" in map(ast.unparse, node.decorator_list):
            found[node.name] = []
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and "*session.posargs" in map(ast.unparse, call.args):
                    found[node.name] = [word.value for word in call.args if isinstance(word, ast.Constant)]
    return found


def check(words: list[str], monkeypatch) -> None:
    """Let the program that a command names parse it, without running anything.

    Raises:
        AssertionError: for a command that the program would refuse.
    """
    if words and Path(words[0]).name == "nox":
        end = words.index("--") if "--" in words else len(words)
        if end > 1:
            option, session = words[1:end]
            assert option == "-s"
            assert session in sessions(), f"no session {session!r}"
            check([*sessions()[session], *words[end + 1 :]], monkeypatch)
        return
    module = module_of(words)
    if module.partition(".")[0] not in ROOMS:
        return
    arguments = words[words.index(module) + 1 :]
    found = importlib.util.find_spec(module)
    assert found, f"no module {module!r}"
    program = importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module)
    if module == "seq2seq" and not arguments:  # the example, which is run before anything is parsed
        return
    namespace = parsed(program, [module, *arguments], monkeypatch)
    if module == "bench":
        check_names(namespace)
    for name, _ in getattr(namespace, "option", None) or []:
        task = getattr(namespace, "task", None)
        assert name in (TASK_OPTIONS[task] if task else set().union(*TASK_OPTIONS.values())), f"no option {name!r}"


def parsed(program, argv: list[str], monkeypatch) -> argparse.Namespace:
    """Return what a program parses a command line to."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", argv)
        try:
            program.main()
        except Parsed as end:
            return end.namespace
        except SystemExit as end:
            msg = f"{shlex.join(argv)} is refused"
            raise AssertionError(msg) from end
    msg = f"{shlex.join(argv)} is not parsed"
    raise AssertionError(msg)


def check_names(namespace: argparse.Namespace) -> None:
    """Look up the suite, workloads and variants of a command, which its parser takes as they are."""
    suite = getattr(namespace, "suite", None)
    assert suite is None or suite.endswith(".toml") or suite in suite_names(), f"no suite {suite!r}"
    if namespace.command == "run":
        plugged = [] if not namespace.plugin else namespace.variant
        match([name for name in namespace.variant if name not in plugged], list(VARIANTS), "variant")
        match(namespace.workload, list(WORKLOADS), "workload")


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_of_the_pages_is_accepted(words, monkeypatch):
    """Every command in a page names a session, module, option, suite and workload that exist."""
    check(words, monkeypatch)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/commands.md", "kernels/README.md"])
def test_commands_of_a_page_are_found(page):
    """The pages with commands are read, so that the test above is about them."""
    assert page in {str(command.id).partition(":")[0] for command in COMMANDS}


def test_every_block_of_commands_is_marked_as_such():
    """A block without a language, or with another one, has no command that the tests would pass over."""
    unmarked = [block for text in PAGES.values() for block in blocks(text, "", "text")]
    assert [line for block in unmarked for line in block.splitlines() if re.match(r"(python3? -m|nox) ", line)] == []


@pytest.mark.parametrize(
    "line",
    [
        "nox -s bnech",
        "nox -s bench -- --suite quik",
        ".venv/bin/nox -s train -- cooking",
        "nox -s train -- forecasting --option timestmp=time",
        "python -m bench run --sweet quick",
        "python -m bench run --workload sede",
        "python -m bench run --variant onednm",
        "cat lines.txt | python -m seq2seq translate",
        "python -m kernels chekc",
        "(cd elsewhere && python -m kernels tune --shapes most)",
        "python -m bench.analysis.derive_intervals --rums 5",
    ],
)
def test_a_wrong_command_would_be_noticed(line, monkeypatch):
    """A mistake in any part of a command fails the test of commands."""
    wrong = [words for words in commands(line) if own(words)]
    assert wrong
    with pytest.raises((AssertionError, ValueError)):
        check(wrong[0], monkeypatch)


def mentioned(text: str) -> Iterator[tuple[str, str]]:
    """Programs that a page names inside a sentence, each with a command of theirs or nothing; `a | b` is two."""
    for program, module, rest in re.findall(r"`(python -m|nox -s) ([\w.]+)([^`]*)`", text):
        if program == "nox -s":
            yield program, module
        else:
            for word in rest.split("|") if "|" in rest else rest.split()[:1]:
                yield module, word.strip() if re.fullmatch(r"[a-z]+", word.strip()) else ""
            if not rest.strip():
                yield module, ""


MENTIONED = [
    pytest.param(*found, id=f"{page}: {' '.join(found)}")
    for page, text in PAGES.items()
    for found in sorted(set(mentioned(text)))
]


def check_mentioned(program: str, command: str, monkeypatch) -> None:
    """Ask a program for the help of one of its commands.

    Raises:
        AssertionError: where there is no such session, module or command.
    """
    if program == "nox -s":
        assert command in sessions(), f"no session {command!r}"
        return
    found = importlib.util.find_spec(program)
    assert found, f"no module {program!r}"
    main = importlib.import_module(f"{program}.__main__" if found.submodule_search_locations else program).main
    monkeypatch.setattr(sys, "argv", [program, *([command] if command else []), "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code, f"{program} {command} is refused"


@pytest.mark.parametrize(("program", "command"), MENTIONED)
def test_a_command_inside_a_sentence_exists(program, command, monkeypatch):
    """What a page calls by name in its text is there to be called."""
    check_mentioned(program, command, monkeypatch)


@pytest.mark.parametrize(
    "text",
    ["`nox -s bnech`", "`python -m bench reprot`", "`python -m kernels tuen | check`", "`python -m bench.nothing`"],
)
def test_a_wrong_command_inside_a_sentence_would_be_noticed(text, monkeypatch):
    """A mistyped session, module or command fails the test above."""
    with pytest.raises(AssertionError):
        check_mentioned(*next(mentioned(text)), monkeypatch)


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_links_lead_to_files_and_headings_that_exist():
    """Every relative link and picture leads to a file, and its anchor to a heading there."""
    seen, broken = 0, []
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in link:
                continue
            seen += 1
            name, _, anchor = link.partition("#")
            target = (ROOT / page).parent / name if name else ROOT / page
            if not target.exists() or (anchor and anchor not in slugs(target.read_text(encoding="utf-8"))):
                broken.append(f"{page}: {link}")
    assert seen > 30
    assert broken == []


def site_maker():
    """The script that gathers the files of the site."""
    spec = importlib.util.spec_from_file_location("gather", ROOT / "docs" / "site" / "gather.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_has_every_page_and_every_file_a_page_links_to(tmp_path):
    """What the pages of the site link to was gathered with them."""
    site_maker().gather(tmp_path / "site")
    folder = tmp_path / "site" / "pages"
    gathered = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert set(PAGES) <= set(gathered)
    links = [
        (page, link.partition("#")[0])
        for page in PAGES
        for link in re.findall(r"\]\(([^)\s]+)\)", gathered[page].read_text(encoding="utf-8"))
        if "://" not in link and not link.startswith("#")
    ]
    assert [(page, link) for page, link in links if not (gathered[page].parent / link).is_file()] == []


def test_the_site_shows_a_link_to_a_folder_as_text():
    """A folder is a page on GitHub alone."""
    assert site_maker().FOLDER_LINK.sub(r"\1", "in [runs](results/), see [b](c.md)") == "in runs, see [b](c.md)"


def test_the_site_s_contents_name_every_page_once():
    """A page that the site's navigation leaves out is not found there."""

    def named(entries):
        for entry in entries:
            for value in entry.values():
                yield from named(value) if isinstance(value, list) else [value]

    settings = tomllib.loads((ROOT / "docs" / "site" / "zensical.toml").read_text(encoding="utf-8"))
    assert sorted(named(settings["project"]["nav"])) == sorted(PAGES)


NOTEBOOK = "docs/notebook/"
INDEX = f"{NOTEBOOK}README.md"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.startswith("docs/") and (page == INDEX or not page.startswith(NOTEBOOK))]
)
def test_the_readme_leads_to_every_page(page):
    """A page that the README does not link to is not found."""
    assert f"]({page})" in PAGES["README.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith(NOTEBOOK) and page != INDEX])
def test_the_notebook_s_index_leads_to_every_page(page):
    """So is a page of the notebook that its index does not link to."""
    assert f"]({page.removeprefix(NOTEBOOK)})" in PAGES[INDEX]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith((NOTEBOOK, "kernels/"))])
def test_a_page_about_the_kernels_can_be_read_at_once(page):
    """The guide and the pages of the notebook have at most 400 lines each."""
    assert len(PAGES[page].splitlines()) <= 400


def test_the_readme_can_be_read_in_one_sitting():
    """The README has at most 1,500 words; everything else has a page of its own."""
    assert len(PAGES["README.md"].split()) <= 1500


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("docs/variants.md", list(VARIANTS)),
        ("docs/workloads.md", [name for name in WORKLOADS if not name.endswith("-scaled")]),
        ("docs/commands.md", list(suite_names())),
        *(
            ("docs/commands.md", [field.name for field in dataclasses.fields(kind)])
            for kind in (Suite, Selection, Sweep, Quality)
        ),
        *(("docs/your-data.md", list(options)) for options in TASK_OPTIONS.values()),
    ],
)
def test_a_page_leaves_nothing_out(page, names):
    """Variants, workloads, suites, fields of a suite and options of a task are all in their page."""
    quoted = set(re.findall(r"`([^`\n]+)`", PAGES[page]))
    assert [name for name in names if name not in quoted] == []


def options_of(*grammars: argparse.ArgumentParser) -> set[str]:
    """Long options of parsers and of their commands."""
    found: set[str] = set()
    for grammar in grammars:
        for action in grammar._actions:
            found |= {name for name in action.option_strings if name.startswith("--")}
            if isinstance(action, argparse._SubParsersAction):
                found |= options_of(*action.choices.values())
    return found


def command_of(name: str) -> argparse.ArgumentParser:
    """Parser of one command of `python -m bench`."""
    return next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices[name]


@pytest.mark.parametrize(
    ("command", "page"),
    [
        ("run", "docs/commands.md"),
        ("compare", "docs/commands.md"),
        ("ab", "docs/commands.md"),
        ("show", "docs/commands.md"),
        ("history", "docs/commands.md"),
        ("recommend", "docs/recommend.md"),
        ("serve", "docs/serving.md"),
        ("ranks", "docs/ranks.md"),
        ("sweep", "docs/sweep.md"),
    ],
)
def test_every_option_is_in_its_page(command, page):
    """All options of the commands that measure, compare and recommend are explained."""
    written = set(re.findall(r"--[a-z][a-z-]+", PAGES[page]))
    assert options_of(command_of(command)) - {"--help"} - written == set()


def test_every_option_of_a_gpu_day_is_in_its_page():
    written = set(re.findall(r"--[a-z][a-z-]+", PAGES["docs/gpu-day.md"]))
    assert options_of(gpu_day.parser()) - {"--help"} - written == set()


def test_every_option_in_the_pages_exists():
    """An option that a page for users mentions in its text is one of a command line here, or of a known other."""
    from seq2seq.cli.arguments import parser as seq2seq_parser

    known = options_of(parser(), seq2seq_parser(), gpu_day.parser()) | OTHERS_OPTIONS
    known |= set(
        re.findall(r"\"(--bench-[a-z]+)\"", (ROOT / "bench" / "microbench" / "conftest.py").read_text(encoding="utf-8"))
    )
    pages = {page: text for page, text in PAGES.items() if not page.startswith(("kernels", "results", NOTEBOOK))}
    unknown = {
        f"{page}: {option}"
        for page, text in pages.items()
        for quoted in re.findall(r"`[^`\n]+`", text)
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", quoted)
        if option not in known
    }
    assert unknown == set()


def test_what_the_page_of_the_kernels_names_can_be_imported():
    """Dotted names are those of the installed package, which is called `kernels` here; commands are of a checkout."""
    page = PAGES["docs/kernels.md"]
    names = re.findall(r"`seq2seq_kernels\.([\w.]+)", page)
    assert "gpu.graph_cache.state" in names
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"kernels.{module}".rstrip(".")), attribute), name
    assert re.findall(r"`kernels\.[\w.]+", page) == []


def options_by_name(monkeypatch) -> dict[str, list[tuple[str, argparse.Action]]]:
    """Return every option of the commands of bench and of the kernels' tools, each with the commands that have it."""
    commands_of_bench = next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    found = {f"bench {name}": command for name, command in commands_of_bench.items()}

    def stop(self, *_: object):
        raise Parsed(self)

    for tool in TOOLS:
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", stop)
            try:
                kernels_main([tool])
            except Parsed as end:
                found[f"kernels {tool}"] = end.namespace
    named: dict[str, list[tuple[str, argparse.Action]]] = {}
    for command, grammar in found.items():
        for action in grammar._actions:
            for option in action.option_strings:
                named.setdefault(option, []).append((command, action))
    return named


def test_one_option_is_one_thing_in_all_commands(monkeypatch):
    """An option of one name is converted by the same function everywhere, and no second name of it has come back."""
    named = options_by_name(monkeypatch)
    assert {"bench run", "bench sweep", "kernels check", "kernels gpu-day"} <= {c for c, _ in named["--time-limit"]}
    for option in ("--out", "--budget", "--time-limit", "--repeats", "--seatings", "--block", "--device", "--resume"):
        kinds = {getattr(action.type, "__qualname__", None) for _, action in named[option] if action.nargs != 0}
        assert len(kinds) == 1, (option, kinds)
    assert named.keys() & {"--output", "--seconds", "--minutes", "--repeat", "--processes"} == set()


def test_every_exit_code_is_in_the_page_of_commands():
    """The table of exit codes has each code that the program ends with."""
    table = PAGES["docs/commands.md"].split("## Exit codes", 1)[1].split("\n## ", 1)[0]
    written = {int(code) for code in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in code.split(",")}
    codes = {value for name, value in vars(bench_commands).items() if name.startswith("EXIT_")}
    assert codes == written


def test_suites_in_the_pages_are_valid(tmp_path):
    """Every suite that a page shows can be loaded, and its workloads and variants exist."""
    shown = [block for text in PAGES.values() for block in blocks(text, "toml")]
    assert shown
    for block in shown:
        path = tmp_path / "mine.toml"
        path.write_text(block, encoding="utf-8")
        for part in load_suite(str(path)).select:
            match(part.workloads, list(WORKLOADS), "workload")
            match(part.variants, list(VARIANTS), "variant")


def test_the_sample_in_the_readme_is_of_the_kept_run():
    """The README shows at most ten lines of at most 80 columns, with the speedups of the run that it links to."""
    (sample,) = blocks(PAGES["README.md"], "text")
    with (ROOT / "results/reference/cpu-2core-amx/records.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["workload"], row["mode"], row["variant"]): row for row in csv.DictReader(file)}
    lines = sample.splitlines()
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 80
    for line in lines:
        workload, mode, variant, speedup, *_ = line.split()
        assert speedup == f"{float(rows[workload, mode, variant]['speedup']):.2f}x"
