"""What happens to an engine that no message of a worker says: calls of clients, workers that come and go, time."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.messages.client_calls import Submission
from distkv_dask.messages.from_worker import FromWorker
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler.ledger.accounts import NO_LIMIT


@dataclass(frozen=True, slots=True)
class Submit:
    """Clients ask. All are in the queue before one is admitted: the policy says who is first, not their order here.

    Those that are not taken are answered by the command Refuse: a request larger than the pools of all workers together
    ever were, or one whose document was released. (If workers are missing just now, a request waits for them, but not
    forever.)
    """

    submissions: tuple[Submission, ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """A client ends a request: cancelled, or at a stop string. Nothing happens if it has ended already."""

    sequence: int
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class StopAll:
    """The engine closes: every request ends, and no other is admitted."""


@dataclass(frozen=True, slots=True)
class WorkerReady:
    """A worker has a pool of ``capacity`` blocks and, if it ``can_decode``, the model.

    Then it can be home of ``places`` sequences. It has ``spill_bytes`` bytes of disk, and before that ``host_bytes`` of
    host memory, for blocks that make room.
    """

    endpoint: Endpoint
    capacity: int
    can_decode: bool = True
    spill_bytes: int = 0
    host_bytes: int = 0
    places: int = NO_LIMIT


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died or left: what lay on it is recomputed, and all requests go on from their last commit."""

    worker: str


@dataclass(frozen=True, slots=True)
class Drain:
    """A worker is about to leave: its blocks move away, and nothing is placed on it (or it stays after all)."""

    worker: str
    leaving: bool


@dataclass(frozen=True, slots=True)
class Pause:
    """Dask has paused these workers for their memory, and no others: it starts nothing on them."""

    workers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Tick:
    """About a second has passed: what waits for something that does not come is ended."""


Event = FromWorker | Submit | Stop | StopAll | WorkerReady | WorkerLost | Drain | Pause | Tick
