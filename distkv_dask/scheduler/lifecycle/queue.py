"""Waiting requests: for room, in the queue, or until their document is stored."""

from __future__ import annotations

from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.policies.base import PRIORITY_SECONDS, Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.reuse import Reuse
from distkv_dask.scheduler.records.states import State, Waiting


def enqueue(life: MachineState, request: Request, before: State) -> None:
    """Let a request wait for room, or for its document to be stored."""
    state = request.state
    assert isinstance(state, Waiting)
    if request.sequence in life.queue:
        return
    submitted, priority = _turn(life, request, state)
    reuse = request.reuse = Reuse()
    if request.parent is not None and not request.alone and not documents.share(life, request, submitted):
        return
    ask = Ask(
        request.sequence,
        request.known_tokens - reuse.shared,
        request.tokens - reuse.shared,
        submitted,
        priority,
        document=request.document if reuse.shared else None,
        shared=reuse.shared,
        is_document=request.is_document,
        home=life.snapshots.homes.get(reuse.begins, "") if reuse.begins is not None else "",
    )
    rank = life.policy.rank(life.ledger, ask) if state.rank is None else state.rank
    request.turn.take(min(rank, state.latest))
    life.queue.enqueue(ask, request.turn.rank)


def _turn(life: MachineState, request: Request, state: Waiting) -> tuple[float, int]:
    """Submission time and priority of a request; for an awaited document, those of the first waiting request."""
    if request.demand is not None and (awaited := request.demand.awaited):
        turns = [(since, life.requests[one].asked.sampling.priority) for one, since in awaited.items()]
        return min(turns, key=lambda turn: turn[0] - turn[1] * PRIORITY_SECONDS)
    submitted = request.asked.submitted if state.submitted is None else state.submitted
    return submitted, request.asked.sampling.priority


def requeue(life: MachineState, request: Request, before: State) -> None:
    """Free the blocks of a request that lost some or was preempted, and let it wait for room in its turn."""
    documents.free_blocks(life, request)
    if (document := life.document_of(request)) is not None and document.is_cached:
        documents.leave_document(life, request)
        request.parent = None
    life.recommend(request, request.state)  # after its document, which may just have become one that is repaired
