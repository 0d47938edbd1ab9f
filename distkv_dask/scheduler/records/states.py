"""States of a request: what it waits for, or what is being done with it, with what only that state knows.

Only :mod:`~distkv_dask.scheduler.lifecycle.transitions` gives a request another state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from distkv_dask.gang import PrefillChunk
from distkv_dask.messages.names import SavedFile

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
        """A worker that was asked is done, or could not do its part; whether all are."""
        if worker not in self.answering:
            return False
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
