"""Counts successive failures of a worker's card for lack of memory. Pure."""

from __future__ import annotations

from distkv_dask.errors import DeviceMemoryError
from distkv_dask.messages.from_worker import ChunkDone, FromWorker, GangFailed, Prefilled, WindowDone

MOST = 3
"""Failures after which engines are reopened, with the KV memory that fits then: others use the card, too."""


class Shortages:
    """Counts failures from the worker's messages to the gManager."""

    def __init__(self) -> None:
        self._count = 0

    def are_too_many(self, message: FromWorker) -> bool:
        """Whether a message is the last allowed failure in a row; a finished chunk or window resets the count."""
        match message:
            case GangFailed(error=DeviceMemoryError()):
                self._count += 1
            case ChunkDone() | Prefilled() | WindowDone():
                self._count = 0
        if self._count < MOST:
            return False
        self._count = 0
        return True
