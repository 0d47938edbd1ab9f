"""Accounts of the debt ledger: one for each worker's pool, one for each live sequence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from distkv_dask.placement import Endpoint, Move, Placement, Span

NO_LIMIT = 2**40
"""More blocks, or sequences, than any worker ever has."""


@dataclass(slots=True)
class WorkerAccount:
    """One worker's pool, in blocks.

    Parameters
    ----------
    endpoint
        The worker.
    capacity
        Blocks of its pool.
    lend_limit
        Maximum blocks that it lends.
    can_decode
        False for a memory worker: it has no weights, so it cannot be a home.
    places
        Maximum number of sequences that it is home of.
    retiring
        It is being drained: nothing new is placed on it.
    used
        Blocks reserved by spans of sequences, or by moves to it.
    lent
        Blocks of ``used`` for sequences with another home.
    borrowed
        Blocks that others hold for sequences whose home it is.
    pending
        Tokens of prompts that are not computed yet, of sequences whose home it is.
    due
        Tokens that sequences whose home it is may still generate.
    documents, documents_lent
        Blocks of ``used`` and of ``lent`` that belong to documents or finished requests, not to a running request.
    cached
        Free blocks that still have KV of finished requests
        (:mod:`~distkv_dask.scheduler.cache.prefix_cache`).
    held
        Reserved blocks by sequence.
    homes
        The sequences that it is home of, in order of arrival (the values mean nothing).
    """

    endpoint: Endpoint
    capacity: int
    lend_limit: int
    can_decode: bool = True
    places: int = NO_LIMIT
    retiring: bool = False
    used: int = 0
    lent: int = 0
    borrowed: int = 0
    pending: int = 0
    due: int = 0
    documents: int = 0
    documents_lent: int = 0
    cached: int = 0
    held: dict[int, int] = field(default_factory=dict)
    homes: dict[int, None] = field(default_factory=dict)

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self.endpoint.worker

    @property
    def free(self) -> int:
        """Blocks that are not reserved."""
        return self.capacity - self.used

    def parts(self) -> dict[str, int]:
        """Parts of the capacity: own running requests, lent to others, documents, cached, and free."""
        lent = self.lent - self.documents_lent
        return {
            "own": self.used - self.documents - lent,
            "lent": lent,
            "documents": self.documents,
            "cached": self.cached,
            "free": self.free - self.cached,
        }

    @property
    def homed(self) -> int:
        """Number of sequences that it is home of."""
        return len(self.homes)

    @property
    def has_place(self) -> bool:
        """Whether it can be home of one more sequence."""
        return self.homed < self.places

    @property
    def lends(self) -> int:
        """Blocks that it lends at most."""
        return min(self.capacity, self.lend_limit)

    @property
    def lendable(self) -> int:
        """Blocks that it can lend now."""
        return 0 if self.retiring else max(0, min(self.free, self.lend_limit - self.lent))


@dataclass(slots=True)
class SequenceAccount:
    """One live sequence: its placement, and the number of tokens with committed KV (``length``).

    ``prompt`` is how many tokens prefill computes; ``moves`` are under way; ``lost`` names workers that died with
    blocks of it. A document is ``idle``: nothing decodes it, so it has no place in its home's batch; one that was
    ``cached`` has none even if homes keep state besides KV of documents. ``sharers`` are the sequences whose placements
    include spans of it.
    """

    placement: Placement
    prompt: int = 0
    length: int = 0
    moves: list[Move] = field(default_factory=list)
    lost: set[str] = field(default_factory=set)
    idle: bool = False
    cached: bool = False
    sharers: set[int] = field(default_factory=set)

    @property
    def own(self) -> Placement:
        """The spans that it owns."""
        return tuple(span for span in self.placement if span.document is None)

    def can_share(self, span: Span) -> bool:
        """Whether a span matches where this document is stored and will stay."""
        if self.moves or span.worker in self.lost or span.stop > self.length:
            return False
        return any(own.worker == span.worker and own.start <= span.start < span.stop <= own.stop for own in self.own)

    @property
    def documents(self) -> set[int]:
        """The documents with which it shares spans."""
        return {span.document for span in self.placement if span.document is not None}

    @property
    def pending(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return max(0, self.prompt - self.length)

    @property
    def due(self) -> int:
        """Tokens that may still be generated."""
        return 0 if self.idle else self.stop - max(self.length, self.prompt)

    @property
    def home(self) -> str:
        """The worker that decodes the sequence: the one that holds its tail."""
        return self.placement[-1].worker

    @property
    def stop(self) -> int:
        """Tokens that have room."""
        return self.placement[-1].stop

    def lies_on(self, worker: str) -> bool:
        """Whether the worker holds a span of the sequence."""
        return any(span.worker == worker for span in self.placement)

    def workers(self) -> Iterator[str]:
        """Live workers with blocks of the sequence, each once: its holders and the targets of its moves."""
        named = (*(span.worker for span in self.placement), *(move.target for move in self.moves))
        return (worker for worker in dict.fromkeys(named) if worker not in self.lost)
