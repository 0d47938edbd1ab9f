"""What the pure side of the scheduler asks the gManager to do: events go into the lifecycle, commands come out."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.protocol import Delivery, Saved
from distkv_dask.types import DecodeWindow, Endpoint, Gang, Placement, PrefillChunk, SequenceState


@dataclass(frozen=True, slots=True)
class Reserve:
    """Allocate room for tokens ``[start, stop)`` of a sequence in a worker's pool."""

    worker: str
    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Begin no more work on a sequence, and say when none is under way (the worker answers RETIRED)."""

    worker: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Release:
    """Free a sequence's blocks: nothing computes on them any more."""

    worker: str
    sequence: int


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """Run these chunks of one prompt as a graph, each after the one before."""

    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True, slots=True)
class SubmitWindow:
    """Run a decode window after the home's window before (``after``), if one is under way.

    It is not needed for another ``patience`` seconds.
    """

    window: DecodeWindow
    after: Gang | None
    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class AddHolders:
    """Let more holders attend a window that is queued already."""

    gang: Gang
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Join:
    """Hand a sequence to its home (again), from the committed state on; it takes part from the next window."""

    home: str
    state: SequenceState
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Reset:
    """Forget all sequences of a home and refuse windows of an older epoch."""

    home: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Expect:
    """Allocate room for tokens ``[start, stop)`` of a sequence that a move brings (the worker answers EXPECTED)."""

    worker: str
    number: int
    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Send:
    """Copy tokens ``[start, stop)`` of a sequence to ``target``, which expects move ``number`` (answered by SENT).

    ``pace`` is the time of a decode step that the copying hides under, in seconds; 0 is as fast as can be.
    """

    worker: str
    number: int
    sequence: int
    start: int
    stop: int
    target: str
    pace: float


@dataclass(frozen=True, slots=True)
class Relocate:
    """Decode a sequence with another placement from the next window on.

    The home answers RELOCATED when no window uses the old one any more.
    """

    home: str
    number: int
    sequence: int
    placement: Placement
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Free the blocks of tokens ``[start, stop)`` of a sequence, which take part in no window; move none of them."""

    worker: str
    sequence: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Store:
    """Save these token ranges of a sequence, for request ``number`` (the worker answers STORED)."""

    worker: str
    number: int
    sequence: int
    ranges: tuple[tuple[int, int], ...]
    saved: Saved


@dataclass(frozen=True, slots=True)
class Fetch:
    """Fill the blocks of these token ranges of a sequence from where it is saved (the worker answers FETCHED)."""

    worker: str
    sequence: int
    ranges: tuple[tuple[int, int], ...]
    saved: Saved


@dataclass(frozen=True, slots=True)
class Discard:
    """Delete files of spilled blocks, once what was asked for before is done with them."""

    worker: str
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """End a worker's part in a gang; without an error where the gang went on without needing it (``unused``)."""

    worker: str
    gang: int
    reason: str
    unused: bool = False


@dataclass(frozen=True, slots=True)
class Forget:
    """Let Dask forget the tasks of a gang: each once it is done (``finished``), or at once, cancelling them."""

    gang: Gang
    finished: bool


Command = (
    Reserve
    | Retire
    | Release
    | SubmitPrefill
    | SubmitWindow
    | AddHolders
    | Join
    | Reset
    | Expect
    | Send
    | Relocate
    | Free
    | Store
    | Fetch
    | Discard
    | Abort
    | Forget
    | Delivery
)
