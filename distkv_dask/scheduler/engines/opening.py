"""Which workers have been asked to open or close an engine, and what became of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping

from distkv_dask.errors import ClusterError
from distkv_dask.messages.from_worker import Opened

MAX_REOPENINGS = 3
"""How many times a worker reopens an engine that it lost, so that a permanent fault of its lanes ends."""


class Opening:
    """Answers of workers, and those who wait for them.

    Parameters
    ----------
    facts
        Reports of the workers on which the engine is open, kept by the engine.

    Attributes
    ----------
    pending
        Workers whose answer is expected.
    failure
        Why a worker could not open the engine, until it is open; workers that come later do not concern it.
    """

    def __init__(self, facts: Mapping[str, Opened]) -> None:
        self.pending: set[str] = set()
        self.failure: Exception | None = None
        self._facts = facts
        self._silent: set[str] = set()
        self._lost = ""
        self._is_over = False
        self._repeated: Counter[str] = Counter()
        self._changed = asyncio.Event()

    # What happens

    def ask(self, worker: str) -> None:
        """A worker is asked to open the engine."""
        self.pending.add(worker)
        self._silent.discard(worker)

    def await_hello(self, worker: str) -> None:
        """A worker will be asked to open it once its version is known."""
        self.pending.add(worker)
        self._silent.add(worker)

    def answered(self, worker: str) -> None:
        """A worker opened or closed it, or is not part of it."""
        self.pending.discard(worker)
        self._silent.discard(worker)
        self.changed()

    def failed(self, worker: str, error: Exception) -> None:
        """A worker could not open it."""
        if not self._is_over:
            self.failure = self.failure or error
        self.answered(worker)

    def lost(self, worker: str) -> None:
        """A worker died or left."""
        if not self._is_over:
            self._lost = worker
        self.answered(worker)

    def may_repeat(self, worker: str) -> bool:
        """Whether a live worker that lost the engine should reopen it; counts the attempts."""
        self._repeated[worker] += 1
        return self._repeated[worker] <= MAX_REOPENINGS

    def finish(self) -> None:
        """The engine is open: what failed until now is past."""
        self._is_over, self.failure, self._lost = True, None, ""
        self.changed()

    def changed(self) -> None:
        """Have those who wait look again."""
        self._changed.set()

    # What is known

    def is_asked(self, worker: str) -> bool:
        """Whether a worker has been asked, and has not answered."""
        return worker in self.pending and worker not in self._silent

    @property
    def can_decode(self) -> bool:
        """Whether the engine is open, and a worker can decode now; others only hold KV or further layers."""
        return self._is_over and self._has_instance

    @property
    def _has_instance(self) -> bool:
        return any(facts.role == "instance" for facts in self._facts.values())

    # Who waits

    async def until(self, done: Callable[[], bool], limit: float) -> bool:
        """Wait until something holds; False if it did not within ``limit`` seconds."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit
        while not done():
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), deadline - loop.time())
            except TimeoutError:
                return False
            if changed is self._changed:  # a new one, not clear(): another waiter may be about to look at this one
                self._changed = asyncio.Event()
        return True

    async def settled(self, limit: float) -> bool:
        """Wait until all workers have answered; False after ``limit`` seconds."""
        return await self.until(lambda: not self.pending, limit)

    async def wait_open(self, limit: float) -> None:
        """Wait until every worker is ready.

        Raises
        ------
        DistKVError
            The first worker's error, or that workers did not answer in time.
        """
        settled = await self.settled(limit)
        if self.failure is not None:
            raise self.failure
        if not settled:
            raise ClusterError(
                f"workers {sorted(self.pending)} did not open the engine within {limit:g} s (distkv.timeouts.open)"
            )
        if not self._has_instance:
            raise ClusterError(
                f"worker {self._lost} died while it opened the engine; see its log. If it ran out of memory, lower "
                f"kv_memory or give workers a higher memory limit."
            )
