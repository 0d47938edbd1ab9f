"""Records of which streams have used which bytes of a memory, and whether another stream may use them now."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from emulated.clocks import LOCK, Clock, Queue
from emulated.errors import RaceError

GRANULE = 64
"""Bytes that are recorded together."""

_LOG = 256
"""Maximum uses by a single stream that are kept as they are before they are recorded by granule."""

Granules = slice | np.ndarray
"""Indices of granules in a memory."""


class Region(NamedTuple):
    """Bytes of a memory: those of a strided tensor, or of some of its rows."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    rows: np.ndarray | None = None
    """Offsets of the rows [n] that are used, in elements; sizes and strides are a row's."""

    @classmethod
    def of(cls, tensor: Tensor) -> Region:
        """All of a tensor in host memory."""
        return cls(tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.element_size())

    def granules(self) -> Granules:
        """The granules that it covers."""
        if 0 in self.sizes or (self.rows is not None and not len(self.rows)):
            return slice(0, 0)
        run, outer = _run(self.sizes, self.strides)
        starts = np.zeros(1, np.int64) if self.rows is None else np.unique(self.rows)
        for size, stride in outer:
            starts = (starts[:, None] + np.arange(size) * stride).ravel()
        starts = (starts + self.offset) * self.itemsize
        return bytes_at(starts, run * self.itemsize)


def _run(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, list[tuple[int, int]]]:
    """Number of contiguous elements, and sizes and strides by which such runs repeat."""
    run, outer = 1, []
    for size, stride in sorted(zip(sizes, strides, strict=True), key=lambda dim: dim[1]):
        if size == 1 or stride == 0:
            continue
        if stride <= run and not outer:
            run += (size - 1) * stride
        else:
            outer.append((size, stride))
    return run, outer


def bytes_at(starts: np.ndarray, size: int) -> Granules:
    """Granules of pieces of ``size`` bytes that begin at these bytes, int64 [n]."""
    first, last = starts // GRANULE, (starts + size - 1) // GRANULE
    if len(starts) == 1:
        return slice(int(first[0]), int(last[0]) + 1)
    low, high = int(first.min()), int(last.max()) + 1
    edges = np.zeros(high - low + 1, np.int64)
    np.add.at(edges, first - low, 1)
    np.add.at(edges, last + 1 - low, -1)
    return np.flatnonzero(edges.cumsum()[:-1]) + low


class Memory:
    """A piece of the device's memory, or of pinned host memory, and its uses by streams."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.last: Clock = {}
        """The last use of any part of it by each stream."""
        self._log: list[tuple[Region, bool, int]] = []
        self._uses: dict[bool, dict[int, np.ndarray]] = {False: {}, True: {}}
        """Written or read -> stream -> its last such operation on each granule, int64."""

    def use(self, where: Region | Granules, write: bool, stream: Queue, tick: int) -> None:
        """Record that an operation of a stream reads or writes bytes.

        Raises
        ------
        RaceError
            Another stream uses them, too; at least one of the two writes, and nothing orders them.
        """
        with LOCK:
            if self.last.keys() <= {stream.number} and isinstance(where, Region):
                self._log.append((where, write, tick))
                self.last[stream.number] = tick
                if len(self._log) > _LOG:
                    self._enter(stream.number)
                return
            if self._log:
                (alone,) = self.last
                self._enter(alone)
            granules = where.granules() if isinstance(where, Region) else where
            self._check(granules, write, stream)
            self._mark(granules, write, stream.number, tick)

    def _enter(self, stream: int) -> None:
        for region, write, tick in self._log:
            self._mark(region.granules(), write, stream, tick)
        self._log.clear()

    def _mark(self, granules: Granules, write: bool, stream: int, tick: int) -> None:
        uses = self._uses[write]
        if stream not in uses:
            uses[stream] = np.zeros(math.ceil(self.nbytes / GRANULE), np.int64)
        uses[stream][granules] = tick
        self.last[stream] = max(tick, self.last.get(stream, 0))

    def _check(self, granules: Granules, write: bool, stream: Queue) -> None:
        for wrote in (True, False) if write else (True,):
            for other, ticks in self._uses[wrote].items():
                known = stream.clock.get(other, 0)
                if other == stream.number or self.last[other] <= known:
                    continue
                latest = int(ticks[granules].max(initial=0))
                if latest > known:
                    raise RaceError(_message(stream, write, other, wrote, latest))


def _message(stream: Queue, write: bool, other: int, wrote: bool, tick: int) -> str:
    verb, past = ("writes" if write else "reads"), ("written" if wrote else "read")
    return (
        f"{stream.what(stream.clock[stream.number])} {verb} memory on {stream} that was {past} on stream {other} by "
        f"{Queue.numbered(other).what(tick)}, and nothing orders the two: record an event there after it, "
        "and have this stream wait for that"
    )
