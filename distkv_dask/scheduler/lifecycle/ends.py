"""Ends: a request is answered, cancelled or fails, and its client hears of it once. Pure: commands come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from distkv_dask.errors import InvalidRequestError, without_quotes
from distkv_dask.protocol import Delivery
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.kept.documents import Documents
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.lifecycle.retirement import Retiring
from distkv_dask.scheduler.moves.moving import Moving
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.scheduler.work.homes import Homes
from distkv_dask.scheduler.work.prefill import Prefilling
from distkv_dask.types import FinishReason


class Ending:
    """Ends requests and documents of one engine, whatever is being done with them.

    Parameters
    ----------
    ledger, live, queue, homes, prefilling, moving, documents, retiring
        The lifecycle's.
    forget_files
        Told of a request whose files are of no use any more.
    admit
        Gives room that has become free to requests that wait.
    """

    def __init__(
        self,
        ledger: Ledger,
        live: Mapping[int, Live],
        queue: Admission,
        homes: Homes,
        prefilling: Prefilling,
        moving: Moving,
        documents: Documents,
        retiring: Retiring,
        forget_files: Callable[[int], None],
        admit: Callable[[float], Iterator[Command]],
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._queue = queue
        self._homes = homes
        self._prefilling = prefilling
        self._moving = moving
        self._documents = documents
        self._retiring = retiring
        self._forget_files = forget_files
        self._admit = admit

    def end(
        self,
        sequence: int,
        reason: FinishReason,
        now: float,
        error: Exception | None = None,
        *,
        settled: bool = False,
    ) -> Iterator[Command]:
        """Tell the client, and free the blocks: at once when nobody computes on them (``settled``), else later."""
        live = self._live[sequence]
        if live.is_document:
            yield from self.end_document(live, now, error)
            return
        account = self._ledger.sequences.get(sequence)
        placement = account.placement if account is not None else ()
        yield Delivery(sequence, (), reason, error, live.timings(now), placement, live.reused)
        self._moving.forget(sequence)
        live.ended = reason
        if live.again:  # it retires already
            live.again = False
            return
        if account is None:
            if sequence in self._queue:
                self._queue.withdraw(sequence)
            yield from self.forget(live, now, error)
            yield from self._admit(now)
            return
        yield from self._prefilling.stop(live, f"the request ended: {without_quotes(error) if error else reason}")
        self._homes.leave(sequence)
        if settled or live.saves:
            self._forget_files(sequence)
            yield from self._retiring.release(live, now)
            yield from self._admit(now)
            return
        yield from self._retiring.begin(live, now)

    def end_document(self, live: Live, now: float, error: Exception | None = None) -> Iterator[Command]:
        """A document is needed no more, or could not be computed: then who waits for it fails with it."""
        if not live.announced:
            yield Delivery(live.sequence, (), "cancelled" if error is None else "error", error, live.timings(now))
            live.announced = live.released = True
        if error is not None:
            yield from self._fail_awaited(live, now, error)
        self._documents.leave_queue(live)
        if live.state in ("prefill", "fetching"):
            yield from self._prefilling.stop(
                live, f"the document ended: {without_quotes(error) if error else 'released'}"
            )
            yield from self._retiring.begin(live, now)
        elif live.sequence in self._live:
            yield from self._documents.unneeded(live, now)
        yield from self._admit(now)

    def forget(self, live: Live, now: float, error: Exception | None = None) -> Iterator[Command]:
        """A request is over, and nothing is kept of it."""
        lost = InvalidRequestError("the answer that this question builds on was not finished: ask that one again")
        yield from self._fail_awaited(live, now, error or lost)
        yield from self._documents.forget(live, now)

    def _fail_awaited(self, live: Live, now: float, error: Exception) -> Iterator[Command]:
        for sequence in tuple(live.awaited):
            yield from self.end(sequence, "error", now, error)
