"""Borrowing (paper v1): home first; blocks that do not fit there overflow to the workers with the most room.

Lent blocks are recalled if a request waits for their room, and idle workers get a share of long sequences.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from distkv_dask.placement import Move, Placement
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.policies.balance import recalls, share_with_idle
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.shares import overflow


class Overflow(Policy):
    """Borrow when full."""

    name: ClassVar[str] = "overflow"

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Place what fits at home there, the rest on as few creditors as possible."""
        return overflow(ledger, ask.tokens)

    def moves(self, ledger: Ledger, waiting: Iterable[Ask]) -> list[Move]:
        """Recalls, else a share for an idle worker."""
        return recalls(ledger, waiting) or share_with_idle(ledger, self.model)
