"""Preemption: which running requests make way for a waiting one of higher priority."""

from __future__ import annotations

from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Decode, Retiring
from distkv_dask.scheduler.work import homes


def make_way(life: MachineState) -> bool:
    """Let running requests make way for the one whose turn it is, if it is more urgent and that helps.

    False if none does.
    """
    head = next(life.queue.turns(), None)
    if head is None or head.priority <= life.lowest_priority:
        return False  # as always where nobody uses priorities
    going = documents.about_to_free(life)
    need = life.ledger.blocks(head.tokens) - documents.room_with(life, going)
    if need <= 0 and going:
        return False  # one at a time where it does not fit for another reason
    chosen = victims(life, head, need)
    for number in chosen:
        homes.leave(life, number)
        life.recommend(life.requests[number], Retiring(again=True))
    return bool(chosen)


def victims(life: MachineState, head: Ask, need: int) -> list[int]:
    """Requests that should make way, the latest and least urgent first; none if it would be in vain.

    A request only makes way for one of higher priority that is before it in the queue's order, too: so nobody is passed
    by all who come after, forever, and the one that waits gets the room.

    Parameters
    ----------
    head
        The request whose turn it is, and that does not fit.
    need
        Blocks that it lacks; one has to make way where it lacks none, and still does not fit.
    """
    rank = life.requests[head.sequence].rank
    running = (life.requests[number] for number in life.ledger.sequences)
    below = [(one.rank, one.sequence) for one in running if one.rank > rank and _may_wait(life, one, head)]
    chosen: list[int] = []
    for _, number in sorted(below, reverse=True):
        chosen.append(number)
        need -= life.ledger.own_blocks(number)
        if need <= 0:
            return chosen
    return []


def _may_wait(life: MachineState, request: Request, head: Ask) -> bool:
    if not isinstance(request.state, Decode) or request.sampling.priority >= head.priority:
        return False
    account = life.ledger.sequences[request.sequence]
    return not (account.moves or account.sharers or account.lost)
