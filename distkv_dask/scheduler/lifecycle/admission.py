"""Admission: room that is free goes to requests that wait, in the policy's order."""

from __future__ import annotations

from distkv_dask.scheduler.cache import documents, prefix_cache, reuse
from distkv_dask.scheduler.lifecycle.preemption import make_way
from distkv_dask.scheduler.lifecycle.transitions import settle, transition
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Prefill, Saving, State
from distkv_dask.scheduler.work import prefill


def admit(life: MachineState) -> None:
    """Let requests begin while there is room; give up documents, or let others make way, where that makes some."""
    while life.queue and not life.is_closing and prefill.has_room(life):
        chosen = life.queue.choose()
        if chosen is None:
            if not documents.evict(life) and not make_way(life):
                return
            settle(life)
            continue
        request = life.requests[chosen[0].sequence]
        ask, placement = reuse.share(life, request, *chosen)
        life.queue.reserve(ask, placement)
        request.admitted = request.admitted or life.now
        prefix_cache.allocate(life, request.sequence)
        transition(life, request, _first(request, ask.shared))


def _first(request: Request, start: int) -> State:
    """The state in which a request with room begins, whose tokens from ``start`` on are missing."""
    if request.saves:
        return Saving()
    return Prefill(start) if request.saved is None else Fetching()
