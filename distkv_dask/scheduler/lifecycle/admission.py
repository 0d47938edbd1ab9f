"""Admission: gives free room to waiting requests, in the policy's order."""

from __future__ import annotations

from functools import partial

from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import common, documents, prefix_cache, restore, reuse, snapshots
from distkv_dask.scheduler.ledger.ledger import Ledger
from distkv_dask.scheduler.lifecycle.preemption import make_way
from distkv_dask.scheduler.lifecycle.transitions import settle
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Prefill, Saving, State
from distkv_dask.scheduler.work import prefill, spread


def admit(life: MachineState) -> None:
    """Admit requests while there is room; evict documents or preempt requests if that makes enough."""
    while life.queue and not life.is_closing and (room := prefill.room(life)).is_any:
        may_begin = partial(_may_begin, life, room)
        chosen = life.queue.choose(may_begin)
        if chosen is None:
            first = next(life.queue.turns(), None)
            if first is None or not may_begin(first):
                return  # it is next, but its prompt may not begin yet
            if not documents.evict(life) and not make_way(life):
                return
            settle(life)
            continue
        request = life.requests[chosen[0].sequence]
        if common.waits(life, request, *chosen):
            life.queue.enqueue(chosen[0], request.turn.rank)
            continue
        ask, placement = reuse.share(life, request, *chosen)
        restores = restore.find(life, request, ask.shared, placement)
        if restores is None:
            placement = spread.spread(life, ask, placement)
        reserve(life.ledger, ask, placement)
        request.admitted = request.admitted or life.now
        snapshots.begin_with_snapshot(life, request, ask.shared)
        prefix_cache.allocate(life, request.sequence)
        life.recommend(request, restores or _first(request, ask.shared))
        settle(life)


def reserve(ledger: Ledger, ask: Ask, placement: Placement) -> None:
    """Reserve the room that the policy found for a request; the tokens that it shares are computed already."""
    ledger.reserve(ask.sequence, placement, ask.shared + ask.prompt, idle=ask.is_document or not ask.tokens)
    ledger.commit(ask.sequence, ask.shared)


def _may_begin(life: MachineState, room: prefill.Room, ask: Ask) -> bool:
    """Whether a waiting request may begin: its prompt may, and it does not wait for blocks to share."""
    return room.has(ask.prompt, life.config.prefill_chunk_tokens) and not common.is_awaiting(life, ask.sequence)


def _first(request: Request, start: int) -> State:
    """The first state of an admitted request, which lacks the tokens from ``start`` on."""
    if request.is_save:
        return Saving()
    return Prefill(start) if request.saved is None else Fetching()
