"""Cached prefixes of a prompt: the longest one, where it is, and whether it can be shared now."""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import replace
from itertools import islice

from distkv_dask.placement import Placement
from distkv_dask.scheduler.ledger.placements import clipped, shared
from distkv_dask.scheduler.records.cached import Cached
from distkv_dask.scheduler.records.machine_state import MachineState
from distkv_dask.scheduler.records.prefix_index import chain

DEEPEST = 64
"""Maximum length of a chain of sequences that share prefixes; after it, a request is recomputed as a whole."""

CANDIDATES = 8
"""Number of sequences with equally long prefixes that are compared."""


def find(life: MachineState, tokens: array[int], near: str, adapter: str) -> tuple[int, int] | None:
    """The sequence with the longest common prefix in whole blocks, and its tokens; None if there is none.

    Of several, one with its last common block on the worker ``near`` is preferred. It has the same ``adapter``.
    """
    index, size = life.cache.index, life.ledger.block_tokens
    found, length = None, 0
    for blocks, key in enumerate(chain(tokens, size, adapter) if index else (), 1):
        if key in index:
            found, length = index[key], blocks * size
    if found is None:
        return None
    some = list(islice(found, CANDIDATES))
    there = (number for number in some if _worker_at(life.cache.by_number[number], length - 1) == near)
    number = next(there, some[0])
    return (number, length) if begins(life, number, tokens, length, adapter) else None


def _worker_at(cached: Cached, position: int) -> str:
    return next(span.worker for span in cached.spans if position < span.stop)


def begins(life: MachineState, number: int | None, tokens: array[int], length: int, adapter: str) -> bool:
    """Whether a prompt really begins with a sequence's tokens and has the same adapter: hashes may collide."""
    while number is not None:
        cached = life.cache.by_number.get(number)
        if cached is None:
            request = life.requests[number]
            return request.adapter_key == adapter and request.prompt[:length] == tokens[:length]
        if cached.adapter != adapter:
            return False
        if cached.tokens[: length - cached.start] != tokens[cached.start : length]:
            return False
        number, length = cached.parent, cached.start
    return True


def text(life: MachineState, number: int, stop: int) -> array[int]:
    """The tokens of a sequence up to a position, including those that it shares."""
    cached = life.cache.by_number.get(number)
    if cached is None:
        return life.requests[number].prompt[:stop]
    own = cached.tokens[: stop - cached.start]
    return own if cached.parent is None else text(life, cached.parent, cached.start) + own


def prefix(life: MachineState, number: int, tokens: int) -> Placement:
    """The spans of a sequence's first tokens, for a sequence that shares them."""
    cached = life.cache.by_number.get(number)
    if cached is None:
        return shared(life.ledger.sequences[number].placement, number, tokens)
    own = (replace(span, document=number) for span in clipped(cached.spans, cached.start, tokens))
    return (*before(life, cached), *own)


def before(life: MachineState, cached: Cached) -> Placement:
    """The spans of the tokens before a sequence's own."""
    return () if cached.parent is None else prefix(life, cached.parent, cached.start)


def missing(life: MachineState, number: int, tokens: int) -> Counter[str]:
    """Blocks by worker that have to return to the ledger before a sequence's first tokens can be shared."""
    found: Counter[str] = Counter()
    at: int | None = number
    while at is not None and (cached := life.cache.by_number.get(at)) is not None:
        found += cached.blocks(cached.held, tokens, life.ledger.block_tokens)
        at, tokens = cached.parent, cached.start
    return found


def can_be_shared(life: MachineState, number: int) -> bool:
    """Whether no blocks of a sequence, and of those that it shares, are about to be freed."""
    at: int | None = number
    depth = 0
    while at is not None and (cached := life.cache.by_number.get(at)) is not None:
        at, depth = cached.parent, depth + 1
        if cached.closed or depth == DEEPEST:
            return False
    return at is None or life.ledger.is_shareable(at)
