"""Starts: chunks that their otherwise idle worker should have started."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from distkv_dask.errors import GangAbortedError
from distkv_dask.gang import PrefillChunk


@dataclass(slots=True)
class Starts:
    """Tracks which of one engine's workers start their work.

    Dask does not start tasks on a worker that it paused for its memory, and does not report this. ``begun`` are gangs
    of running chunks; ``idle_since`` are workers that have a chunk to compute but start nothing.
    """

    begun: set[int] = field(default_factory=set)
    idle_since: dict[str, float] = field(default_factory=dict)

    def chunk_began(self, gang: int) -> None:
        """A worker started the chunk of a gang."""
        self.begun.add(gang)

    def window_began(self, home: str) -> None:
        """A worker started a window."""
        self.idle_since.pop(home, None)

    def late(
        self, heads: Iterable[PrefillChunk], now: float, limit: float
    ) -> list[tuple[PrefillChunk, GangAbortedError]]:
        """Overdue chunks among those that are running or next, with the likely reason.

        A worker with a chunk to compute must start a chunk or a window within ``limit`` seconds.
        """
        heads = list(heads)
        self.begun &= {chunk.gang.number for chunk in heads}
        computing = {chunk.gang.home for chunk in heads if chunk.gang.number in self.begun}
        waiting = [chunk for chunk in heads if chunk.gang.home not in computing]
        self.idle_since = {chunk.gang.home: self.idle_since.get(chunk.gang.home, now) for chunk in waiting}
        late = [chunk for chunk in waiting if now - self.idle_since[chunk.gang.home] > limit]
        return [(chunk, not_started(chunk.gang.home, f"chunk {chunk.gang.name}", limit)) for chunk in late]


def not_started(worker: str, what: str, limit: float) -> GangAbortedError:
    """The error for work that a worker did not start within ``limit`` seconds."""
    return GangAbortedError(
        f"worker {worker} did not start {what} within {limit:g} s (distkv.timeouts.start): Dask paused it for its "
        "memory, or it is busy with other tasks. Lower kv_memory (distkv.kv-memory) or give the worker a larger memory "
        "limit; if it is only busy, raise the time limit"
    )
