"""Placements as values: their blocks, and how moves change them. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from distkv_dask.placement import Move, Placement, Span


def blocks_of(tokens: int, block_tokens: int) -> int:
    """Blocks that ``tokens`` tokens of one span occupy."""
    return -(-tokens // block_tokens)


def span_around(placement: Placement, move: Move, block_tokens: int) -> Span | None:
    """The sequence's own span at the move's source that holds all of its tokens in whole blocks, if there is one."""
    for span in placement:
        if span.document is not None:
            continue
        if span.worker == move.source and span.start <= move.start < move.stop <= span.stop:
            whole = (move.start - span.start) % block_tokens == 0
            return span if whole and (move.stop == span.stop or move.tokens % block_tokens == 0) else None
    return None


def shared(placement: Placement, document: int, tokens: int) -> Placement:
    """The first ``tokens`` tokens of a document, as spans of a sequence that shares them.

    Examples
    --------
    >>> shared((Span("a", 0, 8, document=3), Span("b", 8, 16)), 7, 12)[1]
    Span(worker='b', start=8, stop=12, document=7)
    """
    return tuple(
        Span(span.worker, span.start, min(span.stop, tokens), document if span.document is None else span.document)
        for span in placement
        if span.start < tokens
    )


def shifted(placement: Placement, tokens: int) -> Placement:
    """A placement that begins ``tokens`` tokens later."""
    return tuple(Span(span.worker, span.start + tokens, span.stop + tokens, span.document) for span in placement)


def clipped(placement: Iterable[Span], start: int, stop: int) -> Iterator[Span]:
    """The part of a placement within tokens ``[start, stop)``.

    Examples
    --------
    >>> [(span.worker, span.start, span.stop) for span in clipped((Span("a", 0, 8), Span("b", 8, 16)), 4, 8)]
    [('a', 4, 8)]
    """
    for span in placement:
        first, last = max(span.start, start), min(span.stop, stop)
        if first < last:
            yield replace(span, start=first, stop=last)


def moved(placement: Placement, move: Move, block_tokens: int) -> Placement:
    """The placement after a move that :func:`span_around` found possible.

    Examples
    --------
    >>> [(span.worker, span.start, span.stop) for span in moved((Span("a", 0, 12),), Move(0, 4, 8, "a", "b"), 4)]
    [('a', 0, 4), ('b', 4, 8), ('a', 8, 12)]
    """
    return tuple(_joined(_cut(placement, move, block_tokens), block_tokens))


def relaid(placement: Placement, lost: Collection[str], laid: Placement, block_tokens: int) -> Placement:
    """A placement with the spans of ``lost`` workers replaced, in order, by those of ``laid``.

    Examples
    --------
    >>> whole = (Span("a", 0, 8), Span("b", 8, 16), Span("a", 16, 21))
    >>> [(span.worker, span.start, span.stop) for span in relaid(whole, {"a"}, (Span("c", 0, 4), Span("b", 4, 13)), 4)]
    [('c', 0, 4), ('b', 4, 21)]
    """
    return tuple(_joined(_replace(placement, lost, laid), block_tokens))


def continued(placement: Placement, rest: Sequence[Span], block_tokens: int) -> Placement:
    """A placement up to where ``rest`` begins, and then that.

    Examples
    --------
    >>> [(span.worker, span.start, span.stop) for span in continued((Span("a", 0, 9),), [Span("a", 4, 9)], 4)]
    [('a', 0, 9)]
    """
    return tuple(_joined(iter((*clipped(placement, 0, rest[0].start), *rest)), block_tokens))


def _replace(placement: Placement, lost: Collection[str], laid: Placement) -> Iterator[Span]:
    before = 0  # lost tokens so far
    for span in placement:
        if span.worker not in lost:
            yield span
            continue
        for new in laid:
            start, stop = max(new.start, before), min(new.stop, before + span.tokens)
            if start < stop:
                yield Span(new.worker, span.start + start - before, span.start + stop - before)
        before += span.tokens


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
    """Join adjacent spans of one worker if the first ends with a whole block and neither is a document's."""
    before = next(spans)
    for span in spans:
        own = span.document is before.document is None
        if own and span.worker == before.worker and before.tokens % block_tokens == 0:
            before = Span(before.worker, before.start, span.stop)
        else:
            yield before
            before = span
    yield before
