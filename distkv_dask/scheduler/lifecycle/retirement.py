"""Retirement: workers say that they compute on a sequence no more, and only then its blocks are free, or kept.

So a late write never lands in somebody else's block.
"""

from __future__ import annotations

from collections.abc import Iterable

from distkv_dask.scheduler.cache import disk
from distkv_dask.scheduler.cache.repair import repaired
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import (
    Decode,
    Dropped,
    Fetching,
    Gone,
    Retiring,
    Spilling,
    State,
    Stored,
    Waiting,
)


def begin_retirement(life: MachineState, request: Request, before: State) -> None:
    """Let the workers that run forwards of a sequence, then its holders, say that they compute on it no more."""
    state, account = request.state, life.ledger.sequences[request.sequence]
    assert isinstance(state, Retiring)
    if isinstance(before, Fetching):  # who still reads files says so when it is done
        state.workers, state.reading, state.forwards_ended = set(before.answering), True, True
    elif state.settled:
        state.forwards_ended = True
    else:
        _ask(life, request, {account.home} if isinstance(before, Decode) else account.workers())
    if not state.workers:
        retired(life, request, "")


def retired(life: MachineState, request: Request, worker: str) -> None:
    """A worker computes on a sequence that retires no more.

    First those that run its forwards are waited for; then all of its holders, so that none has a frame of them left to
    answer; then its blocks are freed.
    """
    state = request.state
    assert isinstance(state, Retiring)
    state.workers.discard(worker)
    if state.workers:
        return
    if not state.forwards_ended:
        state.forwards_ended = True
        _ask(life, request, life.ledger.sequences[request.sequence].workers())
    if not state.workers:
        life.recommend(request, _next(life, request, state))


def _ask(life: MachineState, request: Request, workers: Iterable[str]) -> None:
    assert isinstance(request.state, Retiring)
    asked = [worker for worker in workers if worker in life.ledger.workers]
    request.state.workers = set(asked)
    for worker in asked:  # a set's order is another one in every process
        life.command(request.retire(worker))


def _next(life: MachineState, request: Request, state: Retiring) -> State:
    """Decide about a sequence that nothing computes on any longer: it is kept, goes on, or ends."""
    if request.is_document:
        return repaired(life, request) or Dropped()
    if state.again and (further := repaired(life, request)) is not None:
        return further
    if state.again and disk.pays(life, request):
        return Spilling(again=True)
    if state.again:
        return Waiting(rank=request.rank)
    if request.keeps and request.ended in ("stop", "length"):
        return Stored()
    return Gone()
