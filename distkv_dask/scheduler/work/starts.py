"""Starts: chunks of prompts that their worker should have begun, because it does nothing else. Pure."""

from __future__ import annotations

from distkv_dask.errors import GangAbortedError
from distkv_dask.scheduler.work.prefill import Prefilling
from distkv_dask.types import PrefillChunk


class Starts:
    """Which of one engine's workers begin what they are given.

    Dask does not start tasks on a worker that it paused for its memory, and tells nobody.

    Parameters
    ----------
    prefilling
        The lifecycle's.
    limit
        Seconds in which a worker with a chunk to compute must begin a chunk or a window.
    """

    def __init__(self, prefilling: Prefilling, limit: float) -> None:
        self._prefilling = prefilling
        self._limit = limit
        self._begun: set[int] = set()
        self._idle_since: dict[str, float] = {}

    def chunk_began(self, gang: int) -> None:
        """A worker began the chunk of a gang."""
        self._begun.add(gang)

    def window_began(self, home: str) -> None:
        """A worker began a window."""
        self._idle_since.pop(home, None)

    def late(self, now: float) -> list[tuple[PrefillChunk, GangAbortedError]]:
        """Chunks that should have begun long ago, and why that may be."""
        heads = list(self._prefilling.heads())
        self._begun &= {chunk.gang.number for chunk in heads}
        computing = {chunk.gang.home for chunk in heads if chunk.gang.number in self._begun}
        waiting = [chunk for chunk in heads if chunk.gang.home not in computing]
        self._idle_since = {chunk.gang.home: self._idle_since.get(chunk.gang.home, now) for chunk in waiting}
        late = [chunk for chunk in waiting if now - self._idle_since[chunk.gang.home] > self._limit]
        return [(chunk, not_started(chunk.gang.home, f"chunk {chunk.gang.name}", self._limit)) for chunk in late]


def not_started(worker: str, what: str, limit: float) -> GangAbortedError:
    """Error for what a worker was given to compute, and did not begin within ``limit`` seconds."""
    return GangAbortedError(
        f"worker {worker} did not start {what} within {limit:g} s (distkv.timeouts.start): Dask paused it for its "
        "memory, or it is busy with other tasks. Lower kv_memory (distkv.kv-memory) or give the worker a larger memory "
        "limit; if it is only busy, raise the time limit"
    )
