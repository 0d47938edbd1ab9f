"""Retirement: workers confirm that they no longer compute on a sequence; only then are its blocks freed or kept.

So a late write never changes another sequence's block.
"""

from __future__ import annotations

from collections.abc import Iterable

from distkv_dask.scheduler.cache import common, disk
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
    """Ask the workers that run a sequence's forwards, then its holders, to stop computing on it."""
    state, account = request.state, life.ledger.sequences[request.sequence]
    assert isinstance(state, Retiring)
    common.leave(life, request)
    if isinstance(before, Fetching):  # workers that still read files report when they are done
        state.wait_for_readers(before.answering)
    elif state.settled:
        state.end_forwards()
    else:
        _ask(life, request, {account.home} if isinstance(before, Decode) else account.workers())
    if not state.workers:
        retired(life, request, "")


def retired(life: MachineState, request: Request, worker: str) -> None:
    """A worker no longer computes on a retiring sequence.

    First the workers that run its forwards answer, then all of its holders, so that no frame is left unanswered; then
    its blocks are freed.
    """
    state = request.state
    assert isinstance(state, Retiring)
    if not state.answered(worker):
        return
    if state.waits_for == "forwards":
        state.end_forwards()
        _ask(life, request, life.ledger.sequences[request.sequence].workers())
    if not state.workers:
        life.recommend(request, _next(life, request, state))


def _ask(life: MachineState, request: Request, workers: Iterable[str]) -> None:
    assert isinstance(request.state, Retiring)
    asked = [worker for worker in workers if worker in life.ledger.workers]
    request.state.ask(asked)
    for worker in asked:  # a set's order differs between processes
        life.command(request.retire(worker))


def _next(life: MachineState, request: Request, state: Retiring) -> State:
    """Decide whether an idle sequence is kept, continues, or ends."""
    if request.is_document:
        return repaired(life, request) or Dropped()
    if state.again and (further := repaired(life, request)) is not None:
        return further
    if state.again and disk.pays(life, request):
        return Spilling(again=True)
    if state.again:
        return Waiting(rank=request.turn.rank)
    if request.demand is not None and request.ended in ("stop", "length"):  # its answer is kept
        return Stored()
    return Gone()
