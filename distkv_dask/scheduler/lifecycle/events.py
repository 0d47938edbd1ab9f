"""Events of an engine other than messages of workers: calls of clients, joining and leaving workers, time."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.messages.client_calls import Submission
from distkv_dask.messages.from_worker import FromWorker
from distkv_dask.placement import Endpoint
from distkv_dask.sampling import FinishReason
from distkv_dask.scheduler.ledger.accounts import NO_LIMIT


@dataclass(frozen=True, slots=True)
class Submit:
    """Clients submit requests. All are queued before one is admitted, so that the policy decides their order.

    Refused ones are answered by the command Refuse: a request larger than all pools together ever were, or one with a
    released document. (If workers are missing now, a request waits for them for a limited time.)
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

    Then it can be home of ``places`` sequences. For evicted blocks it has ``host_bytes`` bytes of host memory and then
    ``spill_bytes`` bytes of disk.
    """

    endpoint: Endpoint
    capacity: int
    can_decode: bool = True
    spill_bytes: int = 0
    host_bytes: int = 0
    places: int = NO_LIMIT


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker died or left: its blocks are recomputed, and all requests continue from their last commit."""

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
    """About a second has passed: requests that waited too long are ended."""


Event = FromWorker | Submit | Stop | StopAll | WorkerReady | WorkerLost | Drain | Pause | Tick
