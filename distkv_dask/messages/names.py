"""Names that both ends of a connection use, and the records that messages are made of.

Carriers: *rpc* is Dask's request and reply, *stream* Dask's ordered stream between scheduler and worker. Bytes of
queries and partials do not appear here: they travel on channels (:mod:`distkv_dask.worker.channels`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

from distributed.protocol.serialize import ToPickle

if TYPE_CHECKING:
    from distkv_dask.config import Config

PLUGIN = "distkv"
"""Name under which the gManager (scheduler plugin) and the rManagers (worker plugins) are registered."""

MEMORY_RESOURCE = "distkv-memory"
"""Dask resource of workers that only hold KV and load no model (``dask worker --resources "distkv-memory=1"``)."""

KV_MEMORY_RESOURCE = "distkv-kv-memory"
"""Dask resource: bytes of KV memory of this worker, instead of ``distkv.kv-memory``."""

PAUSE_FRACTION = 0.8
"""Dask pauses a worker whose process is above this part of its memory limit (``distributed.worker.memory.pause``)."""

TO_WORKER = "distkv-to-worker"
"""Stream operation of all messages from the gManager to rManagers (:mod:`~distkv_dask.messages.to_worker`)."""

FROM_WORKER = "distkv-from-worker"
"""Stream operation of all messages from rManagers to the gManager (:mod:`~distkv_dask.messages.from_worker`)."""

HANDLE_NUMBERS = 10**9
"""Requests and documents of handle ``h`` of an engine are numbered from ``h * HANDLE_NUMBERS``; the owner's is 0."""

COMMON_NUMBERS = 2**52
"""Numbers of beginnings that requests share while the first of them runs start here: no handle reaches it."""

OWN_DISK = ""
"""The place of spilled blocks: each worker's own folder."""

HOST_MEMORY = "host memory"
"""Where a worker with a card first puts spilled blocks; they are read as if they were on its disk."""

TAKE_TRACE = "distkv_take_trace"
"""The gManager's call of a worker (rpc) for spans by lane that an engine's lanes recorded since the last call."""

TIME_LINK = "distkv_time_link"
"""The gManager's call of a worker (rpc) to measure the link with another one: LinkTimes, or why there are none."""


def pack(value: Any) -> Any:
    """Wrap a value of ours for Dask's comms, which pickle it where it leaves the process."""
    return ToPickle(value)


def unpack(value: Any) -> Any:
    """What was packed: Dask unwraps it on arrival, but not where both ends share a process (``inproc://``)."""
    return value.data if isinstance(value, ToPickle) else value


class ToPeer(StrEnum):
    """RManager to rManager, rpc."""

    BLOCKS = "distkv_blocks"
    SPILLED = "distkv_spilled"


class Transfer(NamedTuple):
    """A transfer of blocks from worker to worker, or into files: what it is for, and its number.

    A "move" brings blocks to another worker, and a "state" is what their home has besides them; a "copy" is of cached
    blocks that may soon be evicted, and a "spill" is of a sequence that makes room; a "save" is of a document, and has
    the number of its request.
    """

    kind: Literal["move", "state", "copy", "spill", "save"]
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


class Piece(NamedTuple):
    """A piece of a transfer: bytes of its block number ``block`` from ``offset`` on; ``last`` ends the transfer."""

    transfer: Transfer
    block: int
    offset: int
    last: bool


class Span(NamedTuple):
    """An activity of a lane, from ``began`` to ``ended`` in nanoseconds since 1970.

    Numbers are -1 if there is none. ``peer`` is the worker at the other end, ``size`` the bytes sent or received, or
    tokens or sequences computed.
    """

    name: str
    began: int
    ended: int
    gang: int
    step: int
    layer: int
    peer: str
    size: int


class Spans(NamedTuple):
    """Spans of one lane in the order of their ends, and how many earlier ones were lost for lack of room."""

    spans: list[Span]
    lost: int


class DaskSpan(TypedDict):
    """The annotation that ``distributed.span`` makes: names and ids of a span and of those around it."""

    name: tuple[str, ...]
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an rManager needs to open an engine; every worker resolves the name ``model`` by itself.

    ``token`` is the random secret that workers show each other when a channel is opened; it travels on Dask's own
    (TLS-able) comm only.
    """

    engine: str
    model: str
    dtype: str
    token: str
    config: Config
    rope_scaling: Mapping[str, Any] | None = None
    span: DaskSpan | None = None


class SavedFile(NamedTuple):
    """A file with the blocks of tokens ``[start, stop)`` of a sequence.

    ``bytes`` is its size, ``checksum`` the CRC-32 of its blocks' CRC-32. Untrusted documents consist of these, so it
    contains nothing that a worker would call or run.
    """

    name: str
    start: int
    stop: int
    bytes: int
    checksum: int


class SpilledFile(NamedTuple):
    """A :class:`SavedFile` on the own disk of ``worker``, or in its host memory until it is moved there.

    Only the gManager makes these, from that worker's reports.
    """

    name: str
    start: int
    stop: int
    bytes: int
    checksum: int
    worker: str


POOL = "blocks-in-pool-"
"""Start of the name of blocks in a pool that are read as if they were in a file."""


def pool_file(sequence: int, start: int, stop: int, worker: str) -> SpilledFile:
    """Blocks of a sequence in a worker's pool, to be read like those of a file.

    Examples
    --------
    >>> sequence_in_pool(pool_file(-7, 0, 64, "tcp://10.0.0.1:4000").name)
    -7
    """
    return SpilledFile(f"{POOL}{sequence}", start, stop, 0, 0, worker)


def sequence_in_pool(name: str) -> int | None:
    """The sequence of these blocks; None if they are in a file."""
    return int(name.removeprefix(POOL)) if name.startswith(POOL) else None


class Saved(NamedTuple):
    """Where the blocks of a sequence are saved: a folder that all workers reach, and the files in it.

    ``place`` is :data:`OWN_DISK` for files that each worker has on its own disk.
    """

    place: str
    files: tuple[SavedFile, ...] | tuple[SpilledFile, ...] = ()
    tag: str = ""
    """Part of the names of files that are to be written."""
