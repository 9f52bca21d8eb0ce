"""The CPU kernel is compiled in parts: a first call waits for its own alone, and meanwhile the entry is compiled."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from planted_kernels import PRINTED, KernelPrograms

from kernels.cpu import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="needs a C++ compiler")

#: What a processor without products of bf16 does under autocast is another matter: the kernel refuses it by name.
_CAN_CAST = "avx512_bf16" in build.cpu_flags().split()
_CASTS = pytest.mark.skipif(not _CAN_CAST, reason="needs products of bf16")
#: Makes one call of a module, and prints what it would have compiled: of the kernel the part, of others the name.
FIRST_CALL = """
import os
import torch
from kernels import LSTM
asked = []
def compiled(command, folder, stem):
    asked.extend(word for word in (*command, stem.partition("-")[0]) if word == "entry" or word.startswith("-DPART="))
    if stem.startswith("entry"):
        raise build.BuildError("planted")
    return Path(os.environ["WHOLE"])
build._compile = compiled
dtype = {dtype}
module = LSTM(3, 4, dtype=dtype, **{options})
with torch.set_grad_enabled({training}), torch.autocast("cpu", torch.bfloat16, enabled={autocast}):
    try:
        module(torch.randn(2, 5, 3, dtype=dtype))
    except (ValueError, RuntimeError):  # the whole kernel at hand may be without such instructions
        pass
print(*sorted(set(asked)))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that serves in place of any part."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQ2SEQ_KERNEL_CACHE", str(tmp_path_factory.mktemp("whole")))
        return build.compiled(build.command(build.SOURCE.name, "-O0"))


def _kept(storage: str) -> dict[str, str]:
    return {"options": repr({"implementation": "cpu-fused", "weight_storage": storage})}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({}, "-DPART=0 entry"),
        ({"training": "True"}, "-DPART=0 entry"),
        (_kept("int8"), "-DPART=2 entry"),
        (_kept("w8a8"), "-DPART=5 entry"),
        pytest.param({"autocast": "True"}, "-DPART=1 entry", marks=_CASTS),
        pytest.param({"autocast": "True", "training": "True"}, "-DPART=4 entry", marks=_CASTS),
        *(({"autocast": "True", "training": text}, "-DPART=0 entry") for text in ("False", "True") if not _CAN_CAST),
        ({"dtype": "torch.float64"}, ""),
    ],
    ids=str,
)
def test_a_first_call_compiles_what_it_needs(
    case: dict[str, str], expected: str, whole: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """The part for weights kept so and the entry, not more; nothing where the kernel cannot serve the call."""
    code = FIRST_CALL
    plain = {"options": "{}", "training": "False", "autocast": "False", "dtype": "torch.float32"}
    for name, text in (plain | case).items():
        code = code.replace(f"{{{name}}}", text)
    ended = programs.run(code, tmp_path, cache=tmp_path / "cache", WHOLE=str(whole))
    assert (ended, (tmp_path / PRINTED).read_text(encoding="utf-8").strip()) == (0, expected)


def test_a_part_serves_its_own_weights_alone(tmp_path: Path, programs: KernelPrograms) -> None:
    """It refuses others, and says so, in place of multiplying them in another way."""
    code = (
        "import ctypes\n"
        "native = build.library('-O0 -DPART=0')\n"
        "values = (ctypes.c_float * 1024)()\n"
        "assert native.pack_forward(values, values, None, 4, 4, 0) == build.DONE\n"
        "try:\n"
        "    native.pack_forward(values, values, None, 4, 4, 1)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert programs.run(code, tmp_path, cache=tmp_path / "cache") == 0
    said = (tmp_path / PRINTED).read_text(encoding="utf-8")
    assert said.endswith("weights kept so are multiplied by another part of the kernel\n")


#: Begins a program in which one part, `FAILS`, cannot be compiled, and another library serves in place of the others.
ONE_FAILS = """
import os
import torch
from kernels import LSTM
from kernels.cpu import fused
def compiled(command, folder, stem):
    if f"-DPART={os.environ['FAILS']}" in command:
        raise build.BuildError("planted")
    if stem.startswith("lstm"):
        return Path(os.environ["WHOLE"])
    raise build.BuildError("no entry")
build._compile = compiled
fused.storage_hindrance = lambda storage: None  # the library at hand may be without such instructions
x = torch.randn(2, 5, 3)
autocast = torch.autocast("cpu", torch.bfloat16, enabled=os.environ["CASTS"] == "1")
"""
#: Another part is there, if asked for, when `auto` is asked; then the kernel by its name.
FALLS_BACK = """
if {loaded}:
    build.library(kept=5)
    assert build.loaded()
with torch.set_grad_enabled(os.environ["SAVES"] == "1"), autocast:
    module = LSTM(3, 4, implementation="auto")
    if {storage!r} == "fp32":
        module(x)
        assert module.choices[0].implementation != "cpu-fused", module.choices
        assert module.choices[0].refused["cpu-fused"] == "planted", dict(module.choices[0].refused)
    try:
        LSTM(3, 4, implementation="cpu-fused", weight_storage={storage!r})(x)
    except ValueError as error:
        assert "cannot serve: planted" in str(error), error
        assert ("with weight_storage='fp32'" in str(error)) == ({storage!r} != "fp32"), error
    else:
        raise AssertionError("it ran")
"""


@pytest.mark.parametrize("loaded", [False, True], ids=["first", "after another"])
@pytest.mark.parametrize(
    "case",
    [  # the part that fails, whether autocast is on, whether gradients are needed, weight_storage
        (0, False, False, "fp32"),
        (0, False, True, "fp32"),
        pytest.param((1, True, False, "fp32"), marks=_CASTS),
        pytest.param((4, True, True, "fp32"), marks=_CASTS),
        (1, False, False, "bf16"),
        (2, False, False, "int8"),
    ],
    ids=["inference", "training", "autocast", "autocast training", "bf16", "int8"],
)
def test_a_part_that_cannot_be_built_is_a_reason(
    case: tuple[int, bool, bool, str], loaded: bool, whole: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """`auto` takes another way and says why; what was asked for by name raises that; be another part there or not."""
    fails, casts, saves, storage = case
    code = ONE_FAILS + FALLS_BACK.replace("{loaded}", str(loaded)).replace("{storage!r}", repr(storage))
    set_ = {"WHOLE": str(whole), "FAILS": str(fails), "CASTS": str(int(casts)), "SAVES": str(int(saves))}
    assert programs.run(code, tmp_path, cache=tmp_path / "cache", **set_) == 0


#: With another part there, a variant says why its own is not; without the failure it compiles that one and no other.
SAYS_WHY = """
from seq2seq.execution.variants import VARIANTS
from kernels.cpu import decoder, shortlist
library = build.library
def asking(*arguments, kept=None):
    asked.add(kept)
    return library(*arguments, kept=kept)
asked = set()
library(kept=5 if os.environ["FAILS"] != "5" else 2)
fused.library = build.library = asking
decoder.library = shortlist.library = lambda: None
print(VARIANTS[os.environ["VARIANT"]].builds(os.environ["MODE"]))
print(*sorted(kept for kept in asked if kept is not None))
"""


@pytest.mark.parametrize(
    ("variant", "mode", "part"),
    [
        ("cpu-fused", "inference", 0),
        ("cpu-fused", "training", 0),
        ("cpu-fused-bf16", "inference", 1),
        ("cpu-fused-int8", "inference", 2),
        ("cpu-fused-split", "inference", 3),
        ("cpu-fused-w8a8", "inference", 5),
        ("cpu-fused-amp", "inference", 1),
        ("cpu-fused-amp", "training", 4),
        ("cpu-fused-head", "decode", 0),
        ("cpu-fused-int8-head", "decode", 2),
    ],
)
@pytest.mark.parametrize("fails", [False, True], ids=["built", "failing"])
def test_a_variant_is_unavailable_without_its_own_part(
    variant: str, mode: str, part: int, fails: bool, whole: Path, tmp_path: Path, programs: KernelPrograms
) -> None:
    """With the compiler's words; whatever part another variant had compiled in that process before."""
    set_ = {"WHOLE": str(whole), "FAILS": str(part if fails else -1), "CASTS": "0", "VARIANT": variant, "MODE": mode}
    ended = programs.run(ONE_FAILS + SAYS_WHY, tmp_path, cache=tmp_path / "cache", **set_)
    said = (tmp_path / PRINTED).read_text(encoding="utf-8").split("\n")
    assert (ended, said[:2]) == (0, ["planted" if fails else "None", str(part)])


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, float]]:
    """A made-up record of what a process compiled and when."""
    found: dict[str, tuple[float, float]] = {}
    monkeypatch.setattr(build, "_spent", found)
    monkeypatch.setattr(build, "_asked", {"a", "b", "c"})
    return found


def test_time_that_two_compilers_ran_at_once_is_waited_for_once(account: dict[str, tuple[float, float]]) -> None:
    """A user waits from the first start to the last end, less what lies between."""
    account |= {"a": (1.0, 6.0), "b": (1.5, 4.0), "c": (10.0, 12.0)}
    assert build.spent_s() == pytest.approx(7.0)
    assert build.spent() == {"a": 5.0, "b": 2.5, "c": 2.0}


@pytest.mark.parametrize(
    ("own", "cores", "expected"),
    [
        ({}, 1, 8.0),
        ({}, 2, 5.0),
        # This process has compiled one of them, and waited for it.
        ({"a": (0.0, 5.0)}, 2, 0.0),
        ({"a": (0.0, 5.0)}, 1, 3.0),
    ],
)
def test_what_was_found_compiled_counts_as_a_user_waits_for_it(
    account: dict[str, tuple[float, float]], own: dict[str, tuple[float, float]], cores: int, expected: float
) -> None:
    """Side by side on the cores that there are, and without libraries that this process never asked for."""
    account |= own
    assert build.saved_s({"a": 5.0, "b": 3.0, "of another case": 60.0}, cores) == pytest.approx(expected)


def test_jobs_run_beside_each_other() -> None:
    """Each waits for the other, which only jobs at the same time can; one that fails stops none."""
    both = threading.Barrier(2, timeout=10)
    done = []

    def failing() -> None:
        both.wait()
        raise build.BuildError

    def job() -> None:
        both.wait()
        done.append(1)

    build.beside(failing, job)
    build.beside(job, failing)
    assert done == [1, 1]
