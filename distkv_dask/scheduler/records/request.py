"""A request in the gManager: its submission, its progress, and its state.

Only :mod:`~distkv_dask.scheduler.lifecycle.transitions` gives a request another state than its first one. It begins as
a waiting one, or, if it is the shared part of a cached sequence, as a stored one (:meth:`Request.of_cached`).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import dataclass, field

from distkv_dask.adapter import Adapter, adapter_key
from distkv_dask.completion import Timings
from distkv_dask.gang import SequenceState, Speculated
from distkv_dask.messages.names import Saved
from distkv_dask.messages.to_worker import Retire
from distkv_dask.placement import Placement
from distkv_dask.sampling import FinishReason, SamplingParams
from distkv_dask.scheduler.records.states import Retiring, Spilling, State, Stored, Waiting


@dataclass(slots=True)
class Request:
    """One request, document or save: its submission and its progress (seconds of the gManager's clock).

    A document is such a request too, without an answer, and has a ``name``; one whose answer is kept (``keeps``)
    becomes one; one that ``saves`` its document generates nothing. ``document`` is the one whose blocks it shares,
    ``reused`` of its tokens; ``restored`` counts tokens that were read from lower tiers; ``alone`` if it must not share
    any, ``borrows`` if the client did not name it; a ``cached`` one is the part of a finished request that others share
    now (:mod:`~distkv_dask.scheduler.cache.prefix_cache`). If homes have state besides KV, ``begins`` names the
    sequence whose snapshot it begins with, and ``common`` is how many tokens it has in common with some sequence,
    snapshot or not.

    Of a document, ``announced`` says that its client knows it, ``released`` that its client no longer needs it;
    ``dependents`` are the requests that name it; those in ``awaited`` (with their times of submission) wait until it is
    stored; ``used`` is when it was last needed, ``saved`` where its blocks are also in files.

    ``rank`` is its place when it last waited for room; ``behind`` that of the request for which a document was evicted:
    it must not return before that. ``lost`` are the workers with which it lost blocks; ``retires`` counts the
    outstanding answers of workers that were asked to stop computing on it.
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
    state: State = field(init=False, default_factory=Waiting)
    admitted: float = 0.0
    decoding: float = 0.0
    generated: list[int] = field(default_factory=list)
    speculated: Speculated = field(default_factory=Speculated)
    ended: FinishReason | None = None
    lost: list[str] = field(default_factory=list)
    retires: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    restored: int = 0
    common: int = 0
    begins: int | None = None
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
    choices: tuple[tuple[int, ...], ...] = ()
    """Tokens of the choices, one of which is its answer."""
    given: Placement = ()
    """Blocks that it computed and now shares with others (:mod:`~distkv_dask.scheduler.cache.common`)."""
    awaits: tuple[int, int] | None = None
    """The request that it waits for to share its first tokens, and how many."""
    adapter: Adapter | None = None
    """The adapter that it is computed with; it shares KV only with others of the same adapter."""
    pooled: int = 0
    """Position up to which hidden states have been summed for its embedding, or need not be."""
    stalls: int = 0
    """How often a worker did not start a chunk of it."""
    stuck_since: float | None = None
    """Time at which it was set aside in the queue."""

    @classmethod
    def of_cached(cls, number: int, parent: int | None, now: float) -> Request:
        """The shared part of a cached sequence: a stored document without a name, which no client knows or needs.

        ``parent`` has the tokens before its own (:mod:`~distkv_dask.scheduler.cache.prefix_cache`).
        """
        request = cls(
            number, array("i"), SamplingParams(), now,
            document=parent, is_document=True, cached=True, announced=True, released=True,
        )  # fmt: skip
        request.state = Stored()
        return request

    @property
    def adapter_key(self) -> str:
        """Key that distinguishes its KV from that of other adapters."""
        return adapter_key(self.adapter)

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain request: its client named no document, and does not keep its answer as one."""
        if self.is_document or self.saves or self.keeps or self.alone:
            return False
        return self.document is None or self.borrows

    @property
    def goes_on_later(self) -> bool:
        """Whether its blocks are being freed, and it will wait for room again."""
        return isinstance(self.state, Retiring | Spilling) and self.state.again

    @property
    def tokens(self) -> int:
        """Tokens whose KV may have to be stored: the last generated token's never is."""
        if self.is_document or self.saves:
            return len(self.prompt)
        return len(self.prompt) + self.sampling.max_new_tokens - 1

    @property
    def known(self) -> array[int]:
        """Tokens whose KV is needed before the next one is drawn: the prompt and the generated tokens.

        The last generated token is excluded: its forward draws the next.
        """
        return self.prompt + array("i", self.generated[:-1])

    @property
    def known_tokens(self) -> int:
        """The number of these tokens, without copying them."""
        return len(self.prompt) + max(0, len(self.generated) - 1)

    @property
    def spared(self) -> int:
        """Tokens that were not computed for it: others had, or lower tiers gave them back."""
        return self.reused + self.restored - sum(span.tokens for span in self.given)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.sampling.max_new_tokens - len(self.generated)

    @property
    def history(self) -> tuple[int, ...]:
        """Prompt and generated tokens if the repetition penalty needs them, else empty."""
        return (*self.prompt, *self.generated) if self.sampling.repetition_penalty != 1 else ()

    def retire(self, worker: str) -> Retire:
        """Ask a worker to stop computing on it; counts the expected answer."""
        self.retires[worker] += 1
        return Retire(worker, self.sequence)

    def answered(self, worker: str) -> bool:
        """A worker stopped computing on it; returns whether that was its last expected answer."""
        if not self.retires[worker]:
            return False  # it was not asked
        self.retires[worker] -= 1
        return not self.retires[worker]

    def state_at(self, placement: Placement, length: int, speculates: bool) -> SequenceState:
        """Committed state, for a home to decode from; one that ``speculates`` looks at the prompt."""
        return SequenceState(
            self.sequence,
            placement,
            length,
            self.generated[-1],
            self.remaining,
            self.sampling,
            self.prompt if speculates or self.sampling.repetition_penalty != 1 else array("i"),
            tuple(self.generated),
            self.adapter,
        )

    def timings(self, now: float) -> Timings:
        """Its seconds of waiting, prefill and decode so far, and counts of speculated tokens."""
        return Timings(
            queued=(self.admitted or now) - self.submitted,
            prefill=(self.decoding or now) - self.admitted if self.admitted else 0.0,
            decode=now - self.decoding if self.decoding else 0.0,
            proposed_tokens=self.speculated.proposed,
            accepted_tokens=self.speculated.accepted,
        )
