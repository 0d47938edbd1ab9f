"""The only place where requests change their state: a table of allowed transitions and their functions.

Packages of the scheduler recommend states; :func:`settle` carries out these recommendations in order, until none is
left. A transition that is not in the table is a bug, and ends the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.lifecycle import ends, files, queue, retirement
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import (
    Decode,
    Dropped,
    Fetching,
    Gone,
    Prefill,
    Retiring,
    Saving,
    Spilling,
    State,
    Stored,
    Waiting,
)
from distkv_dask.scheduler.work import homes, prefill

Enter = Callable[[MachineState, Request, State], None]
"""Called when a request (second) has just left a state (third)."""

TABLE: Mapping[tuple[type[State], type[State]], Enter] = {
    # room
    (Waiting, Waiting): queue.enqueue,
    (Waiting, Prefill): prefill.begin_prefill,
    (Waiting, Saving): files.begin_transfer,
    (Waiting, Fetching): files.begin_transfer,
    (Waiting, Stored): documents.stored,  # a document shorter than a block
    (Waiting, Dropped): documents.stop_waiting,
    (Waiting, Gone): ends.forget_request,
    # work
    (Prefill, Decode): homes.begin_decode,
    (Prefill, Stored): documents.stored,
    (Prefill, Retiring): retirement.begin_retirement,
    (Decode, Retiring): retirement.begin_retirement,
    # after work
    (Retiring, Prefill): prefill.begin_prefill,
    (Retiring, Decode): homes.begin_decode,
    (Retiring, Waiting): queue.requeue,
    (Retiring, Spilling): documents.spill,
    (Retiring, Stored): documents.become_document,
    (Retiring, Dropped): documents.drop_blocks,
    (Retiring, Gone): ends.forget_request,
    (Retiring, Retiring): ends.end_instead,
    # documents
    (Stored, Prefill): prefill.begin_prefill,
    (Stored, Spilling): documents.spill,
    (Stored, Dropped): documents.drop_blocks,
    (Stored, Gone): ends.forget_request,
    (Dropped, Waiting): queue.enqueue,
    (Dropped, Stored): documents.stored,
    (Dropped, Gone): ends.forget_request,
    # files
    (Spilling, Spilling): ends.end_instead,
    (Spilling, Dropped): documents.drop_blocks,
    (Spilling, Waiting): queue.requeue,
    (Spilling, Gone): ends.forget_request,
    (Fetching, Decode): homes.begin_decode,
    (Fetching, Prefill): prefill.begin_prefill,
    (Fetching, Stored): documents.stored,
    (Fetching, Dropped): documents.drop_blocks,
    (Fetching, Retiring): retirement.begin_retirement,
    (Saving, Retiring): retirement.begin_retirement,
    (Saving, Gone): ends.forget_request,
}


def settle(life: MachineState) -> None:
    """Carry out recommendations, and those that follow from them, until none is left.

    Notes
    -----
    Once an event is handled, this is called. Only loops call it before, after each of their steps, because steps change
    what later ones read: which requests and accounts there are (a lost worker, the end of all requests), the order of
    commands for late work, and for an admission the room.
    """
    while True:
        if life.recommendations:
            request, state = life.recommendations.popleft()
            if life.requests.get(request.sequence) is request:  # otherwise it is gone already
                transition(life, request, state)
        elif life.idle_documents:
            number, _ = life.idle_documents.popitem()
            if number in life.requests and documents.is_unneeded(life.requests[number]):
                transition(life, life.requests[number], Gone())
        else:
            return


def transition(life: MachineState, request: Request, state: State) -> None:
    """Change a request's state, and call the function of this transition.

    Raises
    ------
    RuntimeError
        The table has no such transition.
    """
    before = request.state
    enter = TABLE.get((type(before), type(state)))
    if enter is None:
        names = type(before).__name__, type(state).__name__
        raise RuntimeError(f"request {request.sequence} cannot go from {names[0]} to {names[1]}")
    request.state = state
    enter(life, request, before)
