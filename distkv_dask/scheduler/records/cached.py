"""Finished sequences with blocks in the pools: by number, by prefix, and by last use.

:mod:`~distkv_dask.scheduler.cache.prefix_cache` uses them.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass, field

from sortedcontainers import SortedList

from distkv_dask.placement import Placement
from distkv_dask.scheduler.ledger.placements import blocks_of, clipped


@dataclass(slots=True)
class Cached:
    """A cached sequence: its own ``tokens``, whole blocks from position ``start`` on, and the ``spans``.

    The ledger has its tokens up to ``held``. ``keys`` are the keys of its blocks in the index. ``users`` has, of every
    sharer, the number of leading tokens that it shares, parents' included; ``lengths`` are these numbers, sorted.
    ``used`` is when it was last used, in seconds. ``adapter`` is the key of the adapter that its KV is of.
    It is ``closed`` once it has lost blocks or the engine closes: it gets no more sharers.
    """

    number: int
    start: int
    tokens: array[int]
    keys: list[int]
    spans: Placement
    parent: int | None
    held: int
    adapter: str
    used: float = 0.0
    users: dict[int, int] = field(default_factory=dict)
    lengths: SortedList = field(default_factory=SortedList)
    closed: bool = False

    @property
    def stop(self) -> int:
        """Position after its last token."""
        return self.start + len(self.tokens)

    def blocks(self, start: int, stop: int, block_tokens: int) -> Counter[str]:
        """Its own blocks of tokens ``[start, stop)``, by worker."""
        found: Counter[str] = Counter()
        for span in clipped(self.spans, start, stop):
            found[span.worker] += blocks_of(span.tokens, block_tokens)
        return found


@dataclass(slots=True)
class CachedSequences:
    """All cached sequences of one engine, by number.

    ``children`` share another's prefix, sorted by its length; ``recent`` are those with cached blocks on a worker, the
    least recently used first; ``index`` those that have a block, by the block's hash.
    """

    enabled: bool
    """Whether anything is cached."""
    by_number: dict[int, Cached] = field(default_factory=dict)
    children: dict[int, SortedList] = field(default_factory=dict)
    recent: defaultdict[str, OrderedDict[int, None]] = field(default_factory=lambda: defaultdict(OrderedDict))
    index: dict[int, dict[int, None]] = field(default_factory=dict)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.by_number)

    def add(self, cached: Cached) -> None:
        """Add a sequence."""
        self.by_number[cached.number] = cached
        for key in cached.keys:
            self.index.setdefault(key, {})[cached.number] = None
        if cached.parent is not None:
            self.children.setdefault(cached.parent, SortedList()).add((cached.start, cached.number))

    def remove(self, cached: Cached) -> None:
        """Remove a sequence without cached blocks."""
        del self.by_number[cached.number]
        if cached.parent is not None:
            self.children[cached.parent].remove((cached.start, cached.number))
            if not self.children[cached.parent]:
                del self.children[cached.parent]

    def beyond(self, number: int, position: int) -> list[Cached]:
        """Cached sequences that share more than this many tokens of a sequence."""
        children = self.children.get(number, SortedList())
        return [self.by_number[child] for _, child in children.irange((position + 1, -1))]

    def touch(self, number: int, now: float) -> None:
        """Note that a sequence was used."""
        self.by_number[number].used = now
        for span in self.by_number[number].spans:
            if number in self.recent[span.worker]:
                self.recent[span.worker].move_to_end(number)

    def unindex(self, cached: Cached, blocks: int) -> None:
        """Remove all but a sequence's first blocks from the index."""
        for key in cached.keys[blocks:]:
            del self.index[key][cached.number]
            if not self.index[key]:
                del self.index[key]
        del cached.keys[blocks:]
