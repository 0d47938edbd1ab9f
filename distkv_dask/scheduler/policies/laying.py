"""From shares of blocks to a placement: the pieces that policies have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from distkv_dask.scheduler.accounts import WorkerAccount
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.types import Placement, Span


def lay(ledger: Ledger, home: str, shares: Iterable[tuple[str, int]], tokens: int) -> Placement:
    """Blocks of creditors, in this order, then what is left at home.

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


def borrow(creditors: Iterable[WorkerAccount], blocks: int) -> Iterator[tuple[str, int]]:
    """Shares of as few creditors as possible, those that come first."""
    for creditor in creditors:
        if blocks <= 0:
            return
        share = min(creditor.lendable, blocks)
        blocks -= share
        yield creditor.worker, share


def overflow(ledger: Ledger, tokens: int) -> Placement | None:
    """Home first, and what does not fit there to the workers that can lend most; None when there is no room.

    The home is the worker with most free blocks, then the one with fewest sequences. At least one block is its own.
    """
    need, room = ledger.blocks(tokens), ledger.room
    home = next(room.homes(), None)
    if home is None or home.free + room.lendable - home.lendable < need:
        return None
    creditors = (creditor for creditor in room.creditors() if creditor is not home)
    return lay(ledger, home.worker, borrow(creditors, need - min(home.free, need)), tokens)
