"""Copies cached blocks that may soon be evicted, to other workers or to disks.

Cached blocks are evicted at once when their room is needed, and copying takes time. So while a worker has few empty
blocks, runs of its cached blocks are copied one after the other: oldest sequences first, and of a sequence the last
blocks first. They go to empty blocks of other workers, or else to the worker's own disk. A copy is useless if its
blocks are evicted before it is complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from distkv_dask.errors import without_quotes
from distkv_dask.messages.from_worker import Expected, Sent, Stored
from distkv_dask.messages.names import OWN_DISK, Saved, SpilledFile, Transfer
from distkv_dask.messages.to_worker import Expect, Send, Store
from distkv_dask.scheduler.cache import beginnings, retention
from distkv_dask.scheduler.cache.lower_tiers import SEARCHED, give_up, having, reads, worth
from distkv_dask.scheduler.commands import Count, Note
from distkv_dask.scheduler.records.cached import Cached
from distkv_dask.scheduler.records.extents import Extent, Place, Source
from distkv_dask.scheduler.records.machine_state import MachineState

AHEAD = 0.25
"""Share of a worker's blocks that should be empty, or have a copy elsewhere."""

EXTENT_TOKENS = 256
"""Maximum tokens of an extent, which is read and dropped as a whole."""

MEASURED_BYTES = 4 << 20
"""Smallest file from which a disk's speed is measured: smaller ones take as long as the messages about them."""

CREDITORS = 4
"""Workers that are considered for a copy: those with the most room."""


def copy_ahead(life: MachineState) -> None:
    """Start to copy cached blocks of workers that have few empty ones."""
    short, life.extents.short = life.extents.short, {}
    config = life.config
    if config.prefix_cache_tier == "memory" or config.stage_count > 1 or life.ledger.has_states or life.is_closing:
        return
    for worker in short:
        account = life.ledger.workers.get(worker)
        if account is None or worker in life.extents.copying or account.retiring:
            continue
        if account.free - account.cached < AHEAD * account.capacity:
            _copy_one(life, worker)


def _copy_one(life: MachineState, worker: str) -> None:
    """Start to copy the first run of blocks on a worker that is worth it, if there is one."""
    for run in _runs(life, worker):
        place = _place(life, worker, run)
        if place is not None:
            _begin_copy(life, run, place)
            return


def _runs(life: MachineState, worker: str) -> Iterator[Extent]:
    """Runs of blocks on a worker that have no copy, as the extents to be made of them; the oldest first."""
    recent = [life.cache.by_number[number] for number in islice(life.cache.recent.get(worker, ()), SEARCHED)]
    extents = [one for one in life.extents.of(worker, "workers")[:SEARCHED] if one.is_whole]
    both: list[Cached | Extent] = [*recent, *extents]
    for one in sorted(both, key=lambda one: one.used):
        if isinstance(one, Extent):
            if not all(_has_copy(life, key, worker) for key in one.keys):
                source = Source(worker, one.number, life.now)
                told = one.start, one.stop, one.tokens, one.keys, one.used, source, None, one.adapter
                yield Extent(0, "", "disk", *told)
            continue
        settled = worker, one.number
        if life.extents.settled.get(settled) == len(one.keys):
            continue
        if (found := _uncopied(life, one, worker)) is None:
            life.extents.settled[settled] = len(one.keys)
        else:
            start, stop = found
            first, last = ((at - one.start) // life.ledger.block_tokens for at in found)
            text, source = beginnings.text(life, one.number, stop), Source(worker, one.number, life.now)
            told = start, stop, text, tuple(one.keys[first:last]), one.used, source, None, one.adapter
            yield Extent(0, "", "workers", *told)


def _uncopied(life: MachineState, cached: Cached, worker: str) -> tuple[int, int] | None:
    """The last run of blocks of a cached sequence on a worker that have no copy."""
    size, keys = life.ledger.block_tokens, cached.keys
    for span in reversed(cached.spans):
        stop, at = 0, min(span.stop, cached.start + len(keys) * size)
        while span.worker == worker and at > span.start:
            copied = _has_copy(life, keys[(at - size - cached.start) // size], worker)
            if stop and (copied or stop - at >= EXTENT_TOKENS):
                break
            stop = stop or (0 if copied else at)
            at -= size
        if stop:
            return at, stop
    return None


def _has_copy(life: MachineState, key: int, worker: str) -> bool:
    """Whether a block has a copy outside a worker's pool, or will have one soon."""
    return any(one.kind == "disk" or one.worker != worker for one in having(life, key))


def _place(life: MachineState, worker: str, run: Extent) -> Place | None:
    """The first tier that has room for a copy of a worker's blocks and where it pays; None if there is none."""
    for account in islice(life.ledger.room.creditors(), CREDITORS) if run.kind == "workers" else ():
        empty, place = account.free - account.cached - len(run.keys), Place("workers", account.worker)
        has_room = account.worker != worker and empty >= AHEAD * account.capacity
        if has_room and retention.pays(life, place, worker, run.start, run.stop):
            return place
    place = Place("disk", worker)
    if life.config.prefix_cache_tier != "disk" or not life.extents.may_write(worker, life.now):
        return None
    if retention.pays(life, place, worker, run.start, run.stop) and _make_room_for(life, worker, run):
        return place
    return None


def _make_room_for(life: MachineState, worker: str, run: Extent) -> bool:
    """Drop extents on a worker's disk that are worth less than a new one, until it fits; False if it does not."""
    disk, size = life.disks.disk, len(run.keys) * life.block_bytes
    if not size or size > disk.capacity.get(worker, 0):
        return False
    while not disk.fits(worker, size):
        others = [one for one in life.extents.of(worker, "disk")[:SEARCHED] if one.is_whole and not reads(life, one)]
        least = min(others, key=lambda one: (worth(life, worker, one), one.start), default=None)
        if least is None or worth(life, worker, least) >= worth(life, worker, run):
            return False
        give_up(life, least)
    return True


def _begin_copy(life: MachineState, extent: Extent, place: Place) -> None:
    """Start to copy blocks to a worker's memory, or to their own worker's disk."""
    source, blocks = extent.source, len(extent.keys)
    assert source is not None
    life.disks.spills += 1
    kind, worker = place
    extent.number, extent.kind, extent.worker = -life.disks.spills, kind, worker
    life.extents.add(extent)
    transfer = Transfer("copy", extent.number)
    if kind == "workers":
        life.ledger.workers[worker].cached += blocks
        life.command(Expect(worker, transfer, extent.number, extent.start, extent.stop))
        return
    life.disks.disk.change(worker, blocks * life.block_bytes)
    saved = Saved(OWN_DISK, tag=f"{source.sequence}{extent.number}")
    life.command(Store(worker, transfer, source.sequence, ((extent.start, extent.stop),), saved))


# Answers


def expected(life: MachineState, event: Expected) -> None:
    """A worker has room for a copy, or not."""
    extent = life.extents.by_number.get(event.transfer.number)
    if extent is None or extent.source is None:
        return
    if event.refusal:
        give_up(life, extent)
        return
    source = extent.source
    members = {source.worker, extent.worker} & life.chains.keys()
    steps = [life.moves.step_seconds.get(home, 0.0) for home in members if life.chains[home].sequences]
    pace, span = max(steps, default=0.0), (extent.start, extent.stop)
    life.command(Send(source.worker, event.transfer, source.sequence, *span, extent.worker, pace))


def sent(life: MachineState, event: Sent) -> None:
    """Blocks were copied to another worker's memory, or could not be."""
    extent = life.extents.by_number.get(event.transfer.number)
    if extent is None:
        return
    if event.failure:
        give_up(life, extent)
    else:
        _copied(life, extent)


def stored(life: MachineState, event: Stored) -> bool:
    """A worker wrote an extent, or could not; False if no extent waits for that."""
    extent = life.extents.by_number.get(event.transfer.number)
    if extent is None or extent.source is None:
        return False
    if event.error is not None:
        life.extents.failed[event.worker] = life.now, without_quotes(event.error)
        life.command(Note("failure", f"the disk of {event.worker} accepts no KV: {without_quotes(event.error)}"))
        give_up(life, extent)
        return True
    life.extents.failed.pop(event.worker, None)
    extent.file = SpilledFile(*event.files[0], event.worker)
    size = len(extent.keys) * life.block_bytes
    if size >= MEASURED_BYTES:
        life.disks.disk.wrote(size, life.now - extent.source.since)
    _copied(life, extent)
    return True


def _copied(life: MachineState, extent: Extent) -> None:
    life.extents.copied(extent)
    life.command(Count(f"copied_{extent.kind}_blocks", len(extent.keys)))


def expire(life: MachineState, limit: float) -> None:
    """Cancel copies that have been running for longer than ``limit`` seconds."""
    for number in list(life.extents.copying.values()):
        extent = life.extents.by_number[number]
        if extent.source is not None and life.now - extent.source.since > limit:
            if extent.kind == "disk":
                life.extents.failed[extent.worker] = life.now, "it is too slow"
            give_up(life, extent)
