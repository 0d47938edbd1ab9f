"""Chunks under way: the layers whose KV is already stored, for chunks that follow them layer by layer.

The home lane that computes a chunk writes here; the holder lane of the same worker reads, before it answers a later
chunk of the same prompt. KV that was not noted here does not exist yet.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from distkv_dask.errors import GangAbortedError
from distkv_dask.worker.device import Mark

REMEMBERED = 1024
"""Number of chunks that are remembered; those that follow one begin before it has ended."""


@dataclass(slots=True)
class _Chunk:
    """A mark after the KV of each stored layer; whether all layers are stored, or why they never will be."""

    stored: dict[int, Mark] = field(default_factory=dict)
    complete: bool = False
    failure: str = ""


class UnderWay:
    """Chunks that one worker computes for an engine, by the number of their gang."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: OrderedDict[int, _Chunk] = OrderedDict()
        self._awaited = False

    # The home lane's side; each tells whether the holder lane waits for news

    def stored(self, gang: int, layer: int, mark: Mark) -> bool:
        """The KV of a layer of a chunk is stored, once the device is past ``mark``."""
        with self._lock:
            chunk = self._of(gang)
            chunk.stored[layer], chunk.failure = mark, ""  # one that failed with others is computed again, alone
            return self._take_awaited()

    def computed(self, gang: int) -> bool:
        """A chunk is complete."""
        with self._lock:
            chunk = self._of(gang)
            chunk.stored, chunk.complete = {}, True
            return self._take_awaited()

    def failed(self, gang: int, reason: str) -> bool:
        """A chunk will not be completed."""
        with self._lock:
            self._of(gang).failure = reason
            return self._take_awaited()

    def check_computed(self, gangs: Iterable[int]) -> None:
        """Raise GangAbortedError unless all of these chunks are complete: a later one reads their KV here."""
        for gang in gangs:
            if not self.is_computed(gang):
                raise GangAbortedError(f"the chunk of gang {gang}, which this one follows, was not completed here")

    # The holder lane's side

    def is_computed(self, gang: int) -> bool:
        """Whether a chunk is complete."""
        with self._lock:
            return gang in self._chunks and self._chunks[gang].complete

    def is_stored(self, gang: int, layer: int) -> bool:
        """Whether the KV of a layer of a chunk can be read; if not, the home lane tells when there is news.

        Raises
        ------
        GangAbortedError
            It never will be.
        """
        with self._lock:
            chunk = self._chunks.get(gang, _Chunk())
            if chunk.failure:
                raise GangAbortedError(f"the chunk of gang {gang}, which this one follows, failed: {chunk.failure}")
            if chunk.complete:
                return True
            mark = chunk.stored.get(layer)
            self._awaited |= mark is None
        if mark is not None:
            mark.wait()
        return mark is not None

    def _of(self, gang: int) -> _Chunk:
        if gang not in self._chunks and len(self._chunks) >= REMEMBERED:
            self._chunks.popitem(last=False)
        return self._chunks.setdefault(gang, _Chunk())

    def _take_awaited(self) -> bool:
        awaited, self._awaited = self._awaited, False
        return awaited
