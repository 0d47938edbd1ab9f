"""Blocks written to and read from files: documents that users save and load, and spilled sequences.

A save is a separate request that shares the whole document and generates nothing. So the document is in memory, and its
blocks do not move until all workers have written theirs.
"""

from __future__ import annotations

from distkv_dask.errors import GangAbortedError
from distkv_dask.messages.client_calls import Delivery
from distkv_dask.messages.from_worker import Fetched, Stored
from distkv_dask.messages.names import OWN_DISK, Saved, Transfer
from distkv_dask.messages.to_worker import Fetch, Store
from distkv_dask.scheduler.cache import copies, disk, restore
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.lifecycle.ends import end
from distkv_dask.scheduler.moves import migration
from distkv_dask.scheduler.records import states
from distkv_dask.scheduler.records.kinds import Save
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import (
    Decode,
    Dropped,
    Fetching,
    FilesUnderWay,
    Gone,
    Prefill,
    Saving,
    Spilling,
    State,
    Waiting,
)


def begin_transfer(life: MachineState, request: Request, before: State) -> None:
    """Start writing for a save whose document is stored, or reading for a saved sequence that has room."""
    account, state, kind = life.ledger.sequences[request.sequence], request.state, request.kind
    if isinstance(state, Fetching) and state.extents:
        restore.begin_reading(life, request, state)
        return
    saved = kind.to if isinstance(kind, Save) else request.saved
    assert saved is not None
    assert isinstance(state, FilesUnderWay)
    ranges = disk.ranges_of(account.placement if request.is_save else account.own, request.known_tokens)
    home = disk.with_home(life, request)
    workers = dict.fromkeys([*ranges, *home])
    state.ask(workers, life.now)
    for worker in workers:
        some = ranges.get(worker, ())
        if request.is_save:
            assert request.parent is not None
            transfer = Transfer("save", request.sequence)
            life.command(Store(worker, transfer, request.parent.number, some, saved, home.get(worker, 0)))
            continue
        if saved.place == OWN_DISK:
            text = f"tokens {disk.in_words(some)} of sequence {request.sequence} from disk to {worker}"
            life.command(Note("restore", text))
        life.command(Fetch(worker, request.sequence, some, saved, home.get(worker, 0)))


# Written


def stored(life: MachineState, event: Stored) -> None:
    """A worker wrote its part of a document, or of a sequence that is spilled, or could not."""
    match event.transfer.kind:
        case "save":
            _saved(life, event)
        case "state" if migration.stored(life, event):
            pass
        case "copy" if copies.stored(life, event):
            pass
        case _:  # a spill, or what nobody waits for any more: its files are deleted
            if (request := disk.stored(life, event)) is not None:
                _spilled(life, request)


def _saved(life: MachineState, event: Stored) -> None:
    """A worker wrote its part of a document for a user, or could not."""
    request = life.requests.get(event.transfer.number)
    if request is None or not isinstance(state := request.state, Saving) or event.worker not in state.answering:
        return
    state.wrote(event.files)
    if not state.answered(event.worker, event.error):  # a failed save waits, too, so that all its files can be deleted
        return
    if state.failure is not None:
        end(life, request, "error", state.failure)
        return
    assert isinstance(request.kind, Save)
    written = tuple(sorted(state.files, key=lambda file: file.start))
    if (document := life.document_of(request)) is not None:
        disk.forget_copy(life, document)
        document.saved = Saved(request.kind.to.place, written)
    life.command(Delivery(request.sequence, (), "stop", None, request.timings(life.now), files=written))
    life.recommend(request, Gone())


def spill_lost(life: MachineState, request: Request, worker: str) -> None:
    """A worker died while it wrote a part of a spilled sequence."""
    if disk.answered(life, request, worker, GangAbortedError(f"worker {worker} is gone")) is not None:
        _spilled(life, request)


def expire(life: MachineState) -> None:
    """Stop waiting for disks that are too slow; their blocks are recomputed."""
    for request in disk.late_spills(life, life.config.timeout_start):
        assert isinstance(request.state, Spilling)
        for worker in tuple(request.state.answering):
            disk.answered(life, request, worker, TimeoutError(f"the disk of {worker} is too slow"))
        _spilled(life, request)
    copies.expire(life, life.config.timeout_start)


def _spilled(life: MachineState, request: Request) -> None:
    """All workers have written their parts of a sequence, or failed: its blocks are freed."""
    if request.is_document:
        life.recommend(request, Dropped())
    elif request.goes_on_later:
        life.recommend(request, Waiting(rank=request.turn.rank))
    else:  # it has ended meanwhile
        life.recommend(request, Gone())


# Read


def fetched(life: MachineState, event: Fetched) -> None:
    """A worker read its part of a sequence, or could not: then the sequence is recomputed, if its tokens are known."""
    request = life.requests.get(event.sequence)
    if request is None or not isinstance(state := request.state, Fetching):
        return
    if not state.answered(event.worker, event.error):
        return
    if state.extents:
        restore.fetched(life, request, state)
        return
    if state.failure is None:
        life.ledger.commit(request.sequence, request.known_tokens)
    if state.failure is not None or not request.is_document:
        disk.forget_copy(life, request)
        request.saved = None
    if state.failure is None:
        life.recommend(request, states.Stored() if request.is_document else Decode())
    elif not request.is_document:
        life.recommend(request, Prefill(request.reuse.shared))
    elif request.is_announced:
        life.recommend(request, Dropped())
    else:
        end(life, request, "error", state.failure)
