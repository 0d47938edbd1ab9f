"""Waiting requests: for room, in the queue, or until their document is stored."""

from __future__ import annotations

import math

from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.policies.base import PRIORITY_SECONDS, Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import State, Waiting


def enqueue(life: MachineState, request: Request, before: State) -> None:
    """Let a request wait for room, or for its document to be stored."""
    state = request.state
    assert isinstance(state, Waiting)
    if request.sequence in life.queue:
        return
    submitted, priority = _turn(life, request, state)
    request.reused, request.restored, request.common, request.begins, request.awaits = 0, 0, 0, None, None
    has_document = request.document is not None and not request.alone
    if has_document and not documents.share(life, request, submitted):
        return
    ask = Ask(
        request.sequence,
        request.known_tokens - request.reused,
        request.tokens - request.reused,
        submitted,
        priority,
        document=request.document if request.reused else None,
        shared=request.reused,
        is_document=request.is_document,
        home=life.snapshots.homes.get(request.begins, "") if request.begins is not None else "",
    )
    rank = life.policy.rank(life.ledger, ask) if state.rank is None else state.rank
    request.rank = min(rank, state.latest)
    if request.rank <= request.behind:
        request.rank = math.nextafter(request.behind, math.inf)
    life.queue.enqueue(ask, request.rank)


def _turn(life: MachineState, request: Request, state: Waiting) -> tuple[float, int]:
    """Submission time and priority of a request; for an awaited document, those of the first waiting request."""
    if request.awaited:
        turns = [(since, life.requests[one].sampling.priority) for one, since in request.awaited.items()]
        return min(turns, key=lambda turn: turn[0] - turn[1] * PRIORITY_SECONDS)
    submitted = request.submitted if state.submitted is None else state.submitted
    return submitted, request.sampling.priority


def requeue(life: MachineState, request: Request, before: State) -> None:
    """Free the blocks of a request that lost some or was preempted, and let it wait for room in its turn."""
    documents.free_blocks(life, request)
    if (document := life.document_of(request)) is not None and document.cached:
        documents.leave_document(life, request)
        request.document, request.borrows = None, False
    life.recommend(request, request.state)  # after its document, which may just have become one that is repaired
