"""Extents: runs of blocks of requests that ended, below the prefix cache: on other workers, or on disks.

The blocks of an extent are in a pool under its own number, or in a file. No sequence shares them: a request that begins
with the same tokens reads them into its own blocks, and computes the gaps between them.
"""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from distkv_dask.messages.names import SpilledFile

Kind = Literal["workers", "disk"]
"""Where an extent is: in the free memory of a worker other than its sequence's, or on a worker's own disk."""


class Place(NamedTuple):
    """Where an extent is, or could be."""

    kind: Kind
    worker: str


RESTS = 30.0
"""Seconds for which nothing is written to a disk that failed."""


@dataclass(slots=True)
class Source:
    """What an extent is being copied from: tokens of a sequence, in the pool of a worker; ``since`` in seconds."""

    worker: str
    sequence: int
    since: float


@dataclass(slots=True)
class Extent:
    """Whole blocks ``[start, stop)`` of a text.

    Parameters
    ----------
    number
        Its own, negative.
    worker, kind
        Where it is.
    start, stop
        Positions of its first token, and after its last one.
    tokens
        The text up to ``stop``: the KV depends on all of it.
    keys
        Of its blocks (:func:`~distkv_dask.scheduler.records.prefix_index.chain`).
    used
        When it was last used, in seconds.
    source
        What it is being copied from; None once it is complete.
    file
        Its file; None in memory.
    adapter
        The key of the adapter that its KV is of.
    readers
        Requests that are reading it.
    """

    number: int
    worker: str
    kind: Kind
    start: int
    stop: int
    tokens: array[int]
    keys: tuple[int, ...]
    used: float
    source: Source | None = None
    file: SpilledFile | None = None
    adapter: str = ""
    readers: set[int] = field(default_factory=set)

    @property
    def place(self) -> Place:
        """Where it is."""
        return Place(self.kind, self.worker)

    @property
    def is_whole(self) -> bool:
        """Whether it is complete."""
        return self.source is None


@dataclass(slots=True)
class Extents:
    """All extents of one engine.

    ``index`` has those with a block, by the block's key; ``there`` those of a worker by kind, the least recently used
    first, and ``blocks`` counts their blocks. ``copying`` has for each worker the extent that is being copied from it.
    ``short`` are workers that may soon have no empty blocks. ``failed`` says of workers why their disk could not be
    written to, and when.
    """

    by_number: dict[int, Extent] = field(default_factory=dict)
    index: dict[int, dict[int, None]] = field(default_factory=dict)
    there: defaultdict[tuple[str, Kind], dict[int, None]] = field(default_factory=lambda: defaultdict(dict))
    blocks: Counter[tuple[str, Kind]] = field(default_factory=Counter)
    copying: dict[str, int] = field(default_factory=dict)
    short: dict[str, None] = field(default_factory=dict)
    failed: dict[str, tuple[float, str]] = field(default_factory=dict)
    settled: dict[tuple[str, int], int] = field(default_factory=dict)
    """By cached sequence and worker: how many of its blocks there were found to have copies."""

    def add(self, extent: Extent) -> None:
        """Add an extent that is being copied."""
        self.by_number[extent.number] = extent
        self.there[extent.worker, extent.kind][extent.number] = None
        self.blocks[extent.worker, extent.kind] += len(extent.keys)
        for key in extent.keys:
            self.index.setdefault(key, {})[extent.number] = None
        if extent.source is not None:
            self.copying[extent.source.worker] = extent.number

    def remove(self, extent: Extent) -> None:
        """Remove an extent."""
        self.settled.clear()
        del self.by_number[extent.number]
        del self.there[extent.worker, extent.kind][extent.number]
        self.blocks[extent.worker, extent.kind] -= len(extent.keys)
        for key in extent.keys:
            del self.index[key][extent.number]
            if not self.index[key]:
                del self.index[key]
        self.copied(extent)

    def copied(self, extent: Extent) -> None:
        """An extent is no longer being copied."""
        source, extent.source = extent.source, None
        if source is not None and self.copying.get(source.worker) == extent.number:
            del self.copying[source.worker]
            self.short[source.worker] = None

    def touch(self, extent: Extent, now: float) -> None:
        """Note that an extent was used."""
        extent.used = now
        there = self.there[extent.worker, extent.kind]
        there[extent.number] = there.pop(extent.number)

    def of(self, worker: str, kind: Kind) -> list[Extent]:
        """The extents of a worker, the least recently used first."""
        return [self.by_number[number] for number in self.there.get((worker, kind), ())]

    def on_disk(self, worker: str) -> int:
        """Number of blocks on a worker's disk, without those that are being written."""
        copying = (self.by_number[number] for number in self.copying.values())
        under_way = sum(len(one.keys) for one in copying if (one.worker, one.kind) == (worker, "disk"))
        return self.blocks[worker, "disk"] - under_way

    def may_write(self, worker: str, now: float) -> bool:
        """Whether a worker's disk has not failed lately."""
        return worker not in self.failed or now - self.failed[worker][0] > RESTS
