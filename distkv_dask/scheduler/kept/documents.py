"""Documents: sequences that are prefilled and then kept, so that others can share their blocks.

A document is waiting, in prefill, stored, or dropped: its blocks were lost or given to others, and come back from its
tokens when it is next asked. Its blocks are free again when its handle is released and the last sequence that shares
them is gone. The answer to a question of a chat becomes a document itself, which shares the blocks of the one before.
Pure: the lifecycle calls, commands come out.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, MutableMapping

from distkv_dask.errors import InvalidRequestError
from distkv_dask.protocol import Delivery
from distkv_dask.scheduler.commands import Command, Free
from distkv_dask.scheduler.kept.disk import Spilling
from distkv_dask.scheduler.kept.prefix_cache import PrefixCache
from distkv_dask.scheduler.kept.prefix_index import PrefixIndex
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.policies.base import PRIORITY_SECONDS, Ask
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.scheduler.policies.shared_prefix import common_tokens


class Documents:
    """What waits for which document, which one is given up when there is no room, and who is the last to need one.

    Parameters
    ----------
    ledger, live, queue, spilling, cache
        The lifecycle's.
    end_moves
        Told of a sequence whose blocks are about to be freed.
    mend
        Computes just what a sequence lost; nothing if there is no room for that now.
    """

    def __init__(
        self,
        ledger: Ledger,
        live: MutableMapping[int, Live],
        queue: Admission,
        spilling: Spilling,
        cache: PrefixCache,
        end_moves: Callable[[int], None],
        mend: Callable[[Live], list[Command]],
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._queue = queue
        self._spilling = spilling
        self._cache = cache
        self._end_moves = end_moves
        self._mend = mend
        self._index = PrefixIndex(ledger.block_tokens)

    # Requests that come

    def attach(self, live: Live) -> None:
        """A request depends on its document from now on; one that names none on whichever begins like it.

        Raises
        ------
        InvalidRequestError
            There is no such document (any more).
        """
        if live.document is None and not live.is_document:
            found = self._index.find(live.prompt[: len(live.prompt) - 1])
            if found is not None and not self._live[found].released:
                live.document, live.borrows = found, True
        if live.document is None:
            return
        document = self._live.get(live.document)
        if document is None or document.released or not (document.is_document or document.keeps):
            raise InvalidRequestError("the document was released: ingest it again to ask more questions")
        document.dependents.add(live.sequence)

    def enqueue(
        self,
        live: Live,
        now: float,
        submitted: float | None = None,
        *,
        rank: float | None = None,
        latest: float = math.inf,
    ) -> None:
        """Let a request wait for room, or for its document to be stored.

        ``submitted`` is when it is taken to have come, if that is not when it did. ``rank`` is its place in the queue
        if it had one before; ``latest`` that of its document, which has come for it and must not make way for others
        meanwhile. A document that somebody waits for has the turn of the first of those.
        """
        live.state = "waiting"
        submitted = live.submitted if submitted is None else submitted
        priority = live.sampling.priority
        if live.awaited:
            turns = [(since, self._live[one].sampling.priority) for one, since in live.awaited.items()]
            submitted, priority = min(turns, key=lambda turn: turn[0] - turn[1] * PRIORITY_SECONDS)
        document = None if live.document is None or live.alone else self._live[live.document]
        if document is not None and document.state != "document":
            document.awaited[live.sequence] = submitted
            if document.state == "dropped":
                self.enqueue(document, now)
            return
        live.reused = 0
        if document is not None:
            document.used = now
            if live.saves:
                live.prompt = document.prompt
            prompt = live.prompt if live.saves else live.prompt[: len(live.prompt) - 1]  # the last has to be computed
            live.reused = common_tokens(prompt, document.prompt, self._ledger.block_tokens)
        ask = Ask(
            live.sequence,
            live.known_tokens - live.reused,
            live.tokens - live.reused,
            submitted,
            priority,
            document=live.document if live.reused else None,
            shared=live.reused,
            is_document=live.is_document,
        )
        live.rank = min(self._queue.policy.rank(self._ledger, ask) if rank is None else rank, latest)
        if live.rank <= live.behind:
            live.rank = math.nextafter(live.behind, math.inf)
        self._queue.wait(ask, live.rank)

    def ready(self, document: int) -> bool:
        """Whether a stored document can be shared now: whole, at rest, and not on a worker that leaves."""
        account, workers = self._ledger.sequences.get(document), self._ledger.workers
        if account is None or account.lost or account.moves:
            return False
        return not any(workers[worker].retiring for worker in account.workers())

    def give_back(self, live: Live, now: float) -> Iterator[Command]:
        """A request that lost blocks gives back the others, and waits for room in its turn."""
        yield from self._free(live, now)
        if live.document is not None and self._live[live.document].cached:
            yield from self._leave(live, now)
            live.document, live.borrows = None, False
        live.retries = 0
        self.enqueue(live, now, rank=live.rank)

    # Documents that are stored

    def stored(self, live: Live, now: float) -> Iterator[Command]:
        """All of a document's tokens are computed: its client hears of it, and questions can be admitted."""
        live.state, live.used, live.retries = "document", now, 0
        if live.prompt:
            self._ledger.keep(live.sequence, len(live.prompt))
            self._index.add(live.sequence, live.prompt)
        if not live.announced:
            live.announced = True
            account = self._ledger.sequences.get(live.sequence)
            placement = account.placement if account is not None else ()
            yield Delivery(live.sequence, (), "stop", None, live.timings(now), placement, live.reused)
        self._wake(live, now)
        yield from self.unneeded(live, now)

    def kept(self, live: Live, now: float) -> Iterator[Command]:
        """A question has its answer, and both become a document: whole blocks of them."""
        account, size = self._ledger.sequences[live.sequence], self._ledger.block_tokens
        tokens = account.length // size * size
        live.prompt = array("i", [*live.prompt, *live.generated])[:tokens]
        live.generated, live.is_document, live.announced, live.used = [], True, True, now
        live.state, live.alone = "document", False
        if account.lost or account.moves or not tokens:
            yield from self.drop(live, now)
            return
        self._index.add(live.sequence, live.prompt)
        for span in self._ledger.keep(live.sequence, tokens):
            yield Free(span.worker, live.sequence, span.start, span.stop)
        self._wake(live, now)
        yield from self.unneeded(live, now)

    def _wake(self, live: Live, now: float) -> None:
        """A document is stored: what waited for that waits for room now."""
        awaited, live.awaited = live.awaited, {}
        for sequence, submitted in awaited.items():
            self.enqueue(self._live[sequence], now, submitted, latest=live.rank)

    # Documents that go

    def drop(self, live: Live, now: float) -> Iterator[Command]:
        """Free a document's blocks, which nothing computes on; its tokens stay, and bring them back for who waits."""
        self._put_off(live, now)
        live.state = "dropped"
        yield from self._free(live, now)
        if not live.prompt:
            live.state = "document"
            self._wake(live, now)
        yield from self.unneeded(live, now)
        if live.state == "dropped" and live.sequence in self._live and (live.awaited or not live.announced):
            self.enqueue(live, now)

    def lost(self, live: Live, now: float) -> Iterator[Command]:
        """A document at rest lost blocks: they are computed now if there is room, else all of it when it is asked."""
        self._put_off(live, now)
        yield from self._mend(live) or self.drop(live, now)

    def _put_off(self, live: Live, now: float) -> None:
        """Who waits for room next to a document waits for that document first, or does without it."""
        self._index.drop(live.sequence, live.prompt)
        for ask in [ask for ask in self._queue if ask.document == live.sequence]:
            self._queue.withdraw(ask.sequence)
            if (waiting := self._live[ask.sequence]).borrows:
                waiting.document, waiting.borrows = None, False
                live.dependents.discard(ask.sequence)
                self.enqueue(waiting, now)
            elif self._ledger.blocks(ask.tokens) > self._queue.limit:
                waiting.alone = True  # it cannot run beside the document either, which should not come back for it
                self.enqueue(waiting, now, ask.submitted, rank=waiting.rank)
            else:
                live.awaited[ask.sequence] = ask.submitted

    def _give_up(self, live: Live, now: float) -> Iterator[Command]:
        """Free a document's blocks, and keep them in files before that where they come back sooner from there."""
        if live.saved is None and not live.released and self._spilling.pays(live, self._queue.policy.model):
            self._put_off(live, now)
            yield from self._spilling.begin(live, now)
        else:
            yield from self.drop(live, now)

    def leave_queue(self, live: Live) -> None:
        """Wait no more for room for a document that nobody waits for, nor for those that only it waits for."""
        if live.state != "waiting" or live.awaited or not live.announced:
            return
        if live.sequence in self._queue:
            self._queue.withdraw(live.sequence)
        live.state = "dropped"
        before = self._live.get(live.document) if live.document is not None else None
        if before is not None and before.awaited.pop(live.sequence, None) is not None:
            self.leave_queue(before)

    def unneeded(self, live: Live, now: float) -> Iterator[Command]:
        """Forget a document that was released, if nobody depends on it and nothing computes it."""
        if live.released and not live.dependents and live.state in ("document", "dropped"):
            yield from self.forget(live, now)

    def forget(self, live: Live, now: float) -> Iterator[Command]:
        """A request, or a document that nobody needs, is over: free its blocks, and what only it needed."""
        self._index.drop(live.sequence, live.prompt if live.is_document else array("i"))
        yield from self._free(live, now)
        yield from self._spilling.forget(live)
        del self._live[live.sequence]
        yield from self._leave(live, now)

    def _leave(self, live: Live, now: float) -> Iterator[Command]:
        """A request depends on its document no more."""
        document = self._live.get(live.document) if live.document is not None else None
        if document is not None:
            document.dependents.discard(live.sequence)
            document.awaited.pop(live.sequence, None)
            document.used = now
            yield from self._cache.left(document.sequence, live.sequence)
            self.leave_queue(document)
            yield from self.unneeded(document, now)

    def _free(self, live: Live, now: float) -> Iterator[Command]:
        account = self._ledger.sequences.get(live.sequence)
        if account is None:
            return
        self._end_moves(live.sequence)
        yield from self._cache.free(live)
        for number in account.documents:
            document = self._ledger.sequences.get(number)  # None: it went with one that shared it
            if document is not None and document.lost and not document.sharers:
                yield from self.lost(self._live[number], now)

    # Room

    def evict(self, now: float) -> list[Command] | None:
        """Give up one document for the request whose turn it is: the one not used for longest. None if none helps.

        A question whose own document takes the room is answered without it, when nothing else is left to wait for.
        """
        head = next(self._queue.turns(), None)
        smallest = next(self._ledger.room.smallest_batches(), None)
        if head is None or smallest is None or smallest.homed >= self._ledger.room.batch:
            return None  # it waits for a place in a batch
        going = self.going()
        if going and self.room_with(going) >= self._ledger.blocks(head.tokens):
            return None  # it waits for blocks that are being written to disk
        accounts = self._ledger.sequences
        resting = {number for number in accounts if self._rests(number)}
        needed = {one for number in accounts.keys() - resting for one in accounts[number].documents}
        if head.document in accounts:
            needed |= {head.document, *accounts[head.document].documents}
        idle = resting - needed
        if idle and self.room_with(idle | going) >= self._ledger.blocks(head.tokens):
            last = (self._live[number] for number in idle if not accounts[number].sharers)
            oldest = min(last, key=lambda live: (live.used, live.sequence))
            oldest.behind = self._live[head.sequence].rank
            return list(self._give_up(oldest, now))
        if head.document is None or len(resting) < len(accounts):
            return None
        self._queue.withdraw(head.sequence)
        self._live[head.sequence].alone = True
        self.enqueue(self._live[head.sequence], now, head.submitted)
        return []

    def going(self) -> set[int]:
        """Sequences that are about to give up their blocks."""
        again = (number for number in self._ledger.sequences if self._live[number].again)
        return {*again, *self._spilling.under_way}

    def _rests(self, number: int) -> bool:
        """Whether a sequence is a stored document that nothing is done with."""
        return self._live[number].state == "document" and not self._ledger.sequences[number].moves

    def room_with(self, sequences: Iterable[int]) -> int:
        """Blocks that would be free without these sequences."""
        owned = sum(map(self._ledger.own_blocks, sequences))
        return owned + sum(account.free for account in self._ledger.workers.values())
