"""Client to gManager and back, on Dask's rpc: the calls, and the form of requests and events."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from distkv_dask.adapter import Adapter
from distkv_dask.completion import Timings
from distkv_dask.gang import Pooled
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.messages.names import EngineSpec, Saved, SavedFile
from distkv_dask.placement import Placement
from distkv_dask.sampling import FinishReason, SamplingParams


class ClientCall(StrEnum):
    """Client to gManager, rpc."""

    OPEN = "distkv_open"
    ATTACH = "distkv_attach"
    DETACH = "distkv_detach"
    SUBMIT = "distkv_submit"
    STOP = "distkv_stop"
    EVENTS = "distkv_events"
    STATUS = "distkv_status"
    ENGINES = "distkv_engines"
    GRAPH = "distkv_graph"
    TRACE = "distkv_trace"
    SPAN = "distkv_span"
    CLOSE = "distkv_close"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the workers of an engine reported when it opened.

    Attributes
    ----------
    max_positions
        Longest sequence of the model in tokens; infinite if it has no limit.
    vocab_size
        Token ids are below this.
    block_bytes
        Bytes of one KV block.
    dtype
        torch's name of the dtype of weights and KV.
    fingerprint
        Distinguishes models with other weights.
    workers
        Number of the engine's workers at that time.
    """

    max_positions: float
    vocab_size: int
    block_bytes: int
    dtype: str
    fingerprint: str
    workers: int


class Attached(NamedTuple):
    """A new handle on an open engine: its owner's settings (without the token), and its workers' reports."""

    spec: EngineSpec
    facts: EngineFacts
    handle: int


@dataclass(frozen=True, slots=True)
class Submission:
    """What is submitted to the gManager: one of the kinds below, under a number that its client chose."""

    number: int


@dataclass(frozen=True, slots=True)
class Generate(Submission):
    """A request for tokens, or for an embedding.

    ``streamed`` if the answer is read as it is generated; ``document`` is the number of the document that it begins
    with, if any. With ``keeps`` it becomes a document once it is answered. ``choices`` has the tokens of each choice,
    one of which is the answer. It is computed with the ``adapter``, if there is one.
    """

    prompt: array[int]
    sampling: SamplingParams
    streamed: bool = False
    document: int | None = None
    keeps: bool = False
    choices: tuple[tuple[int, ...], ...] = ()
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Ingest(Submission):
    """A document, computed with the ``adapter``, if there is one; ``name`` is for display."""

    prompt: array[int]
    name: str = ""
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Load(Submission):
    """A document whose blocks are read from where they were ``saved``; else as :class:`Ingest`."""

    prompt: array[int]
    saved: Saved
    name: str = ""
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Save(Submission):
    """The blocks of a ``document`` are written where they are to be ``saved``."""

    document: int
    saved: Saved


@dataclass(frozen=True, slots=True)
class Delivery:
    """New tokens of a request, and its end when ``reason`` is set.

    ``generated`` counts the tokens of an answer that ended; it is None for documents and saves. ``logprobs`` are those
    of the tokens, if they are wanted; ``scored`` those of the prompt's tokens from position ``scored_from`` on: they
    are sent again if the prompt is recomputed. ``scores`` are the probabilities of the request's choices, ``pooled`` a
    part of its embedding; no part is sent twice.
    """

    sequence: int
    tokens: tuple[int, ...]
    reason: FinishReason | None = None
    error: Exception | None = None
    timings: Timings | None = None
    placement: Placement = ()
    reused: int = 0
    files: tuple[SavedFile, ...] = ()
    generated: int | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    scored: tuple[TokenLogprob, ...] = ()
    scored_from: int = 0
    scores: tuple[float, ...] = ()
    pooled: Pooled | None = None
