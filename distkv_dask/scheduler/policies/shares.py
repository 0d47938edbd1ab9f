"""From shares of blocks to a placement: functions that policies have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger


def placement_from_shares(ledger: Ledger, home: str, shares: Iterable[tuple[str, int]], tokens: int) -> Placement:
    """Spans of creditors in this order, then the rest at home.

    The home takes the *last* span: its tail grows there without a hop, and the prompt's last chunk is computed where
    decoding starts.
    """
    spans: list[Span] = []
    start = 0
    for worker, blocks in shares:
        if blocks:
            stop = start + blocks * ledger.block_tokens
            spans.append(Span(worker, start, stop))
            start = stop
    return (*spans, Span(home, start, tokens))


def borrow_shares(creditors: Iterable[WorkerAccount], blocks: int) -> Iterator[tuple[str, int]]:
    """Shares of as few creditors as possible, in their order."""
    for creditor in creditors:
        if blocks <= 0:
            return
        share = min(creditor.lendable, blocks)
        blocks -= share
        yield creditor.worker, share


def nearest_creditors(ledger: Ledger, home: WorkerAccount) -> Iterator[WorkerAccount]:
    """Creditors for a home: those of its host first, then all others; those that can lend most first."""
    host = home.endpoint.host
    near = [account for account in ledger.room.on_host(host) if account is not home]
    yield from sorted(near, key=lambda account: (account.lendable, account.worker), reverse=True)
    yield from (account for account in ledger.room.creditors() if account.endpoint.host != host)


def overflow(ledger: Ledger, tokens: int) -> Placement | None:
    """Home first; the rest on the nearest workers that can lend most. None if there is no room.

    The home is the worker with most free blocks, then the one with fewest sequences. At least one block is its own.
    """
    need, room = ledger.blocks(tokens), ledger.room
    home = next(room.homes(), None)
    if home is None or home.free + room.lendable - home.lendable < need:
        return None
    shares = borrow_shares(nearest_creditors(ledger, home), need - min(home.free, need))
    return placement_from_shares(ledger, home.worker, shares, tokens)
