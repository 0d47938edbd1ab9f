"""Which workers have room: indices over the ledger's accounts, so that no decision has to look at all workers.

A change costs a few binary searches, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sortedcontainers import SortedList

from distkv_dask.scheduler.accounts import WorkerAccount


class _Entry(NamedTuple):
    """What an account is indexed by; a part is None where the worker takes nothing of that kind."""

    account: WorkerAccount
    capacity: int
    home: tuple[int, int, str] | None
    creditor: tuple[int, str] | None


class Room:
    """Workers ordered by the room that they have: for sequences of their own, and for others' blocks.

    Parameters
    ----------
    batch
        Sequences that one worker is home of at most.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.capacity = 0
        """Blocks of all workers together."""
        self.lendable = 0
        """Blocks that all workers together can lend now."""
        self._entries: dict[str, _Entry] = {}
        self._homes: SortedList = SortedList()
        self._creditors: SortedList = SortedList()

    def enter(self, account: WorkerAccount) -> None:
        """Index an account as it is now, for the first time or after a change."""
        worker, free, lendable = account.worker, account.free, account.lendable
        takes = account.can_decode and not account.retiring and free > 0 and account.homed < self.batch
        home = (free, -account.homed, worker) if takes else None
        creditor = (lendable, worker) if lendable else None
        old = self._entries.get(worker)
        if old is None or old.home != home or old.creditor != creditor:
            self.forget(worker)
            self._entries[worker] = _Entry(account, account.capacity, home, creditor)
            self.capacity += account.capacity
            self.lendable += lendable
            if home:
                self._homes.add(home)
            if creditor:
                self._creditors.add(creditor)

    def forget(self, worker: str) -> None:
        """Drop a worker from the indices (no error if it is not there)."""
        old = self._entries.pop(worker, None)
        if old is None:
            return
        self.capacity -= old.capacity
        if old.home:
            self._homes.remove(old.home)
        if old.creditor:
            self._creditors.remove(old.creditor)
            self.lendable -= old.creditor[0]

    def homes(self) -> Iterator[WorkerAccount]:
        """Workers that can take one more sequence: most free blocks first, then fewest sequences."""
        return (self._entries[worker].account for _, _, worker in reversed(self._homes))

    def creditors(self) -> Iterator[WorkerAccount]:
        """Workers that can lend: those that can lend most first."""
        return (self._entries[worker].account for _, worker in reversed(self._creditors))

    def check(self, accounts: dict[str, WorkerAccount]) -> None:
        """Assert that the indices say what the accounts say."""
        fresh = Room(self.batch)
        for account in accounts.values():
            fresh.enter(account)
        assert self._entries == fresh._entries
        assert (self.capacity, self.lendable) == (fresh.capacity, fresh.lendable)
        assert (self._homes, self._creditors) == (fresh._homes, fresh._creditors)
