"""Ends: a request is answered, cancelled or fails, and its client is told once."""

from __future__ import annotations

from distkv_dask.errors import InvalidRequestError, without_quotes
from distkv_dask.messages.client_calls import Delivery
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler.cache import documents
from distkv_dask.scheduler.records.kinds import Document
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Fetching, Gone, Prefill, Retiring, Spilling, State
from distkv_dask.scheduler.work import homes, prefill


def end(
    life: MachineState,
    request: Request,
    reason: FinishReason,
    error: Exception | None = None,
    *,
    settled: bool = False,
) -> None:
    """Tell the client, and free the blocks: at once if they are not in use (``settled``), else later."""
    if request.is_document:
        end_document(life, request, error)
        return
    account = life.ledger.sequences.get(request.sequence)
    placement = account.placement if account is not None else ()
    life.command(
        Delivery(
            request.sequence,
            (),
            reason,
            error,
            request.timings(life.now),
            placement,
            request.reuse.spared,
            generated=None if request.is_save else len(request.generated),
        )
    )
    life.moves.end(request.sequence)
    request.ended = reason
    if request.goes_on_later:  # it is being stopped already
        life.recommend(request, Retiring() if isinstance(request.state, Retiring) else Spilling())
    elif account is None:
        if request.sequence in life.queue:
            life.queue.withdraw(request.sequence)
        life.recommend(request, Gone(error))
    else:
        prefill.stop_prefill(life, request, f"the request ended: {without_quotes(error) if error else reason}")
        homes.leave(life, request.sequence)
        life.recommend(request, Retiring(settled=settled or request.is_save))


def end_instead(life: MachineState, request: Request, before: State) -> None:
    """A request that is being stopped will not continue: it ends when the workers have answered that it waits for.

    Raises
    ------
    RuntimeError
        It was not to continue, or still is: there is nothing to change.
    """
    match before, request.state:
        case Retiring(again=True) as retiring, Retiring(again=False) as state:
            state.take_over(retiring)
        case Spilling(again=True) as spilling, Spilling(again=False) as state:
            state.take_over(spilling)
        case _:
            raise RuntimeError(f"request {request.sequence} is {request.state.label} already")


def end_document(life: MachineState, request: Request, error: Exception | None = None) -> None:
    """A document was released, or could not be computed: then requests that wait for it fail, too."""
    if isinstance(request.kind, Document) and not request.kind.announced:
        reason: FinishReason = "cancelled" if error is None else "error"
        life.command(Delivery(request.sequence, (), reason, error, request.timings(life.now)))
        request.kind.announced = request.kind.demand.released = True
    if error is not None:
        _fail_awaited(life, request, error)
    documents.leave_queue(life, request)
    if isinstance(request.state, Prefill | Fetching):
        prefill.stop_prefill(life, request, f"the document ended: {without_quotes(error) if error else 'released'}")
        life.recommend(request, Retiring())
    else:
        life.idle_documents[request.sequence] = None


def forget_request(life: MachineState, request: Request, before: State) -> None:
    """Forget a request that has ended."""
    assert isinstance(request.state, Gone)
    lost = InvalidRequestError("the answer that this question builds on was not finished: ask that one again")
    _fail_awaited(life, request, request.state.error or lost)
    documents.remove(life, request)


def _fail_awaited(life: MachineState, request: Request, error: Exception) -> None:
    awaited = () if request.demand is None else tuple(request.demand.awaited)
    for sequence in awaited:
        end(life, life.requests[sequence], "error", error)
