"""A sequence's launches replayed as one CUDA graph, found again by the addresses of its tensors: nothing is copied.

A graph is a list of launches with their arguments, and the arguments are addresses. So where the same tensors'
addresses come back with the same shapes and settings, replaying does what launching would; whatever lay there
meanwhile. Temporaries made inside belong to the graph, which is why one graph never serves two streams.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

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


class CaptureError(RuntimeError):
    """A capture that came to nothing.

    Args:
        reason: why.
        final: whether torch is left in a state in which no further capture should be tried.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


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
    """The graphs of one place, which replay one after another and so may share their memory."""

    own: Any
    graphs: int = 0


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
        self._graphs: OrderedDict[Hashable, tuple[Hashable, Callable[[], None]]] = OrderedDict()
        self._lanes: OrderedDict[Hashable, _Lane] = OrderedDict()
        self._seen: OrderedDict[Hashable, int] = OrderedDict()
        self._refused: OrderedDict[Hashable, str] = OrderedDict()
        self._final: str | None = None
        self._captured = self._replayed = self._evicted = 0
        self._plain: Counter[str] = Counter()

    def run(self, launch: Callable[[], None], key: tuple[Hashable, ...], tensors: Sequence[Tensor | None]) -> bool:
        """Implements the function `run`; returns whether an earlier call's graph served."""
        reason = self._device.busy()
        if reason is None:
            place = self._device.place()
            full = (key, place, tuple(map(_address, tensors)))
            with self._lock:
                held = full in self._graphs
                reason = self._replay(launch, full, place, tensors)
                if reason is None:
                    return held
        with self._lock:
            self._plain[reason] += 1
        # Outside the lock: a first launch may compile for seconds.
        launch()
        return False

    def state(self) -> ReplayCounts:
        """Implements the function `state`."""
        with self._lock:
            return ReplayCounts(self._captured, self._replayed, self._evicted, len(self._graphs), dict(self._plain))

    def clear(self) -> None:
        """Implements the function `clear`."""
        with self._lock:
            self._drop(list(self._graphs))
            self._seen.clear()

    def _replay(
        self, launch: Callable[[], None], full: Hashable, place: Hashable, tensors: Sequence[Tensor | None]
    ) -> str | None:
        """Replay, capturing first where it is time to; else the reason to launch plainly."""
        found = self._graphs.get(full)
        if found is None:
            reason = self._device.obstacle(tensors) or self._final or self._refused.get(full) or self._too_early(full)
            if reason is not None:
                return reason
            try:
                found = self._capture(launch, full, place)
            except CaptureError as error:
                return self._refuse(full, error)
        self._graphs.move_to_end(full)
        self._lanes.move_to_end(place)
        found[1]()
        self._replayed += 1
        return None

    def _too_early(self, full: Hashable) -> str | None:
        seen = self._seen.pop(full, 0)
        if seen == SIGHTINGS:
            return None
        self._seen[full] = seen + 1
        if len(self._seen) > self._remembered:
            self._seen.popitem(last=False)
        return "its memory was not seen often enough"

    def _capture(
        self, launch: Callable[[], None], full: Hashable, place: Hashable
    ) -> tuple[Hashable, Callable[[], None]]:
        if place not in self._lanes and len(self._lanes) == self._places:
            oldest = next(iter(self._lanes))
            self._evict([key for key, (where, _) in self._graphs.items() if where == oldest])
        lane = self._lanes.get(place) or _Lane(self._device.lane([other.own for other in self._lanes.values()]))
        # A place's first capture that fails leaves no lane behind: its pool ended with its only graph.
        found = (place, self._device.capture(launch, lane.own))
        self._lanes[place] = lane
        lane.graphs += 1
        self._graphs[full] = found
        self._captured += 1
        if len(self._graphs) > self._capacity:
            self._evict([next(iter(self._graphs))])
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
            place, _ = self._graphs.pop(key)
            self._lanes[place].graphs -= 1
            # torch never takes up a pool again whose last graph is gone: the next capture there starts a new lane.
            if not self._lanes[place].graphs:
                del self._lanes[place]


def _address(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    return tensor.data_ptr(), tensor.get_device(), tensor.shape, tensor.stride(), tensor.dtype


@dataclass(frozen=True)
class _Own:
    """Stream to capture on and pool of the memory inside."""

    stream: Any
    pool: Any


class Cuda:
    """Capturing by torch.

    One place, one capture stream, one pool, for cuBLAS's sake: torch keeps its workspace by the stream it was captured
    on, and where a graph is dropped, torch 2.13 frees the workspaces of that graph's stream while others captured
    there still point to them (pytorch #193402). Here those others are of the same place: the freed memory stays in
    their common pool, mapped as long as one of them lives, and is taken only by temporaries of later captures there,
    none of which outlives its replay.
    """

    def __init__(self) -> None:
        #: Failed graphs: torch's allocator may keep a function that points into them, so they are never freed.
        self._failed: list[Any] = []

    def busy(self) -> str | None:
        """See `Device`."""
        if not torch.cuda.is_initialized():
            return "CUDA is not in use"
        return "the current stream is being captured already" if torch.cuda.is_current_stream_capturing() else None

    def obstacle(self, tensors: Sequence[Tensor | None]) -> str | None:
        """See `Device`."""
        present = [tensor for tensor in tensors if tensor is not None]
        if not all(tensor.is_cuda for tensor in present):
            return "a tensor is not on a CUDA device"
        current = torch.cuda.current_device()
        if any(tensor.get_device() != current for tensor in present):
            return "a tensor is not on the current device"
        if torch.cuda.get_allocator_backend() != "native":
            return "torch's memory comes from another allocator than its own"
        return None

    def place(self) -> Hashable:
        """See `Device`. The thread is part of it: CUDA's per-thread stream has the same handle in every thread."""
        device = torch.cuda.current_device()
        # Not `torch.cuda.current_stream()`, which makes an object of the handle: this is asked at each call.
        return device, torch._C._cuda_getCurrentRawStream(device), threading.get_ident()  # noqa: SLF001 - as Inductor

    def lane(self, others: Sequence[Any]) -> Any:
        """See `Device`."""
        taken = {other.stream.cuda_stream for other in others}
        # torch hands out 32 streams of each priority in turn. Those of high priority are hardly used by others, whose
        # captures and cuBLAS workspaces would be mixed with ours. What is captured keeps that priority, so where other
        # streams of the caller's have work at the same time, the blocks of a replay are placed first.
        for _ in range(64):
            stream = torch.cuda.Stream(priority=-1)
            if stream.cuda_stream not in taken:
                return _Own(stream, torch.cuda.graph_pool_handle())
        message = "torch handed out no stream that is not in use for another place"
        raise CaptureError(message)

    def capture(self, launch: Callable[[], None], lane: Any) -> Callable[[], None]:
        """See `Device`.

        Not by `torch.cuda.graph`, which empties the allocator's cache at every capture: the addresses that keys are
        made of would move.
        """
        graph: Any = torch.cuda.CUDAGraph()
        # torch writes the random generator's capture state on the capture stream, before and not inside the capture:
        # no other graph may be reading it then, nor soon after.
        self.wait()
        with _no_collection(), torch.cuda.stream(lane.stream):
            probe = self._record(graph, launch, lane.pool)
            lane.stream.synchronize()
        segments = _segments(lane.pool)
        if not any(0 <= probe - segment["address"] < segment["total_size"] for segment in segments):
            # Temporaries would be in memory that others are given too, such as that of torch.cuda.use_mem_pool.
            message = "memory allocated while capturing did not come from the graph's own pool"
            raise CaptureError(message)
        replay: Callable[[], None] = graph.replay
        return replay

    def wait(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize()

    def _record(self, graph: Any, launch: Callable[[], None], pool: Any) -> int:
        """Capture on the current stream; an address that was allocated meanwhile."""
        try:
            # Other threads go on allocating and launching.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        except RuntimeError as error:
            self._failed.append(graph)
            raise CaptureError(_line(error), final=True) from error
        try:
            launch()
            return torch.empty(1, dtype=torch.int8, device="cuda").data_ptr()
        except RuntimeError as error:
            # Launched plainly next, it raises the same if it is at fault itself.
            raise CaptureError(_line(error)) from error
        finally:
            try:
                graph.capture_end()
            except RuntimeError as error:
                self._failed.append(graph)
                # Another thread that waits for the whole device ends a capture, and torch is none the worse for it.
                raise CaptureError(_line(error), final=not self._captures()) from error

    def _captures(self) -> bool:
        """Return whether torch can still begin and end a capture on the current stream."""
        probe: Any = torch.cuda.CUDAGraph()
        try:
            probe.capture_begin(pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
            probe.capture_end()
        except RuntimeError:
            self._failed.append(probe)
            return False
        return True


def _segments(pool: Any) -> list[dict[str, Any]]:
    """The memory of a pool, in blocks of `address` and `total_size`.

    Raises:
        CaptureError: where this build of torch does not list it.
    """
    try:
        # Without the history of allocations, which a profiler may have made long; not every build takes the argument.
        return list(torch.cuda.memory_snapshot(pool, include_traces=False))
    except (TypeError, RuntimeError):
        pass
    try:
        return list(torch.cuda.memory_snapshot(pool))
    except (TypeError, RuntimeError) as error:
        message = f"torch does not list the memory of a graph's pool ({_line(error)})"
        raise CaptureError(message, final=True) from error


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection meanwhile: it could free events and graphs, which CUDA does not allow inside a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


#: Those of this process.
GRAPHS = Graphs(Cuda())
