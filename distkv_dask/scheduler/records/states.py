"""States of a request, each with the data that only this state has.

Only :mod:`~distkv_dask.scheduler.lifecycle.transitions` gives a request another state, and only methods of these
classes change the data of one: they are all that may happen within a state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from distkv_dask.gang import PrefillChunk
from distkv_dask.messages.from_worker import ChunkDone, Prefilled
from distkv_dask.messages.names import SavedFile

ASIDE = "aside"
"""Label of a waiting request that others overtake, because it cannot run on the workers that stay."""


@dataclass(slots=True)
class State:
    """Base of all states; users see the ``label``."""

    label: ClassVar[str] = ""


@dataclass(slots=True)
class Waiting(State):
    """It waits for room, or for its document to be stored.

    ``submitted`` replaces its submission time, if given; ``rank`` is its earlier place in the queue, if it had one;
    ``latest`` that of its document, which was restored for it and must not be evicted for others in the meantime.
    """

    label: ClassVar[str] = "waiting"
    submitted: float | None = None
    rank: float | None = None
    latest: float = math.inf


@dataclass(slots=True)
class Prefill(State):
    """Its prompt or lost KV is computed: first the ``lost`` ranges, then tokens from ``start`` on.

    ``chunks`` are the unfinished ones, by gang number. ``failures`` counts failures since the last success, which began
    at ``failing_since``; the next attempt is at ``rests_until``.

    In a ``wavefront`` several workers compute chunks at once: those ``under_way`` were submitted. Results that came
    before those of earlier chunks are in ``early``.
    """

    label: ClassVar[str] = "prefill"
    start: int
    lost: tuple[tuple[int, int], ...] = ()
    chunks: dict[int, PrefillChunk] = field(default_factory=dict)
    failures: int = 0
    failing_since: float = 0.0
    rests_until: float | None = None
    wavefront: bool = False
    under_way: set[int] = field(default_factory=set)
    early: dict[int, ChunkDone | Prefilled] = field(default_factory=dict)

    def heads(self) -> list[PrefillChunk]:
        """The chunks that are computed now, or next."""
        if not self.wavefront:
            return list(self.chunks.values())[:1]
        return [chunk for number, chunk in self.chunks.items() if number in self.under_way and number not in self.early]

    # Which chunks there are

    def begin(self, chunks: Iterable[PrefillChunk], *, wavefront: bool) -> None:
        """These chunks are to be computed; those of a ``wavefront`` are submitted one by one."""
        self.chunks, self.wavefront = {chunk.gang.number: chunk for chunk in chunks}, wavefront

    def submit(self, chunk: PrefillChunk) -> None:
        """A chunk of a wavefront is submitted, in the form that its worker gets."""
        self.chunks[chunk.gang.number] = chunk
        self.under_way.add(chunk.gang.number)

    def cut_at(self, start: int) -> None:
        """Forget the chunks of a wavefront that were not submitted: tokens from ``start`` on get others."""
        self.chunks = {number: chunk for number, chunk in self.chunks.items() if number in self.under_way}
        self.start = start

    def add(self, chunks: Iterable[PrefillChunk]) -> None:
        """These chunks come after all others."""
        self.chunks |= {chunk.gang.number: chunk for chunk in chunks}

    def drop(self) -> list[PrefillChunk]:
        """Forget all chunks; returns those that were submitted and not recorded."""
        submitted = [chunk for number, chunk in self.chunks.items() if number in self.under_way or not self.wavefront]
        self.chunks, self.under_way, self.early = {}, set(), {}
        return submitted

    def resume(self, start: int) -> None:
        """Tokens from ``start`` on are to be computed now, after a failure."""
        self.start, self.lost, self.rests_until = start, (), None

    # What became of them

    def computed(self, result: ChunkDone | Prefilled) -> None:
        """A worker computed a chunk."""
        self.early[result.gang] = result

    def next_result(self) -> ChunkDone | Prefilled | None:
        """The result of the first chunk, if it has come; it is returned once."""
        return self.early.pop(next(iter(self.chunks)), None) if self.chunks else None

    def record(self, gang: int) -> PrefillChunk:
        """A chunk is recorded and no longer one of those to compute; returns it."""
        self.failures = 0
        return self.chunks.pop(gang)

    def failed(self, now: float) -> None:
        """A chunk failed."""
        self.failing_since = self.failing_since if self.failures else now
        self.failures += 1

    def rest(self, until: float) -> None:
        """Try again only at a later time."""
        self.rests_until = until


@dataclass(slots=True)
class Decode(State):
    """Its home decodes it."""

    label: ClassVar[str] = "decode"


@dataclass(slots=True)
class Retiring(State):
    """It is being stopped: it continues or ends only when workers confirm that they no longer compute on it.

    First it ``waits_for`` the workers that run its forwards, then for all its holders, so that none has an unanswered
    frame. If its files are being read, it waits for their readers only. ``workers`` have not answered yet. With
    ``settled`` nothing computes on it, so no worker is asked. With ``again`` it continues later: it lost blocks, or was
    preempted by one of higher priority.
    """

    label: ClassVar[str] = "retiring"
    again: bool = False
    settled: bool = False
    workers: set[str] = field(default_factory=set)
    waits_for: Literal["forwards", "holders", "readers"] = "forwards"

    def ask(self, workers: Iterable[str]) -> None:
        """These workers are asked to stop computing on it."""
        self.workers = set(workers)

    def wait_for_readers(self, workers: Iterable[str]) -> None:
        """Nothing computes on it, but these workers read its files."""
        self.workers, self.waits_for = set(workers), "readers"

    def waits_for_reader(self, worker: str) -> bool:
        """Whether this worker reads its files."""
        return self.waits_for == "readers" and worker in self.workers

    def answered(self, worker: str) -> bool:
        """A worker no longer computes on it or is gone; returns whether no other is waited for."""
        self.workers.discard(worker)
        return not self.workers

    def end_forwards(self) -> None:
        """No worker runs its forwards any more."""
        self.waits_for = "holders"

    def take_over(self, other: Retiring) -> None:
        """Wait for the workers that another one waited for."""
        self.settled, self.workers, self.waits_for = other.settled, other.workers, other.waits_for


@dataclass(slots=True)
class Stored(State):
    """A document whose blocks are stored for others to share."""

    label: ClassVar[str] = "document"


@dataclass(slots=True)
class Dropped(State):
    """An evicted document; it is recomputed from its tokens at its next question."""

    label: ClassVar[str] = "dropped"


@dataclass(slots=True)
class FilesUnderWay(State):
    """Workers write or read its blocks; those in ``answering`` have not reported yet.

    ``asked`` is when they started, ``failure`` the first error.
    """

    answering: set[str] = field(default_factory=set)
    asked: float = 0.0
    failure: Exception | None = None

    def ask(self, workers: Iterable[str], now: float) -> None:
        """These workers are asked to write or read."""
        self.answering, self.asked = set(workers), now

    def forget(self, worker: str) -> None:
        """A worker is gone: it will not report."""
        self.answering.discard(worker)

    def answered(self, worker: str, error: Exception | None) -> bool:
        """A worker has finished its part or failed; returns whether all have."""
        if worker not in self.answering:
            return False
        self.failure = self.failure or error
        self.answering.discard(worker)
        return not self.answering


@dataclass(slots=True)
class Saving(FilesUnderWay):
    """A request to save a document: its blocks are written into a user's folder. ``files`` are finished."""

    label: ClassVar[str] = "saving"
    files: list[SavedFile] = field(default_factory=list)

    def wrote(self, files: Iterable[SavedFile]) -> None:
        """A worker has written these files."""
        self.files += files


@dataclass(slots=True)
class Spilling(FilesUnderWay):
    """Its blocks are written to lower tiers; with ``again`` it waits for room afterwards, else it is a document."""

    label: ClassVar[str] = "spilling"
    again: bool = False

    def take_over(self, other: Spilling) -> None:
        """Wait for the workers that another one waited for."""
        self.answering, self.asked, self.failure = other.answering, other.asked, other.failure


@dataclass(slots=True)
class Fetching(FilesUnderWay):
    """Its blocks are read from files: all of them, or token ``ranges`` of its prompt that ``extents`` have.

    ``tokens`` are those of each kind of extent. If one of them is dropped in the meantime, the read data is ``spoilt``.
    """

    label: ClassVar[str] = "fetching"
    extents: tuple[int, ...] = ()
    ranges: tuple[tuple[int, int], ...] = ()
    tokens: Counter[str] = field(default_factory=Counter)
    spoilt: bool = False

    def spoil(self) -> None:
        """Some of what is being read was dropped."""
        self.spoilt = True


@dataclass(slots=True)
class Gone(State):
    """It has ended and is forgotten. Requests that wait for it fail with the ``error``."""

    error: Exception | None = None


UNDER_WAY: tuple[type[State], ...] = (Waiting, Prefill, Decode, Retiring, Saving, Spilling, Fetching)
"""States of requests that are running or waiting."""
