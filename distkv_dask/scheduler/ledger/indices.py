"""Indices of workers by their free room, so that no decision has to scan all workers.

A change costs a few binary searches, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sortedcontainers import SortedList

from distkv_dask.scheduler.ledger.accounts import WorkerAccount


class _Entry(NamedTuple):
    """The keys of an account; a key is None if the worker takes nothing of that kind."""

    account: WorkerAccount
    capacity: int
    host: str
    lendable: int
    home: tuple[int, int, str] | None
    batch: tuple[int, str] | None
    load: tuple[int, str] | None


class Room:
    """Workers ordered by their room for own sequences, and for others' blocks.

    Parameters
    ----------
    batch
        Maximum number of sequences that a worker is home of.
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
        self._batches: SortedList = SortedList()
        self._loads: SortedList = SortedList()
        self._hosts: dict[str, dict[str, WorkerAccount]] = {}
        self._host_room: dict[str, int] = {}
        self._roomy: SortedList = SortedList()

    @property
    def decoders(self) -> int:
        """Number of workers with weights that are not being drained."""
        return len(self._batches)

    def enter_worker(self, account: WorkerAccount) -> None:
        """Index an account, for the first time or after a change."""
        worker, free, lendable = account.worker, account.free, account.lendable
        decodes = account.can_decode and not account.retiring
        home = (free, -account.homed, worker) if decodes and free > 0 and account.has_place else None
        batch = (account.homed, worker) if decodes else None
        load = (account.used, worker) if account.used else None
        entry = _Entry(account, account.capacity, account.endpoint.host, lendable, home, batch, load)
        old = self._entries.get(worker)
        if old is not None and old[2:] == entry[2:]:
            return
        if old is not None:
            self._drop(old)
        self._entries[worker] = entry
        self.capacity += account.capacity
        self._hosts.setdefault(entry.host, {})[worker] = account
        self._lend(entry, +1)
        if home:
            self._homes.add(home)
        if batch:
            self._batches.add(batch)
        if load:
            self._loads.add(load)

    def remove_worker(self, worker: str) -> None:
        """Drop a worker that is gone."""
        entry = self._entries.pop(worker)
        self._drop(entry)
        del self._hosts[entry.host][worker]
        if not self._hosts[entry.host]:
            del self._hosts[entry.host]

    def _drop(self, old: _Entry) -> None:
        self.capacity -= old.capacity
        self._lend(old, -1)
        if old.home:
            self._homes.remove(old.home)
        if old.batch:
            self._batches.remove(old.batch)
        if old.load:
            self._loads.remove(old.load)

    def _lend(self, entry: _Entry, sign: int) -> None:
        """Add (1) or subtract (-1) what a worker can lend, for the worker and its host."""
        if not entry.lendable:
            return
        self.lendable += sign * entry.lendable
        key = entry.lendable, entry.account.worker
        if sign > 0:
            self._creditors.add(key)
        else:
            self._creditors.remove(key)
        before = self._host_room.pop(entry.host, 0)
        after = before + sign * entry.lendable
        if before:
            self._roomy.remove((before, entry.host))
        if after:
            self._host_room[entry.host] = after
            self._roomy.add((after, entry.host))

    def homes(self) -> Iterator[WorkerAccount]:
        """Workers that can take one more sequence: most free blocks first, then fewest sequences."""
        return (self._entries[worker].account for _, _, worker in reversed(self._homes))

    def creditors(self) -> Iterator[WorkerAccount]:
        """Workers that can lend: those that can lend most first."""
        return (self._entries[worker].account for _, worker in reversed(self._creditors))

    def smallest_batches(self) -> Iterator[WorkerAccount]:
        """Workers with weights: those that are home of fewest sequences first."""
        return (self._entries[worker].account for _, worker in self._batches)

    def fullest(self) -> Iterator[WorkerAccount]:
        """Workers that hold something: those with most reserved blocks first."""
        return (self._entries[worker].account for _, worker in reversed(self._loads))

    def hosts(self) -> Iterator[tuple[int, str]]:
        """Blocks that the workers of a host can lend together, and the host: those that can lend most first."""
        return iter(reversed(self._roomy))

    def on_host(self, host: str) -> list[WorkerAccount]:
        """The workers of a host."""
        return list(self._hosts.get(host, {}).values())

    def check(self, accounts: dict[str, WorkerAccount]) -> None:
        """Assert that the indices match the accounts."""
        fresh = Room(self.batch)
        for account in accounts.values():
            fresh.enter_worker(account)
        for name, value in vars(fresh).items():
            assert vars(self)[name] == value, name
