"""Snapshots: state that homes keep of sequences after some of their tokens, with which other sequences can begin.

:mod:`~distkv_dask.scheduler.cache.snapshots` says where they are taken and which are dropped.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field


@dataclass(slots=True)
class Snapshots:
    """All snapshots of one engine.

    ``of`` has those of a sequence: the number of tokens that each is after, and the hash of these tokens, or None of
    the end of a document, which takes the document's own place. All snapshots of a sequence are at one of ``homes``.
    ``recent`` are those of a worker that may be dropped for others, the least recently used first; ``index`` has them
    by hash.
    """

    of: dict[int, dict[int, int | None]] = field(default_factory=dict)
    homes: dict[int, str] = field(default_factory=dict)
    recent: defaultdict[str, OrderedDict[tuple[int, int], None]] = field(
        default_factory=lambda: defaultdict(OrderedDict)
    )
    index: dict[int, dict[int, None]] = field(default_factory=dict)

    def add(self, number: int, tokens: int, home: str, key: int | None = None) -> None:
        """A sequence has a snapshot after ``tokens`` tokens, or will have it when they are computed."""
        self.remove(number, tokens)
        self.of.setdefault(number, {})[tokens] = key
        self.homes[number] = home
        if key is not None:
            self.recent[home][number, tokens] = None
            self.index.setdefault(key, {})[number] = None

    def remove(self, number: int, tokens: int) -> None:
        """A sequence has no such snapshot (any more)."""
        mine = self.of.get(number, {})
        key = mine.pop(tokens, None)
        if key is not None:
            del self.recent[self.homes[number]][number, tokens]
            del self.index[key][number]
            if not self.index[key]:
                del self.index[key]
        if not mine and number in self.of:
            del self.of[number], self.homes[number]

    def touch(self, number: int, tokens: int) -> None:
        """Note that a snapshot was used."""
        recent = self.recent[self.homes[number]]
        if (number, tokens) in recent:
            recent.move_to_end((number, tokens))
