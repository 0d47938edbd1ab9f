"""A request as the gManager sees it, from submission until its blocks are free again."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from distkv_dask.protocol import Saved
from distkv_dask.scheduler.commands import Retire
from distkv_dask.types import FinishReason, Placement, PrefillChunk, SamplingParams, SequenceState, Timings

State = Literal[
    "waiting", "prefill", "decode", "retiring", "document", "dropped", "saving", "spilling", "fetching"
]  # fmt: skip
"""A ``document`` is stored, a ``dropped`` one was given up and is computed when it is next asked; all else is work."""

ASIDE = "aside"
"""What is said of a request that waits, but not in the queue's order: it cannot run on the workers that stay."""


@dataclass(slots=True)
class Live:
    """One request: what was asked, how far it is, and when it got there (seconds of the gManager's clock).

    ``chunks`` are the prompt's chunks that are not done yet, by gang number; ``retiring`` the workers that may still
    compute on it after its end, of which those that run its forwards come first (``forwards_ended``), and ``retires``
    how many of their answers are still to come; ``retries`` says how often a chunk failed since the last that did not,
    and ``failing_since`` since when; ``stalls`` how often a worker did not begin one;
    ``stuck_since`` the time since which it is set aside in the queue.

    A document is such a request too, without an answer, and has a ``name``; one whose answer is kept (``keeps``)
    becomes one. ``document`` is the one whose blocks it shares, ``reused`` of its tokens; ``alone`` if it has to do
    without, ``borrows`` if the client did not name it; a ``cached`` one is what requests share just now of one that
    ended (:mod:`~distkv_dask.scheduler.kept.prefix_cache`). Of a document, ``announced`` says that its client knows it,
    ``released`` that it needs it no more; ``dependents`` are the requests that name it, of which those ``awaited``
    (since when they were submitted) wait until it is stored; ``used`` is when it was last needed, ``saved`` where its
    blocks are in files, too. A request that ``saves`` its document there generates nothing; ``answering`` are the
    workers that write or read files for it, ``asked`` when they began, ``failure`` the first that went wrong.
    ``rank`` is its place when it last waited for room; ``behind`` that of the request that a document made way for:
    it may not come back before that.

    A request that loses blocks with a worker (all those are in ``lost``), or makes way for one of higher priority,
    retires to go on later (``again``): it waits once more, and goes on from its known tokens, whose KV is computed
    anew or comes back from disk.
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
    state: State = "waiting"
    admitted: float = 0.0
    decoding: float = 0.0
    generated: list[int] = field(default_factory=list)
    chunks: dict[int, PrefillChunk] = field(default_factory=dict)
    retries: int = 0
    failing_since: float = 0.0
    stalls: int = 0
    again: bool = False
    lost: list[str] = field(default_factory=list)
    retiring: set[str] = field(default_factory=set)
    retires: Counter[str] = field(default_factory=Counter)
    forwards_ended: bool = False
    stuck_since: float | None = None
    reused: int = 0
    alone: bool = False
    borrows: bool = False
    cached: bool = False
    ended: FinishReason | None = None
    announced: bool = False
    released: bool = False
    dependents: set[int] = field(default_factory=set)
    awaited: dict[int, float] = field(default_factory=dict)
    rank: float = math.inf
    behind: float = -math.inf
    used: float = 0.0
    saved: Saved | None = None
    saves: bool = False
    answering: set[str] = field(default_factory=set)
    asked: float = 0.0
    failure: Exception | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is a request whose client has not named what it shares, and does not keep it."""
        if self.is_document or self.saves or self.keeps or self.alone:
            return False
        return self.document is None or self.borrows

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


def cut_prompt(placement: Placement, start: int, end: int, step: int) -> Iterator[tuple[str, int, int]]:
    """Cut tokens ``start`` to ``end`` at span borders and every ``step`` tokens of a span.

    Examples
    --------
    >>> from distkv_dask.types import Span
    >>> list(cut_prompt((Span("a", 0, 5), Span("b", 5, 20)), 0, 12, 4))
    [('a', 0, 4), ('a', 4, 5), ('b', 5, 9), ('b', 9, 12)]
    """
    for span in placement:
        for first in range(max(span.start, start), min(span.stop, end), step):
            yield span.worker, first, min(first + step, span.stop, end)
