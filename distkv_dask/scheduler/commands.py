"""What a state machine asks the gManager to do: messages to workers, step graphs for Dask, news for clients."""

from __future__ import annotations

from dataclasses import dataclass

from distkv_dask.gang import DecodeWindow, Gang, PrefillChunk
from distkv_dask.messages.client_calls import Delivery
from distkv_dask.messages.to_worker import ToWorker
from distkv_dask.placement import Endpoint


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
class ForgetTasks:
    """Let Dask forget the tasks of a gang: each once it is done (``finished``), or at once, cancelling them."""

    gang: Gang
    finished: bool


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a client, in answer to its call, that a request is not taken."""

    sequence: int
    error: Exception


@dataclass(frozen=True, slots=True)
class Note:
    """Show people something that happened: a ``kind`` of event, and what it was."""

    kind: str
    text: str


Command = ToWorker | SubmitPrefill | SubmitWindow | AddHolders | ForgetTasks | Refuse | Note | Delivery
