"""Stalls: what waits for something that does not come, seen once a second. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.policies.queue import Admission


def held_blocks(ledger: Ledger, live: Mapping[int, Live], now: float, patience: float) -> Counter[str]:
    """Blocks by worker that wait for a disk, or a user's folder, that has not answered for ``patience`` seconds.

    They become free, but nobody knows when: what needs them is set aside meanwhile.
    """
    numbers: set[int] = set()
    for number, account in ledger.sequences.items():
        one = live[number]
        if one.answering and now - one.asked > patience:
            numbers |= {number, *account.documents}
    held: Counter[str] = Counter()
    for account in map(ledger.sequences.__getitem__, numbers):
        for span in account.own:
            if span.worker not in account.lost:
                held[span.worker] += ledger.blocks(span.tokens)
    return held


def waiting_in_vain(queue: Admission, live: Mapping[int, Live], now: float, limit: float) -> Iterator[tuple[Live, str]]:
    """Requests that have been set aside for more than ``limit`` seconds, and why."""
    for ask in list(queue):
        if ask.sequence not in queue:  # it went with one before
            continue
        one = live[ask.sequence]
        reason = queue.aside(ask)
        if not reason:
            one.stuck_since = None
        elif one.stuck_since is None:
            one.stuck_since = now
        elif now - one.stuck_since > limit:
            yield one, reason
