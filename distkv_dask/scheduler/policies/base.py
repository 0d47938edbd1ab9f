"""The interface of a policy: where blocks are placed, what moves, and in which order requests run.

A policy decides from the ledger alone (and the performance model that it is built with). It only proposes; the
lifecycle carries out or vetoes its proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from distkv_dask.placement import Move, Placement
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.ledger.ledger import Ledger

NOTHING: Mapping[str, int] = MappingProxyType({})

PRIORITY_SECONDS = 60.0
"""One step of priority is worth as much as this waiting time, so that no priority starves another."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for policies.

    Parameters
    ----------
    sequence
        Its number.
    prompt, tokens
        Tokens of the prompt, and tokens that need room: the prompt and the longest possible answer. Both exclude tokens
        shared with a document.
    submitted
        When it was submitted, in seconds.
    priority
        Higher runs earlier.
    document, shared
        The document whose first ``shared`` tokens it begins with; policies place the rest.
    is_document
        It will be kept for others to share.
    home
        The worker that has the state with which it begins; empty if any worker will do.
    """

    sequence: int
    prompt: int
    tokens: int
    submitted: float = 0.0
    priority: int = 0
    document: int | None = None
    shared: int = 0
    is_document: bool = False
    home: str = ""


@dataclass(frozen=True, slots=True)
class Policy(ABC):
    """Base of all policies: first come, first served, and nothing moves.

    Parameters
    ----------
    model
        The performance model.
    """

    model: PerformanceModel
    name: ClassVar[str]
    look_ahead: ClassVar[int] = 0
    """Number of later requests that are tried when one does not fit."""

    @abstractmethod
    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Choose the placement of a request, or None while there is no room for it.

        The last span is its home's; inner borders are multiples of a block; each worker has at most one span. ``ahead``
        is a request that waits for room and may be overtaken by those that do not delay it.
        """

    def limit(self, ledger: Ledger, held: Mapping[str, int] = NOTHING) -> int:
        """Blocks of the largest request that fits on an empty cluster: a home, and what all others lend.

        Workers that are about to leave do not count, nor do the blocks by worker that are ``held``.
        """
        rooms = [
            (account.capacity - held.get(account.worker, 0), account.lends - held.get(account.worker, 0), account)
            for account in ledger.workers.values()
            if not account.retiring
        ]
        own = max((room - max(0, lends) for room, lends, account in rooms if account.can_decode), default=None)
        return 0 if own is None else own + sum(max(0, lends) for _, lends, _ in rooms)

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Propose moves of blocks, best first, that can all start together in the ledger's current state."""
        return []

    def rank(self, ledger: Ledger, ask: Ask) -> float:
        """Requests with a lower rank are placed first.

        It is computed once, when a request is submitted: all waiting requests age alike. It is in seconds, so a request
        can be overtaken only by requests submitted within a bounded time after it.
        """
        return ask.submitted - ask.priority * PRIORITY_SECONDS
