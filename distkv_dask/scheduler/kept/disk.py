"""Spilling: blocks that make room go to the disks of the workers that hold them, where reading back beats computing.

The lower tier of the KV cache. Two kinds of sequences are spilled: a document that nobody asks just now, of which a
copy stays until it is released, so that giving it up again costs nothing; and a request that makes way for one of
higher priority, whose copy goes when it comes back. Tokens stay at the gManager, so what a disk loses is computed anew.
Pure: the lifecycle calls, commands come out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from distkv_dask.protocol import OWN_DISK, Saved, SavedFile, SpilledFile
from distkv_dask.scheduler.commands import Command, Discard, Store
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import clipped
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.types import Placement

BYTES_PER_SECOND = 0.5e9
"""What a disk is taken to read and write before it has shown."""

KEPT = 0.7
"""Weight of what was known of the disks when one shows its speed again."""


@dataclass(slots=True)
class _Copy:
    """Number of a spill, bytes of the sequence by worker, since when they are written, and the files that are there."""

    number: int
    bytes: Counter[str]
    began: float
    files: list[SpilledFile] = field(default_factory=list)
    whole: bool = False


class Spilling:
    """What is on the workers' disks, and on its way there.

    Parameters
    ----------
    ledger, live
        The lifecycle's.
    block_bytes
        Bytes of a block, once they are known.
    """

    def __init__(self, ledger: Ledger, live: Mapping[int, Live], block_bytes: Callable[[], int]) -> None:
        self._ledger = ledger
        self._live = live
        self._block_bytes = block_bytes
        self._capacity: dict[str, int] = {}
        self._copies: dict[int, _Copy] = {}
        self._numbers: dict[int, int] = {}
        self._spills = 0
        self._rate = BYTES_PER_SECOND
        self.used: Counter[str] = Counter()
        """Bytes on each worker's disk."""

    def worker_ready(self, worker: str, capacity: int) -> None:
        """A worker has so many bytes of disk for us."""
        self._capacity[worker] = capacity

    # Down

    @property
    def under_way(self) -> list[int]:
        """Sequences whose blocks are being written: they are free soon."""
        return [number for number, copy in self._copies.items() if not copy.whole]

    def pays(self, live: Live, model: PerformanceModel) -> bool:
        """Whether a sequence at rest should be written to disk: there is room, and computing it anew takes longer."""
        account = self._ledger.sequences[live.sequence]
        sizes = self._sizes(live)
        if account.lost or not sizes or any(self._capacity.get(one, 0) < size for one, size in sizes.items()):
            return False
        own = account.length - live.reused
        compute = model.of(account.home).prefill(own, live.reused)
        return 2 * max(sizes.values()) / self._rate < compute

    def begin(self, live: Live, now: float) -> Iterator[Command]:
        """Write a sequence, with which nothing is done meanwhile, to the disks of the workers that hold it."""
        sizes = self._sizes(live)
        for worker, size in sizes.items():
            yield from self._make_room(worker, size)
        self._spills += 1
        number = -self._spills  # those of requests to save are not negative
        self._copies[live.sequence] = _Copy(number, sizes, now)
        self._numbers[number] = live.sequence
        self.used += sizes
        account = self._ledger.sequences[live.sequence]
        ranges = ranges_of(account.own, account.length)
        live.state, live.answering, live.failure = "spilling", set(ranges), None
        live.asked = now
        for worker, some in ranges.items():
            yield Store(worker, number, live.sequence, some, Saved(OWN_DISK, tag=f"{live.sequence}{number}"))

    def sequence_of(self, number: int) -> Live | None:
        """The sequence that is being written as spill ``number``."""
        return self._live[self._numbers[number]] if number in self._numbers else None

    def stored(
        self, number: int, worker: str, files: tuple[SavedFile, ...], error: Exception | None, now: float
    ) -> Iterator[Command]:
        """A worker wrote its part, or could not. The sequence's ``answering`` is empty once all have."""
        live, spilled = self.sequence_of(number), [SpilledFile(*file, worker) for file in files]
        if live is None:
            yield from _discard(spilled)
            return
        copy = self._copies[live.sequence]
        copy.files += spilled
        live.failure = live.failure or error
        if error is None and now > copy.began:
            self._rate = KEPT * self._rate + (1 - KEPT) * copy.bytes[worker] / (now - copy.began)
        yield from self._answered(live, worker)

    def lost(self, live: Live, worker: str, error: Exception) -> Iterator[Command]:
        """A worker that was writing its part died."""
        live.failure = live.failure or error
        yield from self._answered(live, worker)

    def late(self, now: float, limit: float) -> list[Live]:
        """Sequences that are being written for longer than ``limit`` seconds."""
        return [self._live[number] for number in self.under_way if now - self._copies[number].began > limit]

    def _answered(self, live: Live, worker: str) -> Iterator[Command]:
        live.answering.discard(worker)
        if live.answering:
            return
        copy, failure = self._copies[live.sequence], live.failure
        live.failure, copy.whole = None, True
        del self._numbers[copy.number]
        if failure is None:
            live.saved = Saved(OWN_DISK, tuple(sorted(copy.files, key=lambda file: file.start)))
        else:
            yield from self.forget(live)

    # Gone

    def forget(self, live: Live) -> Iterator[Command]:
        """A sequence's copy is of no use (any more); nothing happens if it has none."""
        copy = self._copies.pop(live.sequence, None)
        if copy is None:
            return
        self.used -= copy.bytes
        if live.saved is not None and live.saved.place == OWN_DISK:
            live.saved = None
        yield from _discard(file for file in copy.files if file.worker in self._capacity)

    def worker_lost(self, worker: str) -> Iterator[Command]:
        """A disk is gone: the copies of which parts were there are of no use."""
        self._capacity.pop(worker, None)
        for number, copy in list(self._copies.items()):
            if copy.whole and worker in copy.bytes:
                yield from self.forget(self._live[number])
        del self.used[worker]

    def _make_room(self, worker: str, size: int) -> Iterator[Command]:
        """Delete copies on a disk until ``size`` more bytes fit: first of documents that are in memory, too."""
        if self.used[worker] + size <= self._capacity[worker]:
            return
        others = [self._live[n] for n, copy in self._copies.items() if copy.whole and worker in copy.bytes]
        for live in sorted(others, key=lambda one: (one.state != "document", not one.is_document, one.used)):
            if live.state != "fetching" and self.used[worker] + size > self._capacity[worker]:
                yield from self.forget(live)

    def _sizes(self, live: Live) -> Counter[str]:
        account, sizes = self._ledger.sequences[live.sequence], Counter[str]()
        for worker, ranges in ranges_of(account.own, account.length).items():
            sizes[worker] = sum(self._ledger.blocks(stop - start) for start, stop in ranges) * self._block_bytes()
        return sizes


def ranges_of(placement: Placement, tokens: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Ranges of a sequence's first tokens by worker.

    Examples
    --------
    >>> from distkv_dask.types import Span
    >>> ranges_of((Span("a", 0, 8), Span("b", 8, 12), Span("a", 12, 20)), 14)
    {'a': ((0, 8), (12, 14)), 'b': ((8, 12),)}
    """
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    for span in clipped(placement, 0, tokens):
        ranges[span.worker] = (*ranges.get(span.worker, ()), (span.start, span.stop))
    return ranges


def _discard(files: Iterable[SpilledFile]) -> Iterator[Command]:
    names: dict[str, tuple[str, ...]] = {}
    for file in files:
        names[file.worker] = (*names.get(file.worker, ()), file.name)
    for worker, some in names.items():
        yield Discard(worker, some)
