"""Losses: what becomes of a sequence whose worker is gone or begins nothing, whatever was being done with it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from distkv_dask.errors import DistKVError, without_quotes
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.kept.documents import Documents
from distkv_dask.scheduler.kept.files import Saving
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.ends import Ending
from distkv_dask.scheduler.lifecycle.refusals import workers_lost
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.lifecycle.retirement import Retiring
from distkv_dask.scheduler.lifecycle.retries import MAX_RETRIES
from distkv_dask.scheduler.moves.moving import Moving
from distkv_dask.scheduler.work.prefill import Prefilling

MAX_LOSSES = 3
"""How many workers a request may lose blocks with before it fails, as Dask's allowed-failures: it may be the cause."""


class Losses:
    """Sees to one engine's sequences.

    Parameters
    ----------
    ledger, documents, saving, prefilling, moving, retiring, ending
        The lifecycle's.
    """

    def __init__(
        self,
        ledger: Ledger,
        documents: Documents,
        saving: Saving,
        prefilling: Prefilling,
        moving: Moving,
        retiring: Retiring,
        ending: Ending,
    ) -> None:
        self._ledger = ledger
        self._documents = documents
        self._saving = saving
        self._prefilling = prefilling
        self._moving = moving
        self._retiring = retiring
        self._ending = ending

    def lost(self, live: Live, worker: str, now: float) -> Iterator[Command]:
        """A sequence lost blocks: it is computed anew, a document when it is next asked."""
        if live.state == "retiring":
            return
        if live.state == "spilling":
            yield from self._saving.lost(live, worker, now)
        elif not live.is_document:
            live.lost.append(worker)
            live.answering.discard(worker)
            if live.saves:
                yield from self._saving.stored(live.sequence, worker, (), workers_lost(live), now)
            elif len(live.lost) > MAX_LOSSES:
                yield from self._ending.end(live.sequence, "error", now, workers_lost(live))
            else:
                yield from self._compute_again(live, now, f"a worker with blocks of the request is gone: {worker}")
        elif live.state in ("prefill", "fetching"):
            live.answering.discard(worker)
            yield from self._prefilling.stop(live, "a worker with blocks of the document is gone")
            yield from self._retiring.begin(live, now)
        elif not self._ledger.sequences[live.sequence].sharers:  # else with the last of them
            yield from self._documents.lost(live, now)

    def stalled(self, live: Live, error: DistKVError, now: float) -> Iterator[Command]:
        """A worker does not begin what a sequence waits for: a request is computed elsewhere, but not for ever."""
        live.stalls += 1
        if live.is_document or live.stalls > MAX_RETRIES:
            yield from self._ending.end(live.sequence, "error", now, error)
        else:
            yield from self._compute_again(live, now, without_quotes(error))

    def _compute_again(self, live: Live, now: float, reason: str) -> Iterator[Command]:
        """Free what is left of a request's blocks, once nobody computes on them, and let it wait for room again."""
        self._moving.forget(live.sequence)
        yield from self._prefilling.stop(live, reason)
        live.again = True
        yield from self._retiring.begin(live, now)
