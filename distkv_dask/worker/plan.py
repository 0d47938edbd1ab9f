"""The plan of a step: splits a batch by the placements of its sequences. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from distkv_dask.errors import PlanError
from distkv_dask.placement import Placement, Span
from distkv_dask.worker.channels.bodies import Row


class Stored(NamedTuple):
    """A sequence in a step: its placement, the number of its stored tokens, and the number of new ones.

    The new ones are in one span.
    """

    sequence: int
    placement: Placement
    length: int
    queries: int = 1


class Part(NamedTuple):
    """One worker's part of a step: rows, and the step's tokens of their queries, row after row.

    A token may occur several times: for KV that its sequence shares with a document, and for its own KV.
    """

    rows: tuple[Row, ...]
    tokens: tuple[int, ...]


class Run(NamedTuple):
    """Partials merged together: ``queries`` of a worker from ``query`` on, for the tokens from ``token`` on."""

    worker: str
    query: int
    token: int
    queries: int


_Joined = dict[tuple[Row, int], list[tuple[range, int]]]
"""Rows without queries, each with the tokens and the first position of every sequence that it joins."""


def cut(batch: Sequence[Stored], alike: bool = False) -> dict[str, Part]:
    """Parts of a step by worker; workers without visible KV are left out.

    Sequences that share the same spans of a document are one row there, with the queries of all: a shared-prefix group,
    whose blocks are read once.

    Parameters
    ----------
    batch
        Sequences in the order of their tokens in the step.
    alike
        Whether each token is a separate row: attention rounds differently for rows of several.

    Raises
    ------
    PlanError
        A sequence has no room for its new tokens.
    """
    if alike:
        batch = [one._replace(length=one.length + at, queries=1) for one in batch for at in range(one.queries)]
    shared: dict[str, _Joined] = {}
    own: dict[str, _Joined] = {}
    token = 0
    for place, (sequence, placement, length, queries) in enumerate(batch):
        tokens, token = range(token, token + queries), token + queries
        tail = tail_of(sequence, placement, length)
        held: dict[tuple[str, int | None], list[Span]] = {}
        for span in placement:
            if span.filled(length) or span is tail:
                held.setdefault((span.worker, span.document), []).append(span)
        for (worker, document), spans in held.items():
            stored = sum(span.filled(length) for span in spans)
            ranges = tuple((span.start, span.stop) for span in spans)
            table = sequence if document is None else document
            row = Row(table, stored, 0, spans[-1] is tail, ranges, ())
            rows = (own if document is None else shared).setdefault(worker, {})
            rows.setdefault((row, place * alike), []).append((tokens, length))
    return {worker: _part(shared.get(worker, {}), own.get(worker, {})) for worker in {**own, **shared}}


def merge_order(parts: Mapping[str, Part]) -> list[Run]:
    """The order in which partials of a step are merged: each token's by the first position that they cover.

    Rounding depends on the order, so the order must not depend on arrival, on the holders, or on the rest of the batch.

    Examples
    --------
    >>> whole, rest = Row(1, 8, 2, False, ((0, 8),), (8,)), Row(1, 0, 2, True, ((8, 16),), (8,))
    >>> merge_order({"home": Part((rest,), (0, 1)), "holder": Part((whole,), (0, 1))})
    [Run(worker='holder', query=0, token=0, queries=2), Run(worker='home', query=0, token=0, queries=2)]
    """
    workers = list(parts)
    columns = [
        (worker, query, token, start)
        for worker, part in enumerate(parts.values())
        for (query, token), start in zip(
            enumerate(part.tokens), (row.spans[0][0] for row in part.rows for _ in range(row.queries)), strict=True
        )
    ]
    worker, query, token, start = np.array(columns, dtype=np.int64).reshape(-1, 4).T
    by_token = np.lexsort((start, token))
    rank = np.empty_like(token)
    rank[by_token] = np.arange(len(token)) - np.searchsorted(token[by_token], token[by_token])
    by_rank = np.lexsort((query, worker, rank))
    table = np.stack((rank, worker, query, token))[:, by_rank]
    goes_on = (np.diff(table) == np.array([[0], [0], [1], [1]])).all(0)
    firsts = np.flatnonzero(np.concatenate(([True], ~goes_on)))[: len(token)]
    counts = np.diff(firsts, append=len(token))
    return [
        Run(workers[worker], query, token, count)
        for (_, worker, query, token), count in zip(table[:, firsts].T.tolist(), counts.tolist(), strict=True)
    ]


def _part(*rows: _Joined) -> Part:
    """Rows with the tokens that they serve, one after the other."""
    both = [(row, joined) for some in rows for (row, _), joined in some.items()]
    tokens = tuple(token for _, joined in both for some, _ in joined for token in some)
    return Part(tuple(_filled(row, joined) for row, joined in both), tokens)


def _filled(row: Row, joined: Sequence[tuple[range, int]]) -> Row:
    """A row with the queries of all sequences that it joins, with their positions if the numbers of queries differ."""
    if len({len(some) for some, _ in joined}) > 1:
        joined = [(range(token, token + 1), first + token - some.start) for some, first in joined for token in some]
    return row._replace(queries=sum(len(some) for some, _ in joined), positions=tuple(first for _, first in joined))


def tail_of(sequence: int, placement: Placement, length: int) -> Span:
    """Span in which a sequence's next token will be stored.

    Raises
    ------
    PlanError
        The placement is full.
    """
    for span in placement:
        if span.start <= length < span.stop:
            return span
    room = placement[-1].stop if placement else 0
    raise PlanError(
        f"sequence {sequence} holds {length} tokens and has room reserved for {room}; this is a fault of the plan, "
        "please report it",
        sequence,
    )
