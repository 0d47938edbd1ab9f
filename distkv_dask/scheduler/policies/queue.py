"""The queue: which waiting request gets room next. Pure.

A request that would not fit even after all others end is set aside: others overtake it until it can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from sortedcontainers import SortedList

from distkv_dask.placement import Placement
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.shared_prefix import place

PASSED = 256
"""Number of requests at the head of the queue that are searched for one whose prompt may begin."""


class Queue:
    """The waiting requests, in the policy's order.

    Parameters
    ----------
    ledger
        Has the free room; it is only read.
    policy
        Decides order and placement.

    Attributes
    ----------
    held
        Blocks by worker that will not become free, because a disk or folder does not answer.
    """

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        self.ledger = ledger
        self.policy = policy
        self._order: SortedList = SortedList()
        self._asks: dict[int, tuple[float, Ask]] = {}
        self._limit = (-1, 0)
        self.held: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self._asks)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._asks

    def __iter__(self) -> Iterator[Ask]:
        """The waiting requests, in order."""
        return (self._asks[sequence][1] for _, sequence in self._order)

    def ask(self, sequence: int) -> Ask:
        """A waiting request's needs."""
        return self._asks[sequence][1]

    # Order

    def turns(self) -> Iterator[Ask]:
        """The waiting requests that can run on the workers that stay, in order."""
        return (ask for ask in self if not self.aside(ask))

    def aside(self, ask: Ask) -> str:
        """Why a waiting request is set aside; empty if its turn comes.

        It needs more than the workers that stay have for one request, or its document cannot be shared now.
        """
        if ask.document is not None and not self.ledger.is_shareable(ask.document):
            return "its document is being moved, or lost blocks, or is on a worker that is being retired or paused"
        need, limit = self.ledger.blocks(ask.tokens), self.limit
        if need <= limit:
            return ""
        return f"it needs {need} blocks, and the workers that stay have {limit} for one request"

    @property
    def limit(self) -> int:
        """Blocks of the largest request that can run; recounted only when workers joined, left or began to leave."""
        epoch, limit = self._limit
        if epoch != self.ledger.epoch:
            limit = self.policy.limit(self.ledger, self.held)
            self._limit = self.ledger.epoch, limit
        return limit

    def hold(self, held: Mapping[str, int]) -> None:
        """Stop counting on these blocks by worker (those ``held`` before count again)."""
        if held != self.held:
            self.held, self._limit = held, (-1, 0)

    # Changes

    def enqueue(self, ask: Ask, rank: float | None = None) -> None:
        """Add a request; the lowest ``rank`` is first (the policy's, if none is given)."""
        rank = self.policy.rank(self.ledger, ask) if rank is None else rank
        self._asks[ask.sequence] = rank, ask
        self._order.add((rank, ask.sequence))

    def withdraw(self, sequence: int) -> Ask:
        """Remove a request."""
        rank, ask = self._asks.pop(sequence)
        self._order.remove((rank, sequence))
        return ask

    def choose(self, may_begin: Callable[[Ask], bool] = lambda ask: True) -> tuple[Ask, Placement] | None:
        """Find room for the next request and take it out of the queue; None if no request gets room.

        The first request that does not fit may be overtaken by those that the policy can place without delaying it.

        Parameters
        ----------
        may_begin
            Whether a prompt may begin now; others are skipped, however much room they need.
        """
        ahead = None
        ready = (ask for ask in islice(self.turns(), PASSED) if may_begin(ask))
        for ask in islice(ready, 1 + self.policy.look_ahead):
            placement = place(self.ledger, self.policy, ask, ahead)
            if placement is not None:
                self.withdraw(ask.sequence)
                return ask, placement
            ahead = ahead or ask
        return None


def prefill_slots(ledger: Ledger) -> int:
    """Number of prompts that may be in prefill at once: one per worker, so that each has a chunk to compute.

    More would only delay all first tokens: prefill is limited by compute, not by memory.
    """
    return max(1, sum(account.can_decode for account in ledger.workers.values()))
