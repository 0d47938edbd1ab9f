"""Retiring: workers say that they compute on a sequence no more, and only then its blocks are free, or kept.

So a late write never lands in somebody else's block. Pure: events go in, commands come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.kept.disk import Spilling
from distkv_dask.scheduler.kept.documents import Documents
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.repair import Mending
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.policies.queue import Admission


class Retiring:
    """Sequences of one engine that stop in the middle of something.

    Parameters
    ----------
    ledger, queue, documents, spilling, mending
        The lifecycle's.
    forget
        Forgets a request that has ended.
    go_on
        Makes use of room that has become free.
    """

    def __init__(
        self,
        ledger: Ledger,
        queue: Admission,
        documents: Documents,
        spilling: Spilling,
        mending: Mending,
        forget: Callable[[Live, float], Iterator[Command]],
        go_on: Callable[[float], Iterator[Command]],
    ) -> None:
        self._ledger = ledger
        self._queue = queue
        self._documents = documents
        self._spilling = spilling
        self._mending = mending
        self._forget = forget
        self._go_on = go_on

    def begin(self, live: Live, now: float) -> Iterator[Command]:
        """Let the workers that run forwards of a sequence, then its holders, say that they compute on it no more."""
        account, fetching = self._ledger.sequences[live.sequence], live.state == "fetching"
        computing = {account.home} if live.state == "decode" else {*account.workers()}
        live.state, live.forwards_ended = "retiring", fetching
        if fetching:  # who still reads files says so by FETCHED
            live.retiring = set(live.answering)
        else:
            yield from self._retire(live, computing)
        if not live.retiring:
            yield from self.retired(live, "", now)

    def retired(self, live: Live, worker: str, now: float) -> Iterator[Command]:
        """A worker computes on a sequence that retires no more.

        First those that run its forwards are waited for; then all of its holders, so that none has a frame of them left
        to answer; then its blocks are freed.
        """
        live.retiring.discard(worker)
        if live.retiring:
            return
        if not live.forwards_ended:
            live.forwards_ended = True
            yield from self._retire(live, {*self._ledger.sequences[live.sequence].workers()})
        if not live.retiring:
            yield from self.release(live, now)
            yield from self._go_on(now)

    def _retire(self, live: Live, workers: set[str]) -> Iterator[Command]:
        live.retiring = {worker for worker in workers if worker in self._ledger.workers}
        for worker in tuple(live.retiring):
            yield live.retire(worker)

    def release(self, live: Live, now: float) -> Iterator[Command]:
        """Nothing computes on a sequence any more: free its blocks, or keep what is a document from now on."""
        if live.is_document:
            live.forwards_ended, live.retries = False, 0
            yield from self._mending.mend(live) or self._documents.drop(live, now)
        elif live.again and (commands := self._mending.mend(live)):
            live.again = False
            yield from commands
        elif live.again and self._spilling.pays(live, self._queue.policy.model):
            yield from self._spilling.begin(live, now)
        elif live.again:
            live.again = False
            yield from self._documents.give_back(live, now)
        elif live.keeps and live.ended in ("stop", "length"):
            yield from self._documents.kept(live, now)
        else:
            yield from self._forget(live, now)
