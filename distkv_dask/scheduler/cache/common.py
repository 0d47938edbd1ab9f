"""Common beginnings: requests that arrive together compute their common prefix only once.

The prefix cache has only finished requests. So if a request begins like a running one, the blocks of the running one go
into the cache: they get their own number, under which both requests share them from then on (in the pools, the running
one also keeps them under its number, because work with its old placement may be under way). The request waits for
blocks that the other one has not computed yet, if that is faster by the performance model: not if the request could be
computed on another worker in the meantime, and not for so few tokens that an additional forward takes longer.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from distkv_dask.messages.names import COMMON_NUMBERS
from distkv_dask.messages.to_worker import Free, Relocate, Share
from distkv_dask.placement import Placement, Span
from distkv_dask.scheduler.cache import beginnings, prefix_cache, reuse
from distkv_dask.scheduler.ledger.placements import clipped
from distkv_dask.scheduler.policies.base import Ask
from distkv_dask.scheduler.records.cached import Cached
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.prefix_index import chain
from distkv_dask.scheduler.records.request import Request
from distkv_dask.scheduler.records.states import Decode, Prefill

COUNTED = 64
"""Number of waiting requests that are searched for those that wait for the same beginning."""

# Running requests


def enter(life: MachineState, request: Request) -> None:
    """A request starts to run: others may share its prompt.

    With ``deterministic``, the borders of spans must not depend on what runs at the same time, because bits depend on
    them.
    """
    if life.cache.enabled and request.is_plain and not (life.ledger.has_states or life.config.deterministic):
        life.running.add(request.sequence, request.prompt, request.adapter_key)


def leave(life: MachineState, request: Request) -> None:
    """A request no longer runs."""
    if life.running and request.is_plain:
        life.running.drop(request.sequence, request.prompt, request.adapter_key)


def forget_given(life: MachineState, request: Request) -> None:
    """Nothing computes on a request any more: blocks that it gave to the cache are now only the cache's."""
    for span in request.reuse.given:
        if span.worker in life.ledger.workers:
            life.command(Free(span.worker, request.sequence, span.start, span.stop))
    request.reuse.given = ()


# Waiting requests


def is_awaiting(life: MachineState, sequence: int) -> bool:
    """Whether a waiting request still waits for another one to compute their common beginning."""
    awaits = life.requests[sequence].reuse.awaits
    if awaits is None:
        return False
    number, tokens = awaits
    return number in life.in_prefill and life.ledger.sequences[number].length < tokens


def waits(life: MachineState, request: Request, ask: Ask, placement: Placement) -> bool:
    """Whether a request that found room should wait until a running one has computed their common beginning.

    If it has, the beginning is in the prefix cache afterwards.
    """
    request.reuse.awaits = None
    document = life.document_of(request)
    if not life.running or not request.is_plain or (document is not None and document.is_released):
        return False
    known, home = request.known, placement[-1].worker
    beginning = known[: len(known) - 1]  # the last one has to be computed
    found = _running(life, beginning, home, request.adapter_key)
    if found is None or found[1] <= ask.shared:
        return False
    other, tokens = found
    cached = beginnings.find(life, beginning, home, request.adapter_key)
    if cached is not None and cached[1] >= tokens:
        return False
    account = life.ledger.sequences[other.sequence]
    if account.length >= tokens:
        if tokens < account.stop:  # otherwise it has ended
            _give(life, other, tokens)
    elif other.sequence in life.in_prefill and _pays(life, request, ask, placement, *found):
        request.reuse.awaits = other.sequence, tokens
    return request.reuse.awaits is not None


def _running(life: MachineState, tokens: array[int], near: str, adapter: str) -> tuple[Request, int] | None:
    """A running request with the longest common beginning, and its tokens; preferably one that ends nearby."""
    numbers, length = life.running.longest(tokens, adapter)
    some = [life.requests[number] for number in islice(numbers, beginnings.CANDIDATES)]
    some = [one for one in some if one.adapter_key == adapter and one.prompt[:length] == tokens[:length]]
    some = [one for one in some if _can_give(life, one, length)]
    there = (one for one in some if _worker_at(life, one, length - 1) == near)
    found = next(there, next(iter(some), None))
    return None if found is None else (found, length)


def _worker_at(life: MachineState, request: Request, position: int) -> str:
    return next(span.worker for span in life.ledger.sequences[request.sequence].placement if position < span.stop)


def _can_give(life: MachineState, request: Request, tokens: int) -> bool:
    """Whether a running request's first tokens can be shared, now or once they are computed, and some are its own."""
    account = life.ledger.sequences[request.sequence]
    if account.own[0].start >= tokens or account.moves or account.lost or any(life.moves.of(request.sequence)):
        return False
    if any(life.ledger.workers[worker].retiring for worker in account.workers()):
        return False
    parent = request.document if account.own[0].start else None
    return isinstance(request.state, Prefill | Decode) and (parent is None or beginnings.can_be_shared(life, parent))


def _pays(life: MachineState, request: Request, ask: Ask, placement: Placement, other: Request, tokens: int) -> bool:
    """Whether a request is done sooner if it waits; all that wait for the same share one more forward."""
    model, more = life.policy.model, tokens - ask.shared
    less = replace(ask, shared=tokens, prompt=ask.prompt - more, tokens=ask.tokens - more)
    prefix = tuple(clipped(life.ledger.sequences[other.sequence].placement, 0, tokens))
    there = prefix[-1].worker
    until = model.of(there).prefill(life.ledger.workers[there].pending)
    alone = reuse.seconds(life, request, ask, placement)
    shared = min(
        reuse.seconds(life, request, less, (*prefix, *rest))
        + max(0.0, until - model.of(rest[-1].worker).prefill(life.ledger.workers[rest[-1].worker].pending))
        for rest in _rests(life, less, placement, there)
    )
    if shared >= alone:
        return False
    text = request.prompt[:tokens]
    waiting = [life.requests[one.sequence] for one in islice(life.queue.turns(), COUNTED)]
    same = (one.prompt for one in waiting if one.adapter_key == request.adapter_key)
    together = 1 + sum(prompt[:tokens] == text for prompt in same)
    return together * (alone - shared) > model.of(there).step


def _rests(life: MachineState, ask: Ask, placement: Placement, there: str) -> Iterator[Placement]:
    """Candidate placements of the tokens after the common ones: as admitted, or on the worker where those end."""
    yield tuple(clipped(placement, ask.shared, placement[-1].stop))
    worker = life.ledger.workers[there]
    if worker.can_decode and worker.has_place and worker.free >= life.ledger.blocks(ask.tokens):
        yield (Span(there, ask.shared, placement[-1].stop),)


# The prefix cache


def _give(life: MachineState, request: Request, tokens: int) -> None:
    """Put a running request's first tokens into the prefix cache, and let it share them from now on."""
    account, size = life.ledger.sequences[request.sequence], life.ledger.block_tokens
    number, start = COMMON_NUMBERS + next(life.numbers), account.own[0].start
    own, text = tuple(clipped(account.own, start, tokens)), request.prompt[:tokens]
    parent = request.document if start else None
    life.ledger.split(request.sequence, number, tokens)
    keys = list(chain(text, size, request.adapter_key))[start // size :]
    cached = Cached(number, start, text[start:], keys, own, parent, tokens, request.adapter_key, used=life.now)
    life.cache.add(cached)
    life.requests[number] = Request.of_cached(number, parent, life.now)
    if request.document is not None:
        _leave(life, request, request.document, number if parent is not None else None, start)
    request.borrow(number)
    request.reuse.shared = tokens
    request.reuse.given += own
    prefix_cache.share_cached(life, number, tokens, request.sequence)
    for span in own:
        life.command(Share(span.worker, request.sequence, number, span.start, span.stop))
    if isinstance(request.state, Decode):  # so that what both share is read once in a step
        placement = life.ledger.sequences[request.sequence].placement
        holders = tuple(life.ledger.holders(placement, but=account.home))
        life.command(Relocate(account.home, 0, request.sequence, placement, holders))


def _leave(life: MachineState, request: Request, document: int, user: int | None, tokens: int) -> None:
    """A ``user`` shares a document's first tokens in place of a request."""
    if user is not None:
        prefix_cache.share_cached(life, document, tokens, user)
    life.demand(document).dependents.discard(request.sequence)
    prefix_cache.stop_sharing(life, document, request.sequence)
