"""Commands of a state machine to the gManager: messages to workers, step graphs for Dask, events for clients."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk
from distkv_dask.messages.client_calls import Delivery
from distkv_dask.messages.to_worker import ToWorker
from distkv_dask.placement import Endpoint


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """Run these chunks of one prompt as a graph, each after the previous one."""

    chunks: tuple[PrefillChunk, ...]


@dataclass(frozen=True, slots=True)
class SubmitWindow:
    """Run a decode window after the home's previous window (``after``), if that is still running.

    It is not needed for another ``patience`` seconds.
    """

    window: DecodeWindow
    after: Gang | None
    patience: float = 0.0


@dataclass(frozen=True, slots=True)
class AddHolders:
    """Add holders to a window that is already queued."""

    gang: Gang
    holders: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class ForgetTasks:
    """Let Dask forget the tasks of a gang: each when it is done (``finished``), or cancel them at once."""

    gang: Gang
    finished: bool


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a client, in reply to its call, that a request is refused."""

    sequence: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Note:
    """Record an event for users: its ``kind`` and a text."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Count:
    """Add to a total of the engine."""

    total: str
    more: int


Command = ToWorker | SubmitPrefill | SubmitWindow | AddHolders | ForgetTasks | Refuse | Note | Count | Delivery
