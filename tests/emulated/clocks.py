"""The order of operations: queues of a card, whose work is executed at once, and vector clocks.

A queue counts its operations. Its clock holds, for every queue, the last operation that it is ordered after: an event,
or the host, carries the clock of one queue to another. Everything that is launched after a wait of the host, by any
thread, is ordered after what the host has waited for, because the emulation cannot see how threads wait for each other.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from emulated.counts import place

Clock = dict[int, int]
"""Number of a stream -> number of its last operation that is known to come before."""

LOCK = threading.RLock()
"""Held while clocks, records of memory or the card's figures are read and changed together."""

_KEPT = 4096
"""Number of a stream's last operations whose names are kept."""


def advance(clock: Clock, other: Clock) -> None:
    """Order the clock after another."""
    for stream, tick in other.items():
        if tick > clock.get(stream, 0):
            clock[stream] = tick


@dataclass
class Effect:
    """The effect of an operation that the host sees once it has waited for it."""

    stream: int
    tick: int

    def happen(self) -> None:
        """Apply it, because the host has waited for the operation."""


class Host:
    """What the host has waited for, and the effects that it has not seen yet."""

    def __init__(self) -> None:
        self.clock: Clock = {}
        self.launched: Clock = {}
        """Everything that was ever queued."""
        self.effects: list[Effect] = []

    def waits(self, clock: Clock) -> None:
        """Note that the host has waited for this clock: copies to its memory appear, and sources of copies are checked.

        Another thread that waits for some of the same operations continues only when their copies have appeared.
        """
        faults = []
        with LOCK:
            advance(self.clock, clock)
            done = [one for one in self.effects if one.tick <= self.clock.get(one.stream, 0)]
            self.effects = [one for one in self.effects if one.tick > self.clock.get(one.stream, 0)]
            for effect in done:
                try:
                    effect.happen()
                except RuntimeError as fault:
                    faults.append(fault)
        if faults:
            raise faults[0]


HOST = Host()
_numbers = itertools.count()
_queues: weakref.WeakValueDictionary[int, Queue] = weakref.WeakValueDictionary()


class Queue:
    """Ordered work: that of a stream, or of its stand-in during a capture."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.clock: Clock = {self.number: 0}
        self.names: deque[tuple[str, str]] = deque(maxlen=_KEPT)
        self.capture: Any = None
        self.stand_in: Queue | None = None
        """The queue of its work during a capture."""
        _queues[self.number] = self

    @property
    def queue(self) -> Queue:
        """The queue of its work now."""
        return self.stand_in or self

    @staticmethod
    def numbered(number: int) -> Queue:
        """The queue with a number; one without names if it no longer exists."""
        return _queues.get(number) or Queue()

    def begin(self, name: str) -> int:
        """Queue an operation; returns its number."""
        with LOCK:
            advance(self.clock, HOST.clock)
            tick = self.clock[self.number] = HOST.launched[self.number] = self.clock[self.number] + 1
            self.names.append((name, place()))
            return tick

    def what(self, tick: int) -> str:
        """An operation's name, and the line that asked for it."""
        back = self.clock[self.number] - tick
        if not 0 <= back < len(self.names):
            return "something"
        name, where = self.names[-1 - back]
        return f"{name} ({where})"
