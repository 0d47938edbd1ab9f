"""Chunks of prompts: cut at borders of spans, each computed by the worker that will hold its KV."""

from __future__ import annotations

from collections.abc import Iterator

from distkv_dask.gang import PrefillChunk
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import snapshots
from distkv_dask.scheduler.records.kinds import Answer
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Prefill
from distkv_dask.scheduler.work.gangs import new_gang

SCORED_TOKENS = 128
"""Tokens of a chunk whose log probabilities are wanted: the logits of all of them are in memory at once."""


def chunks_of(life: MachineState, request: Request, state: Prefill) -> list[PrefillChunk]:
    """The ranges of a sequence that prefill has to compute, in order."""
    account, known, asked = life.ledger.sequences[request.sequence], request.known, request.asked
    placement, step = account.placement, life.config.prefill_chunk_tokens
    draws = _draws(request)
    best = asked.sampling.prompt_logprobs if draws else None
    chunks: list[PrefillChunk] = []
    pieces = _pieces(life, request, state, step if best is None else min(step, SCORED_TOKENS))
    kept = snapshots.plan(life, request, [last for _, _, last in pieces])
    for holder, first, last in pieces:
        computes = life.ledger.workers[holder].can_decode and not life.ledger.has_states
        worker = holder if computes else account.home
        draws_here = draws and last == len(known)
        choices = request.answer.choices if draws_here else ()
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
                asked.sampling if draws_here else None,
                request.history if draws_here else (),
                tuple((token,) for token in known[first + 1 : last + 1]) if best is not None else (),
                best or 0,
                choices,
                last in kept,
                asked.adapter,
                _pooled_from(request, first, last),
            )
        )
    return chunks


def _draws(request: Request) -> bool:
    """Whether the first token is drawn after the prompt: not if tokens of an answer are only recomputed."""
    kind = request.kind
    return isinstance(kind, Answer) and kind.pooled is None and not kind.generated


def _pooled_from(request: Request, first: int, last: int) -> int | None:
    """The position in a chunk from which hidden states are summed; None if they are not."""
    match request.kind:
        case Answer(pooled=int(pooled)) if last > pooled:
            return max(first, pooled)
    return None


def _pieces(life: MachineState, request: Request, state: Prefill, step: int) -> list[tuple[str, int, int]]:
    """Tokens [first, last) of each chunk, and the worker that will hold them."""
    placement, stop = life.ledger.sequences[request.sequence].placement, len(request.known)
    ranges = [*state.lost, (state.start, stop)]
    if parts := snapshots.border(life, request, state.start):
        ranges[-1:] = [(state.start, parts), (parts, stop)]
    return [piece for first, last in ranges for piece in cut_prompt(placement, first, last, step)]


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
