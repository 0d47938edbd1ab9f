"""Documents that are written to files by the workers that hold them, and read from files instead of computed.

Saving is a request of its own, which shares the whole document and generates nothing: so the document is there, and its
blocks stay where they are, until all workers have written theirs. Pure: events go in, commands come out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from distkv_dask.protocol import Delivery, Saved, SavedFile
from distkv_dask.scheduler.commands import Command, Fetch, Store
from distkv_dask.scheduler.documents import Documents
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.live import Live
from distkv_dask.types import FinishReason, Placement

End = Callable[[int, FinishReason, float, Exception | None], Iterator[Command]]


class Saving:
    """Files under way of one engine.

    Parameters
    ----------
    ledger, live, documents
        The lifecycle's.
    end
        Ends a request, or a document that could not be had.
    """

    def __init__(self, ledger: Ledger, live: Mapping[int, Live], documents: Documents, end: End) -> None:
        self._ledger = ledger
        self._live = live
        self._documents = documents
        self._end = end
        self._files: dict[int, list[SavedFile]] = {}

    def begin(self, live: Live) -> Iterator[Command]:
        """A request to save has its document, or a document that is saved somewhere has room."""
        placement = self._ledger.sequences[live.sequence].placement
        assert live.saved is not None
        ranges = _ranges(placement)
        live.answering = set(ranges)
        for worker, some in ranges.items():
            if live.saves:
                assert live.document is not None
                yield Store(worker, live.sequence, live.document, some, live.saved)
            else:
                yield Fetch(worker, live.sequence, some, live.saved)
        live.state = "saving" if live.saves else "fetching"
        self._files[live.sequence] = []

    def stored(
        self, number: int, worker: str, files: tuple[SavedFile, ...], error: Exception | None, now: float
    ) -> Iterator[Command]:
        """A worker wrote its part of a document, or could not."""
        live = self._live.get(number)
        if live is None or live.state != "saving":
            return
        if error is not None:
            yield from self._end(number, "error", now, error)
            return
        self._files[number] += files
        live.answering.discard(worker)
        if not live.answering:
            assert live.saved is not None
            saved = Saved(live.saved.place, tuple(sorted(self._files.pop(number), key=lambda file: file.start)))
            if live.document is not None and live.document in self._live:
                self._live[live.document].saved = saved
            yield Delivery(number, (), "stop", None, live.timings(now), files=saved.files)
            yield from self._documents.forget(live, now)

    def fetched(self, number: int, worker: str, error: Exception | None, now: float) -> Iterator[Command]:
        """A worker read its part of a document, or could not: then it is computed, if it was there once."""
        live = self._live.get(number)
        if live is None or live.state != "fetching":
            return
        live.failure = live.failure or error
        live.answering.discard(worker)
        if live.answering:
            return
        failure, live.failure = live.failure, None
        if failure is None:
            self._ledger.commit(number, len(live.prompt))
            yield from self._documents.stored(live, now)
            return
        live.saved = None
        if live.announced:
            yield from self._documents.drop(live, now)
        else:
            yield from self._end(number, "error", now, failure)

    def forget(self, number: int) -> None:
        """A request is over."""
        self._files.pop(number, None)


def _ranges(placement: Placement) -> dict[str, tuple[tuple[int, int], ...]]:
    """Token ranges by worker."""
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    for span in placement:
        ranges[span.worker] = (*ranges.get(span.worker, ()), (span.start, span.stop))
    return ranges
