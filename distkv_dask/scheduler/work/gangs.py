"""Gangs: numbered over all engines of a gManager, and aborted on all their members."""

from __future__ import annotations

from distkv_dask.gang import Gang
from distkv_dask.messages.to_worker import Abort
from distkv_dask.placement import Endpoint
from distkv_dask.scheduler.commands import ForgetTasks
from distkv_dask.scheduler.records.machine_state import MachineState


def new_gang(life: MachineState, title: str, epoch: int, home: str, holders: tuple[Endpoint, ...]) -> Gang:
    """The gang of a chunk or window; ``title`` is for display: its kind, owner and part."""
    number, (kind, rest) = next(life.numbers), title.split("-", 1)
    return Gang(life.engine, number, f"{kind}-{life.engine}-{rest}-{number}", epoch, home, holders)


def abandon(life: MachineState, gang: Gang, reason: str) -> None:
    """Abort a gang on all its members, and forget its tasks."""
    for worker in (gang.home, *(holder.worker for holder in gang.holders)):
        if worker in life.ledger.workers:
            life.command(Abort(worker, gang.number, reason))
    life.command(ForgetTasks(gang, finished=False))
