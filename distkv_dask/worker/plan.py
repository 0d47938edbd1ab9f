"""Which worker does what in a step: pure cutting of a batch by the placements of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distkv_dask.errors import CapacityError
from distkv_dask.types import Placement, Span
from distkv_dask.worker.wire import Row


class Stored(NamedTuple):
    """A sequence as a step sees it: where its KV lies, and how many of its tokens are stored."""

    sequence: int
    placement: Placement
    length: int


class Part(NamedTuple):
    """One worker's part of a step: rows, and the places in the batch of the sequences that they belong to."""

    rows: tuple[Row, ...]
    places: tuple[int, ...]


def cut(batch: Sequence[Stored], queries: int = 1) -> dict[str, Part]:
    """Parts of a step by worker; workers with nothing to see are left out.

    Parameters
    ----------
    batch
        Sequences in the order of their tokens in the step.
    queries
        New tokens of each sequence; they must lie in one span.

    Raises
    ------
    CapacityError
        A sequence has no room for its new tokens.
    """
    parts: dict[str, tuple[list[Row], list[int]]] = {}
    for place, (sequence, placement, length) in enumerate(batch):
        tail = tail_of(sequence, placement, length)
        held: dict[str, list[Span]] = {}
        for span in placement:
            if span.filled(length) or span is tail:
                held.setdefault(span.worker, []).append(span)
        for worker, spans in held.items():
            rows, places = parts.setdefault(worker, ([], []))
            stored = sum(span.filled(length) for span in spans)
            ranges = tuple((span.start, span.stop) for span in spans)
            rows.append(Row(sequence, stored, queries, spans[-1] is tail, ranges))
            places.append(place)
    return {worker: Part(tuple(rows), tuple(places)) for worker, (rows, places) in parts.items()}


def tail_of(sequence: int, placement: Placement, length: int) -> Span:
    """Span in which a sequence's next token will be stored.

    Raises
    ------
    CapacityError
        There is none: the placement is full.
    """
    for span in placement:
        if span.start <= length < span.stop:
            return span
    room = placement[-1].stop if placement else 0
    raise CapacityError(
        f"sequence {sequence} holds {length} tokens and has room reserved for {room}; this is a fault of the plan, "
        "please report it"
    )
