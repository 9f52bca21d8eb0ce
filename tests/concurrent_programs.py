"""Triton's interpreter with all programs of a launch running at once: `with concurrent(seed) as report:`.

The interpreter runs the programs of a grid one after another, so programs that wait for each other inside a launch
never end there. Here each program is a thread. One of them runs at a time, and which one may change at every load,
store and atomic, by a random generator: one seed gives one run. What a GPU may do beyond that is played as well:

- Races are found by happens-before, with vector clocks: an access without volatile or an atomic needs a release of the
  other program that was acquired in between, whether or not this run went wrong for want of it.
- Memory is weak: a load gives, element by element, any value that the program cannot know to be overwritten, and never
  an older one than it has read there before.
- Programs that wait for what none of them will write are found at once, without a timeout.
- An address outside the arguments' memory is an error.

A program is one thread, so `tl.debug_barrier` does nothing, and what the compiler moves cannot be seen.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

#: Bytes of memory that one entry of the shadow arrays stands for: no kernel here has narrower elements.
GRAIN = 2
#: Rounds in which every program that is left reads again and nothing is written, before they count as stuck.
PATIENCE = 8
#: Races that a report keeps.
KEPT_RACES = 20


class DeadlockError(RuntimeError):
    """All programs that are left wait for what none of them will write."""


class OutsideError(RuntimeError):
    """An address that lies in no argument's memory."""


class _Ended(BaseException):
    """Unwinds a program after another one failed."""


@dataclass
class Report:
    """Events in the launches under one `concurrent`.

    Attributes:
        programs: programs of all launches.
        switches: how often another program went on.
        stale: elements that a load gave although a newer value had been stored.
        races: pairs of accesses that nothing orders, in words; the first `KEPT_RACES`.
    """

    programs: int = 0
    switches: int = 0
    stale: int = 0
    races: list[str] = field(default_factory=list)


@contextlib.contextmanager
def concurrent(seed: int = 0) -> Iterator[Report]:
    """Run the programs of every interpreted launch at once.

    Args:
        seed: of all that is random: the order of programs, and how old a value a load gives.
    """
    report, source = Report(), random.Random(seed)

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            accepted = inspect.getfullargspec(self.fn).args
            named = {name: value for name, value in kwargs.items() if name in accepted}
            given = inspect.getcallargs(self.fn, *args, **named)
            with _language_patched_once(self.fn):
                values = {
                    name: value if name in self.constexprs else interpreter._implicit_cvt(value)
                    for name, value in given.items()
                }
                sizes = tuple(self.grid(values) if callable(self.grid) else self.grid)
                sizes = sizes + (1,) * (3 - len(sizes))
                interpreter.interpreter_builder.set_grid_dim(*sizes)
                tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
                generator = random.Random(source.getrandbits(64))
                _Launch(lambda: self.fn(**values), list(np.ndindex(*sizes)), tensors, generator, report).run()

    original, interpreter.GridExecutor = interpreter.GridExecutor, Executor
    try:
        yield report
    finally:
        interpreter.GridExecutor = original


@contextlib.contextmanager
def _language_patched_once(kernel: Any) -> Iterator[None]:
    """Have the interpreter patch `tl` once a module, where it does at every call of a device function."""
    patch, scopes = interpreter._patch_lang, {}

    def once(function: Any) -> Any:
        module = id(function.__globals__)
        if module not in scopes:
            scopes[module] = patch(function)
        return scopes[module]

    interpreter._patch_lang = once
    once(kernel)
    try:
        yield
    finally:
        interpreter._patch_lang = patch
        for scope in reversed(scopes.values()):
            scope.restore()


@dataclass
class _Program:
    """A program: its thread's turn, and what it knows of the others.

    Attributes:
        known: of each program, the newest of its periods whose accesses happened before what this one does next. A
            period ends with a release; its own entry is the one that it is in.
        newest_read: of each address, the newest version that it has read.
        repeated: loads since memory last changed, how often each: what is read again and again is waited for.
        eager: how readily it is chosen to go on.
    """

    index: int
    place: tuple[int, ...]
    known: np.ndarray
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    newest_read: dict[int, int] = field(default_factory=dict)
    repeated: dict[bytes, int] = field(default_factory=dict)
    changes_seen: int = -1
    waits: bool = False
    done: bool = False
    eager: float = 1.0


@dataclass
class _Version:
    """A value that an address had: who wrote it in which period, and what an acquire of it comes to know."""

    value: Any
    writer: int
    period: int
    carried: np.ndarray | None = None


class _Memory:
    """The arguments' memory: where an address lies, and who last wrote and read it in which of its periods."""

    def __init__(self, tensors: dict[str, Tensor], programs: int) -> None:
        parts: dict[int, tuple[int, str, Tensor]] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                parts.setdefault(storage.data_ptr(), (storage.nbytes(), name, tensor))
        begins = sorted(parts)
        sizes = [-(-parts[begin][0] // GRAIN) for begin in begins]
        self.begins = np.array(begins, np.uint64)
        self.ends = np.array([begin + parts[begin][0] for begin in begins], np.uint64)
        self.owners = [parts[begin][1:] for begin in begins]
        self.firsts = np.cumsum([0, *sizes], dtype=np.int64)
        count = int(self.firsts[-1])
        self.writer = np.full(count, -1, np.int64)
        self.written = np.zeros(count, np.int64)
        self.read = np.zeros((programs, count), np.int64)

    def grains(self, addresses: np.ndarray, size: int, place: tuple[int, ...]) -> np.ndarray:
        """Indices into the shadow arrays, of the first bytes of elements of a size."""
        part = np.searchsorted(self.begins, addresses, "right").astype(np.int64) - 1
        outside = (part < 0) | (addresses + np.uint64(size) > self.ends[np.maximum(part, 0)])
        if outside.any():
            msg = f"program {place}: {int(outside.sum())} addresses outside all arguments"
            raise OutsideError(msg)
        return self.firsts[part] + ((addresses - self.begins[part]) // GRAIN).astype(np.int64)

    def named(self, grain: int) -> str:
        """The element that an index belongs to, in words."""
        part = int(np.searchsorted(self.firsts, grain, "right")) - 1
        name, tensor = self.owners[part]
        return f"{name}, element {(grain - int(self.firsts[part])) * GRAIN // tensor.element_size()} of its memory"


class _Launch:
    """One launch: its programs, whose turn it is, and the memory that they share."""

    def __init__(
        self,
        body: Callable[[], None],
        places: list[tuple[int, ...]],
        tensors: dict[str, Tensor],
        generator: random.Random,
        report: Report,
    ) -> None:
        self.body, self.random, self.report = body, generator, report
        self.programs = []
        for index, place in enumerate(places):
            known = np.zeros(len(places), np.int64)
            known[index] = 1
            self.programs.append(_Program(index, place, known))
        self.memory = _Memory(tensors, len(places))
        self.versions: dict[int, list[_Version]] = {}
        self.current = self.programs[0]
        self.changes = self.idle_rounds = self.choices = 0
        self.failure: BaseException | None = None
        self.over = threading.Event()
        # Some launches change programs at nearly every access and some seldom; in some, memory is slow.
        self.restless = generator.choice((1.0, 0.5, 0.1))
        self.slow = generator.choice((0.2, 0.5, 0.9))
        report.programs += len(places)

    def run(self) -> None:
        """Run all programs to their end; raise what one of them raised."""
        threads = [threading.Thread(target=self._thread, args=(one,), daemon=True) for one in self.programs]
        builder = interpreter.interpreter_builder
        hooks = {
            "create_masked_load": self._load,
            "create_masked_store": self._store,
            "create_atomic_rmw": self._atomic,
        }
        for name, hook in hooks.items():
            setattr(builder, name, hook)
        try:
            for thread in threads:
                thread.start()
            self._next().turn.release()
            self.over.wait()
            for thread in threads:
                thread.join()
        finally:
            for name in hooks:
                delattr(builder, name)
        if self.failure is not None:
            raise self.failure

    # Whose turn it is

    def _thread(self, program: _Program) -> None:
        program.turn.acquire()
        try:
            if self.failure is None:
                self._enter(program)
                self.body()
        except _Ended:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by `run`
            self.failure = self.failure or _root(error)
        program.done = True
        left = [one for one in self.programs if not one.done]
        if not left:
            self.over.set()
            return
        following = left[0]
        if self.failure is None:
            try:
                following = self._next()
            except DeadlockError as error:
                self.failure = error
        following.turn.release()

    def _enter(self, program: _Program) -> None:
        self.current = program
        interpreter.interpreter_builder.set_grid_idx(*program.place)

    def _next(self) -> _Program:
        """The program that goes on, one of those that do not wait."""
        left = [one for one in self.programs if not one.done]
        ready = [one for one in left if not one.waits or one.changes_seen != self.changes]
        if not ready:
            self.idle_rounds += 1
            if self.idle_rounds > PATIENCE:
                msg = f"programs {', '.join(str(one.index) for one in left)} wait for what none of them will write"
                raise DeadlockError(msg)
            for one in left:
                one.waits = False
            ready = left
        if self.choices % 64 == 0:
            for one in self.programs:
                one.eager = 10 ** self.random.uniform(-2, 0)
        self.choices += 1
        return self.random.choices(ready, [one.eager for one in ready])[0]

    def _yield(self, *, waits: bool = False) -> None:
        """Let another program go on, perhaps, before the access that comes; certainly where this one waits."""
        program = self.current
        program.waits = waits
        if not waits and self.random.random() >= self.restless:
            return
        following = self._next()
        if following is program:
            return
        self.report.switches += 1
        following.turn.release()
        program.turn.acquire()
        if self.failure is not None:
            raise _Ended
        self._enter(program)

    def _times_read(self, addresses: np.ndarray) -> int:
        """Count how often the program read these addresses since memory changed; loads of nothing wait for nothing."""
        program = self.current
        if program.changes_seen != self.changes:
            program.changes_seen = self.changes
            program.repeated.clear()
        return program.repeated.get(addresses.tobytes(), 0) if len(addresses) else 0

    def _about_to_read(self, addresses: np.ndarray) -> bool:
        """Yield, count the load, and return whether it was made before: it then gives the newest values."""
        self._yield(waits=self._times_read(addresses) > 1)
        before = self._times_read(addresses)
        self.current.repeated[addresses.tobytes()] = before + 1
        return before > 0

    def _changed(self) -> None:
        self.changes += 1
        self.idle_rounds = 0

    # What memory gives

    def _load(
        self, pointers: Any, mask: Any, other: Any, _cache: Any = None, _eviction: Any = None, volatile: bool = False
    ) -> Any:
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        active = _active(mask.data, pointers.data.shape)
        addresses = pointers.data[active]
        repeated = self._about_to_read(addresses)
        program, grains = self.current, self.memory.grains(addresses, dtype.itemsize, self.current.place)
        absent = np.zeros(pointers.data.shape, dtype) if other is None else other.data
        result = interpreter._interpreter.load(pointers.data, mask.data, absent, dtype)
        unordered = self._unordered_writes(grains)
        if not volatile:
            self._race("reads what was written by", grains, unordered, self.memory.writer[grains])
            self.memory.read[program.index, grains] = program.known[program.index]
        values = result[active]
        for index in np.flatnonzero(unordered):
            values[index] = self._version(int(addresses[index]), newest=repeated).value
        result[active] = values
        return interpreter.TensorHandle(result, element)

    def _store(self, pointers: Any, value: Any, mask: Any, _cache: Any = None, _eviction: Any = None) -> None:
        self._yield()
        program, memory = self.current, self.memory
        active = _active(mask.data, pointers.data.shape)
        addresses, dtype = pointers.data[active], value.data.dtype
        if not len(addresses):
            return
        grains = memory.grains(addresses, dtype.itemsize, program.place)
        self._race("writes what was written by", grains, self._unordered_writes(grains), memory.writer[grains])
        for reader in self.programs:
            if reader is not program:
                unordered = memory.read[reader.index, grains] > program.known[reader.index]
                self._race("writes what was read by", grains, unordered, np.full(len(grains), reader.index))
        absent = np.zeros(pointers.data.shape, dtype)
        before = interpreter._interpreter.load(pointers.data, active, absent, dtype)[active]
        after = np.broadcast_to(value.data, pointers.data.shape)[active]
        for old, new, address in zip(before, after, addresses.tolist(), strict=True):
            self._append(address, old, new)
        interpreter._interpreter.store(pointers.data, value.data, mask.data)
        self._wrote(grains)

    def _atomic(self, kind: Any, pointers: Any, value: Any, mask: Any, order: Any, _scope: Any) -> Any:
        builder, native = interpreter.interpreter_builder, interpreter._interpreter
        active = _active(mask.data, pointers.data.shape)
        addresses = pointers.data[active].tolist()
        acquires = order.name in {"ACQUIRE", "ACQUIRE_RELEASE"}
        releases = order.name in {"RELEASE", "ACQUIRE_RELEASE"}
        # Triton compiles an addition of zero to a load.
        kinds = interpreter._ir.ATOMIC_OP
        reads = kind in {kinds.ADD, kinds.FADD} and not value.data.any()
        repeated = False
        if reads:
            repeated = self._about_to_read(pointers.data[active])
        else:
            self._yield()
        program, dtype = self.current, value.data.dtype
        grains = self.memory.grains(pointers.data[active], dtype.itemsize, program.place)
        absent = np.zeros(pointers.data.shape, dtype)
        result = native.load(pointers.data, active, absent, dtype)
        if reads:
            values = result[active]
            for index, address in enumerate(addresses):
                if address in self.versions:
                    version = self._version(address, newest=repeated)
                    values[index] = version.value
                    if acquires:
                        self._learn(version.carried)
            result[active] = values
            return interpreter.TensorHandle(result, value.dtype.scalar)
        native.atomic_rmw(
            builder.ir_rmw_op_to_interpreter_rmw_op[kind],
            pointers.data,
            value.data,
            mask.data,
            builder.ir_sem_to_interpreter_sem[order],
        )
        after = native.load(pointers.data, active, absent, dtype)
        for old, new, address in zip(result[active], after[active], addresses, strict=True):
            # An atomic carries on what the value that it changes carried, and adds what it releases itself.
            carried = self.versions[address][-1].carried if address in self.versions else None
            if acquires:
                self._learn(carried)
            if releases:
                carried = program.known.copy() if carried is None else np.maximum(carried, program.known)
            self._append(address, old, new, carried)
            program.newest_read[address] = len(self.versions[address]) - 1
        self._wrote(grains)
        if releases:
            program.known[program.index] += 1
        return interpreter.TensorHandle(result, value.dtype.scalar)

    def _learn(self, carried: np.ndarray | None) -> None:
        if carried is not None:
            np.maximum(self.current.known, carried, out=self.current.known)

    def _append(self, address: int, old: Any, new: Any, carried: np.ndarray | None = None) -> None:
        """Note a new value of an address; what it held before the launch is its first version."""
        program = self.current
        versions = self.versions.setdefault(address, [_Version(old, program.index, 0)])
        versions.append(_Version(new, program.index, int(program.known[program.index]), carried))

    def _wrote(self, grains: np.ndarray) -> None:
        program = self.current
        self.memory.writer[grains] = program.index
        self.memory.written[grains] = program.known[program.index]
        self._changed()

    def _version(self, address: int, *, newest: bool) -> _Version:
        """Value of a load by the current program: the newest one, or one not known to be overwritten."""
        program, versions = self.current, self.versions[address]
        last = chosen = len(versions) - 1
        if not newest and self.random.random() < self.slow:
            first = last
            while first and not self._knows(versions[first]):
                first -= 1
            chosen = self.random.randint(max(first, program.newest_read.get(address, 0)), last)
        program.newest_read[address] = chosen
        self.report.stale += chosen < last
        return versions[chosen]

    def _knows(self, version: _Version) -> bool:
        return version.writer == self.current.index or version.period <= self.current.known[version.writer]

    def _unordered_writes(self, grains: np.ndarray) -> np.ndarray:
        """Mask of places where another program's last write is not known to have happened before."""
        program, writer = self.current, self.memory.writer[grains]
        others = (writer >= 0) & (writer != program.index)
        return others & (self.memory.written[grains] > program.known[np.maximum(writer, 0)])

    def _race(self, what: str, grains: np.ndarray, unordered: np.ndarray, others: np.ndarray) -> None:
        if unordered.any() and len(self.report.races) < KEPT_RACES:
            element, other = self.memory.named(int(grains[unordered][0])), int(others[unordered][0])
            self.report.races.append(f"program {self.current.index} {what} program {other}, unordered: {element}")


def _active(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(mask, shape), dtype=bool)


def _root(error: BaseException) -> BaseException:
    """Find the first error: the interpreter wraps an error at each call of a device function."""
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error
