"""RManager to gManager, on Dask's ordered stream: what happened on a worker.

The state machine takes these as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from distkv_dask.gang import Chosen, Exchanged, Pooled, WindowResult
from distkv_dask.geometry import Geometry, Measurement
from distkv_dask.logprobs import TokenLogprob
from distkv_dask.messages.names import SavedFile, Transfer
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import FinishReason


@dataclass(frozen=True, slots=True)
class FromWorker:
    """A message of a worker, named by its Dask address."""

    worker: str


# The worker, and engines on it


@dataclass(frozen=True, slots=True)
class Opened(FromWorker):
    """An engine is open on the worker.

    ``role`` is "memory" for a worker that only holds KV, "stage" for one that computes further layers; sizes are in
    blocks and bytes. It can be home of at most ``places`` sequences. ``device`` is what it computes on, with a note if
    there is one; ``fingerprint`` identifies the loaded weights; ``measured`` is the worker's speed, if it was timed;
    ``kernels`` says which attention kernels are used, and why; ``weights`` where the weights are; ``adapters`` is its
    latest report about them.
    """

    endpoint: Endpoint
    role: Literal["instance", "memory", "stage"]
    channels: str
    device: str
    capacity_blocks: int
    block_bytes: int
    spill_bytes: int
    host_bytes: int
    places: int
    geometry: Geometry
    fingerprint: str
    measured: Measurement | None
    kernels: str
    weights: str
    adapters: AdaptersKept | None = None


@dataclass(frozen=True, slots=True)
class OpenFailed(FromWorker):
    """An engine cannot be opened on the worker."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Closed(FromWorker):
    """The worker freed everything that an engine had there."""


@dataclass(frozen=True, slots=True)
class Lost(FromWorker):
    """The worker is alive, but lost everything that it had of an engine."""

    reason: str


@dataclass(frozen=True, slots=True)
class AdaptersKept(FromWorker):
    """The folders of the adapters that the worker has in memory now, and the bytes of all of them."""

    paths: tuple[str, ...]
    nbytes: int


# Gangs


@dataclass(frozen=True, slots=True)
class ChunkStarted(FromWorker):
    """The worker began the chunk of a gang."""

    gang: int


@dataclass(frozen=True, slots=True)
class ChunkDone(FromWorker):
    """A chunk without a draw after it is computed; ``scored`` has its targets, ``pooled`` its hidden states.

    If it ``joined``, it was computed in the gang of another chunk, so its own gang did not need its holders.
    """

    sequence: int
    gang: int
    exchanged: Exchanged
    scored: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    joined: bool = False
    pooled: Pooled | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Prefilled(FromWorker):
    """A prompt's last chunk is computed, and its first token drawn.

    ``reason`` is set if the answer ended with the token; with "stop" the token is not part of it. ``logprob`` is the
    token's, if wanted; ``scored`` has the targets of the chunk. With ``chosen``, the answer is a choice, and ends.
    ``joined`` as in :class:`ChunkDone`.
    """

    sequence: int
    gang: int
    token: int = field(repr=False)
    reason: FinishReason | None
    exchanged: Exchanged
    logprob: TokenLogprob | None = field(default=None, repr=False)
    scored: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    chosen: Chosen | None = field(default=None, repr=False)
    joined: bool = False


@dataclass(frozen=True, slots=True)
class WindowStarted(FromWorker):
    """A home began its window number ``window``."""

    window: int


@dataclass(frozen=True, slots=True)
class WindowDone(FromWorker):
    """A home finished a window of an ``epoch``; of its holders, the workers ``used`` took part."""

    window: int
    epoch: int
    result: WindowResult
    used: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GangFailed(FromWorker):
    """A member of a gang failed."""

    gang: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Retired(FromWorker):
    """The worker no longer computes on a sequence."""

    sequence: int


# Moves and files


@dataclass(frozen=True, slots=True)
class Expected(FromWorker):
    """The target of a move or copy allocated its blocks, or has a ``refusal``."""

    transfer: Transfer
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Sent(FromWorker):
    """The source of a move or copy sent all blocks, or had a ``failure``."""

    transfer: Transfer
    failure: str = ""


@dataclass(frozen=True, slots=True)
class Relocated(FromWorker):
    """No window of the home uses a moved sequence's old placement any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Stored(FromWorker):
    """The worker wrote its part of a transfer into files, or could not."""

    transfer: Transfer
    files: tuple[SavedFile, ...] = ()
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Fetched(FromWorker):
    """The worker read its part of a sequence from files, or could not."""

    sequence: int
    error: Exception | None = None
