"""Gangs: the tasks of a prefill chunk or a decode window, which run together, their work and their results.

Units: positions and lengths are tokens, times are seconds, memory is bytes. A worker is named by its Dask address.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from distkv_dask.adapter import Adapter
from distkv_dask.errors import DistKVError
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.placement import Endpoint, Placement
from distkv_dask.sampling import FinishReason, SamplingParams


class Earlier(NamedTuple):
    """An earlier chunk of the same prompt that may still be under way: the number of its gang, and its worker."""

    gang: int
    worker: str


@dataclass(frozen=True, slots=True)
class Gang:
    """The Dask tasks, one per member worker, that run one decode window or one prefill chunk together.

    ``number`` is unique in a gManager's life and is in every frame on the wire; ``name`` is shown on the dashboard;
    ``epoch`` is the placement version the gang was planned with. A chunk ``follows`` earlier ones that may still be
    running: each of its layers is computed after the same layer of theirs.
    """

    engine: str
    number: int
    name: str
    epoch: int
    home: str
    holders: tuple[Endpoint, ...]
    follows: tuple[Earlier, ...] = ()

    def follows_at(self, worker: str) -> tuple[Earlier, ...]:
        """Of the chunks that it follows, those that a worker computes."""
        return tuple(earlier for earlier in self.follows if earlier.worker == worker)


@dataclass(frozen=True, slots=True)
class SequenceState:
    """The state from which a home decodes a sequence: only committed facts, so that a window can be retried from it.

    ``length`` counts tokens whose KV is stored; ``last_token`` is the sampled token that comes next, at position
    ``length``. ``generated`` holds all tokens of the answer so far, ``prompt`` those before them when the repetition
    penalty or speculation needs them, else nothing. Users' texts are not in its ``repr``, and so not in logs. It is
    decoded with its ``adapter``, if it has one.
    """

    sequence: int
    placement: Placement
    length: int
    last_token: int = field(repr=False)
    remaining: int
    sampling: SamplingParams = field(repr=False)
    prompt: array[int] = field(default_factory=partial(array, "i"), repr=False, hash=False)
    generated: tuple[int, ...] = field(default=(), repr=False)
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One chunk of one prompt: ``tokens`` are computed by ``gang.home``, whose span holds their KV.

    ``start`` is the position of the first token. With ``sampling`` the chunk is the prompt's last and its result
    carries the first generated token, or which of the ``choices`` was chosen. ``targets`` are, for each of the tokens,
    those after it whose log probabilities are wanted, with those of the ``best`` most likely ones. With ``snapshot``
    the home keeps its state of the sequence after the chunk, for other sequences to begin with. It is computed with its
    ``adapter``, if it has one. From position ``pooled_from`` on, hidden states are summed for an embedding. Dask logs
    tasks that fail with their arguments: no text of users is in its ``repr``.
    """

    gang: Gang
    sequence: int
    placement: Placement
    start: int
    tokens: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams | None = field(default=None, repr=False)
    history: tuple[int, ...] = field(default=(), repr=False)
    targets: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    best: int = 0
    choices: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    snapshot: bool = False
    adapter: Adapter | None = None
    pooled_from: int | None = None

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + len(self.tokens)

    @property
    def reach(self) -> int:
        """The position after the last computed token: tokens of choices, except their last ones, follow the chunk."""
        return self.stop + max(0, *(len(choice) - 1 for choice in self.choices)) if self.choices else self.stop


class Pooled(NamedTuple):
    """The sum of the hidden states of tokens ``[start, stop)``: little-endian float64 [hidden size]."""

    start: int
    stop: int
    sums: bytes


class Chosen(NamedTuple):
    """The choice that answers a request: its tokens, with their log probabilities if wanted.

    ``scores`` has the probability of each choice among all of them.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ChunkResult:
    """The result of a chunk: after a prompt's last one the first generated ``token``, with its ``logprob`` if wanted.

    ``scored`` has the log probabilities of the chunk's targets; if the request has choices, ``chosen`` replaces the
    token; ``pooled`` is set if hidden states of the chunk were summed.
    """

    token: int | None = field(default=None, repr=False)
    logprob: TokenLogprob | None = field(default=None, repr=False)
    scored: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    chosen: Chosen | None = field(default=None, repr=False)
    pooled: Pooled | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """About ``seconds`` of decode steps, at most ``steps`` if not None, over the sequences that joined the home."""

    gang: Gang
    window: int
    steps: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Totals of a home's exchange with its holders over channels.

    Seconds it spent sending queries (and KV of tails on other workers) and waiting for partials, and payload bytes.
    """

    sending: float = 0.0
    waiting: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: Exchanged) -> Exchanged:
        return Exchanged(
            self.sending + other.sending,
            self.waiting + other.waiting,
            self.sent_bytes + other.sent_bytes,
            self.received_bytes + other.received_bytes,
        )


class Speculated(NamedTuple):
    """Tokens of a sequence that were tried in steps before they were drawn, and how many of them were then drawn."""

    proposed: int = 0
    accepted: int = 0

    def more(self, proposed: int, accepted: int) -> Speculated:
        """With those of another step or window."""
        return Speculated(self.proposed + proposed, self.accepted + accepted)


@dataclass(frozen=True, slots=True)
class Attended:
    """What a holder has done for a gang: answered requests, and bytes of the queries and of the partials."""

    requests: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True)
class WindowResult:
    """The result of a window: new token ids by sequence, and why sequences ended.

    ``seconds`` is the window's length, and ``gap`` the time from the end of the home's previous window to the start of
    this one, if the home had sequences to decode all the time. ``errors`` has those of the sequences that ended with
    ``"error"``: each failed alone, and keeps its earlier tokens. ``speculated`` has those for which tokens were
    proposed: they may have more tokens than there were steps. ``logprobs`` has those of the tokens of sequences that
    want them.
    """

    tokens: dict[int, list[int]] = field(repr=False)
    finished: dict[int, FinishReason]
    steps: int
    seconds: float
    exchanged: Exchanged = Exchanged()
    gap: float = 0.0
    errors: dict[int, DistKVError] = field(default_factory=dict)
    speculated: dict[int, Speculated] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict, repr=False)
