"""Faults to order: a card that fails for good, or that has no memory for a while, in the middle of whatever it does."""

from __future__ import annotations

import threading

import torch

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Faults:
    """What is to go wrong, and after how many launches and copies."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._broken = ""
        self._until_broken: int | None = None
        self._until_short = self._short = 0

    def order(self, broken: str = "", until_broken: int | None = None, short: int = 0, until_short: int = 0) -> None:
        """Have just this go wrong from now on."""
        with self._lock:
            self._broken, self._until_broken = broken, until_broken
            self._short, self._until_short = short, until_short

    def queued(self) -> None:
        """Something is queued."""
        with self._lock:
            if self._until_broken:
                self._until_broken -= 1
        self.call()

    def call(self) -> None:
        """The host calls the card for whatever it may be.

        Raises
        ------
        torch.AcceleratorError
            It is broken.
        """
        if self._until_broken == 0:
            raise torch.AcceleratorError(self._broken)

    def allocation(self) -> bool:
        """Memory is asked for; whether there is to be none."""
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
    """Have every call fail once so many more things were queued: an error that stays, as a card's own errors do."""
    FAULTS.order(broken=ILLEGAL, until_broken=after)


def run_out(times: int, after: int = 0) -> None:
    """Have so many allocations fail once so many have been made."""
    FAULTS.order(short=times, until_short=after)


def mend() -> None:
    """Have nothing fail any more."""
    FAULTS.order()
