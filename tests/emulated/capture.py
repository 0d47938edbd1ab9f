"""A stream that is being captured: its work is recorded, and calls that would synchronize the host are refused."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from emulated.clocks import HOST, LOCK, Clock, Queue, advance
from emulated.errors import CaptureError

if TYPE_CHECKING:
    from emulated.memory import DeviceMemory
    from emulated.work import Work

Mode = Literal["global", "thread_local", "relaxed"]
"""Who may not synchronize during a capture: any thread, the capturing thread, or users of the captured streams only."""

_running: list[Capture] = []


class Capture:
    """Work that is recorded for a graph.

    A card executes nothing during a capture. Here work is executed to find the shapes of results; afterwards existing
    memory is restored, and memory allocated during the capture holds NaN. Stand-ins replace the streams, so that the
    recorded work is ordered only among itself.
    """

    def __init__(self, mode: Mode, pool: object) -> None:
        self.pool = pool
        """The memory that it shares with other graphs: what one of them has allocated there is valid for all."""
        self.steps: list[tuple[Work, str]] = []
        """The work, and the line that asked for it."""
        self.outside: dict[int, tuple[weakref.ref[DeviceMemory], str]] = {}
        """Memory that existed before, and the first work that uses it."""
        self.numbers: list[tuple[Tensor, Tensor, str]] = []
        """Scalars in host memory that are arguments, their values, and the work that takes them."""
        self.storages: list[torch.UntypedStorage] = []
        """Memory that belongs to the graph."""
        self.mode = mode
        self.thread = threading.get_ident()
        self.fault = ""
        self._streams: list[Queue] = []
        self._last: Clock = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def join(self, stream: Queue) -> None:
        """Capture a stream."""
        with LOCK:
            stand_in = Queue()
            stand_in.clock |= HOST.launched
            stand_in.capture = stream.capture = self
            stream.stand_in = stand_in
            self._streams.append(stream)
            if self not in _running:
                _running.append(self)

    def take(self, work: Work, stream: Queue, tick: int) -> Any:
        """Record work; returns its results."""
        what = stream.what(tick)
        for memory in work.memories():
            if memory.graph is None or memory.graph.pool is not self.pool:
                self.outside.setdefault(id(memory), (weakref.ref(memory), what))
        for held in work.written():
            octets = _all_of(held.untyped_storage())
            self._before.setdefault(octets.data_ptr(), (octets, octets.clone()))
        self.numbers += [(one, one.clone(), what) for one in work.numbers]
        made = work.do(stream, tick)
        self.steps.append((work, what))
        self._last[stream.number] = tick
        return made

    def end(self) -> None:
        """End the capture.

        Raises
        ------
        CaptureError
            A forbidden call has invalidated it, or the first stream does not wait for one that has joined.
        """
        with LOCK, torch.inference_mode():
            origin = self._streams[0].queue
            loose = [stream for stream, tick in self._last.items() if origin.clock.get(stream, 0) < tick]
            _running.remove(self)
            advance(HOST.clock, self._last)
            for stream in self._streams:
                stream.capture = stream.stand_in = None
            for octets, before in self._before.values():
                octets.copy_(before)
            for storage in self.storages:
                _all_of(storage).fill_(0xFF)
            for work, _ in self.steps:
                work.fresh.clear()
        if self.fault:
            raise CaptureError(f"the capture is void: {self.fault} was called meanwhile")
        if loose:
            raise CaptureError("a stream has joined the capture, and the one on which it began does not wait for it")


def permit_stop(name: str, stream: Queue | None) -> None:
    """Raise if a capture forbids the host to wait for a stream (None: for all)."""
    with LOCK:
        running = tuple(_running)
    for capture in running:
        mine = capture.thread == threading.get_ident()
        used = stream is None or stream.capture is capture
        if used or capture.mode == "global" or (capture.mode == "thread_local" and mine):
            capture.fault = name
            raise CaptureError(
                f"CUDA error: operation not permitted when stream is capturing ({name}"
                + ("" if mine else ", in another thread: it captures with capture_error_mode='global'")
                + ")"
            )


def order_events(stream: Queue, capture: Capture | None) -> None:
    """Let a stream that waits for an event join the event's capture, or raise if it may not wait for the event."""
    if capture is stream.capture:
        return
    if capture is None:
        raise CaptureError("a captured stream waits for an event that was recorded outside of its capture")
    if stream.capture is not None or capture not in _running:
        raise CaptureError("a stream waits for an event of a capture that it is not part of, or that has ended")
    capture.join(stream)


def _all_of(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.uint8).set_(storage)
