"""No sharing (the paper's vLLM-multi): a request is on one worker or waits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.base import NOTHING, Ask, Policy


class LocalOnly(Policy):
    """All of a request on the worker with most free blocks."""

    name: ClassVar[str] = "local-only"

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Place the whole request on one worker."""
        home = next(ledger.room.homes(), None)
        if home is None or home.free < ledger.blocks(ask.tokens):
            return None
        return (Span(home.worker, 0, ask.tokens),)

    def limit(self, ledger: Ledger, held: Mapping[str, int] = NOTHING) -> int:
        """Blocks of the largest worker with weights that stays."""
        homes = (account for account in ledger.workers.values() if account.can_decode and not account.retiring)
        return max((account.capacity - held.get(account.worker, 0) for account in homes), default=0)
