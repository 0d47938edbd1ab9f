"""Placements as values: how many blocks, and what a move makes of them. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

from distkv_dask.types import Move, Placement, Span


def blocks_of(tokens: int, block_tokens: int) -> int:
    """Blocks that ``tokens`` tokens of one span occupy."""
    return -(-tokens // block_tokens)


def span_around(placement: Placement, move: Move, block_tokens: int) -> Span | None:
    """The span of the move's source that holds all of the move's tokens in whole blocks, if there is one."""
    for span in placement:
        if span.worker == move.source and span.start <= move.start < move.stop <= span.stop:
            whole = (move.start - span.start) % block_tokens == 0
            return span if whole and (move.stop == span.stop or move.tokens % block_tokens == 0) else None
    return None


def moved(placement: Placement, move: Move, block_tokens: int) -> Placement:
    """The placement after a move that :func:`span_around` found possible.

    Examples
    --------
    >>> moved((Span("a", 0, 12),), Move(0, 4, 8, "a", "b"), 4)
    (Span(worker='a', start=0, stop=4), Span(worker='b', start=4, stop=8), Span(worker='a', start=8, stop=12))
    """
    return tuple(_joined(_cut(placement, move, block_tokens), block_tokens))


def _cut(placement: Placement, move: Move, block_tokens: int) -> Iterator[Span]:
    around = span_around(placement, move, block_tokens)
    for span in placement:
        if span is not around:
            yield span
            continue
        if span.start < move.start:
            yield Span(span.worker, span.start, move.start)
        yield Span(move.target, move.start, move.stop)
        if move.stop < span.stop:
            yield Span(span.worker, move.stop, span.stop)


def _joined(spans: Iterator[Span], block_tokens: int) -> Iterator[Span]:
    """Adjacent spans of one worker as one, where the first ends with a whole block."""
    before = next(spans)
    for span in spans:
        if span.worker == before.worker and before.tokens % block_tokens == 0:
            before = Span(before.worker, before.start, span.stop)
        else:
            yield before
            before = span
    yield before
