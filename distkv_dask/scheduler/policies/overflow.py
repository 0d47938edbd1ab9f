"""Borrowing (paper v1): home first, and what does not fit there overflows to the workers with most room."""

from __future__ import annotations

from typing import ClassVar

from distkv_dask.scheduler.ledger import Ledger
from distkv_dask.scheduler.policies.base import Ask, Policy
from distkv_dask.scheduler.policies.laying import overflow
from distkv_dask.types import Placement


class Overflow(Policy):
    """Borrow when full; nothing moves."""

    name: ClassVar[str] = "overflow"

    def place(self, ledger: Ledger, ask: Ask, ahead: Ask | None = None) -> Placement | None:
        """Place what fits at home there, the rest on as few creditors as possible."""
        return overflow(ledger, ask.tokens)
