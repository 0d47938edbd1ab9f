"""Prompts in prefill: cut into chunks, each computed by the worker that will hold its KV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distkv_dask.gang import PrefillChunk
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import common, snapshots
from distkv_dask.scheduler.commands import SubmitPrefill
from distkv_dask.scheduler.policies.queue import prefill_slots
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Prefill, State
from distkv_dask.scheduler.work import wavefront
from distkv_dask.scheduler.work.gangs import abandon, new_gang


class Room(NamedTuple):
    """How many prompts of more than a chunk may begin, and tokens of shorter ones."""

    long: int
    short: int

    @property
    def is_any(self) -> bool:
        """Whether any prompt may begin."""
        return self.long > 0 or self.short > 0

    def has(self, tokens: int, step: int) -> bool:
        """Whether a prompt may begin, of which ``tokens`` are to be computed in chunks of ``step``."""
        return self.long > 0 if tokens > step else self.short > 0


def room(life: MachineState) -> Room:
    """What may begin besides the prompts that are computed now.

    Of long prompts there is one for each worker. Short ones wait for none of those: a worker computes several of them
    together, between two chunks of a long one. While it does, as many wait for it.
    """
    step, slots = life.config.prefill_chunk_tokens, prefill_slots(life.ledger)
    long, short = slots, FORWARDS * slots * step
    for sequence in life.in_prefill:
        request = life.requests[sequence]
        tokens = request.known_tokens - request.reused - request.restored
        if tokens > step:
            long -= 1
        else:
            short -= tokens
    return Room(long, short)


FORWARDS = 2
"""Forwards of short prompts for each worker: one that runs, and one that waits."""


SCORED_TOKENS = 128
"""Tokens of a chunk whose log probabilities are wanted: the logits of all of them are there at once."""


def begin_prefill(life: MachineState, request: Request, before: State) -> None:
    """Compute what is known of a sequence that is in prefill now."""
    common.enter(life, request)
    submit_chunks(life, request)


def submit_chunks(life: MachineState, request: Request) -> None:
    """Submit the chunks of a sequence in prefill.

    Its last chunk draws the first token, unless it is a document or its tokens so far are only recomputed.
    """
    state = request.state
    assert isinstance(state, Prefill)
    life.in_prefill[request.sequence] = None
    chunks = _chunks(life, request, state)
    state.chunks = {chunk.gang.number: chunk for chunk in chunks}
    state.wavefront = wavefront.is_possible(life, state)
    if state.wavefront:
        wavefront.submit(life, state)
    else:
        life.command(SubmitPrefill(tuple(chunks)))


def _chunks(life: MachineState, request: Request, state: Prefill) -> list[PrefillChunk]:
    account, known = life.ledger.sequences[request.sequence], request.known
    placement, step = account.placement, life.config.prefill_chunk_tokens
    draws = not request.is_document and not request.generated
    best = request.sampling.prompt_logprobs if draws else None
    chunks: list[PrefillChunk] = []
    pieces = _pieces(life, request, state, step if best is None else min(step, SCORED_TOKENS))
    kept = snapshots.plan(life, request, [last for _, _, last in pieces])
    for holder, first, last in pieces:
        computes = life.ledger.workers[holder].can_decode and not life.ledger.has_states
        worker = holder if computes else account.home
        draws_here = draws and last == len(known)
        choices = request.choices if draws_here else ()
        reach = last + max((len(choice) - 1 for choice in choices), default=0)
        holders = tuple(life.ledger.holders(placement, reach, but=worker))
        gang = new_gang(life, f"prefill-{request.sequence}-{first // step}", life.ledger.epoch, worker, holders)
        chunks.append(
            PrefillChunk(
                gang,
                request.sequence,
                placement,
                first,
                tuple(known[first:last]),
                request.sampling if draws_here else None,
                request.history if draws_here else (),
                tuple((token,) for token in known[first + 1 : last + 1]) if best is not None else (),
                best or 0,
                choices,
                last in kept,
            )
        )
    return chunks


def _pieces(life: MachineState, request: Request, state: Prefill, step: int) -> list[tuple[str, int, int]]:
    """Tokens [first, last) of each chunk, and the worker that will hold them."""
    placement, stop = life.ledger.sequences[request.sequence].placement, len(request.known)
    ranges = [*state.lost, (state.start, stop)]
    if parts := snapshots.border(life, request, state.start):
        ranges[-1:] = [(state.start, parts), (parts, stop)]
    return [piece for first, last in ranges for piece in cut_prompt(placement, first, last, step)]


def chunk_began(life: MachineState, gang: int) -> None:
    """A worker began a chunk: the next one may follow it."""
    for sequence in life.in_prefill:
        state = life.requests[sequence].state
        if isinstance(state, Prefill) and state.wavefront and gang in state.chunks:
            wavefront.submit(life, state)


def resubmit_chunks(life: MachineState, request: Request) -> None:
    """Submit again the chunks that were given up."""
    state = request.state
    assert isinstance(state, Prefill)
    state.start, state.lost, state.rests_until = life.ledger.sequences[request.sequence].length, (), None
    submit_chunks(life, request)


def stop_prefill(life: MachineState, request: Request, reason: str) -> None:
    """Give up the chunks that are not done, if it is in prefill."""
    if isinstance(request.state, Prefill):
        state = request.state
        for number, chunk in state.chunks.items():
            if number in state.under_way or not state.wavefront:
                abandon(life, chunk.gang, reason)
        state.chunks, state.under_way, state.early = {}, set(), {}
        life.in_prefill.pop(request.sequence, None)


def is_awaited_by(life: MachineState, home: str) -> bool:
    """Whether a prompt is about to join a home, or needs its lane next."""
    joining = any(life.ledger.sequences[sequence].home == home for sequence in life.in_prefill)
    return joining or any(chunk.gang.home == home for chunk in next_chunks(life))


def next_chunks(life: MachineState) -> Iterator[PrefillChunk]:
    """The chunks of each prompt that are computed now, or next."""
    for sequence in life.in_prefill:
        state = life.requests[sequence].state
        if isinstance(state, Prefill):
            yield from state.heads()


def cut_prompt(placement: Placement, start: int, end: int, step: int) -> Iterator[tuple[str, int, int]]:
    """Cut tokens ``start`` to ``end`` at span borders and every ``step`` tokens of a span.

    Examples
    --------
    >>> from distkv_dask.placement import Span
    >>> list(cut_prompt((Span("a", 0, 5), Span("b", 5, 20)), 0, 12, 4))
    [('a', 0, 4), ('a', 4, 5), ('b', 5, 9), ('b', 9, 12)]
    """
    for span in placement:
        for first in range(max(span.start, start), min(span.stop, end), step):
            yield span.worker, first, min(first + step, span.stop, end)
