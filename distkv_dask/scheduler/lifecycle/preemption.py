"""Preemption: running requests are stopped for a waiting one of higher priority."""

from __future__ import annotations

from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Decode, Retiring
from distkv_dask.scheduler.work import homes


def make_way(life: MachineState) -> bool:
    """Preempt running requests for the next one, if it has a higher priority and then fits.

    False if none is preempted.
    """
    head = next(life.queue.turns(), None)
    if head is None or head.priority <= life.lowest_priority:
        return False  # always, if priorities are not used
    going = documents.about_to_free(life)
    need = life.ledger.blocks(head.tokens) - documents.room_with(life, going)
    if need <= 0 and going:
        return False  # one at a time if it does not fit for another reason
    chosen = victims(life, head, need)
    for number in chosen:
        homes.leave(life, number)
        life.recommend(life.requests[number], Retiring(again=True))
    return bool(chosen)


def victims(life: MachineState, head: Ask, need: int) -> list[int]:
    """Requests to preempt, the latest and least urgent first; none if the next one would still not fit.

    A request is preempted only for one of higher priority that also precedes it in the queue's order. So no request is
    overtaken forever, and the waiting one gets the room.

    Parameters
    ----------
    head
        The next request, which does not fit.
    need
        Blocks that it lacks; if it lacks none and still does not fit, one request is preempted.
    """
    rank = life.requests[head.sequence].turn.rank
    running = (life.requests[number] for number in life.ledger.sequences)
    below = [(one.turn.rank, one.sequence) for one in running if one.turn.rank > rank and _may_wait(life, one, head)]
    chosen: list[int] = []
    for _, number in sorted(below, reverse=True):
        chosen.append(number)
        if documents.freed_with(life, {*chosen}) >= need:
            return chosen
    return []


def _may_wait(life: MachineState, request: Request, head: Ask) -> bool:
    if not isinstance(request.state, Decode) or request.asked.sampling.priority >= head.priority:
        return False
    account = life.ledger.sequences[request.sequence]
    return not (account.moves or account.sharers or account.lost)
