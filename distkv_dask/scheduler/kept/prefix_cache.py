"""The prefix cache: blocks of requests that ended stay until somebody needs their room.

As in vLLM's automatic prefix caching, cached blocks count as free: the ledger does not know them, so they delay, split
and move nothing. The pools still have them, under the number of the request that computed them. When the ledger gives
their room to somebody, they are released first, those not used for longest first and each sequence's last blocks first.

What is shared of a cached sequence comes back into the ledger, as a document that nobody has named, as long as the
longest use of it: ``held`` is the position up to which it is there, the blocks beyond are cached. A request that shared
a beginning is cached behind it: its ``parent`` has the tokens before ``start``.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from itertools import islice

from sortedcontainers import SortedList

from distkv_dask.messages.to_worker import Free, Release, Reserve
from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.kept.prefix_index import chain
from distkv_dask.scheduler.ledger.accounts import SequenceAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import clipped, shared
from distkv_dask.scheduler.lifecycle.request import Request, Stored
from distkv_dask.types import Placement, SamplingParams

DEEPEST = 64
"""Sequences of which each shares the one before; behind the last of them, a request is recomputed as a whole."""

CANDIDATES = 8
"""Sequences with equally long beginnings that are looked at."""


@dataclass(slots=True)
class Cached:
    """A sequence whose blocks stay: its own ``tokens``, whole blocks from position ``start`` on, and the ``spans``.

    ``keys`` are its blocks' in the index. ``users`` share its first so many tokens, all before it included; ``lengths``
    are those, sorted. One that is ``closed`` has lost blocks, or the engine closes: nobody else may share it.
    """

    number: int
    start: int
    tokens: array[int]
    keys: list[int]
    spans: Placement
    parent: int | None
    held: int
    users: dict[int, int] = field(default_factory=dict)
    lengths: SortedList = field(default_factory=SortedList)
    closed: bool = False

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + len(self.tokens)


class PrefixCache:
    """Cached sequences of one engine, by the beginnings that they have.

    Parameters
    ----------
    ledger, requests
        The engine's.
    commands
        Where it adds what workers are to do.
    enabled
        Whether anything is kept at all.
    """

    def __init__(
        self, ledger: Ledger, requests: MutableMapping[int, Request], commands: list[Command], enabled: bool
    ) -> None:
        self._ledger = ledger
        self._requests = requests
        self._commands = commands
        self._enabled = enabled
        self._kept: dict[int, Cached] = {}
        self._children: dict[int, SortedList] = {}
        self._recent: defaultdict[str, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self._index: dict[int, dict[int, None]] = {}

    def __len__(self) -> int:
        return len(self._kept)

    # Beginnings

    def find(self, tokens: array[int], near: str) -> tuple[int, int] | None:
        """The sequence that has most blocks in common with a prompt, and how many tokens these are; None without any.

        Of several, one whose last common block is on the worker ``near``, if there is one.
        """
        found, length = None, 0
        for blocks, key in enumerate(chain(tokens, self._ledger.block_tokens) if self._index else (), 1):
            if key in self._index:
                found, length = self._index[key], blocks * self._ledger.block_tokens
        if found is None:
            return None
        some = list(islice(found, CANDIDATES))
        there = (number for number in some if self._worker_at(number, length - 1) == near)
        number = next(there, some[0])
        return (number, length) if self._begins(number, tokens, length) else None

    def _worker_at(self, number: int, position: int) -> str:
        return next(span.worker for span in self._kept[number].spans if position < span.stop)

    def _begins(self, number: int | None, tokens: array[int], length: int) -> bool:
        """Whether a prompt really begins like a sequence: hashes may agree by chance."""
        while number is not None:
            kept = self._kept.get(number)
            if kept is None:
                return self._requests[number].prompt[:length] == tokens[:length]
            if kept.tokens[: length - kept.start] != tokens[kept.start : length]:
                return False
            number, length = kept.parent, kept.start
        return True

    def prefix(self, number: int, tokens: int) -> Placement:
        """The spans of a sequence's first tokens, as those have them that share it."""
        kept = self._kept.get(number)
        if kept is None:
            return shared(self._ledger.sequences[number].placement, number, tokens)
        own = (replace(span, document=number) for span in clipped(kept.spans, kept.start, tokens))
        return (*self._before(kept), *own)

    def _before(self, kept: Cached) -> Placement:
        return () if kept.parent is None else self.prefix(kept.parent, kept.start)

    def missing(self, number: int, tokens: int) -> Counter[str]:
        """Blocks by worker that the ledger has to take back for somebody to share a sequence's first tokens."""
        found: Counter[str] = Counter()
        at: int | None = number
        while at is not None and (kept := self._kept.get(at)) is not None:
            found += self._blocks(kept, kept.held, tokens)
            at, tokens = kept.parent, kept.start
        return found

    def can_be_shared(self, number: int) -> bool:
        """Whether nothing of a sequence, and of those that it shares, is about to go."""
        at: int | None = number
        depth = 0
        while at is not None and (kept := self._kept.get(at)) is not None:
            at, depth = kept.parent, depth + 1
            if kept.closed or depth == DEEPEST:
                return False
        return at is None or self._ledger.is_shareable(at)

    # Use

    def use(self, number: int, tokens: int, user: int, now: float) -> None:
        """Let ``user`` share a sequence's first tokens; the ledger has room for what is :meth:`missing`."""
        kept = self._kept.get(number)
        if kept is not None:
            kept.users[user] = tokens
            kept.lengths.add(tokens)
            held = max(kept.held, tokens)
            if number in self._requests:
                self._become(kept, held, kept.stop)
                self._ledger.resize(number, clipped(kept.spans, kept.start, held))
            else:
                if kept.parent is not None:
                    self.use(kept.parent, kept.start, number, now)
                self._become(kept, held, kept.stop)
                placement = (*self._before(kept), *clipped(kept.spans, kept.start, held))
                self._ledger.reserve(number, placement, held, idle=True)
                self._ledger.commit(number, held)
                self._requests[number] = Request(
                    number, array("i"), SamplingParams(), now, document=kept.parent, is_document=True, cached=True,
                    state=Stored(), announced=True, released=True,
                )  # fmt: skip
        self._requests[number].dependents.add(user)

    def left(self, number: int, user: int) -> None:
        """Somebody does not share a sequence any more: what nobody else shares is cached again.

        (Where nobody is left, :meth:`free` is called next.)
        """
        kept = self._kept.get(number)
        if kept is None or user not in kept.users:
            return
        kept.lengths.remove(kept.users.pop(user))
        if kept.lengths and kept.lengths[-1] < kept.held and not kept.closed:
            self._ledger.resize(number, clipped(kept.spans, kept.start, kept.lengths[-1]))
            self._become(kept, kept.lengths[-1], kept.stop)
            self._leave_draining(kept)

    # Sequences that end

    def free(self, request: Request) -> None:
        """Nothing computes on a sequence any more: free its blocks in the ledger, and keep or release them."""
        account = self._ledger.sequences[request.sequence]
        workers = self._ledger.release(request.sequence)
        kept = self._kept.get(request.sequence)
        if kept is None and (kept := self._worth_keeping(request, account)) is not None:
            self._keep(kept, account, workers)
        elif kept is not None:
            kept.closed |= bool(account.lost) or not self._enabled
            self._become(kept, kept.start, kept.stop)
            if kept.closed:
                self._cut(kept, kept.start)
            else:
                self._leave_draining(kept)
        else:
            for child in self._beyond(request.sequence, 0):
                self._cut(child, child.start)
            for worker in workers:
                self._commands.append(Release(worker, request.sequence))

    def _worth_keeping(self, request: Request, account: SequenceAccount) -> Cached | None:
        """What would be cached of a sequence that ended, if it is a plain request that went well."""
        if (
            not (self._enabled and request.is_plain and request.ended in ("stop", "length"))
            or account.lost
            or account.moves
        ):
            return None
        size, start = self._ledger.block_tokens, account.own[0].start
        leaving = (span.start for span in account.own if self._ledger.workers[span.worker].retiring)
        stop = min([account.length // size * size, *leaving])
        if stop <= start:
            return None
        parent = request.document if start else None
        if parent is not None and parent in self._kept and self._kept[parent].closed:
            return None
        tokens = request.known[:stop]
        keys = list(chain(tokens, size))[start // size :]
        if start and keys[-1] in self._index:  # the one whose beginning it shared went on just like that
            self._touch(next(iter(self._index[keys[-1]])))
            return None
        spans = tuple(clipped(account.own, start, stop))
        return Cached(request.sequence, start, tokens[start:], keys, spans, parent, held=stop)

    def _keep(self, kept: Cached, account: SequenceAccount, workers: list[str]) -> None:
        """Keep a sequence's whole blocks, and free the room that it did not need."""
        self._kept[kept.number] = kept
        for key in kept.keys:
            self._index.setdefault(key, {})[kept.number] = None
        if kept.parent is not None:
            self._children.setdefault(kept.parent, SortedList()).add((kept.start, kept.number))
        self._become(kept, kept.start, kept.stop)
        there = {span.worker for span in kept.spans}
        for worker in workers:
            if worker not in there:
                self._commands.append(Release(worker, kept.number))
        for span in clipped(account.own, kept.stop, account.stop):
            if span.worker in there:
                self._commands.append(Free(span.worker, kept.number, span.start, span.stop))

    # Room

    def make_room(self, worker: str) -> None:
        """Release as many cached blocks as the ledger has given to others on a worker."""
        account = self._ledger.workers[worker]
        while (more := account.used + account.cached - account.capacity) > 0:
            kept = self._kept[next(iter(self._recent[worker]))]
            self._cut(kept, self._without(kept, worker, more))

    def reserve(self, sequence: int) -> None:
        """Let the workers allocate what the ledger reserved for a sequence; cached blocks go first."""
        for span in self._ledger.sequences[sequence].own:
            self.make_room(span.worker)
            self._commands.append(Reserve(span.worker, sequence, span.start, span.stop))

    def _without(self, kept: Cached, worker: str, blocks: int) -> int:
        """The position from which on a sequence has so many cached blocks on a worker, or all that it has there."""
        stop = kept.stop
        for span in reversed(list(clipped(kept.spans, kept.held, kept.stop))):
            if span.worker == worker and blocks:
                fewer = min(blocks, self._ledger.blocks(span.tokens))
                blocks -= fewer
                stop = span.stop - fewer * self._ledger.block_tokens
        return stop

    def drain(self, worker: str) -> None:
        """Blocks leave a worker: cached ones are given up."""
        for number in list(self._recent.get(worker, ())):
            if number in self._kept:
                self._leave_draining(self._kept[number])

    def _leave_draining(self, kept: Cached) -> None:
        cached = clipped(kept.spans, kept.held, kept.stop)
        leaving = [span.start for span in cached if self._ledger.workers[span.worker].retiring]
        if leaving:
            self._cut(kept, leaving[0])

    def worker_lost(self, worker: str) -> None:
        """A worker is gone, in the ledger already, and all that lay behind its blocks is of no use."""
        self._recent.pop(worker, None)
        for kept in list(self._kept.values()):
            lost = [span.start for span in kept.spans if span.worker == worker]
            if lost and kept.number in self._kept:
                self._break(kept, lost[0])

    def _break(self, kept: Cached, position: int) -> None:
        """What a sequence has from a position on is lost; what is shared of that goes with the last who shares it."""
        for child in self._beyond(kept.number, position):
            self._break(child, child.start)
        if kept.held > position:
            kept.closed = True
            self._unindex(kept, 0)
        self._cut(kept, max(position, kept.held))

    def close(self) -> None:
        """Keep nothing any more."""
        self._enabled = False
        for kept in list(self._kept.values()):
            if kept.number in self._kept:
                self._cut(kept, kept.held)

    # Bookkeeping

    def _cut(self, kept: Cached, stop: int) -> None:
        """Give up the cached blocks of a sequence from a position on, and all that builds on them."""
        for child in self._beyond(kept.number, stop):
            self._cut(child, child.start)
        gone = list(clipped(kept.spans, stop, kept.stop))
        self._become(kept, kept.held, stop)
        there = {span.worker for span in kept.spans}
        for worker in dict.fromkeys(span.worker for span in gone if span.worker in self._ledger.workers):
            if worker not in there:
                self._commands.append(Release(worker, kept.number))
        for span in gone:
            if span.worker in there:
                self._commands.append(Free(span.worker, kept.number, span.start, span.stop))
        if kept.stop == kept.start:
            del self._kept[kept.number]
            if kept.parent is not None:
                self._children[kept.parent].remove((kept.start, kept.number))
                if not self._children[kept.parent]:
                    del self._children[kept.parent]

    def _beyond(self, number: int, position: int) -> list[Cached]:
        """Cached sequences that share more than so many tokens of one."""
        children = self._children.get(number, SortedList())
        return [self._kept[child] for _, child in children.irange((position + 1, -1))]

    def _become(self, kept: Cached, held: int, stop: int) -> None:
        """Change what the ledger has of a sequence, and where it ends; recount its cached blocks."""
        before = self._blocks(kept, kept.held, kept.stop)
        self._unindex(kept, (stop - kept.start) // self._ledger.block_tokens)
        touched, kept.held = held != kept.held, held
        if stop < kept.stop:
            kept.tokens = kept.tokens[: stop - kept.start]
            kept.spans = tuple(clipped(kept.spans, kept.start, stop))
        after = self._blocks(kept, held, stop)
        for worker in before | after:
            if worker in self._ledger.workers:
                self._ledger.workers[worker].cached += after[worker] - before[worker]
            if after[worker]:
                self._recent[worker][kept.number] = None
            else:
                self._recent[worker].pop(kept.number, None)
        if touched:
            self._touch(kept.number)

    def _touch(self, number: int) -> None:
        """A sequence was used just now."""
        for span in self._kept[number].spans:
            if number in self._recent[span.worker]:
                self._recent[span.worker].move_to_end(number)

    def _unindex(self, kept: Cached, blocks: int) -> None:
        """Let only a sequence's first blocks be found."""
        for key in kept.keys[blocks:]:
            del self._index[key][kept.number]
            if not self._index[key]:
                del self._index[key]
        del kept.keys[blocks:]

    def _blocks(self, kept: Cached, start: int, stop: int) -> Counter[str]:
        """A sequence's own blocks of tokens ``[start, stop)``, by worker."""
        found: Counter[str] = Counter()
        for span in clipped(kept.spans, start, stop):
            found[span.worker] += self._ledger.blocks(span.tokens)
        return found
