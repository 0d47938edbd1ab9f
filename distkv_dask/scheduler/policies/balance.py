"""Moves that pay under any policy that borrows: lent blocks recalled, and a share for a worker that has just joined.

Both are self-limiting: a recall requires a waiting request that the creditor would then have room for, and a share goes
only to a worker that holds nothing. So blocks do not move back and forth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from distkv_dask.placement import Move
from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.ledger.accounts import SequenceAccount, WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask

CREDITORS = 4
"""Creditors considered by one decision: those with the most room."""
SEQUENCES = 256
"""Sequences of one worker considered by one decision: the oldest."""
GAIN = 0.1
"""Part of a decode step that a share for an idle worker has to save."""
LEAST = 1024
"""Tokens of the smallest share: the gain of fewer would be below the precision of timings."""
WORTH = 8
"""Maximum number of moved tokens for each token that may still be generated."""


def recalls(ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
    """Moves of lent blocks back home, so that the first waiting request fits on their creditor.

    Blocks move only to their sequences' homes, if these have room, so that no other worker has to lend.
    """
    if (ask := next(iter(waiting), None)) is None:
        return []
    need, roomiest = ledger.blocks(ask.tokens), next(ledger.room.homes(), None)
    if roomiest is not None and roomiest.free >= need:
        return []
    for creditor in _creditors(ledger):
        if creditor.lent and creditor.free + creditor.lent >= need:
            found = list(_home(ledger, creditor, need - creditor.free))
            if sum(ledger.blocks(move.tokens) for move in found) >= need - creditor.free:
                return found
    return []


def _creditors(ledger: Ledger) -> Iterator[WorkerAccount]:
    """Workers that could be a request's home after a recall: those with the most room, then the fullest."""
    yield from islice(ledger.room.homes(), CREDITORS)
    for account in islice(ledger.room.fullest(), CREDITORS):
        if account.can_decode and not account.retiring and account.has_place:
            yield account


def _home(ledger: Ledger, creditor: WorkerAccount, blocks: int) -> Iterator[Move]:
    """Moves back home of ``blocks`` blocks that a creditor has lent, or of as many as can move."""
    room: dict[str, int] = {}
    for sequence in islice(creditor.held, SEQUENCES):
        account = ledger.sequences[sequence]
        debtor = ledger.workers.get(account.home)
        if debtor is None or debtor is creditor or debtor.retiring or account.moves or account.lost:
            continue
        free = room.setdefault(debtor.worker, debtor.free)
        for start, stop in _full(ledger, account, creditor.worker):
            share = min(blocks, free, ledger.blocks(stop - start))
            if share > 0:
                room[debtor.worker] -= share
                blocks -= share
                yield Move(sequence, start, start + share * ledger.block_tokens, creditor.worker, debtor.worker)
                break
        if blocks <= 0:
            return


def share_with_idle(ledger: Ledger, model: PerformanceModel) -> list[Move]:
    """Move half of the longest sequence's part on the fullest worker to a worker that holds nothing, if that is faster.

    Then half of the attention is computed there in parallel. The exchanges must cost less than this saves, and the move
    must end within half of the sequence's remaining time. A prompt in prefill does not move: each of its tokens would
    cost an exchange.
    """
    idles = [one for one in islice(ledger.room.creditors(), CREDITORS) if not one.held]
    if not idles or (full := next(ledger.room.fullest(), None)) is None:
        return []
    movable = ((number, ledger.sequences[number]) for number in islice(full.held, SEQUENCES))
    spans = [
        (stop - start, start, number, account)
        for number, account in movable
        if account.due and not account.moves and not account.lost and not account.pending
        for start, stop in _full(ledger, account, full.worker)
    ]
    if not spans:
        return []
    tokens, start, number, account = max(spans, key=lambda span: span[:3])
    home = ledger.workers[account.home]
    near = [one for one in ledger.room.on_host(home.endpoint.host) if one.lendable and not one.held]
    idle = min(near + idles, key=lambda one: model.exchange(model.link(home.endpoint, one.endpoint), 1))
    blocks = min(ledger.blocks(tokens) // 2, idle.lendable, account.due * WORTH // ledger.block_tokens)
    moved = blocks * ledger.block_tokens
    link = model.link(home.endpoint, idle.endpoint)
    there, here = model.of(idle.worker).token, model.of(full.worker).token
    saved = tokens * here - max((tokens - moved) * here, moved * there) - model.exchange(link, 1)
    on_home = sum(_filled(ledger.sequences[other], home.worker) for other in home.homes)
    step = model.of(home.worker).decode(home.homed, on_home)
    if moved < LEAST or saved < GAIN * step or 2 * model.transfer(link, moved) > account.due * step:
        return []
    return [Move(number, start, start + moved, full.worker, idle.worker)]


def _filled(account: SequenceAccount, worker: str) -> int:
    """Tokens of a sequence whose KV is on a worker."""
    return sum(span.filled(account.length) for span in account.placement if span.worker == worker)


def _full(ledger: Ledger, account: SequenceAccount, worker: str) -> Iterator[tuple[int, int]]:
    """Ranges of a sequence's full, committed blocks on a worker."""
    end = min(account.length, account.stop - 1) // ledger.block_tokens * ledger.block_tokens
    for span in account.placement:
        if span.document is None and span.worker == worker and min(span.stop, end) > span.start:
            yield span.start, min(span.stop, end)
