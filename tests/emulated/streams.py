"""Streams and events. Work is done at once; vector clocks say what a card could have done in another order.

A stream counts its operations. Its clock holds, for every stream, up to which operation it is ordered behind it: an
event, or the host, carries the clock of one stream to another. What the host has waited for it tells to all that is
launched afterwards, by any thread: how threads wait for each other cannot be seen from here.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from emulated.counts import note, place

Clock = dict[int, int]
"""Number of a stream -> of its last operation that is known to come before."""

LOCK = threading.RLock()
"""Held while clocks, memory's records or the card's figures are read and changed together."""

_KEPT = 4096
"""Operations of a stream whose names are known."""


def advance(clock: Clock, other: Clock) -> None:
    """Order the clock behind another."""
    for stream, tick in other.items():
        if tick > clock.get(stream, 0):
            clock[stream] = tick


@dataclass
class Effect:
    """What the host sees of an operation once it has waited for it."""

    stream: int
    tick: int

    def happen(self) -> None:
        """The host has waited for it."""


class Host:
    """What the host has waited for, and what it has yet to see."""

    def __init__(self) -> None:
        self.clock: Clock = {}
        self.launched: Clock = {}
        """All that was ever queued."""
        self.effects: list[Effect] = []

    def waits(self, clock: Clock) -> None:
        """The host has waited for all of this: copies to its memory appear, and their sources were not to change."""
        with LOCK:
            advance(self.clock, clock)
            done = [one for one in self.effects if one.tick <= self.clock.get(one.stream, 0)]
            self.effects = [one for one in self.effects if one.tick > self.clock.get(one.stream, 0)]
        faults = []
        for effect in done:
            try:
                effect.happen()
            except RuntimeError as fault:
                faults.append(fault)
        if faults:
            raise faults[0]


HOST = Host()
_numbers = itertools.count()
_current = threading.local()
_streams: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()


class Stream:
    """A queue of a card, like ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        if priority > 0:
            raise RuntimeError(f"Expected cuda stream priority to be less than or equal to 0, got {priority}")
        self.priority = max(priority, -5)
        self.number = next(_numbers)
        self.clock: Clock = {self.number: 0}
        self.names: deque[tuple[str, str]] = deque(maxlen=_KEPT)
        self.capture: Any = None
        _streams[self.number] = self

    @property
    def device(self) -> Any:
        """The card."""
        import torch

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

    @staticmethod
    def numbered(number: int) -> Stream:
        """The stream of a number; one without names if it is no more."""
        return _streams.get(number) or Stream()

    def begin(self, name: str) -> int:
        """Queue an operation; its number."""
        with LOCK:
            advance(self.clock, HOST.clock)
            tick = self.clock[self.number] = HOST.launched[self.number] = self.clock[self.number] + 1
            self.names.append((name, place()))
            return tick

    def what(self, tick: int) -> str:
        """What an operation was, and which line asked for it."""
        back = self.clock[self.number] - tick
        if back >= len(self.names):
            return "something"
        name, where = self.names[-1 - back]
        return f"{name} ({where})"

    def synchronize(self) -> None:
        """Have the host wait for all that is queued."""
        note("sync", "stream.synchronize")
        HOST.waits(self.clock)

    def query(self) -> bool:
        """Whether all that is queued is done: yes if the host has waited for it."""
        return self.clock[self.number] <= HOST.clock.get(self.number, 0)

    def wait_event(self, event: Event) -> None:
        """Do nothing further before the event."""
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        """Do nothing further before all that the other has queued."""
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

    def record(self, stream: Stream | None = None) -> None:
        """Place it behind all that is queued; the time is the host's, by whom everything is done at once."""
        stream = current_stream() if stream is None else stream
        with LOCK:
            self._clock = dict(stream.clock)
        self._time = time.perf_counter()
        self._asked = False

    def wait(self, stream: Stream | None = None) -> None:
        """Have a stream do nothing further before the event; nothing if it was never recorded."""
        stream = current_stream() if stream is None else stream
        with LOCK:
            advance(stream.clock, self._clock)

    def query(self) -> bool:
        """Whether it has happened: not when asked for the first time, unless the host has waited for it."""
        if not self._done() and not self._asked:
            self._asked = True
            return False
        HOST.waits(self._clock)
        return True

    def synchronize(self) -> None:
        """Have the host wait for it."""
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
    """Have the calling thread queue its work there from now on."""
    if stream is not None:
        _entered()[-1] = stream


def synchronize(device: Any = None) -> None:
    """Have the host wait for all streams."""
    note("sync", "cuda.synchronize")
    HOST.waits(HOST.launched)


class StreamContext:
    """``torch.cuda.stream(...)``: the calling thread queues its work there meanwhile; None changes nothing."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        _entered().append(self.stream or current_stream())

    def __exit__(self, *_: object) -> None:
        _entered().pop()
