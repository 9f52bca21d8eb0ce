"""Exchange of h between programs, in every run that a weak memory allows: what is right, and the role of each part.

`barrier` and `poll` below are the protocols of `kernels.gpu.grid_exchange`, step for step; the rest are changes to
them.
"""

from __future__ import annotations

from typing import Any

import pytest
from exchange_model import Add, Barrier, Fence, Read, Store, Wanted, explore

ABSENT, OLD = "absent", "old"
Programs = tuple[list[list[list[Any]]], dict[Any, Any]]


def h(program: int, element: int, step: int) -> str:
    """The value that is right."""
    return f"h{step}[{program}.{element}]"


def barrier(  # noqa: PLR0913 - each is a change to the protocol
    count: int,
    steps: int,
    threads: int = 1,
    *,
    slots: int | None = None,
    release: str = "release",
    acquire: str = "acquire",
    arrives_together: bool = True,
    waits_together: bool = True,
    fences: bool = False,
    target: Any = None,
    early: bool = False,
    begin: int = 0,
) -> Programs:
    """A counter: store, `arrive`, `wait`, load; a thread an element, which loads all elements of the step before.

    Args:
        count: programs.
        steps: of the sequence.
        threads: of a program.
        slots: steps that memory is kept for, used in turn; a slot for each step when None, as in the kernels.
        release: order of the atomic in `arrive`.
        acquire: order of that in `wait`.
        arrives_together: whether `arrive` has its `tl.debug_barrier`.
        waits_together: whether `wait` has.
        fences: whether a fence stands before the one atomic and after the other.
        target: arrivals to wait for, of the step.
        early: whether it arrives before the store.
        begin: what the counter holds at the launch.
    """
    slots = slots or steps
    memory: dict[Any, Any] = {"counter": begin}
    memory |= {(slot, p, e): OLD for slot in range(slots) for p in range(count) for e in range(threads)}
    fence = [Fence()] if fences else []
    programs = []
    for program in range(count):
        codes = []
        for thread in range(threads):
            code: list[Any] = []
            for step in range(steps):
                least = step * count if target is None else target(step)
                if thread == 0:
                    code += [Read((Wanted("counter", lambda n, least=least: n >= least),), acquire), *fence]
                code += [Barrier()] if waits_together and threads > 1 else []
                if step:
                    before = (step - 1) % slots
                    code.append(
                        Read(
                            tuple(
                                Wanted((before, p, e), None, h(p, e, step - 1))
                                for p in range(count)
                                for e in range(threads)
                            )
                        )
                    )
                store = [Store((step % slots, program, thread), h(program, thread, step))]
                arrive: list[Any] = [Barrier()] if arrives_together and threads > 1 else []
                arrive += [*fence, Add("counter", release)] if thread == 0 else []
                code += arrive + store if early else store + arrive
            codes.append(code)
        programs.append(codes)
    return programs, memory


def poll(  # noqa: PLR0913 - each is a change to the protocol
    count: int,
    steps: int,
    elements: int = 1,
    *,
    slots: int | None = None,
    reset: bool = False,
    tested: str = "all",
    store: str = "weak",
    load: str = "relaxed",
    fences: str = "",
    numbered: bool = False,
    filled: bool = True,
) -> Programs:
    """The values themselves: memory is filled beforehand, and what is not there yet is loaded again.

    Args:
        count: programs.
        steps: of the sequence.
        elements: of a program, stored and loaded one by one.
        slots: as for `barrier`.
        reset: whether a program makes its part of step t - 2 absent again when it has read all of step t - 1.
        tested: whether `all` elements are, or the `last` of a program alone, or `none`.
        store: its order.
        load: its order; what Triton calls volatile is relaxed here.
        fences: `s` for one before the last store, `l` for one after the loads.
        numbered: whether a value carries its step's number, and is waited for by it.
        filled: whether memory is absent at the launch.
    """
    slots = slots or steps
    first = ABSENT if filled else OLD
    memory = {(slot, p, e): first for slot in range(slots) for p in range(count) for e in range(elements)}
    programs = []
    for program in range(count):
        code: list[Any] = []
        for step in range(steps):
            if step:
                asked, rest = [], []
                for p in range(count):
                    for e in range(elements):
                        right = h(p, e, step - 1)
                        waits: Any = (
                            (lambda got, right=right: got == right) if numbered else (lambda got: got != ABSENT)
                        )
                        looked_at = tested == "all" or (tested == "last" and e == elements - 1)
                        group = asked if looked_at else rest
                        group.append(Wanted(((step - 1) % slots, p, e), waits if looked_at else None, right))
                code += [Read(tuple(asked), load)] if asked else []
                code += [Fence()] if "l" in fences else []
                code += [Read(tuple(rest))] if rest else []
            if reset and step >= 2 and step - 2 + slots < steps:
                code += [Store(((step - 2) % slots, program, e), ABSENT) for e in range(elements)]
            for e in range(elements):
                code += [Fence()] if "s" in fences and e == elements - 1 else []
                code.append(Store((step % slots, program, e), h(program, e, step), store))
        programs.append([code])
    return programs, memory


RIGHT = {
    "barrier, 2 programs of 2 threads": barrier(2, 3, 2),
    "barrier, 3 programs": barrier(3, 3),
    "barrier, memory of two steps in turn": barrier(2, 4, slots=2),
    "barrier, relaxed atomics between fences": barrier(2, 3, 2, release="relaxed", acquire="relaxed", fences=True),
    "poll, 2 programs of 2 elements": poll(2, 3, 2),
    "poll, 3 programs": poll(3, 3),
    "poll, one element tested, its store a release and its load an acquire": poll(
        2, 2, 2, tested="last", store="release", load="acquire"
    ),
    "poll, one element tested, strong stores between fences": poll(
        2, 2, 2, tested="last", fences="sl", store="relaxed"
    ),
    "poll, three slots made absent again, a fence a step, strong stores": poll(
        2, 5, slots=3, reset=True, fences="s", store="relaxed"
    ),
    "poll, two slots in turn, values with their step's number": poll(2, 4, 2, slots=2, numbered=True),
}
WRONG = {
    "barrier, release relaxed": barrier(2, 2, release="relaxed"),
    "barrier, acquire relaxed": barrier(2, 2, acquire="relaxed"),
    "barrier, a volatile load for the acquire": barrier(2, 2, acquire="weak"),
    "barrier, one thread arrives before the others stored": barrier(2, 2, 2, arrives_together=False),
    "barrier, the others do not wait for the one thread": barrier(2, 2, 2, waits_together=False),
    "barrier, waits for one too few": barrier(2, 2, target=lambda step: max(0, 2 * step - 1)),
    "barrier, waits for one too many": barrier(2, 2, target=lambda step: 2 * step + (step > 0)),
    "barrier, counter not reset": barrier(2, 2, begin=4),
    "barrier, arrives before the store": barrier(2, 2, early=True),
    "barrier, memory of one step": barrier(2, 3, slots=1),
    "poll, memory not filled": poll(2, 2, filled=False),
    "poll, nothing tested": poll(2, 2, tested="none"),
    "poll, one element tested for all": poll(2, 2, 2, tested="last"),
    "poll, one element tested, a fence in the writer alone": poll(2, 2, 2, tested="last", fences="s", store="relaxed"),
    "poll, two slots in turn that stay filled": poll(2, 4, slots=2),
    "poll, two slots made absent again": poll(2, 4, slots=2, reset=True, store="release", load="acquire"),
    "poll, three slots made absent again, no fence": poll(2, 5, slots=3, reset=True),
    "poll, three slots made absent again, weak stores": poll(2, 5, slots=3, reset=True, fences="s"),
    "poll, one slot, values with their step's number": poll(2, 3, slots=1, numbered=True),
}


@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize("name", RIGHT)
def test_right_in_every_run(name, coherent):
    """No order of steps and no value that a load may give leads to a wrong value or to a wait without an end."""
    programs, memory = RIGHT[name]
    verdict = explore(programs, memory, coherent=coherent)
    assert verdict.wrong is None
    assert verdict.states > 20


@pytest.mark.parametrize("coherent", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_some_run_is_wrong(name, coherent):
    """Each part of the protocols is needed: without it a run exists that reads a wrong value or never ends."""
    programs, memory = WRONG[name]
    assert explore(programs, memory, coherent=coherent).wrong is not None
