"""Streams and events of the card, as in ``torch.cuda``."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from emulated.capture import order_events, permit_stop
from emulated.clocks import HOST, LOCK, Clock, Queue, advance
from emulated.counts import note
from emulated.errors import CaptureError
from emulated.faults import FAULTS

_current = threading.local()


class Stream(Queue):
    """A queue of a card, like ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        if priority > 0:
            raise RuntimeError(f"Expected cuda stream priority to be less than or equal to 0, got {priority}")
        super().__init__()
        self.priority = max(priority, -5)
        self._asked = 0

    @property
    def device(self) -> Any:
        """The card."""
        return torch.device("cuda", 0)

    @property
    def cuda_stream(self) -> int:
        """Its handle; 0 is the default stream's."""
        return self.number

    stream_id = cuda_stream
    device_index = 0

    def __repr__(self) -> str:
        return f"<emulated stream {self.number}, priority {self.priority}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __enter__(self) -> Stream:
        _entered().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _entered().pop()

    def synchronize(self) -> None:
        """Make the host wait for all queued work."""
        FAULTS.call()
        permit_stop("stream.synchronize", self)
        note("sync", "stream.synchronize")
        HOST.waits(self.clock)

    def query(self) -> bool:
        """Whether all queued work is done; the first call says no, unless the host has waited for the work."""
        FAULTS.call()
        permit_stop("stream.query", self)
        queued = self.clock[self.number]
        if queued > HOST.clock.get(self.number, 0) and self._asked < queued:
            self._asked = queued
            return False
        HOST.waits(self.clock)
        return True

    def wait_event(self, event: Event) -> None:
        """Wait for the event before further work."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Wait for all queued work of the other stream before further work."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """Queue an event."""
        event = Event() if event is None else event
        event.record(self)
        return event


class Event:
    """A point in a stream, like ``torch.cuda.Event``."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self._timed = enable_timing
        self._clock: Clock = {}
        self._time = 0.0
        self._asked = False
        self._capture: Any = None

    def record(self, stream: Stream | None = None) -> None:
        """Record it after all queued work; its time is the host's, because all work is executed at once."""
        stream = current_stream() if stream is None else stream
        with LOCK:
            self._clock = dict(stream.queue.clock)
            self._capture = stream.capture
        self._time = time.perf_counter()
        self._asked = False

    def wait(self, stream: Stream | None = None) -> None:
        """Make a stream wait for the event before further work; no effect if it was never recorded."""
        stream = current_stream() if stream is None else stream
        if self._clock:
            order_events(stream, self._capture)
        with LOCK:
            advance(stream.queue.clock, self._clock)

    def query(self) -> bool:
        """Whether it has happened; the first call says no, unless the host has waited for it."""
        self._permit("event.query")
        if not self._done() and not self._asked:
            self._asked = True
            return False
        HOST.waits(self._clock)
        return True

    def synchronize(self) -> None:
        """Make the host wait for it."""
        self._permit("event.synchronize")
        note("sync", "event.synchronize")
        HOST.waits(self._clock)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to another; both must have happened."""
        if not (self._timed and end._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not self._clock or not end._clock:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self._done() and end._done()):
            raise RuntimeError("CUDA error: device not ready (wait for both events before their times are compared)")
        return (end._time - self._time) * 1e3

    def _permit(self, name: str) -> None:
        FAULTS.call()
        if self._capture is not None:
            raise CaptureError(f"{name}: the event was recorded in a capture, where nothing happens")
        permit_stop(name, DEFAULT)

    def _done(self) -> bool:
        return all(tick <= HOST.clock.get(stream, 0) for stream, tick in self._clock.items())


DEFAULT = Stream()


def _entered() -> list[Stream]:
    """The streams that the calling thread has entered, the current one last."""
    if not hasattr(_current, "streams"):
        _current.streams = [DEFAULT]
    return _current.streams


def current_stream(device: Any = None) -> Stream:
    """The stream on which the calling thread queues its work."""
    return _entered()[-1]


def set_stream(stream: Stream | None) -> None:
    """Make the calling thread queue its work on this stream from now on."""
    if stream is not None:
        _entered()[-1] = stream


def synchronize(device: Any = None) -> None:
    """Make the host wait for all streams."""
    FAULTS.call()
    permit_stop("cuda.synchronize", None)
    note("sync", "cuda.synchronize")
    HOST.waits(HOST.launched)


class StreamContext:
    """``torch.cuda.stream(...)``: the calling thread queues its work there inside the ``with``; None has no effect."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        _entered().append(self.stream or current_stream())

    def __exit__(self, *_: object) -> None:
        _entered().pop()
