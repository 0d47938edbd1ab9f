"""Where blocks go and in which order requests run: pure functions of the ledger.

The policy here is the paper's v1 borrowing: home first, and what does not fit there overflows to the workers with most
room.
"""

from __future__ import annotations

from distkv_dask.scheduler.accounts import WorkerAccount
from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.types import Placement, Span


def place(ledger: Ledger, tokens: int, batch: int) -> Placement | None:
    """Choose where a sequence of ``tokens`` tokens lies, or None while there is no room for it.

    The home is the worker with most free blocks (then the one with fewest sequences) among those that decode fewer than
    ``batch`` sequences. What it has no room for goes to as
    few other workers as possible, those with most room first. The home takes the *last* span: its tail grows there
    without a hop, and the prompt's last chunk is computed where decoding starts.
    """
    accounts = sorted(ledger.workers.values(), key=_room, reverse=True)
    need = ledger.blocks(tokens)
    home = next((account for account in accounts if account.free and account.homed < batch), None)
    if home is None or sum(account.free for account in accounts) < need:
        return None
    creditors = [account for account in accounts if account is not home]
    borrowed = need - min(home.free, need)
    spans: list[Span] = []
    start = 0
    for creditor in creditors:
        lent = min(creditor.free, borrowed)
        if not lent:
            break
        borrowed -= lent
        stop = start + lent * ledger.block_tokens
        spans.append(Span(creditor.endpoint.worker, start, stop))
        start = stop
    spans.append(Span(home.endpoint.worker, start, tokens))
    return tuple(spans)


def _room(account: WorkerAccount) -> tuple[int, int, str]:
    return account.free, -account.homed, account.endpoint.worker


def prefill_slots(ledger: Ledger) -> int:
    """How many prompts may be in prefill at once: one for each worker, so that every worker has a chunk to compute.

    More would only delay everybody's first token: prefill is bound by compute, not by memory.
    """
    return max(1, len(ledger.workers))
