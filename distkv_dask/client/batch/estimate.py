"""A dry run: the cost of a batch, and which of its rows will be refused; nothing is answered."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from distkv_dask.client.batch.means import means_of, result_of
from distkv_dask.client.batch.needs import Counting, Lot, Need, count_lot, count_row
from distkv_dask.client.batch.pace import Means, Pace, kv_tokens, pace_of
from distkv_dask.client.batch.rows import Content, Row, Source
from distkv_dask.client.batch.spec import BatchSpec
from distkv_dask.errors import in_words

if TYPE_CHECKING:
    from distkv_dask.client.session.session import Session

LOT = 16
"""Rows that are counted by one task."""

FEW = 2 * LOT
"""This many rows are counted in this process: starting tasks would take longer."""

NAMED = 20
"""Refused rows that an estimate names; all of them are counted."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A question about a row that will be refused, and why."""

    label: int | str
    question: str | None
    error: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of a batch, if every answer has its maximum length.

    Attributes
    ----------
    rows, requests
        Rows of the source; requests to the engine, without those that are refused.
    refused
        Questions about rows that will be refused.
    refused_rows
        The first of them, each with its reason.
    prompt_tokens, shared_tokens, new_tokens
        Tokens of all prompts; how many of them come from documents that several questions share; most tokens of
        answers.
    sharing
        Questions that share a document with others.
    largest_tokens, kv_tokens
        Tokens of KV of the largest request; tokens of KV for which all workers together have room.
    workers, basis
        Workers that compute, and where their speed comes from.
    prefill_seconds, decode_seconds
        Work of all workers.
    seconds
        From beginning to end.
    """

    rows: int
    requests: int
    refused: int
    refused_rows: tuple[Refused, ...]
    prompt_tokens: int
    shared_tokens: int
    new_tokens: int
    sharing: int
    largest_tokens: int
    kv_tokens: int
    workers: int
    basis: str
    prefill_seconds: float
    decode_seconds: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def estimate_batch(session: Session, source: Source, spec: BatchSpec) -> Estimate:
    """Estimate a batch on the cluster of an open engine; large ones are counted by its workers."""
    model, facts = session.model, session.facts
    rope = None if model.rope_scaling is None else tuple(sorted(model.rope_scaling.items()))
    how = Counting(model.name, rope, facts.vocab_size, facts.max_positions, session.config.block_tokens)
    rows = iter(source.rows())
    first = list(islice(rows, FEW))
    here = (one for row in first for one in count_row(*_read(row), spec, session.tokenizer, how))
    needs = [*here, *_counted(rows, spec, how, session)]
    return summed(needs, means_of(session))


def estimate_alone(source: Source, spec: BatchSpec, how: Counting, means: Means) -> Estimate:
    """Estimate a batch without a cluster; rows are counted here."""
    return summed(count_lot([_read(row) for row in source.rows()], spec, how), means)


def summed(needs: Iterable[Need], means: Means) -> Estimate:
    """Add up what rows need."""
    found = [_fitting(one, means) for one in needs]
    asked = [one for one in found if one.error is None]
    wrong = [Refused(one.label, one.question, one.error) for one in found if one.error is not None]
    sharers = Counter(one.label for one in asked if one.shared)
    pace: Pace = pace_of(asked, means)
    return Estimate(
        rows=len({one.label for one in found}),
        requests=sum(len(one.prompts) for one in asked),
        refused=len(wrong),
        refused_rows=tuple(wrong[:NAMED]),
        prompt_tokens=sum(sum(one.prompts) for one in asked),
        shared_tokens=sum(one.shared * len(one.prompts) - one.document for one in asked),
        new_tokens=sum(one.answers * one.new * len(one.prompts) for one in asked),
        sharing=sum(count for count in sharers.values() if count > 1),
        largest_tokens=max(map(kv_tokens, asked), default=0),
        kv_tokens=means.kv_tokens,
        workers=len(means.speeds),
        basis=means.basis,
        prefill_seconds=pace.prefill,
        decode_seconds=pace.decode,
        seconds=pace.seconds,
    )


def _fitting(need: Need, means: Means) -> Need:
    """The need, refused if the cluster has no room for it."""
    if need.error is None and (tokens := kv_tokens(need)) > means.kv_tokens:
        error = f"it needs room for {tokens:,} tokens of KV, and all workers together have room for {means.kv_tokens:,}"
        return Need(need.label, need.question, error=error)
    return need


def _read(row: Row) -> tuple[int | str, Content | str]:
    try:
        return row.label, row.read()
    except Exception as error:  # as the row's own in a run
        return row.label, in_words(error)


def _counted(rows: Iterator[Row], spec: BatchSpec, how: Counting, session: Session) -> Generator[Need]:
    """Rows counted by tasks, two for each worker at a time."""
    waiting: deque[Any] = deque()
    while lot := [_read(row) for row in islice(rows, LOT)]:
        waiting.append(_submitted(lot, spec, how, session))
        if len(waiting) > 2 * session.facts.workers:
            yield from result_of(session, waiting.popleft().result)
    while waiting:
        yield from result_of(session, waiting.popleft().result)


def _submitted(lot: Lot, spec: BatchSpec, how: Counting, session: Session) -> Any:
    submit = partial(session.client.submit, count_lot, lot, spec, how, pure=False)
    return submit()
