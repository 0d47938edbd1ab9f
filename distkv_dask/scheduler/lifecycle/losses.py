"""Losses: how sequences continue when a worker is lost or does not start their work, in any state."""

from __future__ import annotations

from distkv_dask.errors import DistKVError, StateLostError, without_quotes
from distkv_dask.messages.from_worker import Stored
from distkv_dask.messages.names import Transfer
from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.lifecycle import files, retries
from distkv_dask.scheduler.lifecycle.ends import end
from distkv_dask.scheduler.lifecycle.refusals import workers_lost
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, FilesUnderWay, Prefill, Retiring, Spilling
from distkv_dask.scheduler.records.window_chain import WindowChain
from distkv_dask.scheduler.work import homes, prefill

MAX_LOSSES = 3
"""Workers with which a request may lose blocks before it fails, as Dask's allowed-failures: it may be the cause."""


def lost(life: MachineState, request: Request, worker: str) -> None:
    """A sequence lost blocks: it is recomputed, a document at its next question."""
    state = request.state
    if isinstance(state, Retiring):
        return
    if isinstance(state, Spilling):
        files.spill_lost(life, request, worker)
    elif not request.is_document:
        request.lost.append(worker)
        if request.is_save:
            files.stored(life, Stored(worker, Transfer("save", request.sequence), (), workers_lost(request)))
            return
        if isinstance(state, FilesUnderWay):
            state.forget(worker)
        if len(request.lost) > MAX_LOSSES:
            end(life, request, "error", workers_lost(request))
        else:
            _compute_again(life, request, f"a worker with blocks of the request is gone: {worker}")
            text = f"request {request.sequence} lost blocks with {worker}: they are recomputed"
            life.command(Note("repair", text))
    elif isinstance(state, Prefill | Fetching):
        if isinstance(state, Fetching):
            state.forget(worker)
        prefill.stop_prefill(life, request, "a worker with blocks of the document is gone")
        life.recommend(request, Retiring())
    elif not life.ledger.sequences[request.sequence].sharers:  # otherwise with the last of them
        documents.lost(life, request)


def stalled(life: MachineState, request: Request, error: DistKVError) -> None:
    """A worker does not start a sequence's work: the request is computed elsewhere, a limited number of times."""
    request.stalls += 1
    if request.is_document or request.stalls > retries.MAX_RETRIES:
        end(life, request, "error", error)
    else:
        _compute_again(life, request, without_quotes(error))


def state_lost(life: MachineState, gang: int, error: StateLostError) -> None:
    """A home lacks a sequence's state: the sequence is recomputed from its first token, others continue."""
    owner = retries.owner(life, gang)
    if owner is None or (request := life.requests.get(error.sequence)) is None:
        return
    if isinstance(owner, WindowChain):
        homes.restart(life, owner, without_quotes(error), but=[error.sequence])
    if isinstance(request.state, Retiring):  # it was stopped while its window ran
        return
    request.stalls += 1
    request.alone |= bool(request.reuse.shared)  # it was its document's
    if request.stalls > retries.MAX_RETRIES:
        end(life, request, "error", error)
    elif request.is_document:
        prefill.stop_prefill(life, request, without_quotes(error))
        life.recommend(request, Retiring())
    else:
        _compute_again(life, request, without_quotes(error))


def _compute_again(life: MachineState, request: Request, reason: str) -> None:
    """Free a request's remaining blocks once they are not in use, and let it wait for room again."""
    life.moves.end(request.sequence)
    prefill.stop_prefill(life, request, reason)
    life.recommend(request, Retiring(again=True))
