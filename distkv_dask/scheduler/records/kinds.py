"""Kinds of requests, each with the data that only this kind has.

A request is an :class:`Answer` to be generated, a :class:`Document` that is kept for others to share, the shared part
of a cached sequence (:class:`CachedPrefix`), or the :class:`Save` of a document. It never changes its kind, but for one
case: an answer that is kept (a turn of a chat) becomes a document once it is finished.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distkv_dask.gang import Speculated
from distkv_dask.messages.names import Saved


@dataclass(slots=True)
class Demand:
    """Who needs a sequence that others may share.

    ``released`` if no client needs it any more. ``dependents`` are the requests that share it, or will; of these, those
    in ``awaited`` (with their times of submission) wait until it is stored. ``used`` is when it was last needed.
    """

    released: bool = False
    dependents: set[int] = field(default_factory=set)
    awaited: dict[int, float] = field(default_factory=dict)
    used: float = 0.0


@dataclass(slots=True)
class Answer:
    """Tokens, or an embedding, that a client waits for.

    The answer is ``streamed`` if the client reads it as it is generated, and one of the ``choices`` (their tokens) if
    there are any. It is kept as a document if there is a ``demand`` for it, of questions that name it already.

    ``generated`` are its tokens so far; some of them were ``speculated``. ``decoding`` is when the first of them was
    drawn. Of an embedding, hidden states have been summed up to position ``pooled``, or need not be.
    """

    streamed: bool = False
    choices: tuple[tuple[int, ...], ...] = ()
    demand: Demand | None = None
    generated: list[int] = field(default_factory=list)
    speculated: Speculated = field(default_factory=Speculated)
    decoding: float = 0.0
    pooled: int | None = None


@dataclass(slots=True)
class Document:
    """A sequence that is computed, or read from files, and then kept for others to share.

    ``name`` is for display. It is ``announced`` once its client was told that it is stored, or that it never will be.
    """

    name: str = ""
    announced: bool = False
    demand: Demand = field(default_factory=Demand)


@dataclass(slots=True)
class CachedPrefix:
    """The part of a finished request that others share now (:mod:`~distkv_dask.scheduler.cache.prefix_cache`).

    In the ledger it is a document, but no client knows or needs it: only its dependents do.
    """

    demand: Demand = field(init=False, default_factory=lambda: Demand(released=True))


@dataclass(frozen=True, slots=True)
class Save:
    """The blocks of a document are written to files where a user wants them: ``to`` that place.

    It shares the whole document, and generates nothing.
    """

    to: Saved


Kind = Answer | Document | CachedPrefix | Save
