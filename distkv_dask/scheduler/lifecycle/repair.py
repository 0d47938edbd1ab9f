"""Mending: a sequence that lost blocks with a worker gets other room for just these, and keeps the rest. Pure."""

from __future__ import annotations

from collections import Counter

from distkv_dask.scheduler.commands import Command
from distkv_dask.scheduler.kept.prefix_cache import PrefixCache
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.ledger.placements import clipped, relaid
from distkv_dask.scheduler.lifecycle.request import Live
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.queue import Admission
from distkv_dask.scheduler.work.homes import Homes
from distkv_dask.scheduler.work.prefill import Prefilling
from distkv_dask.types import Placement


class Mending:
    """Mends sequences of one engine.

    Parameters
    ----------
    ledger, queue, cache, prefilling, homes
        The lifecycle's.
    """

    def __init__(
        self, ledger: Ledger, queue: Admission, cache: PrefixCache, prefilling: Prefilling, homes: Homes
    ) -> None:
        self._ledger = ledger
        self._queue = queue
        self._cache = cache
        self._prefilling = prefilling
        self._homes = homes

    def mend(self, live: Live) -> list[Command]:
        """Compute just what a sequence lost, elsewhere; nothing if there is no room for that now, or files have it."""
        if live.released or live.saved is not None or not self._ledger.sequences[live.sequence].lost:
            return []
        placement = mended(self._ledger, self._queue.policy, live)
        if placement is None:
            return []
        account, number = self._ledger.sequences[live.sequence], live.sequence
        length = account.length
        computed = clipped(account.placement, 0, length)
        lost = [(span.start, span.stop) for span in computed if span.worker in account.lost]
        self._ledger.commit(number, min([length, *(start for start, _ in lost)]))
        self._ledger.mend(number, placement)
        commands = list(self._cache.reserve(number))
        if lost or length < live.known_tokens:
            live.state, live.retries = "prefill", 0
            commands.append(self._prefilling.begin(live, length, lost))
        else:  # only room was lost
            live.state = "decode"
            commands += self._homes.join(live)
        return commands


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
