"""All workers as one instance (the paper's vLLM-single): one home, every sequence spread over all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distkv_dask.placement import Placement
from distkv_dask.scheduler.ledger.accounts import WorkerAccount
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import NOTHING, Ask, Policy
from distkv_dask.scheduler.policies.shares import placement_from_shares


class Single(Policy):
    """The first worker with weights decodes everything; blocks are spread by free room."""

    name: ClassVar[str] = "single"

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Spread the request over all workers, in proportion to their free room."""
        home = _home(ledger)
        need = ledger.blocks(ask.tokens)
        if home is None or not home.free or not home.has_place:
            return None
        creditors = [account for account in ledger.room.creditors() if account is not home]
        room = home.free + sum(account.lendable for account in creditors)
        if room < need:
            return None
        left, shares = need - max(1, need * home.free // room), []
        for account in creditors:
            share = min(account.lendable, left, -(-need * account.lendable // room))
            shares.append((account.worker, share))
            left -= share
        return placement_from_shares(ledger, home.worker, shares, ask.tokens)

    def limit(self, ledger: Ledger, held: Mapping[str, int] = NOTHING) -> int:
        """Blocks of the home, and what all others that stay lend."""
        home = _home(ledger)
        if home is None:
            return 0
        others = (account for account in ledger.workers.values() if account is not home and not account.retiring)
        lent = sum(max(0, account.lends - held.get(account.worker, 0)) for account in others)
        return home.capacity - held.get(home.worker, 0) + lent


def _home(ledger: Ledger) -> WorkerAccount | None:
    decoders = [account for account in ledger.workers.values() if account.can_decode and not account.retiring]
    return min(decoders, key=lambda account: account.worker, default=None)
