"""Admission: which waiting request gets room next. Pure: the lifecycle and the simulator drive the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from sortedcontainers import SortedList

from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.sharing import place
from distkv_dask.types import Placement


class Admission:
    """The requests that wait, in the policy's order.

    Parameters
    ----------
    ledger
        Where admitted requests are reserved.
    policy
        Decides order and place.
    ready
        Whether a document can be shared now.
    """

    def __init__(self, ledger: Ledger, policy: Policy, ready: Callable[[int], bool] = lambda _: True) -> None:
        self.ledger = ledger
        self.policy = policy
        self._ready = ready
        self._order: SortedList = SortedList()
        self._asks: dict[int, tuple[float, Ask]] = {}

    def __len__(self) -> int:
        return len(self._asks)

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._asks

    def __iter__(self) -> Iterator[Ask]:
        """The waiting requests, in order."""
        return (self._asks[sequence][1] for _, sequence in self._order)

    def wait(self, ask: Ask, rank: float | None = None) -> None:
        """A request waits from now on; the lowest ``rank`` is first (the policy's, if none is given)."""
        rank = self.policy.rank(self.ledger, ask) if rank is None else rank
        self._asks[ask.sequence] = rank, ask
        self._order.add((rank, ask.sequence))

    def withdraw(self, sequence: int) -> Ask:
        """A request waits no more."""
        rank, ask = self._asks.pop(sequence)
        self._order.remove((rank, sequence))
        return ask

    def admit(self) -> tuple[Ask, Placement] | None:
        """Reserve room for the next request that gets it, or return None.

        The first request that does not fit may be passed by those that the policy finds room for without delaying it.
        """
        ahead = None
        for ask in islice(self, 1 + self.policy.look_ahead):
            can = ask.document is None or self._ready(ask.document)
            placement = place(self.ledger, self.policy, ask, ahead) if can else None
            if placement is not None:
                self.withdraw(ask.sequence)
                idle = ask.is_document or not ask.tokens
                self.ledger.reserve(ask.sequence, placement, ask.shared + ask.prompt, idle=idle)
                self.ledger.commit(ask.sequence, ask.shared)
                return ask, placement
            ahead = ahead or ask
        return None


def prefill_slots(ledger: Ledger) -> int:
    """How many prompts may be in prefill at once: one for each worker, so that every worker has a chunk to compute.

    More would only delay everybody's first token: prefill is bound by compute, not by memory.
    """
    return max(1, sum(account.can_decode for account in ledger.workers.values()))
