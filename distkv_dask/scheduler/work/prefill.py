"""Prompts in prefill: cut into chunks, each computed by the worker that will hold its KV. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from distkv_dask.scheduler.commands import Command, SubmitPrefill
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.request import Live, cut_prompt
from distkv_dask.scheduler.policies.queue import prefill_slots
from distkv_dask.scheduler.work.gangs import Gangs
from distkv_dask.types import PrefillChunk


class Prefilling:
    """What is being computed of which prompts.

    Parameters
    ----------
    ledger, live, gangs
        The lifecycle's.
    chunk_tokens
        Tokens of a chunk, at most.
    """

    def __init__(self, ledger: Ledger, live: Mapping[int, Live], gangs: Gangs, chunk_tokens: int) -> None:
        self._ledger = ledger
        self._live = live
        self._gangs = gangs
        self._chunk_tokens = chunk_tokens
        self._running: set[int] = set()

    @property
    def has_room(self) -> bool:
        """Whether another prompt may begin.

        Questions with a chunk of their own at most do not count: those run together, and then decode together.
        """
        prompts = [self._live[sequence] for sequence in self._running]
        long = sum(not one.reused or len(one.prompt) - one.reused > self._chunk_tokens for one in prompts)
        return long < prefill_slots(self._ledger)

    def begin(self, live: Live, start: int, lost: Sequence[tuple[int, int]] = ()) -> SubmitPrefill:
        """Compute what is known of a sequence, from a position on, and before that what it ``lost``.

        Its last chunk draws the first token, unless it is a document or its tokens so far are only computed anew.
        """
        self._running.add(live.sequence)
        account, step = self._ledger.sequences[live.sequence], self._chunk_tokens
        placement, known = account.placement, live.known
        draws = not live.is_document and not live.generated
        chunks: list[PrefillChunk] = []
        ranges = [*lost, (start, len(known))]
        pieces = (piece for first, last in ranges for piece in cut_prompt(placement, first, last, step))
        for holder, first, last in pieces:
            worker = holder if self._ledger.workers[holder].can_decode else account.home
            holders = tuple(self._ledger.holders(placement, last, but=worker))
            gang = self._gangs.new("prefill", live.sequence, first // step, self._ledger.epoch, worker, holders)
            draws_here = draws and last == len(known)
            chunks.append(
                PrefillChunk(
                    gang,
                    live.sequence,
                    placement,
                    first,
                    tuple(known[first:last]),
                    live.sampling if draws_here else None,
                    live.history if draws_here else (),
                )
            )
        live.chunks = {chunk.gang.number: chunk for chunk in chunks}
        return SubmitPrefill(tuple(chunks))

    def again(self, live: Live, reason: str) -> Iterator[Command]:
        """Give up the chunks that are not done, and submit them anew."""
        yield from self.stop(live, reason)
        yield self.begin(live, self._ledger.sequences[live.sequence].length)

    def stop(self, live: Live, reason: str) -> Iterator[Command]:
        """Give up the chunks that are not done."""
        for chunk in live.chunks.values():
            yield from self._gangs.abandon(chunk.gang, reason)
        live.chunks.clear()
        self.ended(live.sequence)

    def ended(self, sequence: int) -> None:
        """A sequence is not in prefill any more, if it was."""
        self._running.discard(sequence)

    def awaited_by(self, home: str) -> bool:
        """Whether a prompt is about to join a home, or needs its lane next."""
        joining = any(self._ledger.sequences[sequence].home == home for sequence in self._running)
        return joining or any(chunk.gang.home == home for chunk in self.heads())

    def heads(self) -> Iterator[PrefillChunk]:
        """The chunk of each prompt that is computed now, or next."""
        for sequence in self._running:
            yield from islice(self._live[sequence].chunks.values(), 1)
