"""Stalls: ends work that waits too long, checked once a second."""

from __future__ import annotations

from collections import Counter

from distkv_dask.scheduler.lifecycle.ends import end
from distkv_dask.scheduler.lifecycle.refusals import too_large, waited_in_vain
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import FilesUnderWay, Waiting


def hold_blocks(life: MachineState) -> None:
    """Stop counting on blocks that wait for a disk, or a user's folder, that has not answered for long.

    It is not known when they become free; until then, requests that need them are set aside.
    """
    numbers: set[int] = set()
    for number, account in life.ledger.sequences.items():
        state = life.requests[number].state
        if not isinstance(state, FilesUnderWay) or not state.answering:
            continue
        if life.now - state.asked > life.config.timeout_receive:
            numbers |= {number, *account.documents}
    held: Counter[str] = Counter()
    for account in map(life.ledger.sequences.__getitem__, numbers):
        for span in account.own:
            if span.worker not in account.lost:
                held[span.worker] += life.ledger.blocks(span.tokens)
    life.queue.hold(held)


def refuse(life: MachineState) -> bool:
    """End requests that have been set aside for longer than a replacement of a lost worker may take; False if none."""
    limit, refused = life.config.timeout_open, False
    for ask in list(life.queue):
        request = life.requests[ask.sequence]
        reason = life.queue.aside(ask)
        if not reason:
            request.turn.aside_since = None
        elif request.turn.aside_since is None:
            request.turn.aside_since = life.now
        elif life.now - request.turn.aside_since > limit:
            large = life.ledger.blocks(request.tokens) > life.policy.limit(life.ledger)
            end(life, request, "error", refusal(life, request) if large else waited_in_vain(request, reason, limit))
            refused = True
    return refused


def refusal(life: MachineState, request: Request) -> Exception:
    """Why a request can never run."""
    return too_large(request, life.ledger, life.policy, life.block_bytes)


def aside(life: MachineState, request: Request) -> str:
    """Why a waiting request, or its document, is set aside while others run; empty if it is not."""
    if request.sequence in life.queue:
        return life.queue.aside(life.queue.ask(request.sequence))
    document = life.document_of(request)
    if not isinstance(request.state, Waiting) or document is None:
        return ""
    return aside(life, document)
