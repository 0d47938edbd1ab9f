"""What C++ records of a traced engine's layers (worker/native/marks.h): room for it, and spans of it afterwards."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from distkv_dask.worker.native.structs import Mark, Marks

CAPACITY = 4096
"""Marks between two looks at them: a layer of a home, or a step of the sessions that a holder serves at once."""

NAMES = ("send", "wait", "wait", "merge", "idle", "receive", "attend", "send", "answer")
"""Names of spans, by distkv::What."""

Recorded = tuple[str, int, int, int, int, int, str, int]
"""A :class:`~distkv_dask.messages.names.Span` by the monotonic clock."""


class NativeMarks:
    """Room for the marks of one lane's C++ calls."""

    def __init__(self) -> None:
        self._room = (Mark * CAPACITY)()
        self._marks = Marks(room=ctypes.addressof(self._room), capacity=CAPACITY)
        self._peers: list[str] = []
        self.address = ctypes.addressof(self._marks)
        """distkv::Marks."""

    def number(self, peer: str) -> int:
        """How marks name a peer."""
        if peer not in self._peers:
            self._peers.append(peer)
        return self._peers.index(peer)

    def start_behind(self, last: int) -> None:
        """Go on behind what Python recorded last."""
        self._marks.last = last

    def take_marks(self) -> Iterator[Recorded]:
        """What was marked since the last call."""
        count, self._marks.count = self._marks.count, 0
        for one in self._room[:count]:
            peer = self._peers[one.peer] if one.peer >= 0 else ""
            yield NAMES[one.what], one.began, one.ended, one.gang, one.step, one.layer, peer, one.size

    def take_lost(self) -> int:
        """How many marks found no room since the last call."""
        lost, self._marks.lost = self._marks.lost, 0
        return int(lost)
