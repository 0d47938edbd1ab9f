"""Shortages: how often in a row a worker's card had too little memory for what it was to compute. Pure."""

from __future__ import annotations

from distkv_dask.errors import DeviceMemoryError
from distkv_dask.messages.from_worker import ChunkDone, FromWorker, GangFailed, Prefilled, WindowDone

MOST = 3
"""Failures after which engines are opened again, with the KV memory that fits then: something else has taken some."""


class Shortages:
    """Counts them by what the worker tells the gManager."""

    def __init__(self) -> None:
        self._count = 0

    def are_too_many(self, message: FromWorker) -> bool:
        """Whether this failure is one too many; another chunk or window that is computed makes up for all before it."""
        match message:
            case GangFailed(error=DeviceMemoryError()):
                self._count += 1
            case ChunkDone() | Prefilled() | WindowDone():
                self._count = 0
        if self._count < MOST:
            return False
        self._count = 0
        return True
