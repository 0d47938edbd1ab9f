"""Client to gManager and back, on Dask's rpc: the calls, and what requests and their news look like."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from distkv_dask.completion import Timings
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


class Attached(NamedTuple):
    """A new handle on an open engine: what its owner asked for (without the token), and what its workers said."""

    spec: EngineSpec
    facts: Mapping[str, Any]
    handle: int


class Submission(NamedTuple):
    """A request as it travels to the gManager.

    ``streamed`` when somebody reads along; ``document`` is the number of the document that it begins with, if any. With
    ``keeps`` it becomes a document once it is answered, and without ``sampling`` it is one, whose blocks are read from
    ``saved`` if that is given. Without either, the blocks of ``document`` are saved there. ``name`` is a document's;
    ``choices`` are the tokens of those that the request is answered with one of.
    """

    number: int
    prompt: array[int]
    sampling: SamplingParams | None
    streamed: bool = False
    document: int | None = None
    keeps: bool = False
    saved: Saved | None = None
    name: str = ""
    choices: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Delivery:
    """New tokens of a request, and its end when ``reason`` is set.

    ``generated`` counts the tokens of an answer that ended; it is None for documents and saves. ``logprobs`` are those
    of the tokens, where they are wanted; ``scored`` those of the prompt's tokens from position ``scored_from`` on: they
    come again if the prompt is computed again. ``scores`` are the probabilities of the request's choices.
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
