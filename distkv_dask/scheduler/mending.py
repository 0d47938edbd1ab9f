"""Mending: a sequence that lost blocks with a worker gets other room for just these, and keeps the rest. Pure."""

from __future__ import annotations

from collections import Counter

from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.live import Live
from distkv_dask.scheduler.placements import relaid
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.types import Placement


def mended(ledger: Ledger, policy: Policy, live: Live) -> Placement | None:
    """A sequence's placement with what it lost laid elsewhere, where the policy finds room for that now.

    None if there is none, if nothing of its own is left to keep, or if blocks are gone that it shares with others.
    """
    account = ledger.sequences[live.sequence]
    lost = [span for span in account.placement if span.worker in account.lost]
    kept = [span for span in account.own if span.worker not in account.lost and span.tokens]
    tokens = sum(span.tokens for span in lost)
    if not kept or not tokens or account.moves or account.sharers or any(span.document is not None for span in lost):
        return None
    priority = live.sampling.priority
    laid = policy.place(ledger, Ask(live.sequence, tokens, tokens, live.submitted, priority, is_document=account.idle))
    if laid is None:
        return None
    placement = relaid(account.placement, account.lost, laid, ledger.block_tokens)
    more = Counter[str]()
    for span in laid:
        more[span.worker] += ledger.blocks(span.tokens)
    home = placement[-1].worker
    fits = all(ledger.workers[one].lendable >= blocks for one, blocks in more.items() if one != home)
    return placement if fits and ledger.workers[home].can_decode else None
