"""Spilling: evicted blocks go to lower tiers of their workers, if reading them back is faster than recomputing.

The tiers are the host memory of a worker with a card and, when that is full or there is no card, its disk. Two kinds of
sequences are spilled. An idle document keeps its copy until it is released, so that evicting it again costs nothing.
The copy of a preempted request is deleted when the request continues. The gManager keeps all tokens, so lost copies are
recomputed. Only this module chooses the tier; workers find a copy in either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from distkv_dask.messages.from_worker import Stored
from distkv_dask.messages.names import HOST_MEMORY, OWN_DISK, Saved, SpilledFile, Transfer
from distkv_dask.messages.to_worker import Demote, Discard, Store
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import lower_tiers
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.ledger.placements import clipped
from distkv_dask.scheduler.records import states
from distkv_dask.scheduler.records.disks import Copy, Tier
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Spilling

# Down


def pays(life: MachineState, request: Request) -> bool:
    """Whether an idle sequence should be spilled: a tier has room, and recomputing would take longer."""
    account, sizes = life.ledger.sequences[request.sequence], _sizes(life, request)
    if account.lost or not sizes or not _can_go_on(life, request):
        return False
    seconds = 0.0
    for worker, size in sizes.items():
        if (tier := _tier_for(life, request, worker, size)) is None:
            return False
        seconds = max(seconds, 2 * size / tier.rate)
    shared = request.reuse.shared
    return seconds < life.policy.model.of(account.home).prefill(account.length - shared, shared)


def _can_go_on(life: MachineState, request: Request) -> bool:
    """Whether a sequence could continue from files: they would have all known tokens, and its home's state."""
    if life.ledger.sequences[request.sequence].length < request.known_tokens:
        return False
    if not life.ledger.has_states or not request.is_document:
        return True
    return len(request.prompt) in life.snapshots.of.get(request.sequence, ())


def begin_spill(life: MachineState, request: Request) -> None:
    """Write an idle sequence to lower tiers of the workers that hold it."""
    state, disks, sequence = request.state, life.disks, request.sequence
    assert isinstance(state, Spilling)
    sizes = _sizes(life, request)
    in_memory = {worker for worker, size in sizes.items() if _tier_for(life, request, worker, size) is disks.memory}
    disks.spills += 1
    number, copy = -disks.spills, Copy(-disks.spills, sizes, life.now, in_memory=in_memory)
    for worker, size in sizes.items():
        _make_room(life, worker, size, disks.tier(copy, worker))
        disks.tier(copy, worker).change(worker, size)
    disks.copies[sequence] = copy
    disks.numbers[number] = sequence
    account = life.ledger.sequences[sequence]
    ranges, home = ranges_of(account.own, account.length), with_home(life, request)
    workers = dict.fromkeys([*ranges, *home])
    state.ask(workers, life.now)
    for worker in workers:
        some = ranges.get(worker, ())
        place, where = (HOST_MEMORY, HOST_MEMORY) if worker in in_memory else (OWN_DISK, "disk")
        life.command(Note("spill", f"tokens {in_words(some)} of sequence {sequence} to the {where} of {worker}"))
        saved = Saved(place, tag=f"{sequence}{number}")
        life.command(Store(worker, Transfer("spill", number), sequence, some, saved, home.get(worker, 0)))


def with_home(life: MachineState, request: Request) -> dict[str, int]:
    """The home of a sequence, if it has state besides blocks, and the number of tokens before that state."""
    home = life.ledger.sequences[request.sequence].home
    return {home: request.known_tokens} if life.ledger.has_states and request.known_tokens else {}


def stored(life: MachineState, event: Stored) -> Request | None:
    """A worker wrote its part of a spill, or could not; the sequence, if all of its workers have answered."""
    spilled = [SpilledFile(*file, event.worker) for file in event.files]
    number = life.disks.numbers.get(event.transfer.number)
    request = life.requests[number] if number is not None else None
    if request is None or not _writes(request, event.worker):
        _discard(life, spilled)
        return None
    copy = life.disks.copies[request.sequence]
    copy.files += spilled
    if event.error is None:
        tier = life.disks.tier(copy, event.worker)
        tier.wrote(copy.bytes[event.worker], life.now - copy.began)
    return answered(life, request, event.worker, event.error)


def _writes(request: Request, worker: str) -> bool:
    return isinstance(request.state, Spilling) and worker in request.state.answering


def answered(life: MachineState, request: Request, worker: str, error: Exception | None) -> Request | None:
    """A worker has finished its part or died; returns the sequence if that was the last part."""
    state = request.state
    assert isinstance(state, Spilling)
    if not state.answered(worker, error):
        return None
    copy = life.disks.copies[request.sequence]
    copy.whole = True
    del life.disks.numbers[copy.number]
    if state.failure is None:
        request.saved = Saved(OWN_DISK, tuple(sorted(copy.files, key=lambda file: file.start)))
    else:
        forget_copy(life, request)
    return request


def late_spills(life: MachineState, limit: float) -> list[Request]:
    """Sequences that have been written for longer than ``limit`` seconds."""
    disks = life.disks
    return [life.requests[number] for number in disks.under_way if life.now - disks.copies[number].began > limit]


# Gone


def forget_copy(life: MachineState, request: Request) -> None:
    """Drop a sequence's copy; nothing happens if it has none."""
    copy = life.disks.copies.pop(request.sequence, None)
    if copy is None:
        return
    for worker, size in copy.bytes.items():
        life.disks.tier(copy, worker).change(worker, -size)
    if request.saved is not None and request.saved.place == OWN_DISK:
        request.saved = None
    _discard(life, (file for file in copy.files if file.worker in life.disks.disk.capacity))


def worker_lost(life: MachineState, worker: str) -> None:
    """A worker's tiers are lost: drop every copy with a part there."""
    life.disks.remove(worker)
    for number, copy in list(life.disks.copies.items()):
        if copy.whole and worker in copy.bytes:
            forget_copy(life, life.requests[number])


def _tier_for(life: MachineState, request: Request, worker: str, size: int) -> Tier | None:
    """The first tier of a worker with room for ``size`` bytes, after evictions if needed; None if there is none.

    State that a home has besides blocks only goes to its disk.
    """
    disks = life.disks
    if worker in with_home(life, request):
        return disks.disk if size <= disks.disk.capacity.get(worker, 0) else None
    stays = disks.memory.used[worker] - sum(
        disks.copies[one.sequence].bytes[worker] for one in _movable(life, worker, disks.memory)
    )
    if stays + size <= disks.memory.capacity.get(worker, 0):
        return disks.memory
    return disks.disk if size <= disks.disk.capacity.get(worker, 0) else None


def _make_room(life: MachineState, worker: str, size: int, tier: Tier) -> None:
    """Move copies down from a worker's host memory, or delete some on its disk, until ``size`` more bytes fit."""
    if tier is life.disks.disk:
        lower_tiers.clear_disk(life, worker, size)
    for request in _movable(life, worker, tier):
        if tier.fits(worker, size):
            return
        if tier is life.disks.memory:
            _demote(life, request, worker)
        else:
            forget_copy(life, request)


def _demote(life: MachineState, request: Request, worker: str) -> None:
    """Move a worker's part of a copy from host memory to disk, or drop the copy if it cannot be there."""
    disks, copy = life.disks, life.disks.copies[request.sequence]
    size = copy.bytes[worker]
    if size > disks.disk.capacity[worker]:
        forget_copy(life, request)
        return
    _make_room(life, worker, size, disks.disk)
    copy.in_memory.discard(worker)
    disks.memory.change(worker, -size)
    disks.disk.change(worker, size)
    life.command(Demote(worker, tuple(file for file in copy.files if file.worker == worker)))


def _movable(life: MachineState, worker: str, tier: Tier) -> list[Request]:
    """Sequences with copies in a worker's tier in eviction order: first those that are also in the pool."""
    disks = life.disks
    there = [
        life.requests[number]
        for number, copy in disks.copies.items()
        if copy.whole and worker in copy.bytes and disks.tier(copy, worker) is tier
    ]
    idle = [one for one in there if not isinstance(one.state, Fetching)]
    return sorted(idle, key=_copy_order)


def _copy_order(request: Request) -> tuple[bool, bool, float]:
    """Sorts sequences by when their copies go: first those that are also in the pool."""
    used = request.demand.used if request.demand is not None else 0.0
    return not isinstance(request.state, states.Stored), not request.is_document, used


def _sizes(life: MachineState, request: Request) -> Counter[str]:
    account, sizes = life.ledger.sequences[request.sequence], Counter[str]()
    for worker, ranges in ranges_of(account.own, account.length).items():
        sizes[worker] = sum(life.ledger.blocks(stop - start) for start, stop in ranges) * life.block_bytes
    for worker in with_home(life, request):
        sizes[worker] += life.home_bytes
    return sizes


def _discard(life: MachineState, files: Iterable[SpilledFile]) -> None:
    names: dict[str, tuple[str, ...]] = {}
    for file in files:
        names[file.worker] = (*names.get(file.worker, ()), file.name)
    for worker, some in names.items():
        life.command(Discard(worker, some))


# Ranges


def ranges_of(placement: Placement, tokens: int) -> dict[str, tuple[tuple[int, int], ...]]:
    """Ranges of a sequence's first tokens by worker.

    Examples
    --------
    >>> from distkv_dask.placement import Span
    >>> ranges_of((Span("a", 0, 8), Span("b", 8, 12), Span("a", 12, 20)), 14)
    {'a': ((0, 8), (12, 14)), 'b': ((8, 12),)}
    """
    ranges: dict[str, tuple[tuple[int, int], ...]] = {}
    for span in clipped(placement, 0, tokens):
        ranges[span.worker] = (*ranges.get(span.worker, ()), (span.start, span.stop))
    return ranges


def in_words(ranges: Iterable[tuple[int, int]]) -> str:
    """Token ranges in words.

    Examples
    --------
    >>> in_words([(0, 8), (12, 14)])
    '0 to 8, 12 to 14'
    """
    return ", ".join(f"{start} to {stop}" for start, stop in ranges)
