"""Blocks that go to files and come back: documents that users save and load, and sequences that are spilled.

Saving is a request of its own, which shares the whole document and generates nothing: so the document is there, and its
blocks stay where they are, until all workers have written theirs. Pure: events go in, commands come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from distkv_dask.errors import GangAbortedError
from distkv_dask.protocol import Delivery, Saved, SavedFile
from distkv_dask.scheduler.commands import Command, Fetch, Store
from distkv_dask.scheduler.kept.disk import Spilling, ranges_of
from distkv_dask.scheduler.kept.documents import Documents
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.ends import Ending
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.work.homes import Homes
from distkv_dask.scheduler.work.prefill import Prefilling


class Saving:
    """Files under way of one engine.

    Parameters
    ----------
    ledger, live, documents, spilling, prefilling, homes, ending
        The lifecycle's.
    """

    def __init__(
        self,
        ledger: Ledger,
        live: Mapping[int, Live],
        documents: Documents,
        spilling: Spilling,
        prefilling: Prefilling,
        homes: Homes,
        ending: Ending,
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._documents = documents
        self._spilling = spilling
        self._prefilling = prefilling
        self._homes = homes
        self._ending = ending
        self._files: dict[int, list[SavedFile]] = {}

    def begin(self, live: Live, now: float) -> Iterator[Command]:
        """A request to save has its document, or a sequence that is saved somewhere has room."""
        account = self._ledger.sequences[live.sequence]
        assert live.saved is not None
        ranges = ranges_of(account.placement if live.saves else account.own, live.known_tokens)
        live.answering, live.asked = set(ranges), now
        live.state = "saving" if live.saves else "fetching"
        if live.saves:
            self._files[live.sequence] = []
        for worker, some in ranges.items():
            if live.saves:
                assert live.document is not None
                yield Store(worker, live.sequence, live.document, some, live.saved)
            else:
                yield Fetch(worker, live.sequence, some, live.saved)

    # Written

    def stored(
        self, number: int, worker: str, files: tuple[SavedFile, ...], error: Exception | None, now: float
    ) -> Iterator[Command]:
        """A worker wrote its part of a document, or of a sequence that is spilled, or could not."""
        if number < 0:
            spilled = self._spilling.sequence_of(number)
            yield from self._spilling.stored(number, worker, files, error, now)
            yield from self._spilled(spilled, now)
            return
        live = self._live.get(number)
        if live is None or live.state != "saving":
            return
        live.failure = live.failure or error
        self._files[number] += files
        live.answering.discard(worker)
        if live.answering:  # also those of a save that failed: then all that they wrote can be deleted
            return
        if live.failure is not None:
            yield from self._ending.end(number, "error", now, live.failure)
        else:
            assert live.saved is not None
            written = tuple(sorted(self._files.pop(number), key=lambda file: file.start))
            if live.document is not None and live.document in self._live:
                yield from self._spilling.forget(self._live[live.document])
                self._live[live.document].saved = Saved(live.saved.place, written)
            yield Delivery(number, (), "stop", None, live.timings(now), files=written)
            yield from self._documents.forget(live, now)

    def lost(self, live: Live, worker: str, now: float) -> Iterator[Command]:
        """A worker died that was writing a part of a sequence that is spilled."""
        yield from self._spilling.lost(live, worker, GangAbortedError(f"worker {worker} is gone"))
        yield from self._spilled(live, now)

    def expire(self, now: float, limit: float) -> Iterator[Command]:
        """Wait no more for disks that need longer than ``limit`` seconds: what they hold is computed anew."""
        for live in self._spilling.late(now, limit):
            for worker in tuple(live.answering):
                yield from self._spilling.lost(live, worker, TimeoutError(f"the disk of {worker} is too slow"))
            yield from self._spilled(live, now)

    def _spilled(self, live: Live | None, now: float) -> Iterator[Command]:
        """All workers wrote their parts of a sequence, or did not: it gives up its blocks."""
        if live is None or live.answering:
            return
        if live.is_document:
            yield from self._documents.drop(live, now)
        elif live.again:
            live.again = False
            yield from self._documents.give_back(live, now)
        else:  # it ended meanwhile
            yield from self._ending.forget(live, now)

    # Read

    def fetched(self, number: int, worker: str, error: Exception | None, now: float) -> Iterator[Command]:
        """A worker read its part of a sequence, or could not: then it is computed, if it was there once."""
        live = self._live.get(number)
        if live is None or live.state != "fetching":
            return
        live.failure = live.failure or error
        live.answering.discard(worker)
        if live.answering:
            return
        failure, live.failure = live.failure, None
        if failure is None:
            self._ledger.commit(number, live.known_tokens)
        if failure is not None or not live.is_document:
            yield from self._spilling.forget(live)
            live.saved = None
        if failure is None and live.is_document:
            yield from self._documents.stored(live, now)
        elif failure is None:
            live.state = "decode"
            yield from self._homes.join(live)
        elif not live.is_document:
            live.state = "prefill"
            yield self._prefilling.begin(live, live.reused)
        elif live.announced:
            yield from self._documents.drop(live, now)
        else:
            yield from self._ending.end(number, "error", now, failure)

    def forget(self, number: int) -> None:
        """A request is over."""
        self._files.pop(number, None)
