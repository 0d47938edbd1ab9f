"""Gangs: numbered over all engines of a gManager, and given up with all their members. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from distkv_dask.scheduler.commands import Abort, Command, Forget
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.types import Endpoint, Gang


class Gangs:
    """Makes one engine's gangs.

    Parameters
    ----------
    engine
        The engine's id.
    numbers
        Unique over all engines of the gManager.
    ledger
        Knows which workers live.
    """

    def __init__(self, engine: str, numbers: Iterator[int], ledger: Ledger) -> None:
        self._engine = engine
        self._numbers = numbers
        self._ledger = ledger

    def new(self, kind: str, owner: int, part: int, epoch: int, home: str, holders: tuple[Endpoint, ...]) -> Gang:
        """The gang of a chunk or window: part ``part`` of what ``owner`` computes."""
        number = next(self._numbers)
        return Gang(self._engine, number, f"{kind}-{self._engine}-{owner}-{part}-{number}", epoch, home, holders)

    def abandon(self, gang: Gang, reason: str) -> Iterator[Command]:
        """Let all members of a gang end, and forget its tasks."""
        for worker in (gang.home, *(holder.worker for holder in gang.holders)):
            if worker in self._ledger.workers:
                yield Abort(worker, gang.number, reason)
        yield Forget(gang, finished=False)
