"""A sequence's launches replayed as one CUDA graph, found again by the addresses of its tensors: nothing is copied.

A graph is a list of launches with their arguments, and the arguments are addresses. So where the same tensors'
addresses come back with the same shapes and settings, replaying does what launching would; whatever lay there
meanwhile. Temporaries made inside belong to the graph, which is why one graph never serves two streams.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .graph_capture import CaptureError, Cuda

#: Up to this number, launching is quicker than looking a graph up.
FEW = 4
#: Calls of a key that launch plainly before one is captured. They compile Triton's kernels and set up cuBLAS, which a
#: capture could not, and keep addresses that never come back from costing a capture.
SIGHTINGS = 2


@dataclass(frozen=True)
class ReplayCounts:
    """Counts of the calls of `run` so far, by outcome.

    Attributes:
        captured: graphs made.
        replayed: calls that were a replay, those right after a capture included.
        evicted: graphs dropped for newer ones.
        graphs: graphs held now.
        plain: calls that launched plainly, by reason.
    """

    captured: int
    replayed: int
    evicted: int
    graphs: int
    plain: Mapping[str, int]


def run(launch: Callable[[], None], key: tuple[Hashable, ...], tensors: Sequence[Tensor | None]) -> None:
    """Do what `launch()` does, from the third call on the same memory by replaying a graph.

    Only for CUDA tensors of the current device and native allocation; anything else, a call inside another capture
    among them, launches plainly, and `state` says why.

    Args:
        launch: launches kernels on the current stream and does nothing else: no synchronisation, no result other than
            in `tensors`, no random numbers. What it allocates must be dead when it returns.
        key: all that decides what is launched and is not in `tensors`: name, tile sizes, precision.
        tensors: all that is read or written, in a fixed order.

    Raises:
        Exception: what `launch` raises.
    """
    GRAPHS.run(launch, key, tensors)


def state() -> ReplayCounts:
    """Counts since the start of the process."""
    return GRAPHS.state()


def clear() -> None:
    """Drop all graphs and their memory; waits for the device."""
    GRAPHS.clear()


class Device(Protocol):
    """Interface of CUDA that `Graphs` needs; tests bring their own."""

    def busy(self) -> str | None:
        """Reason why nothing can be replayed now; None when it can. Asked at each call."""

    def obstacle(self, tensors: Sequence[Tensor | None]) -> str | None:
        """Reason why these tensors cannot go through a graph; None when they can. Asked where there is no graph."""

    def place(self) -> Hashable:
        """Place where launches go now: device, stream and thread."""

    def lane(self, others: Sequence[Any]) -> Any:
        """A stream to capture on and a memory pool, for one place, none of them used by the others."""

    def capture(self, launch: Callable[[], None], lane: Any) -> Callable[[], None]:
        """The launches as something to replay. Raises `CaptureError`."""

    def wait(self) -> None:
        """Return when everything that was launched is done."""


@dataclass
class _Lane:
    """The graphs of one place, which replay one after another and so may share their memory.

    Attributes:
        own: of the device.
        graphs: how many.
        used: number of the replay that was the last one there.
    """

    own: Any
    graphs: int = 0
    used: int = 0


@dataclass
class _Held:
    """A graph: where it replays, what replays it, and the number of its last replay."""

    place: Hashable
    lane: _Lane
    replay: Callable[[], None]
    used: int = 0


class Graphs:
    """Graphs by key, the least recently used dropped first.

    Args:
        device: CUDA, or a stand-in.
        capacity: graphs held at most.
        remembered: keys whose sightings are remembered at most.
        places: places (device, stream and thread) with graphs at most.
    """

    def __init__(self, device: Device, *, capacity: int = 64, remembered: int = 1024, places: int = 8) -> None:
        self._device, self._capacity, self._remembered, self._places = device, capacity, remembered, places
        # One lock for all: looking up and replaying takes microseconds, and captures may not overlap.
        self._lock = threading.RLock()
        self._graphs: dict[Hashable, _Held] = {}
        self._lanes: dict[Hashable, _Lane] = {}
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._final: str | None = None
        self._captured = self._replayed = self._evicted = 0
        self._plain: Counter[str] = Counter()

    def run(
        self,
        launch: Callable[[], None],
        key: Hashable,
        tensors: Sequence[Tensor | None],
        known: Sequence[Tensor | None] = (),
    ) -> int:
        """Implements the function `run`.

        Args:
            launch: see there.
            key: see there.
            tensors: see there.
            known: further ones, whose shape, strides and type follow from the key, so that their addresses suffice.

        Returns:
            Calls that had this memory before: 0 also where no graph can be made of it, and more than `SIGHTINGS` where
            an earlier call's graph served.
        """
        reason, seen = self._device.busy(), 0
        if reason is None:
            place = self._device.place()
            at = [None if value is None else value.data_ptr() for value in known]
            full = (key, place, *map(_address, tensors), *at)
            with self._lock:
                found = self._graphs.get(full)
                if found is not None:
                    self._replay(found)
                    return SIGHTINGS + 1
                reason = self._replay_new(launch, full, place, [*tensors, *known])
                seen = SIGHTINGS if reason is None else max(0, self._seen.get(full, 0) - 1)
        if reason is not None:
            self.note(reason)
            # Outside the lock: a first launch may compile for seconds.
            launch()
        return seen

    def note(self, reason: str) -> None:
        """Count a call that launches plainly, and why."""
        with self._lock:
            self._plain[reason] += 1

    def state(self) -> ReplayCounts:
        """Implements the function `state`."""
        with self._lock:
            return ReplayCounts(self._captured, self._replayed, self._evicted, len(self._graphs), dict(self._plain))

    def clear(self) -> None:
        """Implements the function `clear`."""
        with self._lock:
            self._drop(list(self._graphs))
            self._seen.clear()

    def _replay(self, found: _Held) -> None:
        self._replayed += 1
        found.used = found.lane.used = self._replayed
        found.replay()

    def _replay_new(
        self, launch: Callable[[], None], full: Hashable, place: Hashable, tensors: Sequence[Tensor | None]
    ) -> str | None:
        """Capture and replay where it is time to; else the reason to launch plainly."""
        reason = self._device.obstacle(tensors) or self._final or self._refused.get(full) or self._too_early(full)
        if reason is not None:
            return reason
        try:
            self._replay(self._capture(launch, full, place))
        except CaptureError as error:
            return self._refuse(full, error)
        return None

    def _too_early(self, full: Hashable) -> str | None:
        seen = self._seen.pop(full, 0)
        if seen == SIGHTINGS:
            return None
        self._seen[full] = seen + 1
        if len(self._seen) > self._remembered:
            self._seen.popitem(last=False)
        return "its memory was not seen often enough"

    def _capture(self, launch: Callable[[], None], full: Hashable, place: Hashable) -> _Held:
        if place not in self._lanes and len(self._lanes) == self._places:
            oldest = min(self._lanes, key=lambda one: self._lanes[one].used)
            self._evict([key for key, held in self._graphs.items() if held.place == oldest])
        lane = self._lanes.get(place) or _Lane(self._device.lane([other.own for other in self._lanes.values()]))
        # A place's first capture that fails leaves no lane behind: its pool ended with its only graph.
        found = _Held(place, lane, self._device.capture(launch, lane.own), self._replayed)
        self._lanes[place] = lane
        lane.graphs += 1
        self._graphs[full] = found
        self._captured += 1
        if len(self._graphs) > self._capacity:
            self._evict([min(self._graphs, key=lambda one: self._graphs[one].used)])
        return found

    def _refuse(self, full: Hashable, error: CaptureError) -> str:
        reason = f"capturing failed: {error}"
        self._refused[full] = reason
        if len(self._refused) > self._remembered:
            self._refused.popitem(last=False)
        if error.final:
            self._final = f"an earlier capture failed: {error}"
        warnings.warn(f"launching without a CUDA graph, since {reason}", RuntimeWarning, stacklevel=4)
        return reason

    def _evict(self, keys: list[Hashable]) -> None:
        self._evicted += len(keys)
        self._drop(keys)

    def _drop(self, keys: list[Hashable]) -> None:
        if not keys:
            return
        # A graph may still be running, and what frees it need not wait for that.
        self._device.wait()
        for key in keys:
            place = self._graphs.pop(key).place
            self._lanes[place].graphs -= 1
            # torch never takes up a pool again whose last graph is gone: the next capture there starts a new lane.
            if not self._lanes[place].graphs:
                del self._lanes[place]


class Named:
    """A tuple with its hash, which a tuple computes anew each time: for what stays the same in many keys."""

    def __init__(self, value: tuple[Hashable, ...]) -> None:
        self._value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Named) and self._value == other._value)


def _address(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    # No two devices have an address in common.
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


#: Those of this process.
GRAPHS = Graphs(Cuda())
