"""A request in the gManager: its submission, its progress, and its state.

Only :mod:`~distkv_dask.scheduler.lifecycle.transitions` gives a request another state than its first one. It begins as
a waiting one, or, if it is the shared part of a cached sequence, as a stored one (:meth:`Request.of_cached`).
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from distkv_dask.adapter import Adapter, adapter_key
from distkv_dask.completion import Timings
from distkv_dask.gang import SequenceState
from distkv_dask.messages.names import Saved
from distkv_dask.messages.to_worker import Retire
from distkv_dask.placement import Placement
from distkv_dask.sampling import FinishReason, SamplingParams
from distkv_dask.scheduler.records.kinds import Answer, CachedPrefix, Demand, Document, Kind, Save
from distkv_dask.scheduler.records.reuse import Parent, Reuse
from distkv_dask.scheduler.records.states import Retiring, Spilling, State, Stored, Waiting


@dataclass(frozen=True, slots=True)
class Asked:
    """What a client asked for, besides the prompt: nothing changes it.

    ``submitted`` is when, in seconds of the gManager's clock. It is computed with the ``adapter``, if there is one, and
    shares KV only with others of the same adapter.
    """

    submitted: float
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: Adapter | None = None


@dataclass(slots=True)
class Turn:
    """A request's place in the queue.

    ``rank`` is its place when it last waited for room; ``behind`` that of the request for which it, a document, was
    evicted: it must not return before that. ``aside_since`` is when it was set aside, if it is.
    """

    rank: float = math.inf
    behind: float = -math.inf
    aside_since: float | None = None

    def take(self, rank: float) -> None:
        """Take a place, but none before the request for which it was evicted."""
        self.rank = rank if rank > self.behind else math.nextafter(self.behind, math.inf)


@dataclass(slots=True)
class Request:
    """One request, of any kind, from its submission to its end.

    It computes the ``prompt``: for a document its tokens, for a save those of the document, once that is stored. Its
    blocks are also in files where it is ``saved``. It shares the blocks of its ``parent``, unless it stays ``alone``.

    ``admitted`` is when it first got room; ``ended`` says how an answer or a save did end. ``lost`` are the workers
    with which it lost blocks, ``stalls`` counts workers that did not start a chunk of it; ``retires`` counts the
    outstanding answers of workers that were asked to stop computing on it.
    """

    sequence: int
    prompt: array[int]
    asked: Asked
    kind: Kind = field(default_factory=Answer)
    parent: Parent | None = None
    alone: bool = False
    saved: Saved | None = None
    state: State = field(init=False, default_factory=Waiting)
    admitted: float = 0.0
    ended: FinishReason | None = None
    reuse: Reuse = field(default_factory=Reuse)
    turn: Turn = field(default_factory=Turn)
    lost: list[str] = field(default_factory=list)
    stalls: int = 0
    retires: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of_cached(cls, number: int, parent: int | None, now: float) -> Request:
        """The shared part of a cached sequence: it is stored.

        ``parent`` has the tokens before its own (:mod:`~distkv_dask.scheduler.cache.prefix_cache`).
        """
        request = cls(number, array("i"), Asked(now), CachedPrefix(), None if parent is None else Parent(parent))
        request.state = Stored()
        return request

    # What it is

    @property
    def answer(self) -> Answer:
        """The answer, of a request that generates one."""
        assert isinstance(self.kind, Answer)
        return self.kind

    @property
    def demand(self) -> Demand | None:
        """Who needs it; None if others may not share it."""
        return None if isinstance(self.kind, Save) else self.kind.demand

    @property
    def is_document(self) -> bool:
        """Whether it is stored for others, or will be, and not to be answered."""
        return isinstance(self.kind, Document | CachedPrefix)

    @property
    def is_cached(self) -> bool:
        """Whether it is the shared part of a cached sequence, which no client knows."""
        return isinstance(self.kind, CachedPrefix)

    @property
    def is_save(self) -> bool:
        """Whether it saves its document, and generates nothing."""
        return isinstance(self.kind, Save)

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain request: its client named no document, and does not keep its answer as one."""
        if not isinstance(self.kind, Answer) or self.kind.demand is not None or self.alone:
            return False
        return self.parent is None or self.borrows

    @property
    def is_announced(self) -> bool:
        """Whether it is a document that no client waits for: it was told, or there is none."""
        return self.is_cached or (isinstance(self.kind, Document) and self.kind.announced)

    @property
    def is_released(self) -> bool:
        """Whether others could share it, but no client needs it any more."""
        return self.demand is not None and self.demand.released

    @property
    def goes_on_later(self) -> bool:
        """Whether its blocks are being freed, and it will wait for room again."""
        return isinstance(self.state, Retiring | Spilling) and self.state.again

    def become_document(self, tokens: int) -> None:
        """An answer that is kept is finished: the first ``tokens`` of prompt and answer are a document from now on."""
        answer = self.answer
        assert answer.demand is not None
        self.prompt = array("i", [*self.prompt, *answer.generated])[:tokens]
        self.kind, self.alone = Document(announced=True, demand=answer.demand), False

    # Whose KV it may share

    @property
    def adapter_key(self) -> str:
        """Key that distinguishes its KV from that of other adapters."""
        return adapter_key(self.asked.adapter)

    @property
    def document(self) -> int | None:
        """Number of its parent, if it has one."""
        return None if self.parent is None else self.parent.number

    @property
    def borrows(self) -> bool:
        """Whether it shares blocks of a sequence that its client did not name."""
        return self.parent is not None and self.parent.borrowed

    def borrow(self, number: int) -> None:
        """Share the blocks of this sequence, which its client did not name."""
        self.parent = Parent(number, borrowed=True)

    # Its tokens

    @property
    def generated(self) -> Sequence[int]:
        """Tokens generated so far; only an answer has some."""
        return self.kind.generated if isinstance(self.kind, Answer) else ()

    @property
    def tokens(self) -> int:
        """Tokens whose KV may have to be stored: the last generated token's never is."""
        more = self.asked.sampling.max_new_tokens - 1 if isinstance(self.kind, Answer) else 0
        return len(self.prompt) + more

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
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.asked.sampling.max_new_tokens - len(self.generated)

    @property
    def history(self) -> tuple[int, ...]:
        """Prompt and generated tokens if the repetition penalty needs them, else empty."""
        return (*self.prompt, *self.generated) if self.asked.sampling.repetition_penalty != 1 else ()

    # What workers and clients are told

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
        sampling = self.asked.sampling
        return SequenceState(
            self.sequence,
            placement,
            length,
            self.generated[-1],
            self.remaining,
            sampling,
            self.prompt if speculates or sampling.repetition_penalty != 1 else array("i"),
            tuple(self.generated),
            self.asked.adapter,
        )

    def timings(self, now: float) -> Timings:
        """Its seconds of waiting, prefill and decode so far, and counts of speculated tokens."""
        answer = self.kind if isinstance(self.kind, Answer) else Answer()
        return Timings(
            queued=(self.admitted or now) - self.asked.submitted,
            prefill=(answer.decoding or now) - self.admitted if self.admitted else 0.0,
            decode=now - answer.decoding if answer.decoding else 0.0,
            proposed_tokens=answer.speculated.proposed,
            accepted_tokens=answer.speculated.accepted,
        )
