"""Replans: decides before each chunk of a long prompt which workers compute the rest of it.

Other work changes while a prompt is computed. A worker that helps with it may get other work: then the chunks that were
not submitted go to workers that are still idle, or back to the prompt's home. A busy worker may become idle: then it
helps with the remaining chunks. Nothing is stored yet for such chunks, so only reservations change.
"""

from __future__ import annotations

from collections import Counter

from distkv_dask.gang import PrefillChunk
from distkv_dask.messages.to_worker import Free, Reserve
from distkv_dask.placement import Placement
from distkv_dask.scheduler.cache import prefix_cache
from distkv_dask.scheduler.commands import Note
from distkv_dask.scheduler.ledger.placements import clipped, continued
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Prefill
from distkv_dask.scheduler.work.chunks import chunks_of
from distkv_dask.scheduler.work.spread import PAYS, Task, best, helpers, spans_of

LONG = 0.3
"""Chunks that take at least this many seconds are submitted one by one, which costs about 1 % of that."""
QUIET = 0.75
"""Others help with a prompt if no request came for this part of a chunk's time: a new one would wait that long."""


def is_possible(life: MachineState) -> bool:
    """Whether workers of a prompt are chosen again: if the user asks for it, and if borders of spans change no bits.

    Chunks have to be long, because each is submitted on its own then.
    """
    config = life.config
    chunk = life.policy.model.curve.prefill(config.prefill_chunk_tokens)
    return config.prefill_workers == "auto" and not config.deterministic and chunk >= LONG


def replan(life: MachineState, request: Request, state: Prefill) -> None:
    """Place the chunks of a prompt that were not submitted where they end soonest."""
    rest = [chunk for number, chunk in state.chunks.items() if number not in state.under_way]
    if not is_possible(life) or request.is_document or not _may_change(life, request, state, rest[0]):
        return
    start, account = rest[0].start, life.ledger.sequences[request.sequence]
    home = life.ledger.workers[account.home]
    helping = {chunk.gang.home for chunk in rest} - {home.worker}
    idle = [one.worker for one in helpers(life, home, request.sequence)] if helping or _is_quiet(life) else []
    if helping.issubset(idle) and (helping or not idle):
        return
    held: Counter[str] = Counter()
    for span in clipped(account.placement, start, account.stop):
        held[span.worker] += life.ledger.blocks(span.tokens)
    task = Task(home, start, request.known_tokens - start, account.stop - request.known_tokens, held)
    pieces = best(life, task, idle, 1.0 if helping else PAYS)
    fits = len(pieces) > 1 or home.free + held[home.worker] >= life.ledger.blocks(account.stop - start)
    if fits and {worker for worker, _, _ in pieces} - {home.worker} != helping:
        _lay(life, request, start, spans_of(pieces, account.stop))
        _renew(life, request, state, start)


def _is_quiet(life: MachineState) -> bool:
    """Whether no request has arrived for about the time of a chunk: requests often arrive together."""
    chunk = life.policy.model.curve.prefill(life.config.prefill_chunk_tokens)
    return life.now - life.arrived >= QUIET * chunk


def _may_change(life: MachineState, request: Request, state: Prefill, first: PrefillChunk) -> bool:
    """Whether chunks from this one on may be computed elsewhere."""
    account = life.ledger.sequences[request.sequence]
    settled = not (account.moves or account.lost or account.sharers or state.lost)
    return settled and first.start % life.ledger.block_tokens == 0


def _lay(life: MachineState, request: Request, start: int, spans: Placement) -> None:
    """Reserve other room for a sequence's tokens from a position on."""
    account, size = life.ledger.sequences[request.sequence], life.ledger.block_tokens
    before = tuple(clipped(account.placement, start, account.stop))
    life.ledger.lay(request.sequence, continued(account.placement, spans, size))
    for span in before:
        life.command(Free(span.worker, request.sequence, span.start, span.stop))
    for span in spans:
        prefix_cache.make_room(life, span.worker)
        life.command(Reserve(span.worker, request.sequence, span.start, span.stop))
    count = len({span.worker for span in spans})
    life.command(Note("wavefront", f"prompt {request.sequence} from token {start} on by {count} workers"))


def _renew(life: MachineState, request: Request, state: Prefill, start: int) -> None:
    """Rebuild the chunks from a position on, for their new workers."""
    state.cut_at(start)
    state.add(chunks_of(life, request, state))
