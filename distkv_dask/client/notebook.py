"""Notebook views of an engine and of a document. The engine is queried if that is possible without awaiting.

An engine of an asynchronous client shows what its client knows.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from dask.utils import format_bytes

from distkv_dask import svg
from distkv_dask.errors import DistKVError
from distkv_dask.svg import Piece, counted

if TYPE_CHECKING:
    from distkv_dask.client.documents.document import Document
    from distkv_dask.client.session.session import Session
    from distkv_dask.messages.status import EngineStatus, SequenceStatus

PATIENCE = 3.0
"""Seconds that a notebook waits for an engine's answer; then it shows what the client knows."""

WORKERS = 16
"""Number of workers shown individually: those with the most blocks in use."""

SEQUENCES = 12
"""Number of documents and requests shown individually: the longest."""

ASYNCHRONOUS = "With an asynchronous client, <code>await engine.status()</code> says where the KV is."


def engine_html(session: Session, documents: Mapping[str, Document]) -> str:
    """The engine: its model, its workers' pools, and the placement of the longest sequences."""
    title = f"Engine {session.id}: {session.model.name}"
    if not session.is_open:
        return svg.card(title, "closed, or not open yet")
    facts = session.facts
    about = f"{facts.dtype}, {counted(facts.workers, 'worker')}, {counted(len(documents), 'document')}"
    lines = [escape(about), _link(session)]
    if (status := _status(session)) is None:
        return svg.card(title, *lines, ASYNCHRONOUS if session.client.asynchronous else "The cluster is silent.")
    colour = svg.colours(sorted(status.workers))
    return svg.card(title, *lines, _pools(status, colour), _sequences(documents, status, colour))


def document_html(document: Document, session: Session) -> str:
    """The document: its name and size, and where its KV is, or was when it was stored."""
    title = f"Document {document.name}"
    size = f"{document.tokens:,} tokens"
    if document.is_released:
        return svg.card(title, f"{size}, released")
    status = _status(session) if session.is_open else None
    if status is None:
        pieces = [Piece(span.worker, span.start, span.stop) for span in document.placement]
        return svg.card(title, f"{size}; where its KV was when it was stored:", svg.spans(pieces))
    found = status.sequences.get(document.number)
    if found is None or not found.placement:
        return svg.card(title, f"{size}; its KV was dropped, and is recomputed when it is next asked")
    asked = found.questions
    running = f"; {counted(asked, 'question')} under way" if asked else ""
    colour = svg.colours(sorted(status.workers))
    return svg.card(title, f"{size}{running}", svg.spans(_pieces(found, colour), colour))


def _link(session: Session) -> str:
    try:
        dashboard = session.client.dashboard_link
    except KeyError:  # the scheduler has none
        return ""
    page = f"{(dashboard or '').rpartition('/')[0]}/distkv"
    return f'<a href="{escape(page)}" target="_blank" style="color:inherit">{escape(page)}</a>' if dashboard else ""


def _status(session: Session) -> EngineStatus | None:
    """The engine's status, unless it has to be awaited or takes too long."""
    if session.client.asynchronous:
        return None
    try:
        status: EngineStatus = session.client.sync(session.status, callback_timeout=PATIENCE)
    except (DistKVError, OSError, RuntimeError):  # the last: the client's event loop is closed
        return None
    return status


def _pools(status: EngineStatus, colour: dict[str, str]) -> str:
    workers = status.workers
    most = heapq.nlargest(WORKERS, workers, key=lambda name: (workers[name].used_blocks, name))
    rows = []
    for name in sorted(most):
        one = workers[name]
        used, room, size = one.used_blocks, one.capacity_blocks, one.block_bytes
        words = f"{format_bytes(used * size)} of {format_bytes(room * size)}"
        rows.append((name, svg.meter(used, room, colour.get(name, svg.PALETTE[0]), words), words))
    more = len(workers) - len(rows)
    return svg.table(rows) + (f"and {counted(more, 'more worker')}" if more else "")


def _sequences(documents: Mapping[str, Document], status: EngineStatus, colour: dict[str, str]) -> str:
    names = {document.number: name for name, document in documents.items()}
    placed = {number: one for number, one in status.sequences.items() if one.placement}
    longest = heapq.nlargest(SEQUENCES, placed, key=lambda number: placed[number].kv_tokens)
    scale = max((one.placement[-1].stop for one in placed.values()), default=1)
    rows = []
    for number in sorted(longest):
        one = placed[number]
        words = f"{one.kv_tokens:,} tokens, {one.state}"
        picture = svg.strip(_pieces(one, colour), colour, scale)
        rows.append((names.get(number, f"request {number}"), picture, words))
    more = len(status.sequences) - len(rows)
    return svg.table(rows) + (f"and {counted(more, 'more request')}" if more else "")


def _pieces(sequence: SequenceStatus, colour: dict[str, str]) -> list[Piece]:
    """Spans of a sequence; lost workers have a colour, too."""
    pieces = [Piece(span.worker, span.start, span.stop) for span in sequence.placement]
    for piece in pieces:
        colour.setdefault(piece.worker, svg.PALETTE[-1])
    return pieces
