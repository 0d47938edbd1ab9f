"""Lower tiers of the prefix cache: other workers' free memory, then disks (Pensieve, section 4.3).

Cached blocks count as free, and so do their copies on other workers: both are evicted for anything that the ledger
places there. Copies on disks are evicted for documents. Blocks with a copy are evicted before those without. If there
is no more room for copies, those of the least value are dropped (:mod:`~distkv_dask.scheduler.cache.retention`): of one
text, its front.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from distkv_dask.messages.to_worker import Discard, Release
from distkv_dask.scheduler.cache import retention
from distkv_dask.scheduler.records.cached import Cached
from distkv_dask.scheduler.records.extents import Extent
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.states import Fetching

SEARCHED = 16
"""Sequences and extents of a worker that one decision considers: the least recently used ones."""


def having(life: MachineState, key: int) -> Iterator[Extent]:
    """The extents that contain a block."""
    return (life.extents.by_number[number] for number in life.extents.index.get(key, ()))


# Which go


def least(life: MachineState, worker: str) -> Cached | Extent:
    """The least valuable of a worker's cached blocks: evicted first."""
    recent = [life.cache.by_number[number] for number in islice(life.cache.recent.get(worker, ()), SEARCHED)]
    both: list[Cached | Extent] = [*recent, *life.extents.of(worker, "workers")[:SEARCHED]]
    return min(both, key=lambda one: _value(life, worker, one))


def _value(life: MachineState, worker: str, one: Cached | Extent) -> tuple[float, int]:
    """The value of the blocks that would be evicted first; among equal ones, the front."""
    size = life.ledger.block_tokens
    if isinstance(one, Extent):
        at, key, kept = one.start, one.keys[0], one.start
    else:
        at = next(span.stop for span in reversed(one.spans) if span.worker == worker) - size
        behind = (at - one.start) // size
        key, kept = one.keys[behind] if behind < len(one.keys) else 0, 0
    seconds = retention.recomputed(life, worker, at, at + size)
    for copy in having(life, key):
        if copy.is_whole and (copy.kind == "disk" or copy.worker != worker):
            seconds = min(seconds, retention.read(life, copy.place, worker, size))
    return retention.value(life, seconds, one.used), kept


def worth(life: MachineState, worker: str, extent: Extent) -> float:
    """The value of an extent's first block, which is the least of all its blocks."""
    size = life.ledger.block_tokens
    return retention.value(life, retention.recomputed(life, worker, extent.start, extent.start + size), extent.used)


# Gone


def give_up(life: MachineState, extent: Extent) -> None:
    """Free an extent's blocks, or delete its file; reads that are running are spoilt."""
    life.extents.remove(extent)
    blocks, alive = len(extent.keys), extent.worker in life.ledger.workers
    if extent.kind == "disk":
        life.disks.disk.change(extent.worker, -blocks * life.block_bytes)
        if extent.file is not None and alive:
            life.command(Discard(extent.worker, (extent.file.name,)))
        return
    for state in reads(life, extent):
        state.spoil()
    sources_gone(life, extent.number, extent.start)
    if alive:
        life.ledger.workers[extent.worker].cached -= blocks
        life.command(Release(extent.worker, extent.number))


def sources_gone(life: MachineState, sequence: int, position: int) -> None:
    """Blocks of a sequence from a position on are freed: unfinished copies of them are useless."""
    for number in list(life.extents.copying.values()):
        extent = life.extents.by_number.get(number)
        source = None if extent is None else extent.source
        if extent is not None and source is not None and source.sequence == sequence and extent.stop > position:
            give_up(life, extent)


def reads(life: MachineState, extent: Extent) -> list[Fetching]:
    """The states of requests that read an extent."""
    reading = (life.requests[number].state for number in extent.readers if number in life.requests)
    return [state for state in reading if isinstance(state, Fetching)]


def worker_lost(life: MachineState, worker: str) -> None:
    """A worker is lost (the ledger knows), with all extents there and unfinished copies from it."""
    life.extents.failed.pop(worker, None)
    if worker in life.extents.copying:
        give_up(life, life.extents.by_number[life.extents.copying[worker]])
    leave(life, worker)
    for extent in life.extents.of(worker, "disk"):
        give_up(life, extent)


def leave(life: MachineState, worker: str) -> None:
    """Drop all extents in a worker's memory."""
    for extent in life.extents.of(worker, "workers"):
        give_up(life, extent)


def clear_disk(life: MachineState, worker: str, size: int) -> None:
    """Drop extents on a worker's disk until ``size`` more bytes fit, or none is left."""
    for extent in life.extents.of(worker, "disk"):
        if life.disks.disk.fits(worker, size):
            return
        give_up(life, extent)


def close(life: MachineState) -> None:
    """Drop all extents."""
    for number in list(life.extents.by_number):
        give_up(life, life.extents.by_number[number])
