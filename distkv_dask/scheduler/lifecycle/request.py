"""A request as the gManager sees it: what was asked, how far it is, and the state that it is in.

Only :mod:`~distkv_dask.scheduler.lifecycle.transitions` gives a request another state.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from distkv_dask.messages.names import Saved, SavedFile
from distkv_dask.messages.to_worker import Retire
from distkv_dask.types import FinishReason, Placement, PrefillChunk, SamplingParams, SequenceState, Timings

ASIDE = "aside"
"""What is said of a request that waits, but not in the queue's order: it cannot run on the workers that stay."""


@dataclass(slots=True)
class State:
    """Base of all states; ``label`` is what users read of it."""

    label: ClassVar[str] = ""


@dataclass(slots=True)
class Waiting(State):
    """It waits for room, or for its document to be stored.

    ``submitted`` is when it is taken to have come, if that is not when it did; ``rank`` its place in the queue, if it
    had one before; ``latest`` that of its document, which has come for it and must not make way for others meanwhile.
    """

    label: ClassVar[str] = "waiting"
    submitted: float | None = None
    rank: float | None = None
    latest: float = math.inf


@dataclass(slots=True)
class Prefill(State):
    """Its prompt, or what it lost, is computed: tokens from ``start`` on, and before that the ranges that it ``lost``.

    ``chunks`` are those that are not done yet, by gang number. ``failures`` says how often a chunk failed since the
    last that did not, ``failing_since`` since when, and ``rests_until`` when it is tried again.
    """

    label: ClassVar[str] = "prefill"
    start: int
    lost: tuple[tuple[int, int], ...] = ()
    chunks: dict[int, PrefillChunk] = field(default_factory=dict)
    failures: int = 0
    failing_since: float = 0.0
    rests_until: float | None = None


@dataclass(slots=True)
class Decode(State):
    """Its home decodes it."""

    label: ClassVar[str] = "decode"


@dataclass(slots=True)
class Retiring(State):
    """It stops in the middle of something: workers say that they compute on it no more, and only then it goes on.

    First those are waited for that run its forwards, then all its holders, so that none has a frame left to answer
    (``forwards_ended``); ``workers`` have not answered yet. One whose files are being read (``reading``) waits for
    those that read. With ``settled`` nothing computes on it, so nobody is asked. It goes on later if it does not end
    for good (``again``): it lost blocks, or made way for one of higher priority.
    """

    label: ClassVar[str] = "retiring"
    again: bool = False
    settled: bool = False
    workers: set[str] = field(default_factory=set)
    forwards_ended: bool = False
    reading: bool = False


@dataclass(slots=True)
class Stored(State):
    """A document whose blocks are there, for others to share."""

    label: ClassVar[str] = "document"


@dataclass(slots=True)
class Dropped(State):
    """A document that was given up; it is recomputed from its tokens when it is next asked."""

    label: ClassVar[str] = "dropped"


@dataclass(slots=True)
class FilesUnderWay(State):
    """Workers write or read its blocks: those that are ``answering`` have not said yet that they are done.

    ``asked`` is when they began, ``failure`` the first that went wrong.
    """

    answering: set[str] = field(default_factory=set)
    asked: float = 0.0
    failure: Exception | None = None

    def answered(self, worker: str, error: Exception | None) -> bool:
        """A worker is done, or could not do its part; whether all are."""
        self.failure = self.failure or error
        self.answering.discard(worker)
        return not self.answering


@dataclass(slots=True)
class Saving(FilesUnderWay):
    """A request to save a document: its blocks are written into a user's folder. ``files`` are there already."""

    label: ClassVar[str] = "saving"
    files: list[SavedFile] = field(default_factory=list)


@dataclass(slots=True)
class Spilling(FilesUnderWay):
    """Its blocks go to the workers' disks; with ``again`` it waits for room after that, else it is a document."""

    label: ClassVar[str] = "spilling"
    again: bool = False


@dataclass(slots=True)
class Fetching(FilesUnderWay):
    """Its blocks come back from files."""

    label: ClassVar[str] = "fetching"


@dataclass(slots=True)
class Gone(State):
    """It is over, and nothing is kept of it. Who waits for it fails with the ``error``."""

    error: Exception | None = None


UNDER_WAY: tuple[type[State], ...] = (Waiting, Prefill, Decode, Retiring, Saving, Spilling, Fetching)
"""States in which something is being done, or waited for."""


@dataclass(slots=True)
class Request:
    """One request, document or save: what was asked, and when it got how far (seconds of the gManager's clock).

    A document is such a request too, without an answer, and has a ``name``; one whose answer is kept (``keeps``)
    becomes one; one that ``saves`` its document generates nothing. ``document`` is the one whose blocks it shares,
    ``reused`` of its tokens; ``alone`` if it has to do without, ``borrows`` if the client did not name it; a ``cached``
    one is what requests share just now of one that ended (:mod:`~distkv_dask.scheduler.kept.prefix_cache`).

    Of a document, ``announced`` says that its client knows it, ``released`` that it needs it no more; ``dependents``
    are the requests that name it, of which those ``awaited`` (since when they were submitted) wait until it is stored;
    ``used`` is when it was last needed, ``saved`` where its blocks are in files, too.

    ``rank`` is its place when it last waited for room; ``behind`` that of the request that a document made way for: it
    may not come back before that. ``lost`` are the workers with which it lost blocks; ``retires`` counts the answers of
    workers that are still to come after they were asked to compute on it no more.
    """

    sequence: int
    prompt: array[int]
    sampling: SamplingParams
    submitted: float
    streamed: bool = False
    document: int | None = None
    is_document: bool = False
    name: str = ""
    keeps: bool = False
    saves: bool = False
    saved: Saved | None = None
    state: State = field(default_factory=Waiting)
    admitted: float = 0.0
    decoding: float = 0.0
    generated: list[int] = field(default_factory=list)
    ended: FinishReason | None = None
    lost: list[str] = field(default_factory=list)
    retires: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    alone: bool = False
    borrows: bool = False
    cached: bool = False
    announced: bool = False
    released: bool = False
    dependents: set[int] = field(default_factory=set)
    awaited: dict[int, float] = field(default_factory=dict)
    rank: float = math.inf
    behind: float = -math.inf
    used: float = 0.0
    stalls: int = 0
    """How often a worker did not begin a chunk of it."""
    stuck_since: float | None = None
    """The time since which it is set aside in the queue."""

    @property
    def is_plain(self) -> bool:
        """Whether it is a request whose client has not named what it shares, and does not keep it."""
        if self.is_document or self.saves or self.keeps or self.alone:
            return False
        return self.document is None or self.borrows

    @property
    def goes_on_later(self) -> bool:
        """Whether it gives up its blocks now, to wait for room once more."""
        return isinstance(self.state, Retiring | Spilling) and self.state.again

    @property
    def tokens(self) -> int:
        """Tokens whose KV may have to be stored: the last generated token's never is."""
        if self.is_document or self.saves:
            return len(self.prompt)
        return len(self.prompt) + self.sampling.max_new_tokens - 1

    @property
    def known(self) -> array[int]:
        """Tokens whose KV has to be there before the next one is drawn: the prompt, and what was generated so far.

        Not the last one generated: its forward draws the next.
        """
        return self.prompt + array("i", self.generated[:-1])

    @property
    def known_tokens(self) -> int:
        """How many those are, without a copy of them."""
        return len(self.prompt) + max(0, len(self.generated) - 1)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.sampling.max_new_tokens - len(self.generated)

    @property
    def history(self) -> tuple[int, ...]:
        """Prompt and generated tokens where the repetition penalty needs them, else nothing."""
        return (*self.prompt, *self.generated) if self.sampling.repetition_penalty != 1 else ()

    def retire(self, worker: str) -> Retire:
        """Ask a worker to compute on it no more; the answer that is to come is counted."""
        self.retires[worker] += 1
        return Retire(worker, self.sequence)

    def state_at(self, placement: Placement, length: int) -> SequenceState:
        """Committed state, for a home to decode from."""
        return SequenceState(
            self.sequence,
            placement,
            length,
            self.generated[-1],
            self.remaining,
            self.sampling,
            self.history,
            tuple(self.generated) if self.sampling.schema is not None else (),
        )

    def timings(self, now: float) -> Timings:
        """How long it waited, prefilled and decoded until now."""
        return Timings(
            queued=(self.admitted or now) - self.submitted,
            prefill=(self.decoding or now) - self.admitted if self.admitted else 0.0,
            decode=now - self.decoding if self.decoding else 0.0,
        )
