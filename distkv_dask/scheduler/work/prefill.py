"""Prompts in prefill: which may begin, and when their chunks are submitted."""

from __future__ import annotations

from typing import NamedTuple

from distkv_dask.scheduler.cache import common
from distkv_dask.scheduler.commands import SubmitPrefill
from distkv_dask.scheduler.policies.queue import prefill_slots
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Prefill, State
from distkv_dask.scheduler.work import replan, wavefront
from distkv_dask.scheduler.work.chunks import chunks_of, next_chunks
from distkv_dask.scheduler.work.gangs import abandon


class Room(NamedTuple):
    """How many long prompts (more than a chunk) may begin, and how many tokens of short ones."""

    long: int
    short: int

    @property
    def is_any(self) -> bool:
        """Whether any prompt may begin."""
        return self.long > 0 or self.short > 0

    def has(self, tokens: int, step: int) -> bool:
        """Whether a prompt may begin that has ``tokens`` tokens to compute in chunks of ``step``."""
        return self.long > 0 if tokens > step else self.short > 0


def room(life: MachineState) -> Room:
    """The prompts that may begin in addition to those being computed.

    There may be one long prompt for each worker. Short ones do not wait for those: a worker computes several of them
    together, between two chunks of a long one, while as many others wait for it.
    """
    step, slots = life.config.prefill_chunk_tokens, prefill_slots(life.ledger)
    long, short = slots, FORWARDS * slots * step
    for sequence in life.in_prefill:
        request = life.requests[sequence]
        tokens = request.known_tokens - request.reuse.shared - request.reuse.restored
        if tokens > step:
            long -= 1
        else:
            short -= tokens
    return Room(long, short)


FORWARDS = 2
"""Forwards of short prompts for each worker: one that runs, and one that waits."""


def begin_prefill(life: MachineState, request: Request, before: State) -> None:
    """Compute the known tokens of a sequence that is now in prefill."""
    common.enter(life, request)
    submit_chunks(life, request)


def submit_chunks(life: MachineState, request: Request) -> None:
    """Submit the chunks of a sequence in prefill.

    Its last chunk draws the first token, unless it is a document or its tokens so far are only recomputed.
    """
    state = request.state
    assert isinstance(state, Prefill)
    life.in_prefill[request.sequence] = None
    chunks = chunks_of(life, request, state)
    state.begin(chunks, wavefront=wavefront.is_possible(life, state, chunks))
    if state.wavefront:
        submit_next(life, request, state)
    else:
        life.command(SubmitPrefill(tuple(chunks)))


def submit_next(life: MachineState, request: Request, state: Prefill) -> None:
    """Submit the next chunk of a prompt whose chunks are submitted one by one, if its time has come."""
    if wavefront.is_due(life, state):
        replan.replan(life, request, state)
        wavefront.submit(life, state)


def chunk_began(life: MachineState, gang: int) -> None:
    """A worker began a chunk: the next one may follow it."""
    for sequence in life.in_prefill:
        request = life.requests[sequence]
        state = request.state
        if isinstance(state, Prefill) and state.wavefront and gang in state.chunks:
            submit_next(life, request, state)


def resubmit_chunks(life: MachineState, request: Request) -> None:
    """Submit the dropped chunks again."""
    state = request.state
    assert isinstance(state, Prefill)
    state.resume(life.ledger.sequences[request.sequence].length)
    submit_chunks(life, request)


def stop_prefill(life: MachineState, request: Request, reason: str) -> None:
    """Drop the chunks that are not done, if it is in prefill."""
    if isinstance(request.state, Prefill):
        for chunk in request.state.drop():
            abandon(life, chunk.gang, reason)
        life.in_prefill.pop(request.sequence, None)


def is_awaited_by(life: MachineState, home: str) -> bool:
    """Whether a prompt is about to join a home, or needs its lane next."""
    joining = any(life.ledger.sequences[sequence].home == home for sequence in life.in_prefill)
    return joining or any(chunk.gang.home == home for chunk in next_chunks(life))
