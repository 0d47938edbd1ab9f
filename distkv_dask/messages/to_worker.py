"""GManager to rManager, on Dask's ordered stream: work for one engine.

The state machine makes these as commands, and they are sent as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.gang import SequenceState
from distkv_dask.geometry import Geometry
from distkv_dask.messages.names import EngineSpec, Saved, SpilledFile, Transfer
from distkv_dask.placement import Endpoint, Placement, Stage


@dataclass(frozen=True, slots=True)
class ToWorker:
    """A message to a worker, named by its Dask address."""

    worker: str


@dataclass(frozen=True, slots=True)
class Open(ToWorker):
    """Open an engine (the worker answers Opened or OpenFailed); a memory worker is told the model's ``geometry``.

    If the model's layers are on several workers, each is told its ``stage``.
    """

    spec: EngineSpec
    geometry: Geometry | None = None
    stage: Stage | None = None


@dataclass(frozen=True, slots=True)
class Close(ToWorker):
    """Free everything that the engine has here (the worker answers Closed)."""


@dataclass(frozen=True, slots=True)
class Reserve(ToWorker):
    """Allocate room for tokens ``[start, stop)`` of a sequence in the worker's pool."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Share(ToWorker):
    """Share the blocks of ``source``'s tokens ``[start, stop)`` with a sequence: the last sharer frees them."""

    source: int
    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Begin(ToWorker):
    """Let a sequence begin with its home's snapshot of another one, ``source``, after ``length`` tokens."""

    sequence: int
    source: int
    length: int


@dataclass(frozen=True, slots=True)
class Keep(ToWorker):
    """Keep only a sequence's snapshots after ``lengths`` tokens; if it has ``ended``, nothing else of it."""

    sequence: int
    lengths: tuple[int, ...]
    ended: bool


@dataclass(frozen=True, slots=True)
class Retire(ToWorker):
    """Start no new work on a sequence, and report when no work is running (the worker answers Retired)."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Release(ToWorker):
    """Free a sequence's blocks: nothing computes on them any more."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Free(ToWorker):
    """Free the blocks of tokens ``[start, stop)`` of a sequence: no window uses them, and moves must skip them."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Join(ToWorker):
    """Decode a sequence (again) from its committed state, beginning with the home's next window."""

    state: SequenceState
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Reset(ToWorker):
    """Stop decoding all sequences of the home, and refuse windows of an older epoch."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Expect(ToWorker):
    """Allocate room for tokens ``[start, stop)`` of a sequence that a transfer brings (the worker answers Expected).

    A copy has another ``sequence`` here than at its source.
    """

    transfer: Transfer
    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Send(ToWorker):
    """Copy tokens ``[start, stop)`` of a sequence to ``target``, which expects the transfer (answered by Sent).

    ``pace`` is the time of a decode step, in seconds, with which the copying overlaps; 0 means as fast as possible.
    """

    transfer: Transfer
    sequence: int
    start: int
    stop: int
    target: str
    pace: float


@dataclass(frozen=True, slots=True)
class Relocate(ToWorker):
    """Decode a sequence with another placement from the next window on.

    The home answers Relocated when no window uses the old one any more.
    """

    number: int
    sequence: int
    placement: Placement
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Store(ToWorker):
    """Write these token ranges of a sequence to files, for a transfer (the worker answers Stored).

    The home also writes its state and windows after ``home`` tokens; 0 if there are none, or on another worker.
    """

    transfer: Transfer
    sequence: int
    ranges: tuple[tuple[int, int], ...]
    saved: Saved
    home: int = 0


@dataclass(frozen=True, slots=True)
class Fetch(ToWorker):
    """Fill the blocks of these token ranges of a sequence from its files (the worker answers Fetched).

    The home also reads its state and windows after ``home`` tokens; 0 if there are none, or on another worker.
    """

    sequence: int
    ranges: tuple[tuple[int, int], ...]
    saved: Saved
    home: int = 0


@dataclass(frozen=True, slots=True)
class Demote(ToWorker):
    """Move spilled blocks from host memory to the worker's own disk, before any later message."""

    files: tuple[SpilledFile, ...]


@dataclass(frozen=True, slots=True)
class Discard(ToWorker):
    """Delete spilled blocks, after all earlier messages."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Abort(ToWorker):
    """End the worker's part in a gang; without an error if the gang did not need it (``unused``)."""

    gang: int
    reason: str
    unused: bool = False
