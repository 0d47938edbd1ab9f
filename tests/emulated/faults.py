"""Faults on demand: a card that fails permanently, or that has no memory for a while, in the middle of any work."""

from __future__ import annotations

import threading

import torch

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Faults:
    """Faults that will happen, and after how many launches and copies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broken = ""
        self._until_broken: int | None = None
        self._until_short = self._short = 0

    def order(self, broken: str = "", until_broken: int | None = None, short: int = 0, until_short: int = 0) -> None:
        """Set the faults; earlier ones are cancelled."""
        with self._lock:
            self._broken, self._until_broken = broken, until_broken
            self._short, self._until_short = short, until_short

    def queued(self) -> None:
        """Count a queued operation."""
        with self._lock:
            if self._until_broken:
                self._until_broken -= 1
        self.call()

    def call(self) -> None:
        """Check any call of the host to the card.

        Raises
        ------
        torch.AcceleratorError
            The card is broken.
        """
        if self._until_broken == 0:
            raise torch.AcceleratorError(self._broken)

    def allocation(self) -> bool:
        """Count an allocation; returns whether it must fail."""
        self.call()
        with self._lock:
            if not self._short:
                return False
            if self._until_short:
                self._until_short -= 1
                return False
            self._short -= 1
            return True


FAULTS = Faults()


def break_card(after: int = 0) -> None:
    """Make every call fail after this many further operations: the error persists, as a card's errors do."""
    FAULTS.order(broken=ILLEGAL, until_broken=after)


def run_out(times: int, after: int = 0) -> None:
    """Make ``times`` allocations fail after ``after`` further ones."""
    FAULTS.order(short=times, until_short=after)


def mend() -> None:
    """Cancel all faults."""
    FAULTS.order()
