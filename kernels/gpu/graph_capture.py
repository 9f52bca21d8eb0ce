"""Capturing launches as a CUDA graph by torch: the device behind `graph_cache`, and how a capture fails."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class CaptureError(RuntimeError):
    """A capture that came to nothing.

    Args:
        reason: why.
        final: whether torch is left in a state in which no further capture should be tried.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


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
        """See `graph_cache.Device`."""
        if not torch.cuda.is_initialized():
            return "CUDA is not in use"
        return "the current stream is being captured already" if torch.cuda.is_current_stream_capturing() else None

    def obstacle(self, tensors: Sequence[Tensor | None]) -> str | None:
        """See `graph_cache.Device`."""
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
        """See `graph_cache.Device`. With the thread: CUDA's per-thread stream has the same handle in every thread."""
        device = torch.cuda.current_device()
        # Not `torch.cuda.current_stream()`, which makes an object of the handle: this is asked at each call.
        return device, torch._C._cuda_getCurrentRawStream(device), threading.get_ident()  # noqa: SLF001 - as Inductor

    def lane(self, others: Sequence[Any]) -> Any:
        """See `graph_cache.Device`."""
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
        """See `graph_cache.Device`.

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
        """See `graph_cache.Device`."""
        torch.cuda.synchronize()

    def _record(self, graph: Any, launch: Callable[[], None], pool: Any) -> int:
        """Capture on the current stream; an address that was allocated meanwhile."""
        try:
            # Other threads continue to allocate and launch.
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
                # Another thread that waits for the whole device ends a capture, which does torch no harm.
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
    # Without the history of allocations, which a profiler may have made long; not every build takes the argument.
    with contextlib.suppress(TypeError, RuntimeError):
        return list(torch.cuda.memory_snapshot(pool, include_traces=False))
    try:
        return list(torch.cuda.memory_snapshot(pool))
    except (TypeError, RuntimeError) as error:
        message = f"torch does not list the memory of a graph's pool ({_line(error)})"
        raise CaptureError(message, final=True) from error


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Prevent garbage collection: it could free events and graphs, which CUDA does not allow inside a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
