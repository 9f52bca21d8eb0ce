"""From a suite's TOML to groups of cases: what a pattern selects, who joins, and one clear line for what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bench.errors import UsageError
from bench.plan.cases import (
    DEVICES,
    MODES,
    PASSES,
    REFERENCE,
    Case,
    Filters,
    Selection,
    Suite,
    Sweep,
    expand,
    load_suite,
    match,
    suite_names,
)

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

WORKLOADS = ("seed", "seed-large", "forecast", "scaling")
VARIANTS = ("reference", "loop", "amp-bf16", "amp-fp16", "compile")
CATALOGUE = {
    "workloads": [{"name": name} for name in WORKLOADS],
    "variants": [{"name": name} for name in VARIANTS],
}
GOOD = """
name = "mine"
summary = "a line"
[[select]]
workloads = ["seed"]
"""


def suite(*parts: Selection, **fields: object) -> Suite:
    """A suite of the given parts."""
    return Suite("mine", "a line", parts, **fields)


def expanded(*parts: Selection, **filters: object) -> list[Case]:
    """All cases of a suite of the given parts."""
    return [case for group in expand(suite(*parts), CATALOGUE, Filters(**filters)) for case in group.cases]


def written(path: Path, text: str | bytes) -> str:
    """A suite file with the given content; its name."""
    file = path / "mine.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


def test_a_selection_is_the_product_of_its_parts():
    """Every workload meets every variant in every mode."""
    found = expanded(Selection(("seed", "forecast"), ("reference", "loop"), MODES))
    expected = {(w, v, m) for w in ("seed", "forecast") for v in ("reference", "loop") for m in MODES}
    assert {(c.workload, c.variant, c.mode) for c in found} == expected
    assert len(found) == len(expected)


def test_a_group_differs_in_variant_alone():
    """Cases of a group share everything but the variant, and no two groups share a name."""
    groups = expand(suite(Selection(("*",), ("*",), MODES)), CATALOGUE, Filters(threads=3))
    assert len({group.name for group in groups}) == len(groups) == len(WORKLOADS) * len(MODES)
    for group in groups:
        assert len({dataclasses.replace(case, variant="") for case in group.cases}) == 1
        assert {case.group for case in group.cases} == {group.name}
        assert tuple(case.variant for case in group.cases) == VARIANTS


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        (["*"], VARIANTS),
        (["amp-*"], ("amp-bf16", "amp-fp16")),
        (["loop", "*"], ("loop", "reference", "amp-bf16", "amp-fp16", "compile")),
        (["loop", "l*p", "loop"], ("loop",)),
        (["amp-?p16"], ("amp-fp16",)),
        (["[cl]o*"], ("loop", "compile")),
    ],
)
def test_patterns_select_names_once_in_their_order(patterns, selected):
    """Names come in the order of the patterns, inside a pattern in the registry's, each once."""
    assert tuple(match(patterns, VARIANTS, "variant")) == selected


@pytest.mark.parametrize("pattern", ["LOOP", "loo", "lopo#twice"])
def test_a_pattern_that_selects_nothing_is_told_with_the_near_name(pattern):
    """A mistyped name needs no list of thirty."""
    with pytest.raises(UsageError) as error:
        match([pattern], VARIANTS, "variant")
    assert str(error.value) == f"no variant matches {pattern!r}; did you mean 'loop'?"


@pytest.mark.parametrize("pattern", ["xyz", "amp", "", "@batch=2", "#twice"])
def test_a_pattern_that_selects_nothing_is_named_with_what_there_is(pattern):
    """The message names the pattern and, where no name is near, every name it could have been."""
    with pytest.raises(UsageError) as error:
        match([pattern], VARIANTS, "variant")
    assert repr(pattern) in str(error.value)
    assert all(name in str(error.value) for name in VARIANTS)
    assert "\n" not in str(error.value)


def test_overrides_stay_with_every_workload_that_a_pattern_selects():
    """Overrides after `@` are no part of the pattern."""
    assert match(["seed*@batch=64,hidden=8"], WORKLOADS, "workload") == [
        "seed@batch=64,hidden=8",
        "seed-large@batch=64,hidden=8",
    ]


def test_an_empty_label_is_refused():
    """A second name that is the first one with a mark would only look like a second."""
    with pytest.raises(UsageError, match="variant 'loop#' has an empty label; expected a name after #, or no #"):
        match(["loop#"], ["loop"], "variant")


def test_a_label_lists_a_variant_a_second_time():
    """`name#label` is a case of its own that executes `name`."""
    found = expanded(Selection(("seed",), ("loop", "loop#again"), ("inference",)))
    assert [(c.variant, c.executed) for c in found] == [
        ("reference", "reference"),
        ("loop", "loop"),
        ("loop#again", "loop"),
    ]


@pytest.mark.parametrize("variants", [("loop",), ("loop", "reference"), ("reference#again", "loop"), ("*",)])
def test_the_reference_joins_every_group_and_comes_first(variants):
    """Speedups need the reference, listed or not."""
    for group in expand(suite(Selection(("*",), variants)), CATALOGUE, Filters()):
        assert [case.variant for case in group.cases].index(REFERENCE) == 0
        assert [case.variant for case in group.cases].count(REFERENCE) == 1


def test_a_sweep_makes_one_workload_a_value():
    """Axes vary one at a time, and each case says which axis has which value."""
    sweeps = (Sweep("batch", (1, 4)), Sweep("hidden", (32,)))
    found = expanded(Selection(("scaling", "seed@length=5"), ("reference",), ("inference",), sweeps))
    assert [(c.workload, c.sweep_axis, c.sweep_value) for c in found] == [
        ("scaling@batch=1", "batch", 1),
        ("scaling@batch=4", "batch", 4),
        ("scaling@hidden=32", "hidden", 32),
        ("seed@length=5,batch=1", "batch", 1),
        ("seed@length=5,batch=4", "batch", 4),
        ("seed@length=5,hidden=32", "hidden", 32),
    ]


def test_filters_replace_what_the_suite_says():
    """Workloads, variants and modes of the command line stand instead of the suite's, device and threads too."""
    groups = expand(
        suite(Selection(("forecast",), ("compile",), sweeps=(Sweep("batch", (1, 2)),)), Selection(("scaling",))),
        CATALOGUE,
        Filters(("seed@batch=2",), ("loop",), ("training",), threads=7, device="cuda"),
    )
    assert [group.name for group in groups] == ["seed@batch=2/training/cuda/7t"]
    assert [case.variant for case in groups[0].cases] == ["reference", "loop"]
    assert {(case.threads, case.device) for case in groups[0].cases} == {(7, "cuda")}


def test_a_part_for_another_device_is_not_there():
    """Neither its cases nor its patterns, on a device that it does not name; on its own it joins the others' groups."""
    parts = (
        Selection(("seed",), ("loop",), ("inference",)),
        Selection(("seed", "forecast"), ("compile",), ("inference",), devices=("cuda",)),
    )
    assert [c.variant for c in expanded(*parts)] == ["reference", "loop"]
    on_gpu = expanded(*parts, device="cuda")
    assert [(c.workload, c.variant) for c in on_gpu] == [
        ("seed", "reference"),
        ("seed", "loop"),
        ("seed", "compile"),
        ("forecast", "reference"),
        ("forecast", "compile"),
    ]


def test_a_suite_without_a_part_for_the_device_is_refused():
    """A run of nothing is not what was meant."""
    with pytest.raises(UsageError, match="has nothing for cpu; give another --device or another --suite"):
        expanded(Selection(("seed",), devices=("cuda",)))


def test_without_filters_the_suite_decides():
    """The suite's device holds, and all of its parts are expanded."""
    groups = expand(
        suite(Selection(("seed",)), Selection(("forecast",), ("loop",), ("training",)), device="cuda"),
        CATALOGUE,
        Filters(),
    )
    assert [group.name for group in groups] == [
        "seed/inference/cuda/1t",
        "seed/training/cuda/1t",
        "forecast/training/cuda/1t",
    ]


def test_parts_that_name_one_group_are_one_group():
    """Two parts that overlap give one group with each variant once, so nothing is measured twice."""
    found = expanded(
        Selection(("seed",), ("loop", "compile"), ("inference",)),
        Selection(("seed",), ("compile", "amp-bf16"), ("inference",)),
    )
    assert [case.variant for case in found] == ["reference", "loop", "compile", "amp-bf16"]


@pytest.mark.parametrize("swept_first", [True, False])
def test_a_sweep_that_meets_a_listed_workload_gives_no_second_case(swept_first):
    """A value of a sweep and the same workload listed by name are one case: records are told apart by their names."""
    parts = (
        Selection(("scaling",), ("loop",), ("inference",), (Sweep("batch", (4,)),)),
        Selection(("scaling@batch=4",), ("loop",), ("inference",)),
    )
    found = expanded(*(parts if swept_first else parts[::-1]))
    assert [case.variant for case in found] == ["reference", "loop"]


patterns = st.lists(st.sampled_from(("*", "seed*", "scaling", "seed@batch=2", "s*@batch=2")), min_size=1, max_size=3)
selections = st.builds(
    Selection,
    workloads=patterns.map(tuple),
    variants=st.lists(st.sampled_from(("*", "loop", "amp-*", "loop#2", "reference")), min_size=1).map(tuple),
    modes=st.lists(st.sampled_from(MODES), min_size=1).map(tuple),
    sweeps=st.lists(st.builds(Sweep, st.just("batch"), st.just((1, 2))), max_size=1).map(tuple),
)


@given(parts=st.lists(selections, min_size=1, max_size=3), threads=st.integers(1, 4))
def test_no_case_is_listed_twice(parts, threads):
    """Whatever a suite selects, a group holds each variant once, and the reference first."""
    for group in expand(suite(*parts), CATALOGUE, Filters(threads=threads)):
        variants = [case.variant for case in group.cases]
        assert len(set(variants)) == len(variants)
        assert variants[0] == REFERENCE


def test_an_unknown_workload_or_variant_is_one_line():
    """The line names what does not exist and the name that is near, or all names where none is."""
    with pytest.raises(UsageError, match=r"^no workload matches 'sede@batch=2'; did you mean 'seed'\?$"):
        expanded(Selection(("sede@batch=2",)))
    with pytest.raises(UsageError, match=r"^no variant matches 'lop\*'; did you mean 'loop'\?$"):
        expanded(Selection(("seed",)), variants=("lop*",))
    with pytest.raises(UsageError, match=r"^no variant matches 'loop,onednn'; name each on its own: --variant A"):
        expanded(Selection(("seed",)), variants=("loop,onednn",))
    with pytest.raises(UsageError, match=r"^no variant matches 'xyz'; choose from reference, .*compile$"):
        expanded(Selection(("seed",)), variants=("xyz",))


def test_an_unknown_suite_is_one_line():
    """The line names the suite that is near, or every suite there is."""
    with pytest.raises(UsageError) as error:
        load_suite("quik")
    assert str(error.value) == "no suite 'quik', and not the name of a .toml file; did you mean 'quick'?"
    with pytest.raises(UsageError) as error:
        load_suite("zzz")
    assert all(name in str(error.value) for name in suite_names())
    assert "\n" not in str(error.value)


def test_a_suite_file_that_does_not_exist_is_one_line(tmp_path):
    """A path is told as it was given."""
    with pytest.raises(UsageError, match=r"missing\.toml") as error:
        load_suite(str(tmp_path / "missing.toml"))
    assert "\n" not in str(error.value)


def test_a_file_gives_the_suite_that_it_says(tmp_path):
    """Every field arrives with its type, lists as tuples; what is not said has its default."""
    text = (
        GOOD.replace("[[select]]", "budget_s = 3\nprocesses = 2\n[[select]]")
        + 'variants = ["loop"]\nsweeps = [{ axis = "batch", values = [1, 2] }]\n'
    )
    expected = Suite(
        "mine",
        "a line",
        (Selection(("seed",), ("loop",), PASSES, (Sweep("batch", (1, 2)),)),),
        budget_s=3,
        processes=2,
    )
    assert load_suite(written(tmp_path, text)) == expected


def line_of(path: Path, text: str | bytes) -> str:
    """The message that a suite file of this content gives, checked to be one line that names the file."""
    with pytest.raises(UsageError) as error:
        load_suite(written(path, text))
    message = str(error.value)
    assert "mine.toml" in message
    assert "\n" not in message
    return message


BAD = {
    "unknown field": (GOOD.replace("[[select]]", "budgets = 1\n[[select]]"), "budgets"),
    "unknown field of a part": (GOOD + 'wrkloads = ["seed"]', "wrkloads"),
    "unknown field of a sweep": (GOOD + 'sweeps = [{ axis = "batch", value = [1] }]', "value"),
    "missing name": (GOOD.replace('name = "mine"', ""), "name"),
    "missing workloads": (GOOD.replace('workloads = ["seed"]', ""), "workloads"),
    "budget in words": (GOOD.replace("[[select]]", 'budget_s = "many"\n[[select]]'), "budget_s"),
    "processes in halves": (GOOD.replace("[[select]]", "processes = 1.5\n[[select]]"), "processes"),
    "workloads as a text": (GOOD.replace('["seed"]', '"seed"'), "workloads"),
    "select as a text": ('name = "mine"\nsummary = ""\nselect = "seed"', "select"),
    "select as one table": (GOOD.replace("[[select]]", "[select]"), "write [[select]] with two brackets"),
    "values in words": (GOOD + 'sweeps = [{ axis = "batch", values = ["one"] }]', "values"),
    "no part": ('name = "mine"\nsummary = ""\nselect = []', "select"),
    "empty workloads": (GOOD.replace('["seed"]', "[]"), "select"),
    "empty variants": (GOOD + "variants = []", "select"),
    "empty modes": (GOOD + "modes = []", "select"),
    "unknown mode": (GOOD + 'modes = ["inference", "traning"]', "no mode 'traning', did you mean 'training'"),
    "budget below 0": (GOOD.replace("[[select]]", "budget_s = -1\n[[select]]"), "budget_s is -1"),
    "budget that is not a number": (GOOD.replace("[[select]]", "budget_s = nan\n[[select]]"), "budget_s is nan"),
    "budget without end": (GOOD.replace("[[select]]", "budget_s = inf\n[[select]]"), "budget_s is inf"),
    "limit without end": (GOOD.replace("[[select]]", "case_limit_s = inf\n[[select]]"), "case_limit_s is inf"),
    "interval of 0": (GOOD.replace("[[select]]", "interval = 0\n[[select]]"), "interval is 0"),
    "no process": (GOOD.replace("[[select]]", "processes = 0\n[[select]]"), "processes is 0"),
    "limit of 0": (GOOD.replace("[[select]]", "case_limit_s = 0\n[[select]]"), "case_limit_s is 0"),
    "unknown device of a part": (GOOD + 'devices = ["cpu", "tpu"]', "device tpu"),
    "a part for no device": (GOOD + "devices = []", "select"),
    "unknown device": (GOOD.replace("[[select]]", 'device = "tpu"\n[[select]]'), "device is 'tpu'"),
}


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_suite_file_is_one_line_that_names_the_field(problem, tmp_path):
    """Whatever is wrong with a file, its name and the field come in one line."""
    text, field = BAD[problem]
    assert field in line_of(tmp_path, text)


@pytest.mark.parametrize(
    "content",
    ["name = ", GOOD.encode("utf-16-le"), b"name = '\xff\xfe'", "name = 1\nname = 2", b"\x00\x01"],
    ids=["cut off", "utf-16", "latin", "twice", "binary"],
)
def test_a_file_that_is_no_toml_is_one_line(content, tmp_path):
    """A file that cannot be read as TOML in UTF-8 is named in the error."""
    assert "cannot be read" in line_of(tmp_path, content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_and_line_ends_of_a_suite_file_change_nothing(encoding, end, tmp_path):
    """A suite is the same whatever editor saved it."""
    path = tmp_path / "mine.toml"
    path.write_bytes(GOOD.replace("\n", end).encode(encoding))
    assert load_suite(str(path)).name == "mine"


def test_a_folder_for_a_suite_file_is_one_line(tmp_path):
    """A folder whose name ends like a suite's is no suite."""
    (tmp_path / "mine.toml").mkdir()
    with pytest.raises(UsageError, match=r"mine\.toml"):
        load_suite(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", suite_names())
def test_every_suite_that_comes_along_is_about_things_that_exist(name, device):
    """Its name is its file's, it has a summary, and its patterns all select something from the registries."""
    from seq2seq.execution.variants import VARIANTS
    from seq2seq.workloads import registry as workloads

    loaded = load_suite(name)
    assert loaded.name == name
    assert loaded.summary
    catalogue = {
        "workloads": [{"name": n} for n in (*workloads.WORKLOADS, "own:mine")],
        "variants": [{"name": n} for n in VARIANTS],
    }
    for group in expand(loaded, catalogue, Filters(device=device)):
        for case in group.cases:
            assert case.workload == "own:mine" or workloads.find_workload(case.workload).name == case.workload
            assert case.executed in VARIANTS


def test_a_cpu_s_suites_have_nothing_of_our_gpu_kernels():
    """Their rows would all say the same; on a GPU they are what the suites are for."""
    from seq2seq.execution.variants import VARIANTS
    from seq2seq.workloads import registry as workloads

    ours = {name for name, variant in VARIANTS.items() if variant.lstm == "kernels" and variant.devices == ("cuda",)}
    catalogue = {
        "workloads": [{"name": n} for n in workloads.WORKLOADS],
        "variants": [{"name": n} for n in VARIANTS],
    }
    for name in ("quick", "scaling", "compile"):
        for device in DEVICES:
            groups = expand(load_suite(name), catalogue, Filters(device=device))
            assert all(any(case.executed in ours for case in group.cases) is (device == "cuda") for group in groups)


def test_the_quick_suite_leaves_out_what_takes_minutes():
    """Native bf16 LSTMs are slow on many CPUs: the seed's groups show that, the forecast's would take minutes."""
    from seq2seq.execution.variants import VARIANTS
    from seq2seq.workloads import registry as workloads

    catalogue = {"workloads": [{"name": n} for n in workloads.WORKLOADS], "variants": [{"name": n} for n in VARIANTS]}
    groups = expand(load_suite("quick"), catalogue, Filters(device="cpu"))
    cases = [case for group in groups for case in group.cases if case.variant.startswith("amp-")]
    found = {name: {case.variant for case in cases if case.workload == name} for name in ("seed", "forecast-deepar")}
    assert found == {
        "seed": {"amp-bf16", "amp-bf16-native", "amp-fp16"},
        "forecast-deepar": {"amp-bf16", "amp-fp16"},
    }


def test_the_suites_are_those_in_the_folder():
    """The names promised on the command line exist, the quick one and the smoke test among them."""
    assert {"quick", "smoke"} <= set(suite_names())
