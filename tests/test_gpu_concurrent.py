"""Kernels whose programs wait for each other, with all programs at once: right ones pass, planted faults are seen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Any

import changed_module
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("hypothesis")
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import assert_close
from strategies import SEEDS

from kernels.gpu import grid_exchange as exchange
from kernels.gpu import persistent, persistent_backward, persistent_forward
from kernels.gpu.persistent import PersistentConfig
from kernels.tools.problems import Sizes, errors_backward, errors_forward

if torch.cuda.is_available():
    pytest.skip("it replaces Triton's interpreter, which a visible GPU keeps out", allow_module_level=True)
from concurrent_programs import DeadlockError, OutsideError, concurrent

BARRIER, POLL = PersistentConfig(8, 8, 64, 1, 4, "barrier", 4), PersistentConfig(8, 8, 32, 2, 2, "poll", 4)
CONFIGS = {"barrier": BARRIER, "poll": POLL}
ERRORS = {"forward": errors_forward, "backward": errors_backward}
SMALL = Sizes(batch=3, steps=3, hidden=12, directions=2, lengths=(3, 1, 2))
SOURCES = Path(exchange.__file__).parent


@pytest.fixture(autouse=True)
def _all_at_once(monkeypatch):
    """One launch for all steps, as on a GPU, and not a launch per step as for the interpreter alone."""
    monkeypatch.setattr(persistent, "_interpreted", lambda: False)


@triton.jit
def _message(p_data, p_flag, p_result, order_of_release: tl.constexpr, order_of_wait: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(p_data, 42)
        tl.atomic_add(p_flag, 1, sem=order_of_release)
    else:
        while tl.atomic_add(p_flag, 0, sem=order_of_wait) == 0:
            pass
        tl.store(p_result + tl.program_id(0), tl.load(p_data))


@triton.jit
def _waiting(p_flag):
    while tl.atomic_add(p_flag, 0, sem="acquire") < 3:
        pass
    tl.atomic_add(p_flag, 1)


@triton.jit
def _outside(p_data, at):
    tl.store(p_data, tl.load(p_data + at))


def message(release: str, acquire: str, seed: int) -> tuple[list[int], Any]:
    """Return what two readers got of a message, and the report."""
    data, flag, result = (torch.zeros(4, dtype=torch.int32) for _ in range(3))
    with concurrent(seed) as report:
        _message[3,](data, flag, result, release, acquire)
    return result[1:3].tolist(), report


@pytest.mark.parametrize(
    ("release", "acquire", "right"),
    [
        ("release", "acquire", True),
        ("acq_rel", "acq_rel", True),
        ("relaxed", "acquire", False),
        ("release", "relaxed", False),
        ("relaxed", "relaxed", False),
    ],
)
def test_a_message_needs_a_release_and_an_acquire(release, acquire, right):
    """With both it always arrives; without, the race is found in every run, and in some the old value is read."""
    runs = [message(release, acquire, seed) for seed in range(20)]
    assert all(bool(report.races) is not right for _, report in runs)
    assert all(got == [42, 42] for got, _ in runs) == right


def test_one_seed_is_one_run():
    """The same seed gives the same interleaving and the same values."""
    assert message("relaxed", "acquire", 5) == message("relaxed", "acquire", 5)
    assert len({str(message("relaxed", "relaxed", seed)) for seed in range(10)}) > 1


def test_a_wait_without_an_end_is_found():
    with concurrent(0), pytest.raises(DeadlockError, match="wait for what none of them will write"):
        _waiting[2,](torch.zeros(1, dtype=torch.int32))


def test_an_address_outside_is_found():
    with concurrent(0), pytest.raises(OutsideError, match="1 addresses outside"):
        _outside[1,](torch.zeros(4), 4000)


@pytest.mark.parametrize("phase", ERRORS)
@pytest.mark.parametrize("sync", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_right_with_all_programs_at_once(dtype, sync, phase):
    """Values are those of float64, no access is unordered, whatever waits ends."""
    with concurrent(1) as report:
        errors = ERRORS[phase](dataclasses.replace(SMALL, dtype=dtype), persistent, config=CONFIGS[sync])
    assert_close(errors, dtype)
    assert report.programs >= 4
    assert report.switches > 50
    assert report.stale > 0
    assert report.races == []


@settings(max_examples=6)
@given(data=st.data(), sync=st.sampled_from(sorted(CONFIGS)), phase=st.sampled_from(sorted(ERRORS)), seed=SEEDS)
def test_right_at_random_sizes_and_interleavings(data, sync, phase, seed):
    """Several tiles of the batch and of the hidden units, lengths from 0, states or none."""
    batch, steps = data.draw(st.integers(1, 10)), data.draw(st.integers(2, 4))
    lengths = data.draw(st.none() | st.tuples(*[st.integers(0, steps)] * batch))
    sizes = Sizes(
        batch, steps, data.draw(st.integers(5, 20)), data.draw(st.integers(1, 2)),
        lengths=lengths, state=data.draw(st.booleans()), seed=seed,
    )  # fmt: skip
    with concurrent(seed) as report:
        errors = ERRORS[phase](sizes, persistent, config=CONFIGS[sync])
    assert_close(errors, sizes.dtype)
    assert report.races == []


def absent_state(lengths: tuple[int, ...] | None) -> Any:
    """A recurrence whose first state has the bits that mean `not written yet`."""
    args = dataclasses.replace(SMALL, dtype=torch.float16, lengths=lengths).forward()
    args.h0.view(torch.int16)[:, 0] = exchange.ABSENT.value
    return args


@pytest.mark.parametrize("lengths", [None, (0, 3, 3)])
@pytest.mark.parametrize("sync", CONFIGS)
def test_a_state_that_looks_absent_keeps_nobody_waiting(sync, lengths):
    """NaN stays in its row, held past a length or read at the first step."""
    args = absent_state(lengths)
    with concurrent(2) as report:
        persistent.forward(args, CONFIGS[sync])
    assert args.h_n[:, 0].isnan().all()
    assert args.h_n[:, 1:].isfinite().all()
    assert report.races == []


def changed(name: str, folder: Path, changes: list[tuple[str, str]]) -> ModuleType:
    """A module of the kernels with its text changed, each place once at least."""
    text = (SOURCES / f"{name}.py").read_text(encoding="utf-8")
    for right, wrong in changes:
        assert right in text, right
        text = text.replace(right, wrong)
    path = folder / f"planted_{name}.py"
    path.write_text(text, encoding="utf-8")
    return changed_module.load(path, "kernels.gpu")


WAIT = {
    "forward": "wait(p_counters + group * 32, position * TILES)",
    "backward": "wait(p_counters + group * 32, turn * TILES)",
}
BEFORE = {"forward": "time + 1, time - 1)", "backward": "after = tl.where(direction == 1, time - 1, time + 1)"}
STORE = "        tl.store(p_exchange + o_exchange + o_h[None, :], present(b_h.to(BITS, bitcast=True)), mask=inside)\n"
ARRIVE = '        if SYNC == "barrier":\n            arrive(p_counters + group * 32)\n'
STORED = "        stored = inside & (turn < steps)\n"
POLLS = (
    "            while waits & missing(chunks):\n"
    "                chunks = load_rows(p_rows, inside, first, min(GROUP, CHUNKS - first), K, BLOCK_K, SPLIT, POLL)\n"
)
ZEROS = "torch.zeros(groups * COUNTER_STRIDE,"
FILLS = ("exchange.fill_(ABSENT.value)", "grad_gates.fill_(ABSENT.value)")


def own_step(text: str) -> str:
    """The row of the step itself, where that of the step before has to be read."""
    return "after = time" if "after" in text else "time, time)"


def two_steps_back(text: str) -> str:
    """The row of two steps before."""
    return text.replace("time + 1", "time + 2").replace("time - 1", "time - 2")


def both(places: dict[str, str], change: Any) -> dict[str, list[tuple[str, str]]]:
    """The same change in the forward and in the backward kernel."""
    return {phase: [(text, change(text))] for phase, text in places.items()}


#: Of each fault the exchange that has it, and what it changes in which module; `forward` and `backward` are kernels.
FAULTS: dict[str, tuple[str, dict[str, list[tuple[str, str]]]]] = {
    "arrival left out": (
        "barrier",
        {"grid_exchange": [('    tl.atomic_add(p_counter, 1, sem="release", scope="gpu")', "    pass")]},
    ),
    "wait left out": ("barrier", both(WAIT, lambda _: "pass")),
    "counter not reset": ("barrier", {"persistent": [(ZEROS, "torch.full((groups * COUNTER_STRIDE,), 10,")]}),
    "counter starts at one": ("barrier", {"persistent": [(ZEROS, "torch.full((groups * COUNTER_STRIDE,), 1,")]}),
    "waits for one too few": ("barrier", both(WAIT, lambda text: text[:-1] + " - 1)")),
    "waits for one too many": ("barrier", both(WAIT, lambda text: text[:-1] + " + 1)")),
    "waits for a step too few": (
        "barrier",
        both(WAIT, lambda text: text.replace("position *", "(position - 1) *").replace("turn *", "(turn - 1) *")),
    ),
    "arrives before the store": (
        "barrier",
        {
            "forward": [(STORE + ARRIVE, ARRIVE + STORE)],
            "backward": [(ARRIVE + "        turn += 1", "        turn += 1"), (STORED, STORED + ARRIVE)],
        },
    ),
    "release relaxed": ("barrier", {"grid_exchange": [('sem="release"', 'sem="relaxed"')]}),
    "acquire relaxed": ("barrier", {"grid_exchange": [('sem="acquire"', 'sem="relaxed"')]}),
    "release made an acquire": ("barrier", {"grid_exchange": [('sem="release"', 'sem="acquire"')]}),
    "one counter for all groups": (
        "barrier",
        both(dict.fromkeys(WAIT, "p_counters + group * 32"), lambda _: "p_counters"),
    ),
    "reads its own step": ("barrier", both(BEFORE, own_step)),
    "polls its own step": ("poll", both(BEFORE, own_step)),
    "polls a step too far back": ("poll", both(BEFORE, two_steps_back)),
    "polls once": ("poll", {"grid_exchange": [("while waits & missing(chunks):", "if waits & missing(chunks):")]}),
    "does not poll": ("poll", {"grid_exchange": [(POLLS, "            pass\n")]}),
    "all missing, not any": ("poll", {"grid_exchange": [("return tl.max(", "return tl.min(")]}),
    "load not volatile": ("poll", {"grid_exchange": [("other=0, volatile=True)", "other=0)")]}),
    "memory not filled": ("poll", {"persistent": [(text, "pass") for text in FILLS]}),
    "memory filled with zeros": ("poll", {"persistent": [(text, text.replace("ABSENT.value", "0")) for text in FILLS]}),
    "second step not waited for": (
        "poll",
        {
            "forward": [("in_rows, position > 0, M", "in_rows, position > 1, M")],
            "backward": [("in_rows, turn > 0, M", "in_rows, turn > 1, M")],
        },
    ),
}  # fmt: skip


def seen(
    phase: str,
    config: PersistentConfig,
    sizes: Sizes,
    changes: dict[str, list[tuple[str, str]]],
    folder: Path,
    seed: int = 0,
) -> list[str]:
    """Signs that kernels with these changes are wrong: races, numbers, an endless wait, an address outside."""
    host = changed("persistent", folder, changes.get("persistent", []))
    shared = changed("grid_exchange", folder, changes["grid_exchange"]) if "grid_exchange" in changes else exchange
    kernel = changed(f"persistent_{phase}", folder, changes.get(phase, []))
    for name in ("arrive", "wait", "product", "present"):
        setattr(kernel, name, getattr(shared, name))
    setattr(host, f"{phase}_kernel", getattr(kernel, f"{phase}_kernel"))
    host._interpreted = lambda: False
    with concurrent(seed) as report:
        try:
            assert_close(ERRORS[phase](sizes, host, config=config), torch.float32)
        except (AssertionError, DeadlockError, OutsideError) as error:
            return [str(error), *report.races]
    return report.races


PLANTED = Sizes(3, 4, 12, 2)


@pytest.mark.parametrize("phase", ERRORS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, phase, tmp_path):
    """One run is enough, whatever the fault."""
    sync, changes = FAULTS[fault]
    assert seen(phase, PersistentConfig(8, 8, 64, 1, 4, sync, 4), PLANTED, changes, tmp_path)


@pytest.mark.parametrize("phase", ERRORS)
@pytest.mark.parametrize("sync", CONFIGS)
def test_without_a_fault_nothing_is_seen(sync, phase, tmp_path):
    """The same copies of the same sources, unchanged."""
    assert not seen(phase, PersistentConfig(8, 8, 64, 1, 4, sync, 4), PLANTED, {}, tmp_path)


def test_a_chunk_that_is_not_looked_at_is_seen(tmp_path):
    """Of two chunks that are loaded together, both must have arrived."""
    first_alone = (
        "    for index in tl.static_range(1, len(chunks)):\n        b_absent = b_absent | (chunks[index] == ABSENT)\n"
    )
    changes = {"grid_exchange": [(first_alone, "")]}
    sizes = Sizes(3, 4, 64)
    assert not seen("forward", POLL, sizes, {}, tmp_path)
    assert any(seen("forward", POLL, sizes, changes, tmp_path, seed) for seed in range(3))


def test_without_the_other_nan_a_reader_would_wait_for_ever(monkeypatch):
    """`present` is what keeps a value that looks absent from being waited for."""
    monkeypatch.setattr(persistent_forward, "present", lambda bits: bits)
    with concurrent(2), pytest.raises(DeadlockError):
        persistent.forward(absent_state((0, 3, 3)), POLL)
    assert persistent_backward.present is exchange.present
