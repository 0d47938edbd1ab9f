"""What comes before what: queues of a card, whose work is done at once, and vector clocks.

A queue counts its operations. Its clock holds, for every queue, up to which operation it is ordered behind it: an
event, or the host, carries the clock of one queue to another. What the host has waited for it tells to all that is
launched afterwards, by any thread: how threads wait for each other cannot be seen from here.
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
        """The host has waited for all of this: copies to its memory appear, and their sources were not to change.

        Another thread that waits for some of the same goes on only when they have appeared.
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
    """Work in order: that of a stream, or of its stand-in while it is captured."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.clock: Clock = {self.number: 0}
        self.names: deque[tuple[str, str]] = deque(maxlen=_KEPT)
        self.capture: Any = None
        self.stand_in: Queue | None = None
        """On what its work is queued while it is captured."""
        _queues[self.number] = self

    @property
    def queue(self) -> Queue:
        """On what its work is queued now."""
        return self.stand_in or self

    @staticmethod
    def numbered(number: int) -> Queue:
        """The queue of a number; one without names if it is no more."""
        return _queues.get(number) or Queue()

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
        if not 0 <= back < len(self.names):
            return "something"
        name, where = self.names[-1 - back]
        return f"{name} ({where})"
