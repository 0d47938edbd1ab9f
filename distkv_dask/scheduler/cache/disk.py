"""Spilling: blocks that make room go to the disks of the workers that hold them, where reading back beats computing.

The lower tier of the KV cache. Two kinds of sequences are spilled: a document that nobody asks just now, of which a
copy stays until it is released, so that giving it up again costs nothing; and a request that makes way for one of
higher priority, whose copy goes when it comes back. Tokens stay at the gManager, so what a disk loses is recomputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from distkv_dask.messages.from_worker import Stored
from distkv_dask.messages.names import OWN_DISK, Saved, SpilledFile
from distkv_dask.messages.to_worker import Discard, Store
from distkv_dask.placement import Placement
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.ledger.placements import clipped
from distkv_dask.scheduler.records import states
from distkv_dask.scheduler.records.disks import Copy
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Spilling

# Down


def pays(life: MachineState, request: Request) -> bool:
    """Whether a sequence at rest should be written to disk: there is room, and computing it again takes longer."""
    account, capacity = life.ledger.sequences[request.sequence], life.disks.capacity
    sizes = _sizes(life, request)
    if account.lost or not sizes or any(capacity.get(one, 0) < size for one, size in sizes.items()):
        return False
    own = account.length - request.reused
    compute = life.policy.model.of(account.home).prefill(own, request.reused)
    return 2 * max(sizes.values()) / life.disks.rate < compute


def begin_spill(life: MachineState, request: Request) -> None:
    """Write a sequence, with which nothing is done meanwhile, to the disks of the workers that hold it."""
    state, disks, sequence = request.state, life.disks, request.sequence
    assert isinstance(state, Spilling)
    sizes = _sizes(life, request)
    for worker, size in sizes.items():
        _make_room(life, worker, size)
    disks.spills += 1
    number = -disks.spills
    disks.copies[sequence] = Copy(number, sizes, life.now)
    disks.numbers[number] = sequence
    disks.used += sizes
    account = life.ledger.sequences[sequence]
    ranges = ranges_of(account.own, account.length)
    state.answering, state.asked = set(ranges), life.now
    for worker, some in ranges.items():
        life.command(Note("spill", f"tokens {in_words(some)} of sequence {sequence} to the disk of {worker}"))
        life.command(Store(worker, number, sequence, some, Saved(OWN_DISK, tag=f"{sequence}{number}")))


def stored(life: MachineState, event: Stored) -> Request | None:
    """A worker wrote its part of a spill, or could not; the sequence, if all of its workers have answered."""
    spilled = [SpilledFile(*file, event.worker) for file in event.files]
    request = life.requests[life.disks.numbers[event.number]] if event.number in life.disks.numbers else None
    if request is None or not _writes(request, event.worker):
        _discard(life, spilled)
        return None
    copy = life.disks.copies[request.sequence]
    copy.files += spilled
    if event.error is None:
        life.disks.wrote(copy.bytes[event.worker], life.now - copy.began)
    return answered(life, request, event.worker, event.error)


def _writes(request: Request, worker: str) -> bool:
    return isinstance(request.state, Spilling) and worker in request.state.answering


def answered(life: MachineState, request: Request, worker: str, error: Exception | None) -> Request | None:
    """A worker is done with its part, or dead; the sequence, if it was the last."""
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
    """Sequences that are being written for longer than ``limit`` seconds."""
    disks = life.disks
    return [life.requests[number] for number in disks.under_way if life.now - disks.copies[number].began > limit]


# Gone


def forget_copy(life: MachineState, request: Request) -> None:
    """Drop a sequence's copy on disk; nothing happens if it has none."""
    copy = life.disks.copies.pop(request.sequence, None)
    if copy is None:
        return
    life.disks.used -= copy.bytes
    if request.saved is not None and request.saved.place == OWN_DISK:
        request.saved = None
    _discard(life, (file for file in copy.files if file.worker in life.disks.capacity))


def worker_lost(life: MachineState, worker: str) -> None:
    """A disk is gone: drop every copy that had a part there."""
    life.disks.capacity.pop(worker, None)
    for number, copy in list(life.disks.copies.items()):
        if copy.whole and worker in copy.bytes:
            forget_copy(life, life.requests[number])
    del life.disks.used[worker]


def _make_room(life: MachineState, worker: str, size: int) -> None:
    """Delete copies on a disk until ``size`` more bytes fit: first of documents that are in memory, too."""
    disks = life.disks
    if disks.used[worker] + size <= disks.capacity[worker]:
        return
    others = [life.requests[n] for n, copy in disks.copies.items() if copy.whole and worker in copy.bytes]
    order = sorted(others, key=lambda one: (not isinstance(one.state, states.Stored), not one.is_document, one.used))
    for request in order:
        if not isinstance(request.state, Fetching) and disks.used[worker] + size > disks.capacity[worker]:
            forget_copy(life, request)


def _sizes(life: MachineState, request: Request) -> Counter[str]:
    account, sizes = life.ledger.sequences[request.sequence], Counter[str]()
    for worker, ranges in ranges_of(account.own, account.length).items():
        sizes[worker] = sum(life.ledger.blocks(stop - start) for start, stop in ranges) * life.block_bytes
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
