"""What all processes share: requests, placements, gangs and results, as frozen values that travel.

Units: positions and lengths are tokens, times are seconds, memory is bytes. A worker is named by its Dask address.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

from distkv_dask import pictures
from distkv_dask.errors import DistKVError, InvalidRequestError
from distkv_dask.texts import checked_text

FinishReason = Literal["stop", "length", "error", "cancelled"]
Message = dict[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, and how soon.

    Parameters
    ----------
    max_new_tokens
        Upper bound on generated tokens, at least 1.
    temperature
        0 is greedy; otherwise logits are divided by it before sampling.
    top_p, top_k, min_p
        Nucleus, top-k and min-p filters, applied in the order of Hugging Face's logits warpers
        (temperature, top-k, top-p, min-p). ``top_p=1``, ``top_k=0`` and ``min_p=0`` switch a filter off.
    repetition_penalty
        As in CTRL (arXiv 1909.05858): over prompt and generated tokens; 1 is none.
    seed
        Draws depend on (seed, position) alone, so a retried window draws the same tokens. None picks one at random.
    stop
        Strings at which generation ends; the text ends before the first of them.
    ignore_eos
        Go on after the model's end-of-sequence token.
    schema
        A JSON schema (a dict, or its JSON): the answer is JSON that follows it, whatever the model would rather say,
        unless ``max_new_tokens`` cuts it. Needs the extra ``schema``. It is kept as JSON.
    priority
        From -100 to 100: while requests wait for room, one with a higher priority goes before those that came up to a
        minute earlier, for each step of it. Requests that run already make way for it in the same order, and go on
        later. So nobody waits forever.

    Raises
    ------
    InvalidRequestError
        On a value outside its range; the message names the parameter.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    schema: str | Mapping[str, Any] | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        """Check every value, and bring numbers and ``stop`` to the declared types."""
        put = partial(object.__setattr__, self)  # the one way to normalise a field of a frozen dataclass
        put("max_new_tokens", _whole("max_new_tokens", self.max_new_tokens, low=1))
        put("temperature", _real("temperature", self.temperature, "at least 0", lambda x: x >= 0))
        put("top_p", _real("top_p", self.top_p, "above 0 and at most 1", lambda x: 0 < x <= 1))
        put("top_k", _whole("top_k", self.top_k, low=0))
        put("min_p", _real("min_p", self.min_p, "from 0 to 1", lambda x: 0 <= x <= 1))
        put("repetition_penalty", _real("repetition_penalty", self.repetition_penalty, "above 0", lambda x: x > 0))
        if self.seed is not None:
            put("seed", _whole("seed", self.seed, low=0, high=2**63 - 1))
        put("stop", _strings("stop", self.stop))
        put("priority", _whole("priority", self.priority, low=-100, high=100))
        if not isinstance(self.ignore_eos, bool):
            raise _refusal("ignore_eos", self.ignore_eos, "True or False")
        if self.schema is not None:
            put("schema", _schema(self.schema))
            if self.ignore_eos or self.stop:
                raise InvalidRequestError(
                    "an answer of a schema ends where its JSON does: leave out ignore_eos and stop"
                )


@dataclass(frozen=True, slots=True)
class Span:
    """Contiguous token range ``[start, stop)`` of a sequence held by one worker (its reserved room, filled or not).

    The blocks of a span that names a ``document`` belong to that sequence, not to the one whose placement it stands in:
    they are only read.
    """

    worker: str
    start: int
    stop: int
    document: int | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens that the span has room for."""
        return self.stop - self.start

    def filled(self, length: int) -> int:
        """Number of this span's tokens that lie below sequence length ``length``."""
        return max(0, min(length, self.stop) - self.start)


Placement = tuple[Span, ...]
"""Ordered, gapless spans of one sequence, from token 0; adjacent spans lie on different workers.

A worker may hold several spans; borders between spans are multiples of the block's tokens. Only the last span grows:
its worker is the sequence's home. Spans that it shares with documents come first.
"""


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens ``[start, stop)`` of a sequence, whole blocks of one span of ``source``, go to ``target``."""

    sequence: int
    start: int
    stop: int
    source: str
    target: str

    @property
    def tokens(self) -> int:
        """Number of tokens that change their place."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes of a model that fix the layout of KV and the range of requests.

    ``max_positions`` is the longest sequence in tokens; ``dtype`` is torch's name of the dtype, e.g. ``bfloat16``.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Short timings of one worker, in seconds, which the performance model is fitted to.

    Parameters
    ----------
    decode
        (sequences, tokens of KV of all of them together, seconds of a step).
    prompt
        (tokens of a prompt's chunk, tokens of KV before them, seconds).
    attention
        (tokens of KV, seconds of one query over them in all layers): the only ones of a worker without a model.
    exchange
        Seconds that it adds to a step to ask a holder on the same machine; None where that was not measured.
    """

    decode: tuple[tuple[int, int, float], ...] = ()
    prompt: tuple[tuple[int, int, float], ...] = ()
    attention: tuple[tuple[int, float], ...] = ()
    exchange: float | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker's holder lane listens for channels.

    ``port`` is for TCP; ``unix`` names its Unix socket, where there is one; ``ucx`` is its port for UCX, 0 without.
    """

    worker: str
    host: str
    port: int
    unix: str = ""
    ucx: int = 0


@dataclass(frozen=True, slots=True)
class Gang:
    """The Dask tasks, one per member worker, that run one decode window or one prefill chunk together.

    ``number`` is unique in a gManager's life and stands in every frame on the wire; ``name`` is what people read on the
    dashboard; ``epoch`` is the placement version the gang was planned with.
    """

    engine: str
    number: int
    name: str
    epoch: int
    home: str
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class SequenceState:
    """What a home needs to decode a sequence: committed facts only, so that a window can be retried from it.

    ``length`` counts tokens whose KV is stored; ``last_token`` is the sampled token that comes next, at position
    ``length``. ``history`` holds prompt and generated token ids when the repetition penalty needs them, ``generated``
    the latter when a schema does, else nothing. What users wrote is left out of its ``repr``, and so of logs.
    """

    sequence: int
    placement: Placement
    length: int
    last_token: int = field(repr=False)
    remaining: int
    sampling: SamplingParams = field(repr=False)
    history: tuple[int, ...] = field(default=(), repr=False)
    generated: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """One chunk of one prompt: ``tokens`` are computed by ``gang.home``, whose span holds their KV.

    ``start`` is the position of the first token. With ``sampling`` the chunk is the prompt's last and its result
    carries the first generated token. Dask logs tasks that fail with their arguments: no text of users is in its
    ``repr``.
    """

    gang: Gang
    sequence: int
    placement: Placement
    start: int
    tokens: tuple[int, ...] = field(repr=False)
    sampling: SamplingParams | None = field(default=None, repr=False)
    history: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """About ``seconds`` of decode steps, at most ``steps`` if not None, over the sequences that joined the home."""

    gang: Gang
    window: int
    steps: int | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a home exchanged with its holders over channels.

    Seconds it spent sending queries (and KV of tails that lie elsewhere) and waiting for partials, and payload bytes.
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


@dataclass(frozen=True, slots=True)
class WindowResult:
    """What a window generated: new token ids by sequence, and why those that ended did.

    ``seconds`` is the window's length, and ``gap`` the time from the end of the home's window before to the start of
    this one, when the home had sequences to decode all the while. ``errors`` has those of the sequences that ended with
    ``"error"``: each failed alone, with the tokens that it had before.
    """

    tokens: dict[int, list[int]] = field(repr=False)
    finished: dict[int, FinishReason]
    steps: int
    seconds: float
    exchanged: Exchanged = Exchanged()
    gap: float = 0.0
    errors: dict[int, DistKVError] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a request spent waiting for room, in prefill (to its first token), and in decode.

    Where a worker was lost, the one that was interrupted goes on until the KV cache is recomputed.
    """

    queued: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to one prompt.

    ``token_ids`` are the generated ids (without the end-of-sequence token that ended them), ``placement`` says where
    the sequence's KV lay, ``error`` is the error's text when ``finish_reason`` is ``"error"``. ``reused_tokens`` of the
    prompt were not computed: their KV was a document's, or still there from a request that began alike.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: FinishReason
    error: str | None = None
    timings: Timings = field(default_factory=Timings)
    placement: Placement = ()
    reused_tokens: int = 0

    def _repr_html_(self) -> str:
        """What notebooks show: the answer, its times, and a picture of where the KV lay."""
        times = self.timings
        reused = f" ({self.reused_tokens:,} reused, faint below)" if self.reused_tokens else ""
        return pictures.card(
            f"Completion: {self.finish_reason}",
            pictures.text(self.text if self.error is None else self.error),
            f"{self.prompt_tokens:,} prompt tokens{reused}, {len(self.token_ids):,} new ones; "
            f"{times.queued:.2f} s in the queue, {times.prefill:.2f} s of prefill, {times.decode:.2f} s of decode",
            pictures.spans([pictures.Piece(s.worker, s.start, s.stop, s.document is not None) for s in self.placement]),
        )


def _refusal(name: str, value: object, allowed: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} is {value!r}, but must be {allowed}.")


def _whole(name: str, value: object, low: int, high: int | None = None) -> int:
    if not isinstance(value, bool) and isinstance(value, Integral):
        number = int(value)
        if low <= number and (high is None or number <= high):
            return number
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    raise _refusal(name, value, f"a whole number {limits}")


def _real(name: str, value: object, limits: str, within: Callable[[float], bool]) -> float:
    try:
        number = float(value) if not isinstance(value, bool) and isinstance(value, Real) else math.nan
    except OverflowError:  # a whole number beyond any float
        number = math.inf
    if math.isfinite(number) and within(number):
        return number
    raise _refusal(name, value, f"a finite number {limits}")


def _schema(value: object) -> str:
    try:
        read = json.loads(value) if isinstance(value, str) else value
        if isinstance(read, Mapping):
            return json.dumps(dict(read))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequestError(f"schema cannot be read as JSON: {error}") from error
    raise _refusal("schema", value, "a JSON schema: a dict, or a JSON object as text")


def _strings(name: str, value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if isinstance(strings, list | tuple) and all(isinstance(string, str) and string for string in strings):
        return tuple(checked_text(string, name) for string in strings)
    raise _refusal(name, value, "a string that is not empty, or a list of such strings")
