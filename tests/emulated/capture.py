"""A stream that is being captured: what it is given is recorded, and what would stop the host is refused."""

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
"""Who may not stop meanwhile: no thread, not the one that captures, or nobody who does not use the captured streams."""

_running: list[Capture] = []


class Capture:
    """Work that is recorded for a graph.

    A card does none of it meanwhile. Here it is done, for nothing else knows the shapes of results; afterwards memory
    that was there before is as it was, and memory that was taken meanwhile holds NaN. The streams have stand-ins, so
    that what is recorded is ordered among itself only.
    """

    def __init__(self, mode: Mode, pool: object) -> None:
        self.pool = pool
        """The memory that it shares with other graphs: what one of them has taken there stays valid for all."""
        self.steps: list[tuple[Work, str]] = []
        """The work, and which line asked for it."""
        self.outside: dict[int, tuple[weakref.ref[DeviceMemory], str]] = {}
        """Memory that was there before, and what uses it first."""
        self.numbers: list[tuple[Tensor, Tensor, str]] = []
        """Single numbers of the host that are arguments, what they were, and of what."""
        self.storages: list[torch.UntypedStorage] = []
        """Memory that is the graph's own."""
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
        """Record work; what it makes."""
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
        """End it.

        Raises
        ------
        CaptureError
            A call that is not permitted has made it void, or a stream that has joined is not waited for.
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
    """Refuse to have the host wait for a stream, or for all, where a capture forbids it."""
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
    """A stream waits for an event that was recorded in a capture, or in none: it joins the capture, or may not wait."""
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
