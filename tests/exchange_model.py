"""Every run of a small exchange under a memory model as weak as PTX's: `explore(programs, memory)`.

Programs hand values to each other by a counter or by the values themselves, as `kernels.gpu.grid_exchange` does. Each
interleaving, and each value that a load may give, is tried; a wrong value that is used and a state that nothing leaves
are what to find. The model has views (Kang et al., "A promising semantics", POPL 2017, without promises):

- An address keeps all values ever stored there. A thread's view says of each address how old a value may still be.
- A release attaches its thread's view to the value; an acquire that reads the value takes the view over. An atomic
  carries on what the value that it changes carried. A fence (fence.acq_rel) makes earlier relaxed loads acquire and
  later relaxed stores release.
- At a block's barrier (bar.sync) all threads of a program come to know what any of them knew.
- A weak load does not keep a later one from giving an older value of the same address, unless `coherent`.

A loop that waits is one step, possible where a value that ends it can be read. That a newest value becomes visible some
time is assumed. A load never gives what is stored later, and sizes do not mix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

View = tuple[int, ...]
Test = Callable[[Any], bool]


class Store(NamedTuple):
    """Store a value; `order` is weak, relaxed or release."""

    address: Hashable
    value: Any
    order: str = "weak"


class Add(NamedTuple):
    """Add one atomically; `order` is relaxed or release."""

    address: Hashable
    order: str = "relaxed"


class Wanted(NamedTuple):
    """An element that is read: what it is waited for, if it is, and what it has to be once it is used."""

    address: Hashable
    passes: Test | None = None
    right: Any = None


class Read(NamedTuple):
    """Wait until all elements pass, then use them; `order` is weak, relaxed or acquire."""

    wanted: tuple[Wanted, ...]
    order: str = "weak"


class Fence(NamedTuple):
    """fence.acq_rel."""


class Barrier(NamedTuple):
    """bar.sync of the program's threads."""


class Thread(NamedTuple):
    """A thread between two steps: where it is, what it knows, what a fence would add, what its relaxed stores carry."""

    at: int
    view: View
    seen: View
    carries: View


@dataclass(frozen=True)
class Verdict:
    """Result of a search: how many states were seen, and what went wrong in one of them; None if nothing can."""

    states: int
    wrong: str | None


def explore(programs: list[list[list[Any]]], memory: dict[Any, Any], *, coherent: bool = False) -> Verdict:
    """Try every run.

    Args:
        programs: of each program, of each of its threads, its steps.
        memory: what each address holds at first.
        coherent: whether two weak loads of one address by one thread are ordered.
    """
    search = _Search(programs, list(memory), coherent=coherent)
    nothing = (0,) * len(memory)
    first = (
        tuple(Thread(0, nothing, nothing, nothing) for _ in search.code),
        tuple(((value, None),) for value in memory.values()),
    )
    seen, left = {first}, [first]
    while left:
        state = left.pop()
        try:
            following = list(search.steps(*state))
        except _WrongValueError as error:
            return Verdict(len(seen), str(error))
        threads = state[0]
        if not following and any(one.at < len(code) for one, code in zip(threads, search.code, strict=True)):
            return Verdict(len(seen), "nothing can go on")
        for one in following:
            if one not in seen:
                seen.add(one)
                left.append(one)
    return Verdict(len(seen), None)


class _WrongValueError(Exception):
    """A value was used that is not the one that was meant."""


def _joined(*views: View) -> View:
    return tuple(map(max, zip(*views, strict=True)))


def _replaced(values: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*values[:index], value, *values[index + 1 :])


class _Search:
    """The steps that a state allows."""

    def __init__(self, programs: list[list[list[Any]]], addresses: list[Any], *, coherent: bool) -> None:
        self.code = [code for threads in programs for code in threads]
        self.program = [index for index, threads in enumerate(programs) for _ in threads]
        self.place = {address: index for index, address in enumerate(addresses)}
        self.coherent = coherent

    def steps(self, threads: tuple[Thread, ...], memory: tuple[Any, ...]) -> Iterator[Any]:
        """All states one step further."""
        for index, thread in enumerate(threads):
            if thread.at == len(self.code[index]):
                continue
            step = self.code[index][thread.at]
            if isinstance(step, Barrier):
                yield from self._barrier(index, threads, memory)
                continue
            for after, then in self._step(step, thread, memory):
                yield _replaced(threads, index, after), then

    def _step(self, step: Any, thread: Thread, memory: tuple[Any, ...]) -> Iterator[tuple[Thread, tuple[Any, ...]]]:
        following = thread._replace(at=thread.at + 1)
        if isinstance(step, Fence):
            view = _joined(thread.view, thread.seen)
            yield following._replace(view=view, carries=view), memory
        elif isinstance(step, Read):
            for after, stays in self._reads(step, thread, memory):
                yield after if stays else after._replace(at=thread.at + 1), memory
        else:
            place = self.place[step.address]
            value, before = memory[place][-1]
            view = _replaced(thread.view, place, len(memory[place]))
            carried = {"release": view, "relaxed": thread.carries, "weak": None}[step.order]
            if isinstance(step, Add):
                carried = carried if before is None else _joined(carried, before)
                new = value + 1
            else:
                new = step.value
            yield following._replace(view=view), _replaced(memory, place, (*memory[place], (new, carried)))

    def _reads(self, step: Read, thread: Thread, memory: tuple[Any, ...]) -> Iterator[tuple[Thread, bool]]:
        """The thread after the read, and whether it still stands before it."""
        options = []
        for address, passes, _ in step.wanted:
            place = self.place[address]
            versions = range(thread.view[place], len(memory[place]))
            fitting = [v for v in versions if passes is None or passes(memory[place][v][0])]
            options.append(fitting)
            # The newest value may be all that is left to read; who waits for an overwritten one is then stuck.
            if passes is not None and fitting and not passes(memory[place][-1][0]):
                yield thread._replace(view=_replaced(thread.view, place, len(memory[place]) - 1)), True
        for chosen in itertools.product(*options):
            view, seen = thread.view, thread.seen
            for (address, _, right), version in zip(step.wanted, chosen, strict=True):
                place = self.place[address]
                value, carried = memory[place][version]
                if right is not None and value != right:
                    msg = f"{right} is read as {value}"
                    raise _WrongValueError(msg)
                if self.coherent or step.order == "acquire":
                    view = _replaced(view, place, max(view[place], version))
                if carried is not None and step.order == "acquire":
                    view = _joined(view, carried)
                elif carried is not None and step.order == "relaxed":
                    seen = _joined(seen, carried)
            yield thread._replace(view=view, seen=seen), False

    def _barrier(self, index: int, threads: tuple[Thread, ...], memory: tuple[Any, ...]) -> Iterator[Any]:
        mates = [other for other, program in enumerate(self.program) if program == self.program[index]]
        waiting = (
            threads[mate].at < len(self.code[mate]) and isinstance(self.code[mate][threads[mate].at], Barrier)
            for mate in mates
        )
        if index != mates[0] or not all(waiting):
            return
        view = _joined(*(threads[mate].view for mate in mates))
        after = list(threads)
        for mate in mates:
            after[mate] = threads[mate]._replace(at=threads[mate].at + 1, view=view)
        yield tuple(after), memory
