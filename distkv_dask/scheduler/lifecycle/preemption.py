"""Preemption: which running requests make way for a waiting one of higher priority. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.kept.documents import Documents
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.lifecycle.retirement import Retiring
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.scheduler.work.homes import Homes


class Preemption:
    """Lets requests of one engine make way.

    Parameters
    ----------
    ledger, live, queue, documents, homes, retiring
        The lifecycle's.
    """

    def __init__(
        self,
        ledger: Ledger,
        live: Mapping[int, Live],
        queue: Admission,
        documents: Documents,
        homes: Homes,
        retiring: Retiring,
    ) -> None:
        self._ledger = ledger
        self._live = live
        self._queue = queue
        self._documents = documents
        self._homes = homes
        self._retiring = retiring
        self._lowest_priority = math.inf

    def accepted(self, priority: int) -> None:
        """A request of this priority came."""
        self._lowest_priority = min(self._lowest_priority, priority)

    def make_way(self, now: float) -> list[Command] | None:
        """Let running requests make way for the one whose turn it is, if it is more urgent and that helps.

        None if none does.
        """
        head = next(self._queue.turns(), None)
        if head is None or head.priority <= self._lowest_priority:
            return None  # as always where nobody uses priorities
        going = self._documents.going()
        need = self._ledger.blocks(head.tokens) - self._documents.room_with(going)
        if need <= 0 and going:
            return None  # one at a time where it does not fit for another reason
        chosen = victims(self._ledger, self._live, head, need)
        commands: list[Command] = []
        for number in chosen:
            live = self._live[number]
            self._homes.leave(number)
            live.again = True
            commands += self._retiring.begin(live, now)
        return commands if chosen else None


def victims(ledger: Ledger, live: Mapping[int, Live], head: Ask, need: int) -> list[int]:
    """Requests that should make way, the latest and least urgent first; none if it would be in vain.

    A request only makes way for one of higher priority that is before it in the queue's order, too: so nobody is passed
    by all who come after, for ever, and the one that waits gets the room.

    Parameters
    ----------
    ledger, live
        The lifecycle's.
    head
        The request whose turn it is, and that does not fit.
    need
        Blocks that it lacks; one has to make way where it lacks none, and still does not fit.
    """
    rank = live[head.sequence].rank
    running = (live[number] for number in ledger.sequences)
    below = [(one.rank, one.sequence) for one in running if one.rank > rank and _may_wait(ledger, one, head)]
    chosen: list[int] = []
    for _, number in sorted(below, reverse=True):
        chosen.append(number)
        need -= ledger.own_blocks(number)
        if need <= 0:
            return chosen
    return []


def _may_wait(ledger: Ledger, live: Live, head: Ask) -> bool:
    if live.state != "decode" or live.sampling.priority >= head.priority:
        return False
    account = ledger.sequences[live.sequence]
    return not (account.moves or account.sharers or account.lost)
