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
    """One worker's part of a step: rows, and which of the step's tokens their queries are, row after row.

    A token may stand there several times: once for what its sequence shares with a document, once for its own KV.
    """

    rows: tuple[Row, ...]
    tokens: tuple[int, ...]

    def rounds(self) -> list[tuple[int, int]]:
        """Cut the queries so that no token stands twice in a round: its partials are merged one after the other.

        Examples
        --------
        >>> Part((), (0, 1, 2, 0, 1)).rounds()
        [(0, 3), (3, 5)]
        """
        rounds: list[tuple[int, int]] = []
        start, seen = 0, set[int]()
        for at, token in enumerate(self.tokens):
            if token in seen:
                rounds.append((start, at))
                start, seen = at, set()
            seen.add(token)
        return [*rounds, (start, len(self.tokens))]


def cut(batch: Sequence[Stored], queries: int = 1) -> dict[str, Part]:
    """Parts of a step by worker; workers with nothing to see are left out.

    Sequences that share the same spans of a document are one row there, with the queries of all: a shared-prefix group,
    whose blocks are read once.

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
    shared: dict[str, dict[Row, list[int]]] = {}
    own: dict[str, dict[Row, list[int]]] = {}
    for place, (sequence, placement, length) in enumerate(batch):
        tail = tail_of(sequence, placement, length)
        held: dict[tuple[str, int | None], list[Span]] = {}
        for span in placement:
            if span.filled(length) or span is tail:
                held.setdefault((span.worker, span.document), []).append(span)
        for (worker, document), spans in held.items():
            stored = sum(span.filled(length) for span in spans)
            ranges = tuple((span.start, span.stop) for span in spans)
            table = sequence if document is None else document
            row = Row(table, stored, queries, spans[-1] is tail, ranges)
            rows = (own if document is None else shared).setdefault(worker, {})
            rows.setdefault(row, []).extend(range(place * queries, (place + 1) * queries))
    return {worker: _part(shared.get(worker, {}), own.get(worker, {})) for worker in {**own, **shared}}


def _part(*rows: dict[Row, list[int]]) -> Part:
    """Rows with the tokens that they serve, one after the other."""
    both = [(row, tokens) for some in rows for row, tokens in some.items()]
    tokens = tuple(token for _, tokens in both for token in tokens)
    return Part(tuple(row._replace(queries=len(tokens)) for row, tokens in both), tokens)


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
