"""Marks that C++ records for a traced engine's layers (worker/native/marks.h), and spans made from them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from distkv_dask.worker.native.structs import Mark, Marks

CAPACITY = 4096
"""Maximum marks between two reads: a layer of a home, or a step of the sessions that a holder serves at once."""

NAMES = ("send", "wait", "wait", "merge", "idle", "receive", "attend", "send", "answer")
"""Names of spans, by distkv::What."""

Recorded = tuple[str, int, int, int, int, int, str, int]
"""A :class:`~distkv_dask.messages.names.Span` on the monotonic clock."""


class NativeMarks:
    """Room for the marks of one lane's C++ calls."""

    def __init__(self) -> None:
        self._room = (Mark * CAPACITY)()
        self._marks = Marks(room=ctypes.addressof(self._room), capacity=CAPACITY)
        self._peers: list[str] = []
        self.address = ctypes.addressof(self._marks)
        """distkv::Marks."""

    def number(self, peer: str) -> int:
        """The number by which marks refer to a peer."""
        if peer not in self._peers:
            self._peers.append(peer)
        return self._peers.index(peer)

    def start_behind(self, last: int) -> None:
        """Continue after Python's last span."""
        self._marks.last = last

    def take_marks(self) -> Iterator[Recorded]:
        """Spans since the last call."""
        count, self._marks.count = self._marks.count, 0
        for one in self._room[:count]:
            peer = self._peers[one.peer] if one.peer >= 0 else ""
            yield NAMES[one.what], one.began, one.ended, one.gang, one.step, one.layer, peer, one.size

    def take_lost(self) -> int:
        """Number of marks lost since the last call."""
        lost, self._marks.lost = self._marks.lost, 0
        return int(lost)
