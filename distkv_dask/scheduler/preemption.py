"""Preemption: which running requests make way for a waiting one of higher priority. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.live import Live
from distkv_dask.scheduler.policies.base import Ask


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
